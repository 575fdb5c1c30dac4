"""The parent's side of the process that renders chat templates: start, messages, limits, end.

This file decides how requests and answers are carried and what ends a process.
`qcore.checkpoint.chat_template` decides which error each failure raises,
`qcore.checkpoint.chat_template_worker` what a template may do.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, Protocol

from ..io.stop_signals import shielded

SECONDS: Final = 90.0  #: wall time without an answer; the worker itself bounds processor time
START_SECONDS: Final = 20.0  #: wall time until the process is ready
_WORKER = Path(__file__).with_name("chat_template_worker.py")
#: Environment variables that the worker inherits.
_INHERITED = ("TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
_BLOCK: Final = 1 << 20
_HEAD: Final = 16  # bytes before each part: shared characters, bytes that follow
_FAILED: Final = (1 << 64) - 1  # in place of the shared characters


class Conversation(Protocol):
    """The fields of a row that are rendered; errors use `line` and `unit`."""

    @property
    def line(self) -> int: ...

    @property
    def unit(self) -> str: ...

    @property
    def messages(self) -> Sequence[Mapping[str, Any]]: ...

    @property
    def tools(self) -> Sequence[Mapping[str, Any]] | None: ...


@dataclass(frozen=True, slots=True)
class Prefix:
    """A rendering of the first messages of a conversation.

    Attributes:
        count: number of messages.
        prompt: whether the generation prompt follows, as in serving.
        variables: variables of the template, over those of all rows.
    """

    count: int
    prompt: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)

    def wire(self) -> list[Any]:
        """The prefix as the worker reads it."""
        return [self.count, self.prompt, dict(self.variables)]


Asked = tuple[Conversation, Sequence[Prefix]]  #: a row, and the renderings that it needs


class RenderFailure(Exception):
    """A failure that the worker reported, or the end of the worker itself.

    Attributes:
        kind: as the worker names it.
        text: what the template or the system says.
        line: line of the template.
    """

    def __init__(self, kind: str, text: str = "", line: int | None = None) -> None:
        super().__init__(kind)
        self.kind = kind
        self.text = text
        self.line = line


class TemplateProcess:
    """One process of `chat_template_worker` and its message pipes.

    Attributes:
        inputs: variables that the template reads from its caller.
        dead: whether the process has ended.
    """

    def __init__(self) -> None:
        self.inputs: frozenset[str] = frozenset()
        self.dead = False
        self._buffer = bytearray()
        with shielded():
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={name: os.environ[name] for name in _INHERITED if name in os.environ},
            )

    def open(self, template: str) -> None:
        """Wait until the process is ready and has parsed the template.

        Raises:
            RenderFailure: the template does not parse, or the process ended.
        """
        self._answer(START_SECONDS)
        self._send({"template": template})
        self.inputs = frozenset(self._answer(SECONDS)["inputs"])

    def ask(self, rows: Sequence[Asked], variables: Mapping[str, Any]) -> None:
        """Send one request for all prefixes of some rows.

        The process must be idle, so that the write does not block.

        Raises:
            RenderFailure: the process ended.
        """
        self._send(
            {
                "variables": {**variables, "documents": None},
                "rows": [
                    [
                        list(row.messages),
                        None if row.tools is None else list(row.tools),
                        [prefix.wire() for prefix in prefixes],
                    ]
                    for row, prefixes in rows
                ],
            }
        )

    def texts(self, count: int) -> Iterator[str | RenderFailure]:
        """The next `count` renderings of one row that was asked for.

        Raises:
            RenderFailure: the process ended.
        """
        last = ""
        for _ in range(count):
            deadline = time.monotonic() + SECONDS
            head = self._read(_HEAD, deadline)
            shared = int.from_bytes(head[:8], "little")
            body = self._read(int.from_bytes(head[8:], "little"), deadline).decode()
            if shared == _FAILED:
                yield _failure(json.loads(body))
            else:
                last = last[:shared] + body
                yield last

    def close(self) -> None:
        """End the process."""
        self.dead = True
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                try:
                    stream.close()
                except OSError:  # buffered bytes cannot be flushed: the reader is gone
                    continue

    def _send(self, request: dict[str, Any]) -> None:
        body = json.dumps(request).encode("ascii")
        try:
            stream = _pipe(self._process.stdin)
            stream.write(len(body).to_bytes(8, "little") + body)
            stream.flush()
        except OSError:
            raise self._lost() from None

    def _answer(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        size = int.from_bytes(self._read(8, deadline), "little")
        answer: dict[str, Any] = json.loads(self._read(size, deadline))
        if "error" in answer:
            raise _failure(answer)
        return answer

    def _read(self, size: int, deadline: float) -> bytes:
        descriptor, buffer = _pipe(self._process.stdout).fileno(), self._buffer
        while len(buffer) < size:
            remaining = max(0.0, deadline - time.monotonic())
            if not select.select([descriptor], [], [], remaining)[0]:
                self.close()
                raise RenderFailure("timeout")
            chunk = os.read(descriptor, _BLOCK)
            if not chunk:
                raise self._lost()
            buffer += chunk
        taken = bytes(buffer[:size])
        del buffer[:size]
        return taken

    def _lost(self) -> RenderFailure:
        self.close()
        status = self._process.returncode
        if status in (-signal.SIGPROF, -signal.SIGALRM):  # the worker's own limits on time
            return RenderFailure("timeout")
        return RenderFailure("died", f"exit status {status}")


def _failure(answer: Mapping[str, Any]) -> RenderFailure:
    return RenderFailure(answer["error"], answer["text"], answer["line"])


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None, "the process was started with pipes"
    return stream
