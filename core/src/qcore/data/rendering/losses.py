"""What a template does to supervised text: reasoning and whitespace that it does not render.

This file decides what is compared. A trained turn is compared with its rendering, because what a
template drops is not trained although the row asks for it.

Codes: ``QC-DATA-042`` a turn is trained after another prompt than serving shows, ``-043``
reasoning is not rendered, ``-044`` text is not rendered as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...api.records import ChatFormat
from ..content import text_of
from ..findings import WARNING, DataFinding, Findings
from ..think_block import reasoning_of, split_block, thinking_marks
from .row_plan import RowPlan
from .samples import Draft
from .turns import Turn, check_count

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tokenizers import Tokenizer


@dataclass(slots=True)
class LossCounts:
    """What the template did not render, in numbers.

    Attributes:
        turns: trained turns.
        other_prompts: trained turns that serving shows another prompt.
        reasonings: reasonings of trained turns.
        lost: lost reasonings.
        lost_tokens: their tokens.
        changed: turns whose text is not rendered as it is.
        characters: characters of them that are dropped.
    """

    turns: int = 0
    other_prompts: int = 0
    reasonings: int = 0
    lost: int = 0
    lost_tokens: int = 0
    changed: int = 0
    characters: int = 0

    def __reduce__(self) -> tuple[type[LossCounts], tuple[int, ...]]:
        """Pickle it by position: a process sends one for each row."""
        return LossCounts, (
            self.turns, self.other_prompts, self.reasonings, self.lost, self.lost_tokens,
            self.changed, self.characters,
        )  # fmt: skip

    def add(self, other: LossCounts) -> None:
        """Add those of other rows."""
        self.turns += other.turns
        self.other_prompts += other.other_prompts
        self.reasonings += other.reasonings
        self.lost += other.lost
        self.lost_tokens += other.lost_tokens
        self.changed += other.changed
        self.characters += other.characters

    def total(self, findings: Findings, advice: str) -> None:
        """Put the totals into the lines of the report.

        Args:
            findings: of all rows.
            advice: what to do about lost reasoning.
        """
        if self.other_prompts:
            findings.total(
                "QC-DATA-042",
                WARNING,
                f"{self.other_prompts} of {self.turns} trained turns are trained after another "
                "prompt than serving shows (history=as_rendered)",
                fix="set history=as_served",
            )
        if self.lost:
            findings.total(
                "QC-DATA-043",
                WARNING,
                f"{self.lost} of {self.reasonings} reasonings ({self.lost_tokens} tokens) are "
                "not in the rendered text",
                fix=advice,
            )
        if self.changed:
            findings.total(
                "QC-DATA-044",
                WARNING,
                f"the chat template does not render the text of {self.changed} of {self.turns} "
                f"trained turns as it is ({self.characters} characters are dropped)",
            )


@dataclass(slots=True)
class Losses:
    """Compares the trained turns of one row with their renderings.

    Attributes:
        chat_format: the format of rendered conversations.
        tokenizer: counts the tokens of lost reasoning.
        counts: what is lost so far.
        findings: a finding for each turn that loses something.
    """

    chat_format: ChatFormat
    tokenizer: Tokenizer
    counts: LossCounts = field(default_factory=LossCounts)
    findings: list[DataFinding] = field(default_factory=list)

    def look(self, plan: RowPlan, draft: Draft) -> None:
        """Compare the trained turns of a sample with their messages."""
        messages = plan.row.messages[: draft.count]
        said = [n for n, m in enumerate(messages) if m["role"] == self.chat_format.assistant]
        turns = check_count(draft.parsed, self.chat_format, len(said))
        for index, turn in zip(said, turns, strict=True):
            if index in draft.tails:
                self.counts.turns += 1
                self.findings.extend(self._turn(plan, draft, index, turn))

    def _turn(self, plan: RowPlan, draft: Draft, index: int, turn: Turn) -> Iterator[DataFinding]:
        row, message = plan.row.row, plan.row.messages[index]
        rendered, at = (
            draft.text[turn.body + len(draft.tails[index]) : turn.end],
            f"messages[{index}]",
        )
        if index in draft.other_prompt:
            self.counts.other_prompts += 1
            yield DataFinding(
                code="QC-DATA-042",
                severity=WARNING,
                row=row,
                field=at,
                message="the turn is trained after another prompt than serving shows",
            )
        reasoning = reasoning_of(message, self.chat_format).strip()
        if reasoning:
            self.counts.reasonings += 1
            if reasoning not in rendered:
                yield self._lost_reasoning(row, at, reasoning)
        finding = self._changed_text(row, at, message, rendered)
        if finding is not None:
            yield finding

    def _lost_reasoning(self, row: int, at: str, reasoning: str) -> DataFinding:
        tokens = len(self.tokenizer.encode(reasoning, add_special_tokens=False).ids)
        self.counts.lost += 1
        self.counts.lost_tokens += tokens
        return DataFinding(
            code="QC-DATA-043",
            severity=WARNING,
            row=row,
            field=f"{at}.reasoning_content",
            message=f"the reasoning ({tokens} tokens) is not in the rendered text",
        )

    def _changed_text(
        self, row: int, at: str, message: Mapping[str, Any], rendered: str
    ) -> DataFinding | None:
        content = message.get("content", "")
        if not isinstance(content, str):
            if any(part["type"] != "text" for part in content):
                return None
            content = text_of(content)
        split = split_block(content, thinking_marks(self.chat_format))
        content = content if split is None else split[1]  # templates move the block
        if content in rendered:
            return None
        bare = content.strip()
        lost = len(content) - len(bare) if bare in rendered else len(content)
        self.counts.changed += 1
        self.counts.characters += lost
        what = "whitespace at its start or end" if bare in rendered else "the text as it is"
        return DataFinding(
            code="QC-DATA-044",
            severity=WARNING,
            row=row,
            field=f"{at}.content",
            message=f"the chat template does not render {what} ({lost} characters)",
            what="changed text",
        )
