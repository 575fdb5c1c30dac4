"""Several adapters of one base, with weights, as one set of changes: ``W + sum_i w_i s_i B_i A_i``.

This file decides what a sum of adapters is. LoRA pairs of one weight become one pair whose pieces
are those of all adapters, so that the sum is exact. A change that is not a product of matrices
(DoRA, saved values) is taken as it is if its adapter has weight 1 and no other adapter changes the
same weight; any other is refused by name. It imports no torch.

Codes: ``QC-ADAPTER-018`` a change that cannot be added or scaled, ``-020`` the adapters were
trained on different bases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Header
from ..errors import InputError
from .changes import Change, Pair, Replacement
from .media_record import joined_media
from .peft_names import Adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighted:
    """An adapter of a sum.

    Attributes:
        adapter: the adapter, as it was read.
        weight: the factor of its changes.
    """

    adapter: Adapter
    weight: float = 1.0


def combined(adapters: Sequence[Weighted]) -> Adapter:
    """Return the sum of adapters as one.

    Args:
        adapters: at least one, all read for the same base.

    Returns:
        The adapter itself if it is the only one with weight 1. Otherwise the tensors of all
        adapters, whose headers have absolute paths, under the path of the first one.

    Raises:
        InputError: ``QC-ADAPTER-018`` a change that cannot be added or scaled, ``-020`` the
            adapters record different bases.
    """
    first = adapters[0].adapter
    if len(adapters) == 1 and adapters[0].weight == 1:
        return first
    changes: dict[str, Change] = {}
    for own in adapters:
        for name, change in own.adapter.changes.items():
            changes[name] = _sum(changes.get(name), change, own)
    meta = _meta([own.adapter for own in adapters])
    if towers := _towers([own.adapter for own in adapters], changes):
        meta["modalities"] = towers
    return replace(
        first,
        changes=changes,
        meta=meta,
        notes=(),
        untied=any(own.adapter.untied for own in adapters),
    )


def _sum(before: Change | None, change: Change, own: Weighted) -> Change:
    """Add the change of an adapter to those of the adapters before it."""
    placed = _placed(change, own.adapter.path)
    if not isinstance(placed, Pair) or not is_product(placed):
        if before is not None or own.weight != 1:
            raise _refused(own, change)
        return placed
    pieces = tuple(replace(piece, scaling=own.weight * piece.scaling) for piece in placed.pieces)
    if before is None:
        return replace(placed, pieces=pieces)
    if not isinstance(before, Pair) or not is_product(before):
        raise _refused(own, before)
    return replace(before, pieces=(*before.pieces, *pieces))


def is_product(pair: Pair) -> bool:
    """Whether a change is a product of matrices alone, so that it can be added and scaled."""
    return not pair.has_magnitude and pair.under is None


def _placed(change: Change, folder: Path) -> Change:
    """Return a change whose headers have the absolute path of their file."""

    def put(header: Header) -> Header:
        return replace(header, file=str((folder / header.file).absolute()))

    if isinstance(change, Replacement):
        below = None if change.under is None else _placed(change.under, folder)
        assert not isinstance(below, Pair)
        return replace(change, values=put(change.values), under=below)
    pieces = tuple(
        replace(
            piece, a=put(piece.a), b=put(piece.b),
            magnitude=None if piece.magnitude is None else put(piece.magnitude),
        )
        for piece in change.pieces
    )  # fmt: skip
    under = None if change.under is None else _placed(change.under, folder)
    assert not isinstance(under, Pair)
    return replace(change, pieces=pieces, under=under)


def _refused(own: Weighted, change: Change) -> InputError:
    kind = "saved values" if isinstance(change, Replacement) else "DoRA"
    if isinstance(change, Pair) and not change.has_magnitude:
        kind = "saved values below LoRA"
    return InputError(
        "QC-ADAPTER-018",
        f"cannot be added to another adapter or scaled: one of the two has {kind} there",
        file=own.adapter.path,
        field=change.tensor.name,
        found=f"weight {own.weight:g}" if own.weight != 1 else "several changes of one weight",
        expected="one change with weight 1",
        fix="merge the adapters one after another, each into the result of the one before",
    )


#: What the manifests of adapters of one base record alike, by name of a part or tensor.
_OF_BASE = ("tensors", "fingerprints")


def _meta(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Return what the manifests of all adapters record of their base and their prompts."""
    meta: dict[str, Any] = {}
    recorded = [adapter for adapter in adapters if adapter.meta]
    for field in _OF_BASE:
        known: dict[str, Any] = {}
        for adapter in recorded:
            own = adapter.meta.get(field)
            for name, value in (own if isinstance(own, dict) else {}).items():
                if known.setdefault(name, value) != value:
                    raise InputError(
                        "QC-ADAPTER-020",
                        "was trained on another base than the adapters before it",
                        file=adapter.path,
                        field=name,
                        found=str(value)[:12],
                        expected=str(known[name])[:12],
                        fix="merge adapters of one base",
                    )
        meta |= {field: known} if known else {}
    configs = [adapter.base_config for adapter in recorded]
    if configs and configs[0] is not None and all(one == configs[0] for one in configs):
        meta |= {"config": configs[0]}
    for adapter in recorded[:1]:
        meta |= {"model": adapter.meta.get("model", {})}
    chats = [adapter.meta.get("chat") for adapter in adapters]
    if chats[0] is not None and all(chat == chats[0] for chat in chats):
        meta |= {"chat": chats[0]}  # of adapters that were trained on other prompts, none applies
    return meta


def _towers(
    adapters: Sequence[Adapter], changes: Mapping[str, Change]
) -> dict[str, dict[str, Any]]:
    """Return the towers that any of the adapters was trained with, and the media of all."""
    seen: dict[str, dict[str, Any]] = {}
    for adapter in adapters:
        for name, record in adapter.modalities.items():
            before = seen.get(name, {})
            changed = bool(record.get("tower_changed") or before.get("tower_changed"))
            seen[name] = {
                **record, **before, **joined_media(before, record), "tower_changed": changed,
                "pairs": sum(change.tensor.part.name == name for change in changes.values()),
            }  # fmt: skip
    return seen
