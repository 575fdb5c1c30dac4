"""What the changes of an adapter do to a head that is tied to the embedding.

This file decides whether base + adapter still has one weight for both. PEFT trains the two apart,
except for ``trainable_token_indices``, which it gives to both, for copies that ``modules_to_save``
does not name, which it loads into the one weight, and with ``ensure_weight_tying``, under which
both have the same matrices or values. Where the two differ, the model is untied: the
head is written as a tensor of its own. PEFT's ``merge_and_unload`` adds both changes to the one
weight, which is not what the adapter computes. It imports no torch.

Several adapters: if one of them unties the model, the head gets the changes of the others as a
tensor of its own.

Code: ``QC-ADAPTER-005`` the two changes contradict each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..api.parameters import Tensor as TableTensor
from ..checkpoint.layout import Layout
from .changes import Change, Pair, Replacement
from .findings import Findings
from .peft_names import Adapter

#: Whether two changes have the same effect on weights with the same values.
Same = Callable[[Change, Change], bool]


class Settled(NamedTuple):
    """The changes of an adapter, where embedding and head are one weight or two.

    Attributes:
        changes: by canonical name; a head that stays tied has none.
        untied: whether the head gets values of its own.
    """

    changes: Mapping[str, Change]
    untied: bool = False


def settle_tie(
    changes: Mapping[str, Change], layout: Layout, same: Same | None, findings: Findings
) -> Settled:
    """Decide what the changes of an adapter do to a tied head.

    Args:
        changes: what the adapter changes, by canonical name.
        layout: the base.
        same: compares two changes; ``None``: they are taken to differ.
        findings: receives the error.
    """
    head = next((t for t in layout.table if t.row.group == "head" and t.row.tie), None)
    if head is None or head.row.tie is None:
        return Settled(changes)
    mine, embedding = changes.get(head.name), changes.get(head.row.tie)
    if mine is None and embedding is None:
        return Settled(changes)
    own = _shared(mine)
    if embedding is None and own is not None:
        embedding = replace(own, tensor=layout.table[head.row.tie])
        changes = {**changes, head.row.tie: embedding}
        if mine is own:
            return Settled({name: c for name, c in changes.items() if name != head.name})
    shared = _shared(embedding)
    if shared is not None and (mine is None or isinstance(mine, Pair)):
        if mine is None and isinstance(embedding, Replacement):
            return Settled(changes)
        mine = _with_shared(head, mine, shared)
    elif shared is not None and isinstance(mine, Replacement) and mine.rows is None:
        if same is not None and embedding is not None and same(embedding, mine):
            return Settled({name: c for name, c in changes.items() if name != head.name})
        findings.problem(
            "QC-ADAPTER-005",
            "is a saved copy of a tied head, and the embedding gets other values",
            mine.values.name,
            fix="train again with one of the two",
        )
        return Settled(changes)
    if mine is not None and embedding is not None and same is not None and same(embedding, mine):
        return Settled({name: c for name, c in changes.items() if name != head.name})
    return Settled({**changes, **({} if mine is None else {head.name: mine})}, untied=True)


def untied_together(adapters: Sequence[Adapter], layout: Layout) -> list[Adapter]:
    """Return the adapters of a sum, all untied if one is.

    Args:
        adapters: adapters that were read for the base.
        layout: the base.
    """
    head = next((t for t in layout.table if t.row.group == "head" and t.row.tie), None)
    if head is None or head.row.tie is None or not any(own.untied for own in adapters):
        return [*adapters]
    together = []
    for own in adapters:
        change = None if own.untied else own.changes.get(head.row.tie)
        if change is not None:
            own = replace(own, changes={**own.changes, head.name: _moved(change, head)})
        together.append(replace(own, untied=True))
    return together


def _moved(change: Change, tensor: TableTensor) -> Change:
    """Return the change of another weight with the same values."""
    if isinstance(change, Pair) and change.under is not None:
        return replace(change, tensor=tensor, under=replace(change.under, tensor=tensor))
    return replace(change, tensor=tensor)


def _shared(change: Change | None) -> Replacement | None:
    """Return the values of the embedding that the head gets too."""
    saved = change.under if isinstance(change, Pair) else change
    return saved if saved is not None and saved.shared else None


def _with_shared(head: TableTensor, change: Change | None, shared: Replacement) -> Change:
    """Return the change of a head with the values of the embedding below it."""
    own = replace(shared, tensor=head)
    if not isinstance(change, Pair):
        return own
    return change if change.under is not None else replace(change, under=own)
