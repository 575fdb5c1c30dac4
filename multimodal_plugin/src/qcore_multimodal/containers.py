"""Containers of videos, told from their own bytes.

This file decides which containers FFmpeg is asked to open, and that a file is as long as it says.
FFmpeg's own probing would also find playlists and lists of files, which name further files and
addresses; and where a Matroska or an AVI was cut it stops without a word. Of an MP4 it makes an
index of all samples when it opens it, as many as a few bytes say that there are: those are counted
before. Nothing is decoded here.

- ``QC-VISION-034`` not a container that is read.
- ``QC-VISION-035`` cut short.
- ``QC-VISION-039`` too many samples.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO, Final

from qcore.data.jsonl import BadRow

_MOV: Final = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_EBML: Final = b"\x1a\x45\xdf\xa3"
_SEGMENT: Final = b"\x18\x53\x80\x67"
_NESTED: Final = frozenset(
    (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf", b"udta", b"edts", b"dinf",
     b"mvex", b"tref")
)  # fmt: skip
_DEEPEST: Final = 10  # as FFmpeg has it
# Not final, as tests lower them.
MOST_BOXES = 2_000_000  #: of an MP4, those in others too; a fragment has some eight
MOST_SAMPLES = 10_000_000  #: of an MP4, of all its tracks
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
    if name == "mov":
        _check_samples(file, size)
    file.seek(0)
    return name


def _boxes(file: BinaryIO, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, start of the body and end of each box of an MP4, those in others left alone."""
    while at + 8 <= end:
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            return
        length, body = int.from_bytes(head[:4], "big"), at + 8
        if length == 1:
            length, body = int.from_bytes(head[8:16], "big"), at + 16
        stop = at + length if length else end  # 0: up to the end
        if stop < body:
            return
        yield head[4:8], body, stop
        at = stop


def _end_of_boxes(file: BinaryIO, size: int) -> int:
    """Where the last box at the top of an MP4 ends."""
    end = 0
    for name, _, stop in islice(_boxes(file, 0, size), MOST_BOXES):
        if not name.isalnum():
            break  # nothing that a player would read, as some writers leave behind the last box
        end = stop
    return end


def _check_samples(file: BinaryIO, size: int) -> None:
    """Refuse more samples than a file can hold, or than are read (``QC-VISION-039``)."""
    most, count = min(size, MOST_SAMPLES), 0
    sound = single = False
    for boxes, (name, body) in enumerate(_all_boxes(file, 0, size), 1):
        if boxes > MOST_BOXES:
            raise _too_many(f"more than {MOST_BOXES} boxes", f"at most {MOST_BOXES}")
        numbers = struct.unpack(">4I", body.ljust(16, b"\0"))
        if name == b"trak":
            sound = single = False
        elif name == b"hdlr" and body[8:12] in (b"soun", b"vide"):
            sound = body[8:12] == b"soun"  # a MOV has a second one, of where its data lie
        elif name == b"stts":
            single = numbers[1] == numbers[3] == 1
        elif name in (b"stsz", b"stz2") and not (sound and single):
            count += numbers[2]  # of raw sound FFmpeg makes no index
        elif name == b"trun":
            count += numbers[1]
        elif name == b"cmov":
            raise BadRow(
                "QC-VISION-034", "has an index that is compressed", found="a box cmov",
                expected=_READ, fix="convert it to MP4",
            )  # fmt: skip
        if count > most:
            raise _too_many(f"{count} samples in {size} bytes", f"at most {most}")


def _all_boxes(file: BinaryIO, at: int, end: int, depth: int = 0) -> Iterator[tuple[bytes, bytes]]:
    """Name of every box, and the first 16 bytes of its body."""
    for name, body, stop in _boxes(file, at, end):
        file.seek(body)
        yield name, file.read(min(16, stop - body))
        if name in _NESTED and depth < _DEEPEST:
            yield from _all_boxes(file, body, min(stop, end), depth + 1)


def _too_many(found: str, expected: str) -> BadRow:
    return BadRow(
        "QC-VISION-039",
        "has too many frames, or too many samples of sound",
        found=found,
        expected=expected,
        fix="cut it into shorter ones",
    )


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
