"""Tensor names of an adapter layout that a plugin claims, translated to PEFT's names.

This file decides that a layout has one claim and that the claim names weights of the base. A plugin
decides which tensors are its layout (`AdapterClaim`); `qcore.adapter.reader` reads the result as it
reads PEFT's.

Code: ``QC-ADAPTER-010`` several plugins claim the layout, or a claim names a weight or tensor that
does not exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..api.adapter_claims import AdapterClaim
from ..api.parameters import Kind
from ..checkpoint.checkpoint import Header
from ..checkpoint.layout import Layout
from ..errors import InputError
from .peft_names import stems, trunk_part
from .piece_names import modules_of


def translated(
    path: Path, headers: Mapping[str, Header], claims: Sequence[AdapterClaim], layout: Layout
) -> dict[str, Header]:
    """Rename the tensors of another layout to PEFT's names, as the only claim maps them.

    Raises:
        InputError: ``QC-ADAPTER-010`` several plugins claim the layout, or the claim names a
            weight, tensor or rows that do not exist.
    """
    names = ", ".join(claim.layout for claim in claims)
    if len(claims) > 1:
        raise InputError(
            "QC-ADAPTER-010",
            "is in a layout that several plugins claim",
            file=path,
            found=names,
            expected="one",
            fix="uninstall the plugin that does not belong",
        )
    translated, table = dict(headers), layout.table
    claimed = {weight for weight, _ in claims[0].names.values()}
    # All at once: the name of a stack depends on which stacks of its module have LoRA.
    peft_names = stems((t for t in table if t.name in claimed), trunk_part(table).namespaces[0])
    for name, (weight, side) in claims[0].names.items():
        if weight not in peft_names or side not in ("A", "B") or name not in headers:
            found, expected = f"{weight} ({side})", "a weight of this base, side A or B"
            raise _wrong(path, claims[0], name, found, expected)
        translated[f"{peft_names[weight]}.lora_{side}.weight"] = translated.pop(name)
    _check_parts(path, headers, claims[0], layout)
    return translated


def _check_parts(
    path: Path, headers: Mapping[str, Header], claim: AdapterClaim, layout: Layout
) -> None:
    """Refuse a piece of a weight, module, expert or range of rows that does not exist."""
    modules = modules_of(headers)
    for piece in claim.pieces:
        tensor = layout.table.tensors.get(piece.weight)
        if tensor is None or tensor.row.kind is None or piece.module not in modules:
            raise _wrong(path, claim, piece.module, piece.weight, "a module and a weight")
        experts = tensor.shape[0] if tensor.row.kind is Kind.EXPERTS else 0
        start, stop = piece.rows or (0, tensor.shape[-2])
        first, last = piece.source or (start, stop)
        if (
            not 0 <= start < stop <= tensor.shape[-2]
            or first < 0
            or last - first != stop - start
            or not 0 <= (piece.expert or 0) < max(experts, 1)
            or (piece.expert is not None and not experts)
        ):
            expected = f"rows and an expert of {list(tensor.shape)}"
            raise _wrong(path, claim, piece.module, str(piece), expected)


def _wrong(path: Path, claim: AdapterClaim, field: str, found: str, expected: str) -> InputError:
    return InputError(
        "QC-ADAPTER-010",
        f"the plugin that claims layout '{claim.layout}' maps it to what does not exist",
        file=path,
        field=field,
        found=found,
        expected=expected,
        fix="report this to the plugin's author",
    )
