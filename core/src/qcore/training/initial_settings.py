"""The settings that an initial adapter sets: rank, alpha, LoRA groups, and the class.

This file decides how the pairs of an adapter are expressed in settings (the usual rank and alpha of
each LoRA group, patterns for other weights of the group, groups as a whole), and that an explicit
setting must agree with them. What else is compared with the adapter's training is up to
`qcore.training.initial_adapter`.

Codes: ``QC-TRAIN-009`` the adapter cannot be expressed in settings, ``-011`` a setting contradicts
it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from ..adapter.changes import Pair, Replacement
from ..adapter.peft_names import CONFIG, Adapter, target_name
from ..api.parameters import Aim
from ..checkpoint.checkpoint import read_json
from ..checkpoint.layout import Layout
from ..config.frozen_map import Entries
from ..config.settings import Settings
from ..errors import InputError, UsageError

_V = TypeVar("_V")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Rank and alpha of a LoRA group."""

    r: int
    alpha: float


def adapter_settings(
    adapter: Adapter, layout: Layout, settings: Settings, explicit: Collection[str]
) -> Settings:
    """The settings of a run that starts from an adapter.

    Args:
        adapter: the initial adapter, matched with `layout`.
        layout: the base of the run.
        settings: the settings without the adapter.
        explicit: names of the settings that the user set.

    Raises:
        InputError: ``QC-TRAIN-009`` the adapter covers a part of a LoRA group, or has values that
            settings do not allow.
        UsageError: ``QC-TRAIN-011`` an explicit setting contradicts the adapter.
    """
    dora, rows = _check_fit(adapter)
    rslora = read_json(adapter.path / CONFIG).get("use_rslora") is True
    numbers = _numbers(adapter, layout, rslora=rslora)
    groups = {name: _usual(list(of_group.values())) for name, of_group in numbers.items()}
    by_default = {
        name
        for name, aim in layout.table.groups.items()
        if aim is Aim.ON and _trainable(layout, name)
    }
    r = _usual([group.r for group in groups.values()])
    alphas = [int(group.alpha) for group in groups.values() if group.alpha == int(group.alpha)]
    alpha = _usual(alphas) if alphas else settings.lora_alpha
    try:
        chosen = replace(
            settings,
            r=r,
            lora_alpha=alpha,
            target_groups=() if set(groups) == by_default else tuple(groups),
            group_r=Entries({name: group.r for name, group in groups.items() if group.r != r}),
            group_lora_alpha=Entries(
                {name: float(g.alpha) for name, g in groups.items() if g.alpha != alpha}
            ),
            use_rslora=rslora,
            use_dora=dora,
            trainable_token_indices=rows.get("embed", ()),
            trainable_head_token_indices=rows.get("head", ()),
            rank_pattern=Entries(_pattern(adapter, numbers, groups, lambda own: own.r)),
            alpha_pattern=Entries(_pattern(adapter, numbers, groups, lambda own: own.alpha)),
            adapter_class=_class(adapter, settings, explicit),
        )
    except UsageError as error:
        raise InputError(
            "QC-TRAIN-009",
            f"has a value of {error.field} that training does not support",
            file=adapter.path,
            field=error.field,
            found=error.found,
            expected=error.expected,
            fix="merge the adapter into its base, and train on the merge",
        ) from None
    _check_groups(adapter, settings, explicit, groups, by_default)
    _check_kind(adapter, settings, explicit, chosen)
    _check_numbers(adapter, settings, explicit, groups, chosen)
    return chosen


def _check_fit(adapter: Adapter) -> tuple[bool, Mapping[str, tuple[int, ...]]]:
    """Refuse an adapter with changes that are not trained.

    Returns:
        Whether it has DoRA, and the rows that it replaces, by group (embedding or head).
    """
    dora = {name for name, pair in adapter.pairs.items() if pair.has_magnitude}
    rows = trained_rows(adapter)
    known = dora | {change.tensor.name for change in rows.values()}
    if (unfit := adapter.folded - known) or not adapter.pairs:
        raise _unfit(
            adapter,
            "has changes that training cannot continue" if unfit else "has no LoRA",
            field=min(unfit, default=None),
            found=f"saved values or LoRA at {len(unfit)} heads, embeddings or other weights",
            expected="LoRA or DoRA on linear layers, and rows of embedding and head",
        )
    return bool(dora), {group: change.rows or () for group, change in rows.items()}


def trained_rows(adapter: Adapter) -> dict[str, Replacement]:
    """The rows of the embedding and of the head that an adapter replaces, by group."""
    return {
        change.tensor.row.group: change
        for change in adapter.changes.values()
        if isinstance(change, Replacement)
        and change.tensor.row.group in ("embed", "head")
        and change.rows
    }


def _class(adapter: Adapter, settings: Settings, explicit: Collection[str]) -> str:
    """The class to write for: the adapter's own, unless the user names one."""
    if "adapter_class" in explicit or adapter.layout != "peft":
        return settings.adapter_class
    return adapter.namespace.name


