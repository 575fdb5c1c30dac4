"""LoRA targets: which linear layers get LoRA with which rank, and the table of what is trained.

This file decides which rows of the parameter table get LoRA, and with which rank and alpha. It
builds the coverage table from the loaded modules, not from the plan, so the 4-bit share is the
share that is really stored in 4 bits.

Codes: ``QC-LORA-001`` not a LoRA group of this model or run, ``-002`` a group has no linear layer,
``-003`` dropout or DoRA on weights for which PEFT has none, ``-005`` a pattern matches no weight
with LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..api.parameters import Aim, Kind, Table
from ..checkpoint.layout import Layout
from ..config.settings import Settings
from ..errors import UsageError, nearest
from ..nn.model import Model
from ..nn.qlora.lora_layer import Lora
from .number_patterns import NumberPatterns
from .peft_names import target_name
from .written_config import choose_class


def lora_targets(layout: Layout, settings: Settings, classes: Sequence[str]) -> dict[str, Lora]:
    """Choose the weights that get LoRA in a run, and the numbers of each.

    Args:
        layout: the base.
        settings: the settings of the run.
        classes: ``architectures`` of config.json; the class decides the names that patterns match.

    Returns:
        The LoRA settings of each weight, by canonical name.

    Raises:
        UsageError: ``QC-LORA-*``.
        InputError: ``QC-ADAPTER-004`` a pattern takes too long to match.
    """
    lora = Lora(
        r=settings.r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora, use_dora=settings.use_dora,
    )  # fmt: skip
    chosen = targets(
        layout,
        settings.target_groups,
        lora,
        group_r={name: int(r) for name, r in settings.group_r.items()},
        group_lora_alpha={name: float(x) for name, x in settings.group_lora_alpha.items()},
    )
    return _by_pattern(chosen, layout, settings, classes)


def _by_pattern(
    chosen: dict[str, Lora], layout: Layout, settings: Settings, classes: Sequence[str]
) -> dict[str, Lora]:
    """Apply ``rank_pattern`` and ``alpha_pattern``, which PEFT matches with module names."""
    patterns = {
        "rank_pattern": dict(settings.rank_pattern),
        "alpha_pattern": dict(settings.alpha_pattern),
    }
    if not any(patterns.values()):
        return chosen
    touched = {layout.table[name].part.name for name in chosen}
    namespace = choose_class(layout, touched, classes, settings.adapter_class)
    modules = {name: target_name(layout.table[name], namespace) for name in chosen}
    numbers = NumberPatterns(None, patterns, list(modules.values()))
    for field, key in numbers.unmatched:
        example = next(iter(modules.values()), "")
        raise UsageError(
            "QC-LORA-005",
            "matches no weight that gets LoRA",
            field=f"{field}.{key}",
            expected=f"the end of a name such as {example}",
            fix="leave the key out, or add the group of the weight to target_groups",
        )
    return {
        name: replace(
            lora,
            r=int(numbers.value("rank_pattern", modules[name], lora.r)),
            lora_alpha=numbers.value("alpha_pattern", modules[name], lora.lora_alpha),
        )
        for name, lora in chosen.items()
    }


def targets(
    layout: Layout,
    asked: Sequence[str],
    lora: Lora,
    *,
    group_r: Mapping[str, int] | None = None,
    group_lora_alpha: Mapping[str, float] | None = None,
) -> dict[str, Lora]:
    """Choose the weights that get LoRA, and the rank, alpha and dropout of each.

    Args:
        layout: the base.
        asked: the requested LoRA groups; empty for the groups that are on by default.
        lora: rank, alpha and dropout of weights whose group has no values of its own.
        group_r: rank by group; for experts, the rank of each expert.
        group_lora_alpha: alpha by group.

    Returns:
        The LoRA settings of each weight, by canonical name.

    Raises:
        UsageError: ``QC-LORA-001`` the model does not have the group or never trains it, or
            `group_r` or `group_lora_alpha` names a group that is not trained; ``-002`` the group
            has no linear layer in this model; ``-003`` dropout or DoRA is set for weights on which
            PEFT does not support it.
    """
    table = layout.table
    allowed = check_groups(layout, asked)
    groups = set(asked) or {name for name, aim in table.groups.items() if aim is Aim.ON}
    ranks, alphas = group_r or {}, group_lora_alpha or {}
    chosen = {
        entry.name: replace(
            lora,
            r=ranks.get(entry.row.group, lora.r),
            lora_alpha=alphas.get(entry.row.group, lora.lora_alpha),
        )
        for entry in (item.tensor for item in layout.located.values())
        if entry.row.kind is not None and entry.row.group in groups and layout.loads(entry.part)
    }
    hit = {table[weight].row.group for weight in chosen}
    trained = [name for name in allowed if name in hit]
    _check_names("group_r", ranks, trained)
    _check_names("group_lora_alpha", alphas, trained)
    for name in sorted((groups if not chosen else {*asked}) - hit):
        raise UsageError(
            "QC-LORA-002",
            "has no linear layer in this model",
            field="target_groups",
            found=name,
            fix="leave the group out",
        )
    _check_parameters(chosen, table)
    return chosen


def check_groups(layout: Layout, asked: Iterable[str]) -> list[str]:
    """Return the LoRA groups that may be trained.

    Args:
        layout: the base.
        asked: the requested LoRA groups.

    Raises:
        UsageError: ``QC-LORA-001`` the model does not have the group or never trains it.
    """
    allowed = [name for name, aim in layout.table.groups.items() if aim is not Aim.NEVER]
    _check_names("target_groups", asked, allowed, owned_by_none=sorted(layout.carried_roots()))
    return allowed


def _check_names(
    field: str, names: Iterable[str], allowed: Sequence[str], owned_by_none: Sequence[str] = ()
) -> None:
    more = f", or install the plugin that owns {' and '.join(owned_by_none)}"
    for name in names:
        if name not in allowed:
            words = "is not a LoRA group of this model"
            near = nearest(name.lower(), allowed)
            hint = f"did you mean {near}? Otherwise " if near else ""
            raise UsageError(
                "QC-LORA-001",
                words if field == "target_groups" else "is not a LoRA group of this run",
                field=field,
                found=name,
                expected=", ".join(allowed),
                fix=f"{hint}name groups among {', '.join(allowed)}{more if owned_by_none else ''}",
            )


def _check_parameters(chosen: Mapping[str, Lora], table: Table) -> None:
    """Refuse dropout and DoRA if any target is a parameter: PEFT refuses the whole adapter."""
    for name, lora in chosen.items():
        if table[name].row.kind is Kind.LINEAR:
            continue
        group = table[name].row.group
        for field, found, what, off in (
            ("lora_dropout", lora.lora_dropout, "dropout", 0),
            ("use_dora", "true" if lora.use_dora else "", "DoRA", "false"),
        ):
            if found:
                raise UsageError(
                    "QC-LORA-003",
                    f"is not supported with LoRA on '{group}': PEFT has no {what} there",
                    field=field,
                    found=found,
                    expected=off,
                    fix=f"set {field}={off}, or leave '{group}' out of target_groups",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """One line of the coverage table: a group, its LoRA and its storage.

    Attributes:
        group: name of the group.
        modules: number of tensors of the base.
        hit: number of tensors that have LoRA.
        parameters: parameters of the base.
        trained: parameters of the adapters.
        four_bit: parameters of the base that are stored in 4 bits.
        bits: bits per parameter of the base, scales included.
    """

    group: str
    modules: int
    hit: int
    parameters: int
    trained: int
    four_bit: int
    bits: float


def coverage(model: Model, layout: Layout) -> list[Coverage]:
    """Return the coverage table, one line per group, in the order of the parameter table.

    Args:
        model: the loaded model.
        layout: the layout that it was loaded from.
    """
    entries = [
        item.tensor
        for item in layout.located.values()
        if layout.loads(item.tensor.part)
        and item.tied is None
        and item.tensor.name not in layout.ties
    ]
    lines, rows = [], _trained_rows(model)
    for group in dict.fromkeys(entry.row.group for entry in entries):
        of_group = [entry for entry in entries if entry.row.group == group]
        layers = {entry.name: model.lora_layers.get(entry.name) for entry in of_group}
        with_lora = [m for m in layers.values() if m is not None and m.lora is not None]
        numel = sum(entry.numel for entry in of_group)
        stored = sum(
            layer.stored_bytes if layer is not None else model.get_parameter(name).nbytes
            for name, layer in layers.items()
        )
        lines.append(
            Coverage(
                group=group,
                modules=len(of_group),
                hit=len(with_lora),
                parameters=numel,
                trained=sum(p.numel() for m in with_lora for p in m.factors)
                + sum(rows.get(name, 0) for name in layers),
                four_bit=sum(
                    entry.numel
                    for entry in of_group
                    for layer in [layers[entry.name]]
                    if layer is not None and layer.four_bit
                ),
                bits=8 * stored / numel,
            )
        )
    return lines


def _trained_rows(model: Model) -> dict[str, int]:
    """Parameters of trained rows, by canonical name of the embedding or the head."""
    trained = model.trained_rows
    if trained is None:
        return {}
    parts = ((model.embed_name, trained.embed), (model.head_name, trained.head))
    return {name: part.trainable_tokens_delta.numel() for name, part in parts if part is not None}
