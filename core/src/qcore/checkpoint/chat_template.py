"""Renders chat templates in a subprocess with limits on time and memory, and reports failures.

This file decides how long a template may run and which error each of its failures raises. A
template is untrusted code that comes with a checkpoint. It runs in a separate process
(`qcore.checkpoint.chat_template_worker`) with a sandbox, a memory limit and an almost empty
environment, which is killed when it exceeds its time limit. The worker decides what the template
sees; `qcore.data.rendering.masking` decides which text is trained.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
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

SECONDS = 30.0  #: wall time of one render; the worker itself bounds processor time
START_SECONDS = 20.0  #: wall time until the process is ready
_WORKER = Path(__file__).with_name("chat_template_worker.py")
#: Environment variables that the worker inherits.
_INHERITED = ("TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")

#: Failure kind, as the worker names it -> (code, statement, whether a row can cause it).
_FAILURES: Mapping[str, tuple[str, str, bool]] = {
    "syntax": ("QC-TEMPLATE-001", "cannot be parsed as a Jinja template", False),
    "raised": ("QC-TEMPLATE-002", "refuses the conversation", True),
    "runtime": ("QC-TEMPLATE-003", "fails on the conversation", True),
    "security": ("QC-TEMPLATE-003", "uses a feature that the sandbox forbids", True),
    "recursion": ("QC-TEMPLATE-003", "exceeds the recursion limit", True),
    "timeout": ("QC-TEMPLATE-004", "takes more than 2 s of processor time", False),
    "memory": ("QC-TEMPLATE-005", "exceeds the memory limit for templates", False),
    "output": ("QC-TEMPLATE-006", "renders more text than fits into any context", True),
    "died": ("QC-TEMPLATE-007", "crashes the process that renders it", False),
}
#: Special tokens of tokenizer_config.json that ``apply_chat_template`` passes by these names.
TOKEN_NAMES: Final = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
#: Variables that transformers passes to every template, so they are not the template's own.
STANDARD_INPUTS: Final = frozenset(
    {
        "messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
        "additional_special_tokens", *TOKEN_NAMES,
    }
)  # fmt: skip


class Conversation(Protocol):
    """The fields of a row that `Template.render_prefixes` reads; errors use `line` and `unit`."""

    @property
    def line(self) -> int: ...

    @property
    def unit(self) -> str: ...

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
    """A chat template and its worker process, which starts on first use.

    The code that creates a template must close it, by ``with`` or `close`. A `Checkpoint` closes
    its own template; `reopen` returns a copy with a separate process.

    Args:
        text: the template.
        source: the file that the template was read from, for errors.
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
        """End the process. The next use starts a new one."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def reopen(self) -> Template:
        """Return the same template with a separate process, which the caller must close."""
        return Template(self.text, self.source)

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the text without trailing newlines, which tools add and remove."""
        return hashlib.sha256(self.text.rstrip("\n").encode("utf-8", "surrogatepass")).hexdigest()

    def inputs(self) -> frozenset[str]:
        """Return the variables that the template reads from its caller.

        Raises:
            InputError: ``QC-TEMPLATE-001`` or a limit, as in `render`.
        """
        try:
            return self._open().inputs
        except _Failure as failure:
            raise self._error(failure) from None

    def switches(self) -> frozenset[str]:
        """Return the template-specific variables: `inputs` without `STANDARD_INPUTS`.

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
        """Render a conversation, exactly as transformers' ``apply_chat_template`` does.

        Args:
            messages: messages in the format of ``apply_chat_template``, JSON values only.
            tools: function descriptions, JSON values only.
            add_generation_prompt: end with the text that opens the assistant's next turn.
            variables: further inputs of the template, e.g. ``enable_thinking``.

        Raises:
            InputError: ``QC-TEMPLATE-001`` the template does not parse, ``-002`` it called
                ``raise_exception``, ``-003`` it failed, ``-004`` it exceeded the time limit,
                ``-005`` the memory limit or ``-006`` the output limit, ``-007`` its process died.
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

        The next row renders while the caller processes the current one.

        Yields:
            Each row with a text for each of its prefixes, or with the error if the row can cause
            it.

        Raises:
            InputError: an error that every row would hit (syntax, time or memory limit).
        """
        worker: _Worker | None = None
        previous: tuple[_C, int] | None = None
        try:
            for row, prefixes in rows:
                finished = (
                    None if previous is None or worker is None else self._finish(worker, *previous)
                )
                if worker is None:
                    worker = self._start()
                request = _request(row.messages, row.tools, False, variables)
                worker.send(request | {"prefixes": [prefix.wire() for prefix in prefixes]})
                (previous, rendered) = (row, len(prefixes)), previous
                if finished is not None and rendered is not None:
                    yield rendered[0], finished
            if previous is not None and worker is not None:
                yield previous[0], self._finish(worker, *previous)
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
            raise self._error(failure, f" on the row at {row.unit} {row.line}") from None

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
    """A failure that the worker reported, or the end of the worker itself."""

    def __init__(self, kind: str, text: str = "", line: int | None = None) -> None:
        super().__init__(kind)
        self.kind = kind
        self.text = text
        self.line = line


class _Worker:
    """One process of `chat_template_worker` and its message pipes."""

    def __init__(self) -> None:
        self.inputs: frozenset[str] = frozenset()
        self.dead = False
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={name: os.environ[name] for name in _INHERITED if name in os.environ},
        )

    def open(self, template: str) -> None:
        """Wait until the process is ready and has parsed the template."""
        self._answer(START_SECONDS)
        self.send({"template": template})
        self.inputs = frozenset(self._answer(SECONDS)["inputs"])

    def send(self, request: dict[str, Any]) -> None:
        """Write one request. The process must be idle, so that the write does not block."""
        body = json.dumps(request).encode("ascii")
        try:
            stream = _pipe(self._process.stdin)
            stream.write(len(body).to_bytes(8, "little") + body)
            stream.flush()
        except OSError:
            raise self._lost() from None

    def text(self) -> str:
        """Return the text that answers the last request."""
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
                except OSError:  # buffered bytes cannot be flushed: the reader is gone
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
        chunks: list[bytes] = []
        while size:
            remaining = max(0.0, deadline - time.monotonic())
            if not select.select([descriptor], [], [], remaining)[0]:
                self.close()
                raise _Failure("timeout")
            chunk = os.read(descriptor, min(size, 1 << 20))
            if not chunk:
                raise self._lost()
            chunks.append(chunk)
            size -= len(chunk)
        return b"".join(chunks)

    def _lost(self) -> _Failure:
        self.close()
        status = self._process.returncode
        if status in (-signal.SIGPROF, -signal.SIGALRM):  # the worker's own limits on time
            return _Failure("timeout")
        return _Failure("died", f"exit status {status}")


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