def _numbers(adapter: Adapter, layout: Layout, *, rslora: bool) -> dict[str, dict[str, _Group]]:
    """Rank and alpha of each weight by LoRA group, in the order of the table.

    Raises:
        InputError: ``QC-TRAIN-009``.
    """
    found: dict[str, dict[str, _Group]] = {}
    for name, pair in adapter.pairs.items():
        numbers = _Group(r=pair.r, alpha=_alpha(pair, rslora=rslora))
        found.setdefault(pair.tensor.row.group, {})[name] = numbers
    for group, pairs in found.items():
        if layout.table.groups[group] is Aim.NEVER:
            raise _unfit(adapter, f"has LoRA on '{group}', which qcore does not train")
        whole = _trainable(layout, group)
        if missing := sorted(whole - pairs.keys()):
            raise _unfit(
                adapter,
                f"covers LoRA group '{group}' in part",
                field=missing[0],
                found=f"{len(pairs)} of {len(whole)} weights of the group",
                expected="LoRA on all weights of a group",
            )
    return {name: found[name] for name in layout.table.groups if name in found}


def _pattern(
    adapter: Adapter,
    numbers: Mapping[str, Mapping[str, _Group]],
    groups: Mapping[str, _Group],
    value: Callable[[_Group], _V],
) -> dict[str, _V]:
    """The values that differ from those of the group, by the end of the module's name.

    Args:
        adapter: whose class spells the names; from the layer on, all classes spell them alike.
        numbers: of each weight, by group.
        groups: the usual numbers of each group.
        value: rank or alpha.
    """
    pattern = {}
    for group, of_group in numbers.items():
        for name, own in of_group.items():
            if value(own) != value(groups[group]):
                words = target_name(adapter.pairs[name].tensor, adapter.namespace).split(".")
                first = next((n for n, word in enumerate(words) if word.isdigit()), 1)
                pattern[".".join(words[max(first - 1, 0) :])] = value(own)
    return pattern


def _trainable(layout: Layout, group: str) -> set[str]:
    """Canonical names of the weights of a group that LoRA can be put on."""
    return {
        tensor.name
        for tensor in (item.tensor for item in layout.located.values())
        if tensor.row.group == group
        and tensor.row.kind is not None
        and tensor.part.loaded
        and tensor.part.name not in layout.absent
    }


def _unfit(
    adapter: Adapter,
    what: str,
    *,
    field: str | None = None,
    found: object | None = None,
    expected: object | None = None,
) -> InputError:
    return InputError(
        "QC-TRAIN-009",
        what,
        file=adapter.path,
        field=field,
        found=found,
        expected=expected,
        fix="merge the adapter into its base, and train on the merge",
    )


def _alpha(pair: Pair, *, rslora: bool) -> float:
    """``lora_alpha`` that gives the pair's scaling."""
    divisor = math.sqrt(pair.r) if rslora else pair.r
    alpha = pair.scaling * divisor
    return float(round(alpha)) if round(alpha) / divisor == pair.scaling else alpha


def _usual(values: list[_V]) -> _V:
    """The most frequent value; of several, the first."""
    return Counter(values).most_common(1)[0][0]


def _check_groups(
    adapter: Adapter,
    settings: Settings,
    explicit: Collection[str],
    groups: Collection[str],
    by_default: Collection[str],
) -> None:
    """Compare explicit groups with those of the adapter."""
    wanted = settings.target_groups or sorted(by_default)
    if "target_groups" in explicit and set(wanted) != set(groups):
        shown = ",".join(wanted)
        raise _contradicts(adapter, "target_groups", shown, ",".join(groups))


def _check_kind(
    adapter: Adapter, settings: Settings, explicit: Collection[str], chosen: Settings
) -> None:
    """Compare explicit settings of the kind of LoRA, and patterns, with the adapter's."""
    for key in (
        "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "trainable_token_indices",
        "trainable_head_token_indices",
    ):  # fmt: skip
        if key in explicit and getattr(settings, key) != getattr(chosen, key):
            shown = (str(getattr(each, key)).lower() for each in (settings, chosen))
            raise _contradicts(adapter, key, *shown)


def _check_numbers(
    adapter: Adapter,
    settings: Settings,
    explicit: Collection[str],
    groups: Mapping[str, _Group],
    chosen: Settings,
) -> None:
    """Compare explicit ranks and alphas, for all groups and by group, with the adapter's."""
    ranks = {name: group.r for name, group in groups.items()}
    alphas = {name: group.alpha for name, group in groups.items()}
    of_group: tuple[tuple[str, Mapping[str, float], Mapping[str, float]], ...] = (
        ("group_r", settings.group_r, ranks),
        ("group_lora_alpha", settings.group_lora_alpha, alphas),
    )
    for key, wanted, there in of_group:
        for name, value in wanted.items() if key in explicit else ():
            if there.get(name) != value:
                expected = f"{there[name]:g}" if name in there else "no entry"
                raise _contradicts(adapter, f"{key}.{name}", f"{value:g}", expected)
    of_all: tuple[tuple[str, float, Mapping[str, float], Collection[str]], ...] = (
        ("r", settings.r, ranks, {*settings.group_r, *chosen.group_r}),
        (
            "lora_alpha", settings.lora_alpha, alphas,
            {*settings.group_lora_alpha, *chosen.group_lora_alpha},
        ),
    )  # fmt: skip
    for key, value, there, own in of_all:
        for name, number in there.items() if key in explicit else ():
            if name not in own and number != value:
                raise _contradicts(adapter, key, f"{value:g}", f"{number:g}")


def _contradicts(adapter: Adapter, key: str, found: str, expected: str) -> UsageError:
    return UsageError(
        "QC-TRAIN-011",
        f"contradicts the initial adapter {adapter.path}",
        field=key,
        found=found,
        expected=expected,
        fix=f"leave {key} out: the adapter sets it",
    )
