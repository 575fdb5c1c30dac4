"""Recognizes an MLX export by the layout and values of its tensors, whatever their names are.

mlx-lm and mlx-vlm change values when they convert a checkpoint: convolutions are transposed to
``[C, K, 1]``, 1 is added to the zero-centered norms, and linear layers may be quantized. So renamed
tensors would load and compute ``1 + (1 + w)``. This file decides what proves an export: a
transposed convolution, a quantized weight with ``scales``, or norms around 1 where the convolutions
were turned back. MLX's names alone prove nothing: tensors of those names with the values of the hub
are another spelling, which the parameter table reports.

Code: ``QC-QWEN35-004`` an MLX export.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qcore.errors import InputError

if TYPE_CHECKING:
    from qcore.api import CheckpointView, Header

_CONVOLUTION = ".linear_attn.conv1d.weight"
_NORM = ".input_layernorm.weight"
_NORMS = 16  #: norms that are read, of as many layers
#: Published norms are around 0 and half of their values are negative; of an export they are
#: around 1 and almost none is (mlx-swift-lm pull request 598: mean 0.97).
_MEAN, _NEGATIVE = 0.5, 0.02


def refuse(checkpoint: CheckpointView) -> None:
    """Refuse an MLX export.

    Raises:
        InputError: ``QC-QWEN35-004``.
    """
    headers = checkpoint.headers
    for name, header in headers.items():
        if name.endswith(_CONVOLUTION) and header.shape[2:] == (1,):
            raise _export(checkpoint, name, "its convolutions are transposed", list(header.shape))
        scales = f"{name.removesuffix('.weight')}.scales"
        if name.endswith(".weight") and scales in headers and header.dtype == "U32":
            raise _export(checkpoint, name, "its weights are quantized", f"U32 beside {scales}")
    values = list(_norm_values(checkpoint))
    if not values:
        return
    mean, negative = sum(values) / len(values), sum(v < 0 for v in values) / len(values)
    if mean > _MEAN and negative < _NEGATIVE:
        raise _export(
            checkpoint,
            f"*{_NORM}",
            "1 was added to its zero-centered norms, so that the model would compute 1 + (1 + w)",
            f"mean {mean:.2f}, {negative:.0%} negative",
        )


def _export(checkpoint: CheckpointView, name: str, why: str, found: object) -> InputError:
    return InputError(
        "QC-QWEN35-004",
        f"is an MLX export: {why}",
        file=checkpoint.source,
        field=name,
        found=found,
        expected="the layouts and values of the original checkpoint",
        fix="use the checkpoint that it was converted from",
    )


def _norm_values(checkpoint: CheckpointView) -> Iterator[float]:
    """Yield the values of some zero-centered norms of the trunk; none for files on the hub."""
    names = [
        name for name in checkpoint.headers
        if name.endswith(_NORM) and ".layers." in name and not name.startswith("mtp.")
    ]  # fmt: skip
    for name in names[:_NORMS]:
        header = checkpoint.headers[name]
        try:
            path = checkpoint.file(header.file)
        except InputError:  # only the header was downloaded
            return
        with path.open("rb") as file:
            file.seek(header.start)
            yield from _floats(file.read(header.end - header.start), header)


def _floats(data: bytes, header: Header) -> tuple[float, ...]:
    """Decode little-endian values; empty for a dtype that norms do not have."""
    if header.dtype == "BF16":  # the upper half of a float32
        wide = bytearray(2 * len(data))
        wide[2::4], wide[3::4] = data[0::2], data[1::2]
        return struct.unpack(f"<{len(data) // 2}f", wide)
    code, size = {"F16": ("e", 2), "F32": ("f", 4), "F64": ("d", 8)}.get(header.dtype, ("", 1))
    return struct.unpack(f"<{len(data) // size}{code}", data) if code else ()
