"""How the trained turns of a run were rendered: the record that serving needs.

This file decides what ``meta.chat`` of an adapter's and of a merge's manifest holds: the digest of
the chat template, the variables that it must be rendered with to give the prompts that were
trained, and how many turns were trained with and without reasoning.
`qcore.data.rendering.template_kwargs` reads it again.

Code: ``QC-DATA-045`` which mode of thinking was trained; as a warning: variables that differ
between the trained rows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..findings import NOTE, WARNING, DataFinding

if TYPE_CHECKING:
    from ..store.records import PackedExample
    from .masking import Example

_VALUES = 8  #: values of one variable that are counted apart
_OTHERS = "another value"
_UNSET = "unset"


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
        differing: by variable that differs between the trained rows: rows by value.
    """

    template_sha256: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    switch: str = ""
    fixed: bool = False
    turns_with_reasoning: int = 0
    turns_without: int = 0
    differing: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """``meta.chat`` of a manifest."""
        return {
            "template_sha256": self.template_sha256,
            "kwargs": dict(self.kwargs),
            "turns_with_reasoning": self.turns_with_reasoning,
            "turns_without": self.turns_without,
        }

    def _served(self, name: str) -> str:
        return f"{name}={_word(self.kwargs[name])}"

    def findings(self) -> Iterator[DataFinding]:
        """What a user should know of the variables and of the mode of thinking."""
        for name, rows in self.differing.items():
            values = ", ".join(f"{value} in {count}" for value, count in rows.items())
            served = (
                f"the manifest records {self._served(name)}"
                if name in self.kwargs
                else "the manifest records no value, and serving uses the template's default"
            )
            yield DataFinding(
                code="QC-DATA-045", severity=WARNING, row=0, field=f"chat_template_kwargs.{name}",
                message=f"{name} differs between the trained rows ({values}): {served}",
                fix=f"give all rows the same {name}, or pass it when you serve the adapter",
            )  # fmt: skip
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


@dataclass(slots=True)
class TrainedTurns:
    """Counts the trained turns of a run and the variables of their rows.

    Attributes:
        turns: trained turns.
        reasoned: those of them with reasoning.
        rows: rows with trained turns.
    """

    turns: int = 0
    reasoned: int = 0
    rows: int = 0
    _row: int = 0
    _own: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, example: Example | PackedExample) -> None:
        """Count a training sample; all samples of a row come one after the other."""
        self.turns += example.turns
        self.reasoned += example.reasoned
        if self.rows and example.row == self._row:
            return
        self._row = example.row
        self.add_rows(example.variables, 1)

    def add_rows(self, variables: str, rows: int) -> None:
        """Count rows with the same variables of their own.

        Args:
            variables: ``chat_template_kwargs`` as JSON; empty without them.
            rows: how many.
        """
        self.rows += rows
        for name, value in json.loads(variables or "{}").items():
            values, text = self._own.setdefault(name, Counter()), json.dumps(value, sort_keys=True)
            values[text if text in values or len(values) < _VALUES else _OTHERS] += rows

    def shared(self, variables: Mapping[str, Any], switch: str) -> dict[str, Any]:
        """The variables of rows that have one value in all trained rows."""
        differing = self.differing(variables, switch)
        return {
            name: json.loads(next(iter(values)))
            for name, values in self._own.items()
            if name not in differing and values.total() == self.rows
        }

    def differing(self, variables: Mapping[str, Any], switch: str) -> dict[str, dict[str, int]]:
        """The variables with several values: rows by value.

        Args:
            variables: what the user set for all rows.
            switch: variable that turns thinking on and off. A row without it is rendered in the
                mode of each of its turns, so that only two values of it differ.
        """
        found = {}
        for name, own in sorted(self._own.items()):
            values = Counter(own)
            if rest := self.rows - own.total():
                if name in variables:
                    values[json.dumps(variables[name], sort_keys=True)] += rest
                elif name != switch:
                    values[_UNSET] += rest
            if len(values) > 1:
                found[name] = dict(values.most_common())
        return found


def chat_record(
    template_sha256: str,
    variables: Mapping[str, Any],
    switch: str,
    trained: TrainedTurns,
) -> ChatRecord:
    """The record of a run.

    Args:
        template_sha256: digest of the chat template.
        variables: what the user set.
        switch: variable that turns thinking on and off; empty: the template has none.
        trained: the trained turns.
    """
    some, none = trained.reasoned, trained.turns - trained.reasoned
    differing = trained.differing(variables, switch)
    variables = {**variables, **trained.shared(variables, switch)}
    fixed = bool(switch) and switch in variables
    own = {switch: bool(some)} if switch and not fixed and bool(some) != bool(none) else {}
    return ChatRecord(
        template_sha256=template_sha256,
        kwargs={**variables, **own},
        switch=switch,
        fixed=fixed,
        turns_with_reasoning=some,
        turns_without=none,
        differing=differing,
    )


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
