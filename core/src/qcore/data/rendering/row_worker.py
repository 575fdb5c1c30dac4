"""A process that renders rows for `qcore.data.rendering.row_pool`: its end of the pipes.

This file decides how records become outcomes in another process. It is started as a program, and
not forked, because the libraries of the parent have threads. Messages are eight bytes of length,
little endian, then a pickle: the setup and the template, then a chunk of records each. Each chunk
is answered with its outcomes, in order. The process ends with its stdin, so that it never outlives
its parent.

A worker reads no media: a row that has some is left to the parent, whose reader holds the cache
and decodes in a process of its own.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, BinaryIO

from ...errors import Failure, contained
from .row_messages import pack, send, unpack

if TYPE_CHECKING:
    from ..reading import Chunk
    from .row_renderer import RowOutcome


def _receive(stream: BinaryIO, inbox: SimpleQueue[bytes]) -> None:
    """Put messages into a queue, so that the parent never waits to write; end with the parent."""
    while True:
        head = stream.read(8)
        size = int.from_bytes(head, "little")
        body = stream.read(size) if len(head) == 8 else b""
        if len(head) < 8 or len(body) < size:
            os._exit(0)
        inbox.put(body)


def _serve(inbox: SimpleQueue[bytes], out: BinaryIO) -> None:
    """Answer chunks until the process ends."""
    from ...checkpoint.chat_template import Template
    from ..formats import load_formats
    from .row_renderer import RowRenderer

    setup, text, source = unpack(inbox.get())
    pending: deque[Chunk] = deque()

    def chunks() -> Iterator[Chunk | None]:
        while True:
            try:
                body = inbox.get_nowait() if pending else inbox.get()
            except Empty:
                yield None  # finish what there is: the parent waits for it
                continue
            chunk = unpack(body)
            pending.append(chunk)
            yield chunk

    formats = load_formats(kinds=setup.context.kinds, unread=setup.unread)
    with Template(text, source) as template, RowRenderer(setup, template, formats) as rows:
        for outcomes in rows.outcomes(chunks()):
            pending.popleft()
            send(out, pack([_sent(one) for one in outcomes]))


def _sent(outcome: RowOutcome) -> tuple[Any, ...]:
    """What the parent needs of an outcome, by position; `outcome_of` reads it."""
    from ..store.records import PackedExample

    if outcome.deferred:
        return (True,)
    examples = tuple(
        one if isinstance(one, PackedExample) else PackedExample.of(one) for one in outcome.examples
    )
    return (
        False, outcome.format, outcome.ignored, outcome.findings, outcome.losses, outcome.error,
        outcome.tokens, outcome.fatal, outcome.asked, outcome.cut, examples,
    )  # fmt: skip


def outcome_of(sent: tuple[Any, ...]) -> RowOutcome:
    """The outcome that a process has sent."""
    from .row_renderer import RowOutcome

    deferred, *values = sent
    if deferred:
        return RowOutcome(deferred=True)
    form, ignored, findings, losses, error, tokens, fatal, asked, cut, examples = values
    return RowOutcome(
        format=form, ignored=ignored, findings=findings, losses=losses, error=error, tokens=tokens,
        fatal=fatal, asked=asked, cut=cut, examples=examples,
    )  # fmt: skip


def _error(failure: Failure) -> bytes:
    """The answer to a chunk that failed for another reason than its rows."""
    made: Any = contained(lambda: pack(failure.error))
    return pack(str(failure)) if isinstance(made, Failure) else made


def main() -> None:
    """Serve the parent on stdin and stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a plugin prints must not get between the answers
    inbox: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_receive, args=(sys.stdin.buffer, inbox), daemon=True).start()
    failure = contained(lambda: _serve(inbox, out))
    if isinstance(failure, Failure):
        send(out, _error(failure))
    os._exit(1)


if __name__ == "__main__":
    main()
