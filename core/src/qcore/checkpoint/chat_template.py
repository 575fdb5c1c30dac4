"""Chat templates, rendered in a bounded process of their own.

This file decides how long a template may take and how its failures are told. A template comes
with a checkpoint and is code: it runs in `qcore.checkpoint.chat_template_worker`, a process with a
sandbox, a memory limit and nothing of this one's environment, killed when it is late. What the
template sees is decided there; which text is trained is `qcore.data.masking`'s business.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Final, Protocol, TypeVar

from ..errors import InputError

SECONDS = 2.0  #: wall time of one render, or of reading the template
START_SECONDS = 20.0  #: wall time until the process is up
_WORKER = Path(__file__).with_name("chat_template_worker.py")
_KEPT = ("TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  #: of the environment

#: Failure by what the worker calls it: code, statement, whether a row can be its cause.
_FAILURES: Mapping[str, tuple[str, str, bool]] = {
    "syntax": ("QC-TEMPLATE-001", "is not a template that parses", False),
    "raised": ("QC-TEMPLATE-002", "refuses the conversation", True),
    "runtime": ("QC-TEMPLATE-003", "fails on the conversation", True),
    "security": ("QC-TEMPLATE-003", "does what the sandbox forbids", True),
    "recursion": ("QC-TEMPLATE-003", "recurses without end", True),
    "timeout": ("QC-TEMPLATE-004", f"takes longer than {SECONDS:.0f} s", False),
    "memory": ("QC-TEMPLATE-005", "takes more memory than a template may", False),
    "output": ("QC-TEMPLATE-006", "renders more text than any context holds", True),
    "died": ("QC-TEMPLATE-007", "ends the process that renders it", False),
}
#: Special tokens of tokenizer_config.json that ``apply_chat_template`` gives by these names.
TOKEN_NAMES: Final = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
#: Variables that transformers gives to every template; that one is read says nothing.
STANDARD_INPUTS: Final = frozenset(
    {
        "messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
        "additional_special_tokens", *TOKEN_NAMES,
    }
)  # fmt: skip


class Conversation(Protocol):
    """What `Template.render_prefixes` needs of a row; `line` is its number, for errors."""

    @property
    def line(self) -> int: ...

    @property
    def messages(self) -> Sequence[Mapping[str, Any]]: ...

    @property
    def tools(self) -> Sequence[Mapping[str, Any]] | None: ...


_C = TypeVar("_C", bound=Conversation)


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


class Template:
    """A chat template and the process that renders it, started on first use.

    The code that creates it closes it, by ``with`` or `close`. The template of a `Checkpoint`
    belongs to the checkpoint; `reopen` gives another one with a process of its own.

    Args:
        text: the template.
        source: the file it came from, for errors.
    """

    def __init__(self, text: str, source: str) -> None:
        self.text = text
        self.source = source
        self._worker: _Worker | None = None

    def __enter__(self) -> Template:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process; another use starts a new one."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def reopen(self) -> Template:
        """The same template with a process of its own, which the caller closes."""
        return Template(self.text, self.source)

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the text without trailing newlines, which files gain and lose."""
        return hashlib.sha256(self.text.rstrip("\n").encode("utf-8", "surrogatepass")).hexdigest()

    def inputs(self) -> frozenset[str]:
        """Variables that the template reads from its caller.

        Raises:
            InputError: ``QC-TEMPLATE-001`` and the limits, as in `render`.
        """
        try:
            return self._open().inputs
        except _Failure as failure:
            raise self._error(failure) from None

    def switches(self) -> frozenset[str]:
        """Variables of its own that the template reads: `inputs` without `STANDARD_INPUTS`.

        Raises:
            InputError: as `inputs`.
        """
        return self.inputs() - STANDARD_INPUTS

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as text, exactly as transformers' ``apply_chat_template`` gives it.

        Args:
            messages: JSON values only.
            tools: function descriptions, JSON values only.
            add_generation_prompt: end with what opens the assistant's next turn.
            variables: further inputs of the template, e.g. ``enable_thinking``.

        Raises:
            InputError: ``QC-TEMPLATE-001`` does not parse, ``-002`` the template raised, ``-003``
                it failed, ``-004`` too slow, ``-005`` too much memory, ``-006`` too much text,
                ``-007`` the process died.
        """
        request = _request(messages, tools, add_generation_prompt, variables)
        try:
            worker = self._open()
            worker.send(request)
            return worker.text()
        except _Failure as failure:
            raise self._error(failure) from None

    def render_prefixes(
        self, rows: Iterable[tuple[_C, Sequence[Prefix]]], **variables: Any
    ) -> Iterator[tuple[_C, list[str | InputError]]]:
        """Render prefixes of many conversations, one request for all prefixes of a row.

        The next row renders while the caller works on the last. Yields each row with a text for
        each of its prefixes, or with the error when the row can be its cause.

        Raises:
            InputError: one that no other row would escape (syntax, time, memory).
        """
        worker: _Worker | None = None
        before: tuple[_C, int] | None = None
        try:
            for row, prefixes in rows:
                done = None if before is None or worker is None else self._finish(worker, *before)
                if worker is None:
                    worker = self._start()
                request = _request(row.messages, row.tools, False, variables)
                worker.send(request | {"prefixes": [prefix.wire() for prefix in prefixes]})
                (before, last) = (row, len(prefixes)), before
                if done is not None and last is not None:
                    yield last[0], done
            if before is not None and worker is not None:
                yield before[0], self._finish(worker, *before)
        except _Failure as failure:
            raise self._error(failure) from None
        finally:
            if worker is not None:
                worker.close()

    def _finish(self, worker: _Worker, row: Conversation, count: int) -> list[str | InputError]:
        return [self._text(worker, row) for _ in range(count)]

    def _text(self, worker: _Worker, row: Conversation) -> str | InputError:
        try:
            return worker.text()
        except _Failure as failure:
            if _FAILURES[failure.kind][2]:
                return self._error(failure)
            raise self._error(failure, f" at the row of line {row.line}") from None

    def _open(self) -> _Worker:
        if self._worker is None or self._worker.dead:
            self._worker = self._start()
        return self._worker

    def _start(self) -> _Worker:
        worker = _Worker()
        weakref.finalize(self, worker.close)
        worker.open(self.text)
        return worker

    def _error(self, failure: _Failure, where: str = "") -> InputError:
        code, what, _ = _FAILURES[failure.kind]
        return InputError(
            code,
            what + where,
            file=self.source,
            field=None if failure.line is None else f"line {failure.line}",
            found=failure.text or None,
            fix="use the template that came with the weights"
            if code not in ("QC-TEMPLATE-002", "QC-TEMPLATE-006")
            else None,
        )


class _Failure(Exception):
    """What the worker says, or what became of it."""

    def __init__(self, kind: str, text: str = "", line: int | None = None) -> None:
        super().__init__(kind)
        self.kind = kind
        self.text = text
        self.line = line


class _Worker:
    """One process of `render_worker` and the frames to and from it."""

    def __init__(self) -> None:
        self.inputs: frozenset[str] = frozenset()
        self.dead = False
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={name: os.environ[name] for name in _KEPT if name in os.environ},
        )

    def open(self, template: str) -> None:
        """Wait until the process is up and has read the template."""
        self._answer(START_SECONDS)
        self.send({"template": template})
        self.inputs = frozenset(self._answer(SECONDS)["inputs"])

    def send(self, request: dict[str, Any]) -> None:
        """Write one request; the process is idle, so it reads it."""
        body = json.dumps(request).encode("ascii")
        try:
            stream = _pipe(self._process.stdin)
            stream.write(len(body).to_bytes(8, "little") + body)
            stream.flush()
        except OSError:
            raise self._lost() from None

    def text(self) -> str:
        """The text that answers the last request."""
        text: str = self._answer(SECONDS)["text"]
        return text

    def close(self) -> None:
        """End the process."""
        self.dead = True
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                try:
                    stream.close()
                except OSError:  # what was buffered has nobody left to read it
                    continue

    def _answer(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        size = int.from_bytes(self._read(8, deadline), "little")
        answer: dict[str, Any] = json.loads(self._read(size, deadline))
        if "error" in answer:
            raise _Failure(answer["error"], answer["text"], answer["line"])
        return answer

    def _read(self, size: int, deadline: float) -> bytes:
        descriptor = _pipe(self._process.stdout).fileno()
        parts: list[bytes] = []
        while size:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([descriptor], [], [], left)[0]:
                self.close()
                raise _Failure("timeout")
            part = os.read(descriptor, min(size, 1 << 20))
            if not part:
                raise self._lost()
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _lost(self) -> _Failure:
        self.close()
        return _Failure("died", f"exit status {self._process.returncode}")


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None, "the process was started with pipes"
    return stream


def _request(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        **variables,
        "messages": list(messages),
        "tools": None if tools is None else list(tools),
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
