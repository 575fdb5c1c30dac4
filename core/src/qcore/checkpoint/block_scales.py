"""Block FP8 on disk: the name and shape of the scale tensor that belongs to each FP8 weight.

This file decides that the scales of ``NAME`` are ``NAME_scale_inv``, with one value per block,
that config.json sets the block size, and which error a weight without matching scales raises.
`qcore.checkpoint.quantization_formats` detects which formats a checkpoint uses, and
`qcore.nn.fp8` decodes the weights.

Code: ``QC-KEY-007`` FP8 without matching block scales.
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
    """config.json has an invalid block size.

    Attributes:
        field: dotted path of the key in config.json.
        value: its value.
    """

    def __init__(self, field: str, value: object) -> None:
        super().__init__(f"{field}: {value!r}")
        self.field = field
        self.value = value


def quantization_sections(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every non-empty ``quantization_config`` of config.json, with its dotted path.

    The section may be at the top level or in a section of it, such as ``text_config``.
    """
    for prefix, where in (("", config), *((f"{k}.", v) for k, v in config.items())):
        value = where.get(SECTION) if isinstance(where, Mapping) else None
        if value:
            yield f"{prefix}{SECTION}", value


def block_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the rows and columns that share a scale: (128, 128) unless config.json sets it.

    Raises:
        BadBlockError: ``weight_block_size`` is not two positive integers.
    """
    for path, section in quantization_sections(config):
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
    """Return whether a tensor on disk has an 8-bit float dtype."""
    return header.dtype.startswith("F8_")


def scale_name(weight: str) -> str:
    """Return the name on disk of the tensor that holds a weight's scales."""
    return f"{weight}_scale_inv"


def scale_problem(
    weight: Header, scale: Header | None, block: tuple[int, int], folder: Path
) -> InputError | None:
    """Return the error for an FP8 weight whose scales are missing or have the wrong shape.

    Args:
        weight: header of shape ``[..., out, in]``; a vector counts as one row.
        scale: header of its scales, which must have shape
            ``[..., ceil(out / rows), ceil(in / columns)]``; ``None`` if there is none.
        block: (rows, columns) that share a scale.
        folder: the checkpoint, for the error.

    Returns:
        ``QC-KEY-007``, or ``None`` if the scales match.
    """
    rows, columns = block
    *stack, out, into = weight.shape if len(weight.shape) > 1 else (1, *weight.shape)
    expected = (*stack, -(-out // rows), -(-into // columns))
    if scale is not None and scale.shape == expected:
        return None
    return InputError(
        "QC-KEY-007",
        "is FP8 but has no block scales of the expected shape",
        file=folder / weight.file,
        field=weight.name,
        found=list(scale.shape) if scale is not None else "none",
        expected=f"{scale_name(weight.name)} {list(expected)}",
        fix="use the bf16 revision of this checkpoint",
    )
