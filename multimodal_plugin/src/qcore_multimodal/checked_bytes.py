"""Reading the bytes that core checked: a payload that changed since is refused.

This file decides that what is decoded has the digest that core computed when it checked the row.
An image is hashed as it is read; a video, which is not held in memory, before it is decoded, and
must not be written to until the end.

- ``QC-VISION-042`` a file changed or disappeared after core checked it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from qcore.api import Payload, RowError

if TYPE_CHECKING:
    from .processor import Bytes


def decoded_image(file: BinaryIO, payload: Payload) -> Bytes:
    """Decode the image of a payload, whose bytes must be those that core checked."""
    from . import images  # imports Pillow, which a run of text does not need

    data = images.read_bounded(file)
    _check_digest(payload, hashlib.sha256(data).hexdigest())
    return images.decode(data)


def decoded_frames(payload: Payload) -> Iterator[Bytes]:
    """Decode the frames of a payload one by one; an error names the frame and its file."""
    for index, frame in enumerate(payload.frames):
        try:
            with open_payload(frame) as file:
                yield decoded_image(file, frame)
        except RowError as error:
            if frame.path is not None:
                reason = "" if error.found is None else f": {error.found}"
                error.found = f"{frame.path.name!r}{reason}"
            raise error.within(f"{payload.kind}[{index}]") from None


@contextmanager
def open_payload(payload: Payload) -> Iterator[BinaryIO]:
    """Open a payload, whose file existed when core checked the row."""
    try:
        with payload.open() as file:
            yield file
    except OSError as error:
        raise RowError(
            "QC-VISION-042", "can no longer be read", found=error.strerror or str(error)
        ) from None


@contextmanager
def unchanged(file: BinaryIO, payload: Payload) -> Iterator[None]:
    """Verify that a file has the payload's digest and does not change inside the context."""
    before = _stamp(file, payload)
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    _check_digest(payload, digest.hexdigest())
    file.seek(0)
    try:
        yield
    except RowError:
        _check_stamp(file, payload, before)  # the error may come from a mix of two versions
        raise
    _check_stamp(file, payload, before)


def _check_stamp(file: BinaryIO, payload: Payload, before: tuple[int, int]) -> None:
    if (after := _stamp(file, payload)) != before:
        raise _changed(
            f"{after[0]} bytes", f"{before[0]} bytes, unchanged while it is decoded"
        ) from None


def _stamp(file: BinaryIO, payload: Payload) -> tuple[int, int]:
    """Size and modification time of a file; zeros for bytes in the row."""
    if payload.path is None:
        return 0, 0
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _check_digest(payload: Payload, sha256: str) -> None:
    """Refuse bytes with a different digest than when the row was checked."""
    if sha256 != payload.sha256:
        raise _changed(sha256, f"sha256 {payload.sha256}")


def _changed(actual: str, expected: str) -> RowError:
    return RowError(
        "QC-VISION-042", "changed after its row was checked", found=actual,
        expected=expected, fix="do not modify media files during a run",
    )  # fmt: skip
