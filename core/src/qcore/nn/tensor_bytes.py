"""Reads the bytes of a tensor on disk into memory; names the dtypes that need no decoding."""

from __future__ import annotations

from typing import IO, Any, cast

import torch
from torch import Tensor

from ..checkpoint.checkpoint import Header
from ..errors import InputError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable."""
    return memoryview(cast(Any, tensor.reshape(-1).view(torch.uint8).numpy()))


def read_exact(file: IO[bytes], view: memoryview, header: Header) -> None:
    """Fill `view` from where `file` stands. Raises ``QC-CKPT-005`` when the file ends before."""
    got = file.readinto(view)  # type: ignore[attr-defined]
    if got != len(view):
        raise InputError(
            "QC-CKPT-005",
            "is damaged",
            file=file.name,
            field=header.name,
            found=f"{got} bytes",
            expected=len(view),
            fix="download the file again",
        )
