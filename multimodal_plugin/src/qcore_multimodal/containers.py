"""Signatures of video containers, and where a file ends according to its headers.

This file decides which containers FFmpeg may open: its own probing would also accept playlists and
file lists, which reference other files and URLs. It also decides that a file is as long as its
headers state, because on a truncated Matroska or AVI file FFmpeg stops without an error. Tables and
frames are FFmpeg's, in `video_frames`.

- ``QC-VISION-034`` an unsupported container.
- ``QC-VISION-035`` a truncated file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO, Final

from qcore.api import RowError

_MOV: Final = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_EBML: Final = b"\x1a\x45\xdf\xa3"
_SEGMENT: Final = b"\x18\x53\x80\x67"
_MAX_BOXES: Final = 2_000_000  # at the top level of an MP4; a fragment has two
_FORMATS: Final = "MP4, MOV, Matroska, WebM, AVI, or animated GIF, WebP or PNG"


def demuxer(file: BinaryIO) -> str | None:
    """FFmpeg's name of a complete file's container; ``None`` for an animated image.

    Raises:
        RowError: ``QC-VISION-034``, ``-035``.
    """
    file.seek(0)
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
    for name, _, stop in islice(_boxes(file, 0, size), _MAX_BOXES):
        if not name.isalnum():
            break  # trailing bytes that some writers leave after the last box; players ignore them
        end = stop
    return end


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
