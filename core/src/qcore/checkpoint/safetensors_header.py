"""Reads a safetensors header: names, dtypes, shapes, offsets, all checked with the file size.

This file decides which headers are valid. The bytes may come from a local file or from the first
bytes of a file on the hub. No tensor is read.

Codes: ``QC-CKPT-005`` a damaged file; ``QC-READ-001`` a file that cannot be read.
"""

from __future__ import annotations

import gc
import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

from ..errors import InputError
from ..io import strict_json
from ..io.atomic import reading

#: Bits per element by the dtype names of the safetensors format.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "F4": 4,
}  # fmt: skip

PREFIX: Final = 8  # bytes of the length field before the header
_LFS: Final = b"version "  # "version https://git-lfs.github.com/spec/v1"
_MAX_HEADER: Final = 100_000_000  # the limit of the safetensors format itself
_MAX_TENSORS: Final = 1_000_000
_MAX_SIZE: Final = 2**63
_MAX_RANK: Final = 64  # torch's limit; a product of millions of sizes would take hours
_KEYS: Final = frozenset(("dtype", "shape", "data_offsets"))
_ORDER: Final = attrgetter("start", "end")


@dataclass(frozen=True, slots=True)
class Header:
    """The header entry of one tensor in a safetensors file.

    Attributes:
        name: name on disk.
        dtype: safetensors name of the dtype.
        shape: shape on disk.
        file: name of the file.
        start: offset of the first byte in the file.
        end: offset after the last byte in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_headers(path: Path) -> list[Header]:
    """Read the headers of the tensors in a safetensors file, in the order of their bytes.

    Raises:
        InputError: ``QC-CKPT-005`` the file is truncated, bytes overlap or are missing, a dtype
            is unknown or a size does not match the shape; ``QC-READ-001``.
    """
    with reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = header_length(file.read(PREFIX), size, path)
        raw = file.read(length)
    return parse_headers(raw, size, path.name, path)


def header_length(prefix: bytes, size: int, where: object) -> int:
    """Return the length in bytes of the header that follows the prefix.

    Args:
        prefix: the first `PREFIX` bytes of the file, or all bytes if it has fewer.
        size: size of the whole file in bytes.
        where: location of the file, for errors.

    Raises:
        InputError: ``QC-CKPT-005`` the length exceeds the file or the limit of the format.
    """
    if len(prefix) < PREFIX:
        raise _damaged(where, f"{size} bytes, less than a header")
    if prefix == _LFS:
        fix = "run git lfs pull in the folder, or download the file"
        raise _damaged(where, "a Git LFS pointer, not the file", fix=fix)
    length: int = struct.unpack("<Q", prefix)[0]
    if length > min(size - PREFIX, _MAX_HEADER):
        raise _damaged(where, f"a header of {length} bytes in a file of {size}")
    return length


def parse_headers(raw: bytes, size: int, file: str, where: object) -> list[Header]:
    """Parse a header into the headers of its tensors, in the order of their bytes.

    Args:
        raw: the header without its prefix.
        size: size of the whole file in bytes; the tensors must cover it without gaps.
        file: name of the file, for `Header.file`.
        where: location of the file, for errors.

    Raises:
        InputError: ``QC-CKPT-005`` the file is damaged, as in `read_headers`.
    """
    with without_gc():
        headers = _parse(raw, file, where)
    headers.sort(key=_ORDER)
    position = PREFIX + len(raw)
    for header in headers:
        if header.start != position:
            raise _damaged(where, "bytes that overlap or belong to no tensor", header.name)
        position = header.end
    if position != size:
        raise _damaged(where, f"{size} bytes where the header accounts for {position}")
    return headers


@contextmanager
def without_gc() -> Iterator[None]:
    """Disable garbage collection: the search for cycles took a third of the parsing time."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _parse(raw: bytes, file: str, where: object) -> list[Header]:
    try:
        entries = strict_json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(where, f"a header that does not parse ({error})") from None
    if not isinstance(entries, dict) or len(entries) > _MAX_TENSORS:
        raise _damaged(where, "a header that is not a mapping of tensors")
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not _is_texts(metadata):
        raise _damaged(where, "not a mapping of texts", "__metadata__")
    base = PREFIX + len(raw)
    return [_header(where, file, name, entry, base) for name, entry in entries.items()]


def _is_texts(value: Any) -> bool:
    return type(value) is dict and all(type(text) is str for text in value.values())


def _header(where: object, file: str, name: str, entry: Any, base: int) -> Header:
    """Check one entry. A checkpoint may have 100,000 entries, so this function is flat."""
    if type(entry) is not dict:
        raise _damaged(where, "an entry that is not a tensor", name)
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if len(entry) != 3 and not entry.keys() <= _KEYS:
        raise _damaged(where, f"unknown keys {sorted(entry.keys() - _KEYS)}", name)
    bits = DTYPE_BITS.get(dtype) if type(dtype) is str else None
    if bits is None:
        raise _damaged(where, f"dtype {dtype!r}", name)
    lists = type(shape) is list and type(offsets) is list and len(offsets) == 2
    if not lists or len(shape) > _MAX_RANK:
        raise _damaged(where, f"shape {shape!r}, offsets {offsets!r}", name)
    for number in shape + offsets:
        if type(number) is not int or not 0 <= number < _MAX_SIZE:
            raise _damaged(where, f"shape {shape!r}, offsets {offsets!r}", name)
    start, end = offsets
    if (end - start) * 8 != math.prod(shape) * bits:
        raise _damaged(where, f"{end - start} bytes for {dtype} {tuple(shape)}", name)
    return Header(name, dtype, tuple(shape), file, base + start, base + end)


def _damaged(
    where: object, found: str, field: str | None = None, fix: str = "download the file again"
) -> InputError:
    return InputError(
        "QC-CKPT-005",
        "is damaged",
        file=where,
        field=field and field[:200],
        found=found[:200],
        fix=fix,
    )
