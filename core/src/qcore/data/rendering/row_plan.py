"""The trained turns of a row: which assistant messages are trained, and how they are rendered.

This file decides which turns are trained (marks in the row, then the source, then ``turns``), which
mode of thinking each is rendered in, and which prefixes of the conversation the template renders.
`qcore.data.rendering.samples` makes samples of the renderings.

Code: ``QC-DATA-012`` no trained turn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...api.media import RowError
from ...api.records import ChatFormat
from ...checkpoint.chat_template import Prefix
from ..policies import AS_RENDERED, DROP, LAST, Policies
from ..rows import thinking_marks

if TYPE_CHECKING:
    from ..rows import ChatRow


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedTurn:
    """An assistant message that is trained.

    Attributes:
        index: of the message.
        reasoned: whether it has reasoning, so that it is served with thinking.
        variables: variables of the template that make it so.
    """

    index: int
    reasoned: bool
    variables: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlan:
    """What is rendered of a row.

    Attributes:
        row: the row; its reasoning is removed with ``reasoning=drop``.
        policies: in force for it.
        turns: the trained turns, in order.
        untrained: by index of the other assistant messages: why they are not trained.
    """

    row: ChatRow
    policies: Policies
    turns: tuple[TrainedTurn, ...]
    untrained: Mapping[int, str]

    @property
    def line(self) -> int:
        """Number of the row in its file, for errors of the template."""
        return self.row.line

    @property
    def unit(self) -> str:
        """What `line` counts."""
        return self.row.unit

    @property
    def messages(self) -> Sequence[Mapping[str, Any]]:
        """Messages of the row."""
        return self.row.messages

    @property
    def tools(self) -> Sequence[Mapping[str, Any]] | None:
        """Tools of the row."""
        return self.row.tools

    def prefixes(self) -> list[Prefix]:
        """The renderings that `drafts` needs, in its order."""
        if self.policies.history == AS_RENDERED:
            return [Prefix(len(self.row.messages), variables=self.turns[-1].variables)]
        return [
            prefix
            for turn in self.turns
            for prefix in (
                Prefix(turn.index + 1, variables=turn.variables),
                Prefix(turn.index, prompt=True, variables=turn.variables),
            )
        ]


def plan_row(
    row: ChatRow, policies: Policies, chat_format: ChatFormat, switch: str, fixed: bool
) -> RowPlan:
    """Choose the trained turns of a row and how they are rendered.

    Args:
        row: the row.
        policies: in force for it.
        chat_format: the format of rendered conversations.
        switch: variable of the template that turns thinking on and off; empty: there is none.
        fixed: whether the user set `switch` for all rows.

    Raises:
        RowError: ``QC-DATA-012`` no trained turn.
    """
    if policies.reasoning == DROP:
        row = replace(row, messages=tuple(_without_reasoning(row.messages, chat_format)))
    said = [n for n, m in enumerate(row.messages) if m["role"] == chat_format.assistant]
    untrained = {n: why for n in said if (why := _why_not(row, n, said, policies))}
    trained = [n for n in said if n not in untrained]
    if not trained:
        raise RowError(
            "QC-DATA-012",
            "has no turn to train",
            found="; ".join(sorted(set(untrained.values()))) or "no assistant turn",
            expected="at least one assistant turn that is trained",
            fix='remove the row, or mark a turn with "train": true',
        )
    free = bool(switch) and not fixed and switch not in row.variables
    turns = []
    for index in trained:
        reasoned = bool(reasoning_of(row.messages[index], chat_format).strip())
        own = {switch: reasoned} if free else {}
        turns.append(
            TrainedTurn(index=index, reasoned=reasoned, variables={**row.variables, **own})
        )
    return RowPlan(row=row, policies=policies, turns=tuple(turns), untrained=untrained)


def _why_not(row: ChatRow, index: int, said: Sequence[int], policies: Policies) -> str:
    """Why an assistant message is not trained; empty if it is."""
    marked = row.train[index] if row.train else None
    if marked is not None:
        return "" if marked else "marked train: false"
    if row.trained is not None:
        if not row.trained:
            return "row marked train: false"
    elif not policies.train:
        return "source with train: false"
    return "turns=last" if policies.turns == LAST and index != said[-1] else ""


def reasoning_of(message: Mapping[str, Any], chat_format: ChatFormat) -> str:
    """The reasoning of an assistant message, as a key or as a think block in its content."""
    reasoning = message.get("reasoning_content")
    if reasoning is not None:
        return str(reasoning)
    return _split(message, chat_format)[0]


def _split(message: Mapping[str, Any], chat_format: ChatFormat) -> tuple[str, str]:
    """Reasoning and answer of a content with a think block."""
    marks, content = thinking_marks(chat_format), message.get("content")
    if marks is None or not isinstance(content, str) or marks[1] not in content:
        return "", content if isinstance(content, str) else ""
    before, _, after = content.partition(marks[1])
    return before.rpartition(marks[0])[2], after


def _without_reasoning(
    messages: Sequence[dict[str, Any]], chat_format: ChatFormat
) -> list[dict[str, Any]]:
    done = []
    for message in messages:
        if message["role"] == chat_format.assistant:
            message = {key: value for key, value in message.items() if key != "reasoning_content"}
            if reasoning_of(message, chat_format):
                message["content"] = _split(message, chat_format)[1].lstrip("\n")
        done.append(message)
    return done


def own_variables(variables: Mapping[str, Any]) -> str:
    """The variables of a row as `Example.variables`; rows with the same ones share the string."""
    return sys.intern(json.dumps(variables, sort_keys=True)) if variables else ""
