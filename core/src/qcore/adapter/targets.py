"""LoRA targets: which linear layers of which groups have LoRA, and the coverage table.

This file decides which rows of the table get an adapter and with which numbers, and reads off
the loaded modules, rather than off the plan, what each group holds: the share that is really
4-bit is counted tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..api.parameters import Aim, Kind, Table
from ..checkpoint.layout import Layout
from ..errors import UsageError
from ..nn.model import Model
from ..nn.qlora.lora_layer import Lora


def targets(
    layout: Layout,
    asked: Sequence[str],
    lora: Lora,
    *,
    group_r: Mapping[str, int] | None = None,
    group_lora_alpha: Mapping[str, float] | None = None,
) -> dict[str, Lora]:
    """Which weights get LoRA, and its numbers: every map of the groups that are on or asked.

    Args:
        layout: the base.
        asked: LoRA groups; empty for those that are on.
        lora: the numbers of a map whose group has none of its own.
        group_r: rank by group; of experts it is each one's.
        group_lora_alpha: alpha by group.

    Raises:
        UsageError: ``QC-LORA-001`` for a group that the model does not have or never trains,
            or that has numbers and is not trained, ``-002`` for one without a map, ``-003``
            for dropout on what PEFT drops no input of.
    """
    table = layout.table
    allowed = [name for name, aim in table.groups.items() if aim is not Aim.NEVER]
    _check_names("target_groups", asked, allowed, owned_by_none=sorted(layout.carried_roots()))
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
            "has no linear map in this model",
            field="target_groups",
            found=name,
            fix="leave the group out",
        )
    _check_dropout(chosen, table)
    return chosen


def _check_names(
    field: str, names: Iterable[str], allowed: Sequence[str], owned_by_none: Sequence[str] = ()
) -> None:
    more = f", or install the plugin that owns {' and '.join(owned_by_none)}"
    for name in names:
        if name not in allowed:
            words = "is not a LoRA group of this model"
            raise UsageError(
                "QC-LORA-001",
                words if field == "target_groups" else "is not a LoRA group of this run",
                field=field,
                found=name,
                expected=", ".join(allowed),
                fix=f"name groups among {', '.join(allowed)}{more if owned_by_none else ''}",
            )


def _check_dropout(chosen: Mapping[str, Lora], table: Table) -> None:
    """PEFT refuses dropout in an adapter that targets parameters, also for its other modules."""
    for name, lora in chosen.items():
        if lora.lora_dropout and table[name].row.kind is not Kind.LINEAR:
            group = table[name].row.group
            raise UsageError(
                "QC-LORA-003",
                f"does not go with LoRA on '{group}', where PEFT knows none",
                field="lora_dropout",
                found=lora.lora_dropout,
                expected=0,
                fix=f"set lora_dropout=0, or leave '{group}' out of target_groups",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """One line of the coverage table: a group, what LoRA hits in it, how it is stored.

    Attributes:
        group: its name.
        modules: tensors of the base.
        hit: how many of them carry LoRA.
        parameters: of the base.
        trained: parameters of the adapters.
        four_bit: parameters of the base that are held in 4 bit.
        bits: a parameter, scales included.
    """

    group: str
    modules: int
    hit: int
    parameters: int
    trained: int
    four_bit: int
    bits: float


def coverage(model: Model, layout: Layout) -> list[Coverage]:
    """What training will touch, a line a group, in the order of the table."""
    entries = [
        item.tensor
        for item in layout.located.values()
        if layout.loads(item.tensor.part)
        and item.tied is None
        and item.tensor.name not in layout.ties
    ]
    lines = []
    for group in dict.fromkeys(entry.row.group for entry in entries):
        mine = [entry for entry in entries if entry.row.group == group]
        held = {entry.name: model.lora_layers.get(entry.name) for entry in mine}
        adapted = [m for m in held.values() if m is not None and m.lora is not None]
        numel = sum(entry.numel for entry in mine)
        stored = sum(
            holder.stored_bytes if holder is not None else model.get_parameter(name).nbytes
            for name, holder in held.items()
        )
        lines.append(
            Coverage(
                group=group,
                modules=len(mine),
                hit=len(adapted),
                parameters=numel,
                trained=sum(
                    p.numel() for m in adapted for p in (m.lora_A, m.lora_B) if p is not None
                ),
                four_bit=sum(
                    entry.numel
                    for entry in mine
                    for holder in [held[entry.name]]
                    if holder is not None and holder.four_bit
                ),
                bits=8 * stored / numel,
            )
        )
    return lines
