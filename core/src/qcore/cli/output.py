"""Exit status if stdout or stderr cannot be written: broken pipe (141) or full disk (73).

This file decides which failed writes are those of the command line's own output, and the exit
status of a process that ends by one. It follows Python's note on SIGPIPE: the error is caught, the
streams are pointed at the null device so that the flush at exit cannot fail again, and the process
ends. What is printed, and how any other error ends the process, is left to `main`.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from ..errors import WriteError
from .common import fail

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: The status that shells report for a process that SIGPIPE ended: 128 + 13.
SIGPIPE_STATUS = 141


class OutputError(OSError):
    """Standard output or error cannot be written.

    It has no ``errno``: click and rich would take a broken pipe for the end of the process, and so
    could not tell one of the output from one of a socket.

    Args:
        reason: what the system reports.
    """

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class _Descriptor(io.FileIO):
    """The file descriptor of a standard stream."""

    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError(error) from error


def _marked(stream: TextIO | None) -> TextIO | None:
    """The same stream, whose failed writes raise `OutputError`."""
    if not isinstance(stream, io.TextIOWrapper):  # None: closed before we began
        return stream
    try:
        raw = _Descriptor(stream.fileno(), "wb", closefd=False)
    except io.UnsupportedOperation:  # in memory
        return stream
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def exit_status(run: Callable[[], int]) -> int:
    """The status that `run` returns, or that of output that cannot be written.

    Args:
        run: prints on standard output and error; lets `OutputError` pass.
    """
    sys.stdout, sys.stderr = _marked(sys.stdout), _marked(sys.stderr)
    try:
        status = run()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except OutputError as error:
        return _unwritten(error.reason)
    return status


def _unwritten(reason: OSError) -> int:
    left = reason.errno == errno.EPIPE
    with suppress(OSError):
        if not left:
            full = WriteError(
                "QC-CLI-007",
                "cannot be written",
                field="standard output",
                found=reason.strerror,
                fix="make room, or redirect it elsewhere",
            )
            fail(full, as_json=False)
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(null, stream.fileno())
    return SIGPIPE_STATUS if left else WriteError.exit_code
