"""Decodes weights that bitsandbytes stored in 4 bits, and loads them into NF4 storage as they are.

This file decides how the tensors of such a weight become values: bit for bit those of
bitsandbytes, in the dtype that the weight had before it was quantized. NF4 with double
quantization in blocks of 64 and 256 is what `qcore.nn.qlora.nf4` holds; its codes and scales are
taken over, so that training computes from the same values and nothing is rounded again.
`qcore.checkpoint.four_bit` decides which tensors make up a weight.

Codes: ``QC-LOAD-003`` a scale that is not finite, ``QC-LOAD-004`` codes with other values.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint.checkpoint import Checkpoint, Header
from ..checkpoint.four_bit import FourBit
from ..errors import InputError, NumericError
from .qlora.nf4 import BLOCK, BLOCK2, VALUES, functional
from .tensor_bytes import DTYPES, as_bytes, read_exact

_PIECE = 2**20  # values that are decoded at a time


class StoredCodes(NamedTuple):
    """The tensors of a 4-bit weight, in memory.

    Attributes:
        packed: uint8 ``[ceil(n / 2), 1]``, two values a byte.
        absmax: scale of each block, float32, or its code, uint8.
        quant_map: float32 ``[16]``, the value of each code.
        nested_absmax: float32, scales of the scales; ``None`` without double quantization.
        nested_quant_map: float32 ``[256]``, the value of each code of a scale.
        offset: float32, mean of the scales.
    """

    packed: Tensor
    absmax: Tensor
    quant_map: Tensor
    nested_absmax: Tensor | None
    nested_quant_map: Tensor | None
    offset: Tensor


def read_codes(checkpoint: Checkpoint, weight: FourBit, rows: slice | None = None) -> StoredCodes:
    """Read the tensors of a 4-bit weight.

    Args:
        checkpoint: where they are.
        weight: which they are.
        rows: those of the weight whose packed codes are read, each of whole bytes; all scales are.

    Raises:
        NumericError: ``QC-LOAD-003`` a scale is not finite.
        InputError: ``QC-LOAD-004`` the values of the codes are not those of its type.
    """
    nested, code2 = weight.nested_absmax, weight.nested_quant_map
    codes = StoredCodes(
        packed=_read(checkpoint, weight.packed, _bytes_of(weight, rows)).view(-1, 1),
        absmax=_read(checkpoint, weight.absmax),
        quant_map=_read(checkpoint, weight.quant_map),
        nested_absmax=None if nested is None else _read(checkpoint, nested),
        nested_quant_map=None if code2 is None else _read(checkpoint, code2),
        offset=torch.tensor(weight.nested_offset),
    )
    _check(checkpoint, weight, codes)
    return codes


def read_four_bit(checkpoint: Checkpoint, weight: FourBit) -> Tensor:
    """Read a 4-bit weight: its values, in the shape and dtype that it had before.

    Raises:
        QcoreError: as `read_codes`.
    """
    return decode(weight, read_codes(checkpoint, weight))


def decode(weight: FourBit, codes: StoredCodes) -> Tensor:
    """Return the values of codes, computed as bitsandbytes does, some blocks at a time.

    A value is ``quant_map[code] * scale`` in float32, rounded once. bitsandbytes itself is not
    called: version 0.50.2 misreads rows on the CPU whose length is not a multiple of its blocks.
    """
    count = math.prod(weight.shape)
    value = torch.empty(count, dtype=DTYPES[weight.dtype])
    scales = _scales(weight, codes)
    step = max(1, _PIECE // weight.blocksize // 2) * 2 * weight.blocksize  # whole bytes
    for at in range(0, count, step):
        end = min(at + step, count)
        packed = codes.packed.flatten()[at // 2 : -(-end // 2)]
        numbers = torch.stack((packed >> 4, packed & 15), 1).flatten()[: end - at]
        blocks = scales[at // weight.blocksize : -(-end // weight.blocksize)]
        spread = blocks.repeat_interleave(weight.blocksize)[: end - at]
        value[at:end] = codes.quant_map[numbers.int()].mul_(spread)
    return value.view(weight.shape)


def _scales(weight: FourBit, codes: StoredCodes) -> Tensor:
    """Return the scale of each block, float32."""
    if codes.nested_absmax is None or codes.nested_quant_map is None:
        return codes.absmax
    scales = codes.nested_quant_map[codes.absmax.int()]
    spread = codes.nested_absmax.repeat_interleave(weight.nested_blocksize)[: len(scales)]
    return scales.mul_(spread).add_(codes.offset)


def nf4_state(codes: StoredCodes, dtype: torch.dtype) -> Any:
    """Return bitsandbytes' state of codes that NF4 storage holds (`FourBit.is_nf4_storage`)."""
    bnb = functional()
    return bnb.QuantState(
        absmax=codes.absmax,
        code=codes.quant_map,
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=codes.offset,
        state2=bnb.QuantState(
            absmax=codes.nested_absmax,
            code=codes.nested_quant_map,
            blocksize=BLOCK2,
            dtype=torch.float32,
        ),
    )


def on_device(codes: StoredCodes, device: torch.device) -> StoredCodes:
    """Return the codes on a device."""
    nested, code2 = codes.nested_absmax, codes.nested_quant_map
    return StoredCodes(
        packed=codes.packed.to(device),
        absmax=codes.absmax.to(device),
        quant_map=codes.quant_map.to(device),
        nested_absmax=None if nested is None else nested.to(device),
        nested_quant_map=None if code2 is None else code2.to(device),
        offset=codes.offset.to(device),
    )


def _bytes_of(weight: FourBit, rows: slice | None) -> slice | None:
    """The bytes of the packed codes that hold some rows."""
    if rows is None:
        return None
    each = math.prod(weight.shape[1:]) // 2
    return slice(rows.start * each, rows.stop * each)


def _read(checkpoint: Checkpoint, header: Header, part: slice | None = None) -> Tensor:
    dtype = DTYPES.get(header.dtype, torch.uint8)
    shape = header.shape if part is None else (part.stop - part.start,)
    value = torch.empty(shape, dtype=dtype)
    with checkpoint.file(header.file).open("rb") as file:
        file.seek(header.start + (0 if part is None else part.start))
        read_exact(file, as_bytes(value), header)
    return value


def _check(checkpoint: Checkpoint, weight: FourBit, codes: StoredCodes) -> None:
    for header, value in (
        (weight.absmax, codes.absmax),
        (weight.nested_absmax, codes.nested_absmax),
        (weight.nested_quant_map, codes.nested_quant_map),
    ):
        if header is not None and value is not None and not bool(value.isfinite().all()):
            raise NumericError(
                "QC-LOAD-003",
                "holds a scale that is not finite",
                file=checkpoint.path / header.file,
                field=header.name,
                fix="download the checkpoint again",
            )
    if not torch.equal(codes.quant_map, values_of(weight.quant_type)):
        raise InputError(
            "QC-LOAD-004",
            f"holds other values than those of {weight.quant_type}",
            file=checkpoint.path / weight.quant_map.file,
            field=weight.quant_map.name,
            found=f"{codes.quant_map[0]:.6g} to {codes.quant_map[-1]:.6g}",
            expected=f"the 16 values of bitsandbytes' {weight.quant_type}",
            fix="use the bf16 checkpoint that it was made from",
        )


def values_of(quant_type: str) -> Tensor:
    """Return the 16 values of a type, float32."""
    if quant_type == "nf4":
        return torch.tensor(VALUES)
    values: Tensor = functional().get_4bit_type("fp4", device="cpu")
    return values
