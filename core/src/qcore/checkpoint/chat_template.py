"""Renders chat templates in a subprocess with limits on time and memory, and reports failures.

This file decides how long a template may run and which error each of its failures raises. A
template is untrusted code that comes with a checkpoint. It runs in a separate process
(`qcore.checkpoint.chat_template_worker`) with a sandbox, a memory limit and an almost empty
environment, which is killed when it exceeds its time limit. The worker decides what the template
sees; `qcore.data.rendering.masking` decides which text is trained.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from ..errors import InputError
from .template_process import Asked, Conversation, Prefix, RenderFailure, TemplateProcess

__all__ = ["STANDARD_INPUTS", "TOKEN_NAMES", "Prefix", "PrefixBatches", "Template"]

#: Failure kind, as the worker names it -> (code, statement, whether a row can cause it).
_FAILURES: Mapping[str, tuple[str, str, bool]] = {
    "syntax": ("QC-TEMPLATE-001", "cannot be parsed as a Jinja template", False),
    "raised": ("QC-TEMPLATE-002", "refuses the conversation", True),
    "runtime": ("QC-TEMPLATE-003", "fails on the conversation", True),
    "security": ("QC-TEMPLATE-003", "uses a feature that the sandbox forbids", True),
    "recursion": ("QC-TEMPLATE-003", "exceeds the recursion limit", True),
    "timeout": ("QC-TEMPLATE-004", "takes more than 2 s of processor time", False),
    "slow": ("QC-TEMPLATE-004", "takes more than 30 s for all turns of the conversation", True),
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
        self._worker: TemplateProcess | None = None

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
        except RenderFailure as failure:
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
        row = _Row(messages, tools)
        asked = [(row, [Prefix(len(messages), add_generation_prompt)])]
        try:
            process = self._open()
            process.ask(asked, variables)
            (text,) = process.texts(1)
        except RenderFailure as failure:
            raise self._error(failure) from None
        if isinstance(text, RenderFailure):
            raise self._error(text)
        return text

    def batches(self, **variables: Any) -> PrefixBatches:
        """Renders prefixes of many conversations in a process of its own; the caller closes it.

        Args:
            variables: further inputs of the template, for all rows.
        """
        return PrefixBatches(self, variables)

    def _open(self) -> TemplateProcess:
        if self._worker is None or self._worker.dead:
            self._worker = self._start()
        return self._worker

    def _start(self) -> TemplateProcess:
        worker = TemplateProcess()
        weakref.finalize(self, worker.close)
        worker.open(self.text)
        return worker

    def _refusal(self, failure: RenderFailure, row: Conversation) -> InputError:
        """The error of a row, if a row can cause it.

        Raises:
            InputError: every row would hit it.
        """
        if _FAILURES[failure.kind][2]:
            return self._error(failure)
        raise self._error(failure, f" on the row at {row.unit} {row.line}") from None

    def _error(self, failure: RenderFailure, where: str = "") -> InputError:
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


@dataclass(frozen=True, slots=True)
class _Row:
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    line: int = 0
    unit: str = "line"


class PrefixBatches:
    """Renders prefixes of conversations, many rows in one request.

    A batch renders while the caller processes the one before it: `ask` for it, then process the
    answers of the last one. Answers must be taken before the next batch is asked for.

    Args:
        template: what renders.
        variables: inputs of the template, for all rows.
    """

    def __init__(self, template: Template, variables: Mapping[str, Any]) -> None:
        self._template = template
        self._variables = variables
        self._process: TemplateProcess | None = None
        self._asked: Sequence[Asked] = ()

    def __enter__(self) -> PrefixBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def ask(self, rows: Sequence[Asked]) -> None:
        """Start to render the prefixes of some rows.

        Raises:
            InputError: as `answers`.
        """
        assert not self._asked, "the answers of the last batch were not taken"
        self._asked = rows
        if rows:
            try:
                self._send(rows)
            except RenderFailure:  # `answers` finds the row
                self.close()

    def answers(self) -> list[list[str | InputError]]:
        """The texts of the rows that were asked for, one for each prefix.

        An error that the row can cause takes the place of the text.

        Raises:
            InputError: an error that every row would hit (syntax, time or memory limit); it names
                the row at which it occurred.
        """
        rows, self._asked = self._asked, ()
        done: list[list[str | InputError]] = []
        try:
            for row, prefixes in rows:
                done.append(self._taken(row, prefixes))
        except RenderFailure:
            # Answers are buffered, so that those of rows before the one at fault may be lost.
            done = [self._alone(row, prefixes) for row, prefixes in rows]
        return done

    def _send(self, rows: Sequence[Asked]) -> None:
        if self._process is None:
            self._process = self._template._start()
        self._process.ask(rows, self._variables)

    def _taken(self, row: Conversation, prefixes: Sequence[Prefix]) -> list[str | InputError]:
        if self._process is None:
            raise RenderFailure("died")
        return [
            self._template._refusal(made, row) if isinstance(made, RenderFailure) else made
            for made in self._process.texts(len(prefixes))
        ]

    def _alone(self, row: Conversation, prefixes: Sequence[Prefix]) -> list[str | InputError]:
        """Render one row by itself, after a process ended that rendered several."""
        if self._process is not None and self._process.dead:
            self.close()
        try:
            self._send([(row, prefixes)])
            return self._taken(row, prefixes)
        except RenderFailure as failure:
            self.close()
            raise self._template._error(failure, f" on the row at {row.unit} {row.line}") from None
