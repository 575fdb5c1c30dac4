"""Containers of videos, told from their own bytes.

This file decides which containers FFmpeg is asked to open, and that a file is as long as it says.
FFmpeg's own probing would also find playlists and lists of files, which name further files and
addresses; and where a Matroska or an AVI was cut it stops without a word. Nothing is decoded here.

- ``QC-VISION-034`` not a container that is read.
- ``QC-VISION-035`` cut short.
"""

from __future__ import annotations

import os
from typing import BinaryIO, Final

from qcore.data.jsonl import BadRow

_MOV: Final = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_EBML: Final = b"\x1a\x45\xdf\xa3"
_SEGMENT: Final = b"\x18\x53\x80\x67"
_MOST_BOXES: Final = 100_000  # of an MP4 at its top; a fragment has two
_READ: Final = "MP4, MOV, Matroska, WebM, AVI, or animated GIF, WebP or PNG"


def demuxer(file: BinaryIO) -> str | None:
    """FFmpeg's name of a file's container, found whole; ``None`` for a picture.

    Raises:
        BadRow: ``QC-VISION-034``, ``QC-VISION-035``.
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
        raise BadRow(
            "QC-VISION-034",
            "is no video that is read",
            found=f"a file that starts with {start[:8]!r}" if start else "no bytes",
            expected=_READ,
            fix="convert it to MP4",
        )
    if end > size:
        raise BadRow(
            "QC-VISION-035",
            "is damaged: it is cut short",
            found=f"{size} bytes",
            expected=f"{end}, as it says",
            fix="copy or download it again",
        )
    file.seek(0)
    return name


def _end_of_boxes(file: BinaryIO, size: int) -> int:
    """Where the last box at the top of an MP4 ends."""
    at = 0
    for _ in range(_MOST_BOXES):
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            break  # some writers leave a few bytes of nothing behind the last box
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length < 8 or not head[4:8].isalnum():
            break  # 0: up to the end; else nothing that a player would read
        at += length
        if at >= size:
            break
    return at


def _end_of_segment(file: BinaryIO) -> int:
    """Where the segment of a Matroska ends; 0 where it does not say, as of a recording."""
    file.seek(len(_EBML))
    length = _variable(file)
    if length is None:
        return 0
    file.seek(length, os.SEEK_CUR)
    if file.read(4) != _SEGMENT:
        return 0
    length = _variable(file)
    return 0 if length is None else file.tell() + length


def _variable(file: BinaryIO) -> int | None:
    """A number of one to eight bytes; ``None`` where all bits are set: unknown."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    value = int.from_bytes(first + file.read(more), "big") & ((1 << 7 * (more + 1)) - 1)
    return None if value == (1 << 7 * (more + 1)) - 1 else value
