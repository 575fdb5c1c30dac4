"""Checks of video containers (MP4, Matroska, AVI) before FFmpeg opens them.

This file decides which containers FFmpeg may open, and that a file is as long as its headers state.
FFmpeg's own probing would also accept playlists and file lists, which reference other files and
URLs; and on a truncated Matroska or AVI file FFmpeg stops without an error. For an MP4, FFmpeg
builds an index of all samples when it opens the file, and a few bytes can declare any number of
samples: they are counted here first. Tables are searched by name in all bytes except those of the
media, independent of nesting, because FFmpeg accepts tables in many places. Four bytes of an image
in ``moov`` that happen to equal a table name would be counted too, about once in a billion. Nothing
is decoded here.

- ``QC-VISION-034`` an unsupported container.
- ``QC-VISION-035`` a truncated file.
- ``QC-VISION-039`` too many samples.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO, Final

import numpy as np

from qcore.api import RowError

_MOV: Final = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_EBML: Final = b"\x1a\x45\xdf\xa3"
_SEGMENT: Final = b"\x18\x53\x80\x67"
_LEAVES: Final = frozenset((b"mdat", b"free", b"skip", b"wide", b"uuid"))  # contain no tables
_TABLE: Final = re.compile(rb"(?=(stsz|stz2|trun|elst|stco|co64|stsc|stts|stsd|hdlr|cmov))")
_AUDIO: Final = frozenset((b"soun", b"alis", b"rsrc", b"url ", b"mdir", b"mdta"))
_RAW_SAMPLES: Final = 160  # minimum number of raw audio samples per index entry
_TRAILING: Final = 24  # bytes after a box that FFmpeg may read as part of a short table
_MAX_TABLES: Final = 100  # per track; a real track has about eight
_MAX_TABLE_BYTES: Final = 1 << 28  # bytes of a track's tables, which are read into memory
# Not `Final`: tests lower these limits.
MAX_BOXES = 2_000_000  #: of an MP4, at the top level and in ``moov``; a fragment has two
MAX_SAMPLES = 10_000_000  #: of an MP4, over all tracks
_FORMATS: Final = "MP4, MOV, Matroska, WebM, AVI, or animated GIF, WebP or PNG"


def demuxer(file: BinaryIO) -> str | None:
    """FFmpeg's name of a complete file's container; ``None`` for an animated image.

    Raises:
        RowError: ``QC-VISION-034``, ``-035``, ``-039``.
    """
    start = file.read(16)
    size = file.seek(0, os.SEEK_END)
    if start[4:8] in _MOV:
        name, end = "mov", _end_of_boxes(file, size)
    elif start.startswith(_EBML):
        name, end = "matroska", _end_of_segment(file)
    elif start[:4] == b"RIFF" and start[8:12] == b"AVI ":
        name, end = "avi", 8 + int.from_bytes(start[4:8], "little")
    elif start.startswith((b"GIF8", b"\x89PNG\r\n\x1a\n")) or start[8:12] == b"WEBP":
        name, end = None, 0
    else:
        raise RowError(
            "QC-VISION-034",
            "unsupported video format",
            found=f"a file that starts with {start[:8]!r}" if start else "no bytes",
            expected=_FORMATS,
            fix="convert it to MP4",
        )
    if end > size:
        raise RowError(
            "QC-VISION-035",
            "is damaged: the file is truncated",
            found=f"{size} bytes",
            expected=f"{end}, as the file states",
            fix="copy or download it again",
        )
    if name == "mov":
        _check_samples(file, size)
    file.seek(0)
    return name


def _boxes(file: BinaryIO, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, body start and end of each MP4 box between `at` and `end`, without nested boxes."""
    while at + 8 <= end:
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            return
        length, body = int.from_bytes(head[:4], "big"), at + 8
        if length == 1:
            length, body = int.from_bytes(head[8:16], "big"), at + 16
        stop = at + length if length else end  # 0: extends to the end
        if stop < body:
            return
        yield head[4:8], body, stop
        at = stop


def _end_of_boxes(file: BinaryIO, size: int) -> int:
    """The end of the last top-level box of an MP4."""
    end = 0
    for name, _, stop in islice(_boxes(file, 0, size), MAX_BOXES):
        if not name.isalnum():
            break  # trailing bytes that some writers leave after the last box; players ignore them
        end = stop
    return end


def _check_samples(file: BinaryIO, size: int) -> None:
    """Refuse more samples than the file can hold or than the limit (``QC-VISION-039``)."""
    limit, count = min(size, MAX_SAMPLES), 0
    for boxes, (name, body, stop) in enumerate(_index_boxes(file, size), 1):
        if boxes > MAX_BOXES:
            raise _too_many(f"more than {MAX_BOXES} boxes", f"at most {MAX_BOXES}")
        if name in _LEAVES or not name.isalnum():
            continue
        if stop - body > _MAX_TABLE_BYTES:
            raise _too_many(
                f"a box {name.decode()} of {stop - body} bytes", f"at most {_MAX_TABLE_BYTES}"
            )
        file.seek(body)
        length = stop - body + _TRAILING
        count += _count_entries(name, file.read(length).ljust(length, b"\0"))
        if count > limit:
            raise _too_many(f"{count} samples in {size} bytes", f"at most {limit}")


