"""Checks that a run can hold the 4-bit weights of a checkpoint without rounding them again.

This file decides that a run in NF4 is refused if the checkpoint has weights in another 4-bit format
of bitsandbytes: such weights would have to be decoded and quantized a second time.
`qcore.checkpoint.four_bit` decides which weights NF4 storage holds as they are.

Code: ``QC-LOAD-005``.
"""

from __future__ import annotations

from ..errors import InputError
from ..plugins.resolve_model import Identified


def refuse_rounding(found: Identified, *, fix: str) -> None:
    """Refuse a run in NF4 that would round 4-bit weights a second time.

    Args:
        found: the model.
        fix: how the run is started without NF4.

    Raises:
        InputError: ``QC-LOAD-005``.
    """
    names = found.layout.requantized()
    if not names:
        return
    place = next(p for p in found.layout.located[names[0]].places if p.four_bit is not None)
    assert place.four_bit is not None
    stored = place.four_bit
    nested = "with" if stored.nested_absmax is not None else "without"
    raise InputError(
        "QC-LOAD-005",
        "is in 4 bits that NF4 storage cannot hold without rounding them again",
        file=found.checkpoint.path / place.header.file,
        field=place.header.name,
        found=f"{stored.quant_type} in blocks of {stored.blocksize}, {nested} double quantization"
        f"{f', and {len(names) - 1} more' if len(names) > 1 else ''}",
        expected="nf4 in blocks of 64, with double quantization in blocks of 256",
        fix=fix,
    )
