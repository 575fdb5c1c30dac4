"""Compares tensors that config.json ties and the files hold nevertheless, by value.

This file decides that such a duplicate is accepted if every value equals that of the tensor it is
tied to, in any two dtypes, and refused otherwise: some loaders use the file's tensor and others the
tie, so the two would compute different models. It reads the files in chunks and imports no torch.

Code: ``QC-LOAD-002`` a tied tensor on disk has other values.
"""

from __future__ import annotations

import array
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from typing import IO, NamedTuple

from ..errors import InputError
from ..io.atomic import reading
from .checkpoint import DTYPE_BITS, Checkpoint, Header
from .layout import Layout, Located

#: Bytes of a tensor that are read at a time.
_CHUNK = 2**24
#: Elements that are converted at a time, each to an object of Python.
_CONVERTED = 2**19
#: Dtypes that are compared by value; any others only byte by byte.
_FLOATS = ("BF16", "F16", "F32", "F64")


class _Pair(NamedTuple):
    """Two tensors on disk that must hold the same values."""

    one: Header
    other: Header


def tie_problems(layout: Layout, checkpoint: Checkpoint) -> list[InputError]:
    """Compare every tied tensor on disk with the tensor that it is tied to.

    Args:
        layout: the layout of the checkpoint.
        checkpoint: the checkpoint; nothing is compared if only its headers were downloaded.

    Returns:
        One ``QC-LOAD-002`` error for each tied tensor with other values.
    """
    if checkpoint.headers_only:
        return []
    problems = []
    for name, tie in layout.ties.items():
        head, target = layout.located[name], layout.located.get(tie)
        if target is None or not target.places:
            continue  # the layout reports that it is missing
        row = _first_difference(checkpoint, head, target)
        if row is not None:
            problems.append(_differs(checkpoint, head, tie, row))
    return problems


def _differs(checkpoint: Checkpoint, head: Located, tie: str, row: int) -> InputError:
    header = head.places[0].header
    return InputError(
        "QC-LOAD-002",
        f"differs from '{tie}', to which config.json ties it; loaders disagree on which is used",
        file=checkpoint.path / header.file,
        field=header.name,
        found=f"other values from row {row} of {head.tensor.shape[0]}",
        expected="the same values, or no such tensor",
        fix="if the tensor was trained, set tie_word_embeddings to false in config.json and in "
        "its text_config; else restore the weights",
    )


def _first_difference(checkpoint: Checkpoint, head: Located, target: Located) -> int | None:
    """Return the first row that differs; ``None`` if all values are equal."""
    pairs = []
    for mine, theirs in zip(head.places, target.places):
        if mine.header.shape != theirs.header.shape:
            return None  # the layout reports the shape
        pairs.append((int(mine.region[0].start), _Pair(mine.header, theirs.header)))
        if mine.scale is not None and theirs.scale is not None:
            pairs.append((0, _Pair(mine.scale, theirs.scale)))
        elif mine.scale is not theirs.scale:
            return 0
    for first, pair in pairs:
        row = _different_row(checkpoint, pair)
        if row is not None:
            return first + row
    return None


def _different_row(checkpoint: Checkpoint, pair: _Pair) -> int | None:
    """Return the first row of dim 0 in which two tensors on disk differ."""
    one, other = pair
    if one.dtype != other.dtype and not {one.dtype, other.dtype} <= {*_FLOATS}:
        return 0
    count = max(1, _CHUNK * 8 // max(DTYPE_BITS[one.dtype], DTYPE_BITS[other.dtype]))
    if one.dtype != other.dtype:
        count = min(count, _CONVERTED)
    columns = max(1, one.numel // one.shape[0]) if one.shape else 1
    with ExitStack() as stack:
        chunks = [_chunks(checkpoint, header, count, stack) for header in pair]
        at = 0
        for mine, theirs in zip(*chunks, strict=True):
            if one.dtype != other.dtype:
                mine, theirs = _as_float64(mine, one.dtype), _as_float64(theirs, other.dtype)
            if mine != theirs:
                return (at + _first_unequal(mine, theirs, min(count, one.numel - at))) // columns
            at += count
    return None


def _chunks(
    checkpoint: Checkpoint, header: Header, count: int, stack: ExitStack
) -> Iterator[bytes]:
    """Yield the bytes of a tensor, `count` elements at a time."""
    path = checkpoint.file(header.file)
    with reading(path):
        file: IO[bytes] = stack.enter_context(path.open("rb"))
        file.seek(header.start)
    left = header.end - header.start
    step = count * DTYPE_BITS[header.dtype] // 8
    while left > 0:
        with reading(path):
            data = file.read(min(step, left))
        if not data:
            raise InputError(
                "QC-CKPT-005",
                "is damaged",
                file=path,
                field=header.name,
                found=f"{left} bytes too few",
                fix="download the file again",
            )
        left -= len(data)
        yield data


def _first_unequal(one: bytes, other: bytes, elements: int) -> int:
    """Return the index of the first element that differs, by bisection."""
    size = len(one) // elements
    low, high = 0, elements
    while high - low > 1:
        middle = (low + high) // 2
        if one[low * size : middle * size] != other[low * size : middle * size]:
            high = middle
        else:
            low = middle
    return low


def _as_float64(data: bytes, dtype: str) -> bytes:
    """Convert little-endian floating-point values to float64, which holds each exactly."""
    if dtype == "F64":
        return data
    if dtype == "BF16":  # the upper half of a float32
        wide = bytearray(2 * len(data))
        wide[2::4], wide[3::4] = data[0::2], data[1::2]
        data, dtype = bytes(wide), "F32"
    code, size = ("e", 2) if dtype == "F16" else ("f", 4)
    values = struct.unpack(f"<{len(data) // size}{code}", data)
    return array.array("d", values).tobytes()