def _index_boxes(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Top-level boxes and the boxes in ``moov``, from which FFmpeg builds its index."""
    index = hidden = False
    name = b""
    for name, body, stop in _boxes(file, 0, size):
        stop = min(stop, size)
        if name == b"moov":
            index = True
            for inner, start, end in _boxes(file, body, stop):
                yield inner, start, min(end, stop)
            continue
        file.seek(body + 4)
        inside = file.read(4) if name in _LEAVES - {b"mdat"} else b""
        hidden = hidden or inside in (b"mvhd", b"cmov")
        if name == b"hoov":
            break
        yield name, body, stop
    # Without a regular index, FFmpeg reads an index in a free box.
    if name == b"hoov" or (hidden and not index):
        raise _no_index("an index in a free box")


def _count_entries(name: bytes, data: bytes) -> int:
    """Upper bound on the entries of FFmpeg's index for one box.

    FFmpeg accepts tables in nearly all boxes, so table names are searched in the bytes. Of several
    tables of one kind, the largest counts.
    """
    sizes = fragments = edits = chunks = tables = 0
    kinds: set[bytes] = set()
    single, runs = [], []
    for box, body in _tables(name, data):
        numbers = struct.unpack_from(">4I", data, body)
        tables += box != b"trun"
        if tables > _MAX_TABLES:
            raise _too_many(f"more than {_MAX_TABLES} tables in one place", "one of a kind")
        if box == b"cmov":
            raise _no_index("a box cmov")
        if box == b"stsd":
            _check_descriptions(data, body, numbers[1])
        elif box in (b"stsz", b"stz2"):
            sizes += numbers[2]
        elif box == b"trun":
            fragments += numbers[1]
        elif box == b"elst":
            edits = max(edits, min(numbers[1], (len(data) - body) // 12))
        elif box in (b"stco", b"co64"):
            chunks = max(chunks, min(numbers[1], (len(data) - body) // 4))
        elif box == b"stsc":
            runs.append(body)
        elif box == b"stts":
            single.append(numbers[1] == numbers[3] == 1)
        else:
            kinds.add(data[body + 8 : body + 12])
    # For raw audio an index entry covers several samples, according to the chunks.
    if b"soun" in kinds and kinds <= _AUDIO and single and all(single):
        sizes = sum(_samples_in_chunks(data, body, chunks) for body in runs) // _RAW_SAMPLES
    return (sizes + fragments) * max(edits, 1)  # each edit may repeat all samples


def _tables(name: bytes, data: bytes) -> Iterator[tuple[bytes, int]]:
    """Name and body of every table in a box: the box itself, and all nested table names."""
    if _TABLE.match(name):
        yield name, 0
    for match in _TABLE.finditer(data, 4, len(data) - _TRAILING):
        at = match.start()
        length = int.from_bytes(data[at - 4 : at], "big")
        if length == 1 or length >= 8 or not length:
            body = at + (12 if length == 1 else 4)
            if body + 16 <= len(data):
                yield match[1], body


def _check_descriptions(data: bytes, body: int, count: int) -> None:
    """Refuse a sample description beyond its track: FFmpeg would search it for tables."""
    at, end = body + 8, len(data) - _TRAILING
    while count and at + 8 <= end:
        length = int.from_bytes(data[at : at + 4], "big")
        if at + length > end:
            raise RowError(
                "QC-VISION-035", "is damaged: a sample description extends beyond its track",
                found=f"{length} bytes", expected=f"at most {end - at}",
                fix="encode the video again",
            )  # fmt: skip
        at, count = at + max(length, 8), count - 1


def _samples_in_chunks(data: bytes, body: int, chunks: int) -> int:
    """Samples of all chunks according to an ``stsc`` table (first chunk, samples per chunk)."""
    count = min(int.from_bytes(data[body + 4 : body + 8], "big"), (len(data) - body - 8) // 12)
    table = np.frombuffer(data, ">u4", 3 * count, body + 8).reshape(-1, 3).astype(np.float64)
    alike = np.diff(table[:, 0], append=chunks + 1)
    return int((np.where(alike > 0, alike, chunks) * table[:, 1]).sum())


def _no_index(reason: str) -> RowError:
    return RowError(
        "QC-VISION-034", "has a compressed or hidden index", found=reason,
        expected=_FORMATS, fix="convert it to MP4",
    )  # fmt: skip


def _too_many(count: str, expected: str) -> RowError:
    return RowError(
        "QC-VISION-039",
        "has too many video frames or audio samples",
        found=count,
        expected=expected,
        fix="cut it into shorter videos",
    )


def _end_of_segment(file: BinaryIO) -> int:
    """The end of a Matroska segment; 0 if the size is unknown, as in a live recording."""
    file.seek(len(_EBML))
    length = _ebml_number(file)
    if length is None:
        return 0
    file.seek(length, os.SEEK_CUR)
    if file.read(4) != _SEGMENT:
        return 0
    length = _ebml_number(file)
    return 0 if length is None else file.tell() + length


def _ebml_number(file: BinaryIO) -> int | None:
    """A variable-length EBML number; ``None`` for the reserved value "unknown"."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    value = int.from_bytes(first + file.read(more), "big") & ((1 << 7 * (more + 1)) - 1)
    return None if value == (1 << 7 * (more + 1)) - 1 else value
