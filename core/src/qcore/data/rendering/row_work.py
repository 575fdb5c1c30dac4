"""How much rendering a row takes, estimated before the template sees it, and what is too much.

This file decides the estimate and its bound. Two prefixes of a conversation are rendered for each
trained turn (``history=as_rendered``: one), which takes time in the square of the number of turns.
A row beyond the bound is refused, unless ``long_rows`` drops or cuts it because it is too long.

Code: ``QC-DATA-078`` a row with too many turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from ...api.media import RowError

if TYPE_CHECKING:
    from ...checkpoint.chat_template import Prefix
    from .row_plan import RowPlan, TrainedTurn

#: Characters of all renderings of a row: about 350 short turns, or 100 turns in a row of 500 KB.
MOST_WORK: Final = 128 << 20
FEW: Final = 4  #: turns of a row that need no estimate, because a row is bounded itself
_MESSAGE: Final = 500  # characters that take as long to render as a message without text


def work_of(plan: RowPlan, prefixes: Sequence[Prefix]) -> list[int]:
    """The work of each rendering in characters, with an allowance for each message."""
    sums = [_size(plan.tools), *map(_size, plan.messages)]
    until = list(accumulate(sums))
    return [until[prefix.count] for prefix in prefixes]


def _size(value: Any) -> int:
    """Characters of all texts in a message or a tool, and the allowance."""
    size, todo = _MESSAGE, [value]
    while todo:
        one = todo.pop()
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, Mapping):
            todo += one.values()
        elif isinstance(one, list | tuple):
            todo += one
    return size


def with_turns(plan: RowPlan, turns: Sequence[TrainedTurn], why: str) -> RowPlan:
    """The plan with some of its trained turns; `why` the others are not trained."""
    kept = {turn.index for turn in turns}
    others = {turn.index: why for turn in plan.turns if turn.index not in kept}
    return replace(plan, turns=tuple(turns), untrained={**plan.untrained, **others})


def first_turns(plan: RowPlan, works: Sequence[int]) -> Sequence[TrainedTurn]:
    """The first trained turns of a row, as many as the bound allows; at least one.

    Args:
        plan: of the row.
        works: from `work_of`.
    """
    each = len(works) // len(plan.turns)
    count = sum(total <= MOST_WORK for total in accumulate(works)) // each
    return plan.turns[: max(1, count)]


def too_many_turns(plan: RowPlan) -> RowError:
    """The error of a row that fits, but whose turns cannot all be rendered in time."""
    return RowError(
        "QC-DATA-078",
        "has too many turns to render the prompt of each of them",
        at="messages",
        found=f"{len(plan.turns)} trained turns in {len(plan.messages)} messages",
        fix='divide the conversation, or train fewer of its turns (turns=last, "train": false)',
    )
