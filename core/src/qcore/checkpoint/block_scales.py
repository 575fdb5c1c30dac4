"""Block FP8 on disk: where the scales of a weight lie, and which shape they must have.

This file decides that the scales of ``NAME`` are ``NAME_scale_inv``, one for each block of rows
and columns that config.json names, and what a weight without such scales is called. Which formats
a checkpoint holds is `qcore.checkpoint.quantization_formats`' business, decoding is
`qcore.nn.fp8`'s.

Code: ``QC-KEY-007`` FP8 without block scales that fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from ..errors import InputError
from .safetensors_header import Header

SECTION: Final = "quantization_config"
_DEFAULT: Final = (128, 128)


class BadBlockError(ValueError):
    """config.json names no block size: `field` says where, `found` what stands there."""

    def __init__(self, field: str, found: object) -> None:
        super().__init__(f"{field}: {found!r}")
        self.field = field
        self.found = found


def sections(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every ``quantization_config`` that says something, with its path: at the top or one below."""
    for prefix, where in (("", config), *((f"{k}.", v) for k, v in config.items())):
        value = where.get(SECTION) if isinstance(where, Mapping) else None
        if value:
            yield f"{prefix}{SECTION}", value


def block_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale; 128 each where config.json does not say.

    Raises:
        BadBlockError: what it says is not two positive integers.
    """
    for path, section in sections(config):
        block = section.get("weight_block_size", list(_DEFAULT)) if hasattr(section, "get") else 0
        if (
            isinstance(block, list)
            and len(block) == 2
            and all(type(size) is int and size > 0 for size in block)
        ):
            return block[0], block[1]
        raise BadBlockError(f"{path}.weight_block_size", block)
    return _DEFAULT


def is_fp8(header: Header) -> bool:
    """Whether a tensor on disk is of 8-bit floats."""
    return header.dtype.startswith("F8_")


def scale_name(weight: str) -> str:
    """The tensor on disk that holds a weight's scales."""
    return f"{weight}_scale_inv"


def scale_problem(
    weight: Header, scale: Header | None, block: tuple[int, int], folder: Path
) -> InputError | None:
    """The error for a weight in FP8 whose scales are absent or of another shape.

    Args:
        weight: ``[..., out, in]``; a vector counts as one row.
        scale: its scales; they must be ``[..., ceil(out/rows), ceil(in/columns)]``.
        block: rows and columns that share a scale.
        folder: the checkpoint, for the error.
    """
    rows, columns = block
    *stack, out, into = weight.shape if len(weight.shape) > 1 else (1, *weight.shape)
    expected = (*stack, -(-out // rows), -(-into // columns))
    if scale is not None and scale.shape == expected:
        return None
    return InputError(
        "QC-KEY-007",
        "is in FP8 without block scales that fit",
        file=folder / weight.file,
        field=weight.name,
        found=list(scale.shape) if scale is not None else "none",
        expected=f"{scale_name(weight.name)} {list(expected)}",
        fix="use the bf16 revision of this checkpoint",
    )
