"""Rendering of rows in several processes: chunks go out, outcomes come back in order.

This file decides how many processes there are, how many chunks are under way, and what the end of
a process means. The outcomes and their order do not depend on the number of processes.
`qcore.data.rendering.row_worker` is a process's own side.

Code: ``QC-DATA-079`` a process that renders rows ended.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import IO, TYPE_CHECKING, BinaryIO, Final, cast

from ...errors import Failure, InputError, QcoreError, contained
from ...io.cores import available_cores
from ...io.stop_signals import shielded
from .row_messages import pack, send, unpack
from .row_worker import outcome_of
from .text_reader import TextReader

if TYPE_CHECKING:
    from ...checkpoint.chat_template import Template
    from ..reading import Chunk
    from ..sources.source import Source
    from .row_renderer import RowOutcome, RowSetup

_SMALL: Final = 8 << 20  # bytes of data that one process has read before others have started
_MOST: Final = 32  # processes; more would wait for the parent
_AHEAD: Final = 2  # chunks that a process has: one to render, one to tokenize
_WINDOW: Final = 4  # chunks for each process that may wait for an earlier one
_BLOCK: Final = 1 << 20
_MAIN: Final = "from qcore.data.rendering.row_worker import main; main()"


def worker_count(wanted: int, sources: Sequence[Source]) -> int:
    """The number of processes for some sources; 1: this one.

    Args:
        wanted: the setting ``dataset_num_proc``.
        sources: what is read.
    """
    if wanted in (0, 1):
        return 1
    size = sum(path.stat().st_size for source in sources for path in source.files if path.exists())
    if wanted < 0:
        return 1 if size < _SMALL else min(_MOST, available_cores())
    return wanted


def packed(setup: RowSetup, template: Template) -> bytes | None:
    """What a process needs to render rows; ``None`` if a plugin's part of it cannot be pickled."""
    reader = setup.reader
    if reader is not None:
        stand_in = TextReader(tuple(reader.kinds), tuple(reader.keys), tuple(reader.control))
        setup = replace(setup, reader=stand_in)
    made = contained(lambda: pack((setup, template.text, template.source)))
    return None if isinstance(made, Failure) else made


class RowPool:
    """Processes that render rows; a context manager that ends them.

    Args:
        setup: from `packed`.
        count: number of processes.
    """

    def __init__(self, setup: bytes, count: int) -> None:
        self._setup = setup
        self._count = count
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> RowPool:
        for _ in range(self._count):
            worker = _Worker()
            self._workers.append(worker)
            self._selector.register(worker.output, selectors.EVENT_READ, worker)
            worker.send(self._setup)
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        for worker in self._workers:
            worker.close()
        self._workers = []

    def outcomes(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, list[RowOutcome]]]:
        """Yield each chunk with what became of its rows, in order.

        Raises:
            QcoreError: of `chunks`, after the outcomes of all chunks before it.
            InputError: ``QC-DATA-079``.
        """
        source: Iterator[Chunk] | None = iter(chunks)
        under_way: deque[_Chunk] = deque()
        failed: QcoreError | None = None
        while True:
            while source is not None and len(under_way) < _WINDOW * self._count:
                worker = min(self._workers, key=lambda one: len(one.waiting))
                if len(worker.waiting) >= _AHEAD:
                    break
                try:
                    chunk = next(source, None)
                except QcoreError as error:
                    chunk, failed = None, error
                if chunk is None:
                    source = None
                    break
                under_way.append(_Chunk(chunk))
                worker.ask(under_way[-1])
            if not under_way:
                break
            if under_way[0].answer is None:
                for key, _ in self._selector.select():
                    key.data.receive()
                continue
            done = under_way.popleft()
            assert done.answer is not None
            yield done.chunk, _unpacked(done.answer)
        if failed is not None:
            raise failed


def _unpacked(answer: bytes) -> list[RowOutcome]:
    made = unpack(answer)
    if isinstance(made, list):
        return list(map(outcome_of, made))
    raise made if isinstance(made, BaseException) else RuntimeError(made)


class _Chunk:
    """A chunk that is under way, and its answer."""

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.answer: bytes | None = None


class _Worker:
    """One process and its pipes.

    Attributes:
        output: descriptor of the pipe that it answers on.
        waiting: chunks that it has not answered, in order.
    """

    def __init__(self) -> None:
        with shielded():
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _MAIN],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # The process imports what this one would, whatever was added to its path.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        weakref.finalize(self, self._process.kill)
        self.output = _pipe(self._process.stdout).fileno()
        self.waiting: deque[_Chunk] = deque()
        self._buffer = bytearray()

    def ask(self, chunk: _Chunk) -> None:
        """Send a chunk."""
        self.waiting.append(chunk)
        self.send(pack(chunk.chunk))

    def receive(self) -> None:
        """Take what the process has answered; called when there is something to read.

        Raises:
            InputError: ``QC-DATA-079``.
        """
        block = os.read(self.output, _BLOCK)
        if not block:
            raise self._ended()
        self._buffer += block
        while len(self._buffer) >= 8:
            end = 8 + int.from_bytes(self._buffer[:8], "little")
            if len(self._buffer) < end:
                return
            answer = bytes(self._buffer[8:end])
            del self._buffer[:end]
            self.waiting.popleft().answer = answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            try:
                _pipe(stream).close()
            except OSError:  # buffered bytes cannot be flushed: the reader is gone
                continue

    def send(self, body: bytes) -> None:
        """Send a message.

        Raises:
            InputError: ``QC-DATA-079``.
        """
        try:
            send(_pipe(self._process.stdin), body)
        except OSError:
            raise self._ended() from None

    def _ended(self) -> InputError:
        """The error of the rows that the process had."""
        status = self._process.wait()
        found = f"exit status {status}"
        if status < 0:
            found += f" ({signal.Signals(-status).name})"
        rows = [numbered for one in self.waiting for numbered in one.chunk]
        return InputError(
            "QC-DATA-079",
            "the process that rendered these rows ended",
            file=rows[0].path if rows else None,
            field=f"rows {rows[0].row} to {rows[-1].row}" if rows else None,
            found=found,
            fix="set dataset_num_proc=1 to find the row, or to a smaller number if memory ran out",
        )


def _pipe(stream: IO[bytes] | None) -> BinaryIO:
    assert stream is not None, "the process was started with pipes"
    return cast(BinaryIO, stream)
