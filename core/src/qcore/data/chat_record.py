"""How the trained turns of a run were rendered: the record that serving needs.

This file decides what ``meta.chat`` of an adapter's and of a merge's manifest holds: the digest of
the chat template, the variables that it must be rendered with to give the prompts that were
trained, and how many turns were trained with and without reasoning. `qcore.data.template_kwargs`
reads it again.

Code: ``QC-DATA-045`` which mode of thinking was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .findings import NOTE, DataFinding


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRecord:
    """How trained turns were rendered.

    Attributes:
        template_sha256: digest of the chat template.
        kwargs: variables that serving must render it with.
        switch: variable that turns thinking on and off; empty: the template has none.
        fixed: whether the user set `switch`.
        turns_with_reasoning: trained turns that are served with thinking.
        turns_without: the others.
    """

    template_sha256: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    switch: str = ""
    fixed: bool = False
    turns_with_reasoning: int = 0
    turns_without: int = 0

    def as_json(self) -> dict[str, Any]:
        """``meta.chat`` of a manifest."""
        return {
            "template_sha256": self.template_sha256,
            "kwargs": dict(self.kwargs),
            "turns_with_reasoning": self.turns_with_reasoning,
            "turns_without": self.turns_without,
        }

    def findings(self) -> Iterator[DataFinding]:
        """What a user should know of the mode of thinking."""
        some, none = self.turns_with_reasoning, self.turns_without
        if not self.switch:
            return
        counts = f"{some} of {some + none} trained turns have reasoning"
        if self.fixed:
            message = f"{counts}; {self.switch}={_word(self.kwargs[self.switch])} as you set it"
        elif some and none:
            message = (
                f"{counts} and are trained as {self.switch}=true is served, the others as "
                f"{self.switch}=false; the adapter keeps the template's default"
            )
        else:
            message = f"{counts}: they are trained as {self.switch}={_word(bool(some))} is served"
            message += ", which the manifest records and generate uses"
        yield DataFinding(code="QC-DATA-045", severity=NOTE, row=0, field="", message=message)


def chat_record(
    template_sha256: str,
    variables: Mapping[str, Any],
    switch: str,
    turns: tuple[int, int],
) -> ChatRecord:
    """The record of a run.

    Args:
        template_sha256: digest of the chat template.
        variables: what the user set.
        switch: variable that turns thinking on and off; empty: the template has none.
        turns: trained turns with and without reasoning.
    """
    some, none = turns
    fixed = bool(switch) and switch in variables
    own = {switch: bool(some)} if switch and not fixed and bool(some) != bool(none) else {}
    return ChatRecord(
        template_sha256=template_sha256,
        kwargs={**variables, **own},
        switch=switch,
        fixed=fixed,
        turns_with_reasoning=some,
        turns_without=none,
    )


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
