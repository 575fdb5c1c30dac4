"""How much rendering a row takes, estimated before the template sees it.

This file decides the estimate. With ``history=as_served`` two prefixes of a conversation are
rendered for each trained turn, which takes time in the square of the number of turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from ...checkpoint.chat_template import Prefix
    from .row_plan import RowPlan

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
