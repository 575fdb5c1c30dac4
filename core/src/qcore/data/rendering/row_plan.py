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
from ..policies import AS_RENDERED, DROP_REASONING, LAST, Policies
from ..think_block import reasoning_of, without_reasoning

if TYPE_CHECKING:
    from ..rows import ChatRow

ROW, RUN = "row", "run"  #: who sets the mode of thinking for all turns


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
        switch: variable of the template that turns thinking on and off; empty: there is none.
        fixed: who set `switch` for all turns: ``row``, ``run`` or empty.
    """

    row: ChatRow
    policies: Policies
    turns: tuple[TrainedTurn, ...]
    untrained: Mapping[int, str]
    switch: str = ""
    fixed: str = ""

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
        prompts = [Prefix(turn.index, prompt=True, variables=turn.variables) for turn in self.turns]
        if self.policies.history == AS_RENDERED:
            whole = Prefix(len(self.row.messages), variables=self.turns[-1].variables)
            return [whole, *prompts]
        return [
            prefix
            for turn, prompt in zip(self.turns, prompts, strict=True)
            for prefix in (Prefix(turn.index + 1, variables=turn.variables), prompt)
        ]

    def mode_advice(self, turn: TrainedTurn) -> str:
        """What to do about a turn that is not rendered in the mode that its prompt asks for."""
        rendered = "set history=as_rendered to train the row as the template renders it"
        if not self.fixed:
            return rendered
        where = "the row's" if self.fixed == ROW else "the setting"
        ways = [
            f"leave {self.switch} out of {where} chat_template_kwargs, so that each turn is "
            "rendered in its own mode"
        ]
        if turn.reasoned:
            ways.append("set reasoning=drop")
        return ", or ".join([*ways, rendered])


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
    if policies.reasoning == DROP_REASONING:
        row = replace(
            row,
            messages=tuple(
                without_reasoning(m, chat_format) if m["role"] == chat_format.assistant else m
                for m in row.messages
            ),
        )
    answers = [n for n, m in enumerate(row.messages) if m["role"] == chat_format.assistant]
    untrained = {n: why for n in answers if (why := _why_not(row, n, answers, policies))}
    trained = [n for n in answers if n not in untrained]
    if not trained:
        raise RowError(
            "QC-DATA-012",
            "has no turn to train",
            found="; ".join(sorted(set(untrained.values()))) or "no assistant turn",
            expected="at least one assistant turn that is trained",
            fix='remove the row, or mark a turn with "train": true',
        )
    by = "" if not switch else ROW if switch in row.variables else RUN if fixed else ""
    free = bool(switch) and not by
    turns = []
    for index in trained:
        reasoned = bool(reasoning_of(row.messages[index], chat_format).strip())
        own = {switch: reasoned} if free else {}
        turns.append(
            TrainedTurn(index=index, reasoned=reasoned, variables={**row.variables, **own})
        )
    return RowPlan(
        row=row, policies=policies, turns=tuple(turns), untrained=untrained,
        switch=switch, fixed=by,
    )  # fmt: skip


def _why_not(row: ChatRow, index: int, answers: Sequence[int], policies: Policies) -> str:
    """Why an assistant message is not trained; empty if it is."""
    marked = row.train[index] if row.train else None
    if marked is not None:
        return "" if marked else "marked train: false"
    if row.trained is not None:
        if not row.trained:
            return "row marked train: false"
    elif not policies.train:
        return "source with train: false"
    return "turns=last" if policies.turns == LAST and index != answers[-1] else ""


def own_variables(variables: Mapping[str, Any]) -> str:
    """The variables of a row as `Example.variables`; rows with the same ones share the string."""
    return sys.intern(json.dumps(variables, sort_keys=True)) if variables else ""
