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

from ..api.records import AdapterClaim
from ..checkpoint.checkpoint import Header
from ..checkpoint.layout import Layout
from ..errors import InputError
from .peft_names import stems, trunk_part


def translated(
    path: Path, headers: Mapping[str, Header], claims: Sequence[AdapterClaim], layout: Layout
) -> dict[str, Header]:
    """Rename the tensors of another layout to PEFT's names, as the only claim maps them.

    Raises:
        InputError: ``QC-ADAPTER-010`` several plugins claim the layout, or the claim names a
            weight or tensor that does not exist.
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
            raise InputError(
                "QC-ADAPTER-010",
                f"the plugin that claims layout '{names}' maps it to a weight that does not exist",
                file=path,
                field=name,
                found=f"{weight} ({side})",
                expected="a weight of this base, side A or B",
                fix="report this to the plugin's author",
            )
        translated[f"{peft_names[weight]}.lora_{side}.weight"] = translated.pop(name)
    return translated
