"""Standard output and error that cannot be written: what is lost, and the exit status then.

This file decides what a failed write to a standard stream means. Standard error is a log: once it
cannot be written, it is pointed at the null device and the verb goes on. Standard output is what
the user asked for: a failed write ends the verb by a broken pipe (141) or a full disk (73), but
never replaces the status of an error. It follows Python's note on SIGPIPE: the streams are pointed
at the null device so that the flush at exit cannot fail again. What is printed, and how any other
error ends the process, is left to `main`.
"""

from __future__ import annotations

import errno
import io
import json
import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TextIO

import click

from ..errors import QcoreError, WriteError
from .common import fail, line_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: The status that shells report for a process that SIGPIPE ended: 128 + 13.
SIGPIPE_STATUS = 141
_OUT: Final = 1
_ERR: Final = 2


class OutputError(OSError):
    """Standard output cannot be written.

    It has no ``errno``: click and rich would take a broken pipe for the end of the process, and so
    could not tell one of the output from one of a socket.

    Args:
        reason: what the system reports.
    """

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class _Descriptor(io.FileIO):
    """The file descriptor of a standard stream.

    Attributes:
        lost: what the system reported when it could not be written; ``None`` before.
        dropped: what cannot be written is dropped, without an exception.
    """

    def __init__(self, number: int, *, lost: OSError | None = None) -> None:
        super().__init__(number, "wb", closefd=False)
        self.lost = lost
        self.dropped = number == _ERR

    def write(self, data: Buffer, /) -> int:
        try:
            if self.lost is None:
                return _write(self.fileno(), data)
        except OSError as error:
            self.lost = error
            _discard(self.fileno())
        if self.lost is not None and not self.dropped:
            raise OutputError(self.lost) from self.lost
        return memoryview(data).nbytes


def _write(fd: int, data: Buffer) -> int:
    """Write what a descriptor takes; one that does not block is waited for."""
    while True:
        try:
            return os.write(fd, data)
        except BlockingIOError:
            select.select([], [fd], [])


def _discard(fd: int) -> None:
    """Point a descriptor at the null device, also for other libraries that write to it."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, fd)
    os.close(null)


def _opened() -> dict[int, OSError]:
    """Point standard descriptors that are closed at the null device.

    The next file that is opened would take the number, and what is printed be written into it.

    Returns:
        The error of a write to each of those that were closed.
    """
    closed = {}
    for number in range(3):
        try:
            os.fstat(number)
        except OSError as error:
            closed[number] = error
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    return closed


def _marked(stream: TextIO | None, number: int, closed: OSError | None) -> TextIO | None:
    """The same stream on a `_Descriptor`."""
    raw = _Descriptor(number, lost=closed)
    if stream is None:  # closed before we began
        return None if closed is None else io.TextIOWrapper(raw, "utf-8", "backslashreplace")
    try:
        if not isinstance(stream, io.TextIOWrapper) or stream.fileno() != number:
            return stream
    except io.UnsupportedOperation:  # in memory
        return stream
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _descriptor(stream: object) -> _Descriptor | None:
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw if isinstance(raw, _Descriptor) else None


def lost(stream: object) -> OSError | None:
    """What the system reported of a standard stream that cannot be written; ``None`` if it can."""
    raw = _descriptor(stream)
    return None if raw is None else raw.lost


def _drop() -> None:
    """From now on standard output that cannot be written is dropped, also what is buffered."""
    raw = _descriptor(sys.stdout)
    if raw is not None:
        raw.dropped = True


def log(text: str) -> None:
    """Print a line on standard output that is not what the user asked for: it may be lost."""
    try:
        click.echo(text)
    except OutputError:
        _drop()


def say_now(line: str, fd: int = _ERR) -> None:
    """Write a line at once, without waiting for a terminal that is stopped or a pipe that is full.

    It may be called in a thread, and while the main thread is in the middle of a line.
    """
    before = "\r\x1b[K" if os.isatty(fd) else ""  # a bar, which is drawn again below
    with suppress(OSError):
        if select.select([], [fd], [], 0)[1]:
            os.write(fd, f"{before}{line}\n".encode())


def leave_now(error: QcoreError, *, as_json: bool) -> None:
    """As `fail`, for a process that ends at once."""
    if as_json:
        say_now(json.dumps({"error": error.as_json()}, ensure_ascii=False), _OUT)
    else:
        say_now(line_of(error))


def exit_status(run: Callable[[], int]) -> int:
    """The status that `run` returns, or that of output that cannot be written.

    Args:
        run: prints on standard output and error; lets `OutputError` pass.
    """
    closed = _opened()
    sys.stdout = _marked(sys.stdout, _OUT, closed.get(_OUT))
    sys.stderr = _marked(sys.stderr, _ERR, closed.get(_ERR))
    status = 0
    try:
        status = run()
        if sys.stdout is not None:
            sys.stdout.flush()
    except OutputError as error:
        status = status or _unwritten(error.reason)
    finally:
        _drop()  # the flush at exit
    return status


def _unwritten(reason: OSError) -> int:
    if reason.errno == errno.EPIPE:
        return SIGPIPE_STATUS
    full = WriteError(
        "QC-CLI-007",
        "cannot be written",
        field="standard output",
        found=reason.strerror,
        fix="make room, or redirect it elsewhere; files that the command has published are "
        "complete",
    )
    return fail(full, as_json=False)
