"""Repairs of a canonical row: what a conversion corrupted, and what serving cannot produce.

This file decides the order of the repairs. A repair is made where nothing is lost and is reported;
where something would be lost, the row is refused. `repair` is a pure function and passes over what
it does not understand: `qcore.data.rows`, which runs after it, refuses malformed rows.

- `qcore.data.repairs.text`: calls, results and think blocks as text, marks of media;
- `qcore.data.repairs.padding`: null arguments of column formats;
- `qcore.data.repairs.calls`: undeclared functions, arguments that do not fit their schema;
- `qcore.data.repairs.turns`: order of turns;
- `qcore.data.repairs.results`: results in the order of their calls.

Code: ``QC-DATA-056`` an empty user turn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ...api.records import ChatFormat
from ...api.views import TemplateView
from ..findings import DataFinding
from ..think_block import thinking_marks
from .calls import check_calls, write_whole_numbers
from .notes import Notes, PlacedMessage, RepairContext, text_only
from .padding import drop_padding
from .template_probes import probe_abilities
from .text import check_marks, move_thinking, read_text_calls
from .turns import repair_order

EMPTY = "QC-DATA-056"


def repair_context(
    template: TemplateView,
    chat_format: ChatFormat,
    variables: Mapping[str, Any] | None = None,
    kinds: Collection[str] = (),
    refused: Collection[str] = (),
) -> RepairContext:
    """What `repair` knows of a run; renders some probes.

    Args:
        template: the checkpoint's.
        chat_format: the format of rendered conversations.
        variables: variables of the template.
        kinds: kinds of media of all installed readers, also of those that the run does not use.
        refused: codes whose warnings refuse the row instead.

    Raises:
        InputError: as `probe_abilities`.
    """
    return RepairContext(
        assistant=chat_format.assistant,
        marks=thinking_marks(chat_format),
        call_tags=chat_format.call_tags,
        result_tags=chat_format.result_tags,
        parse=chat_format.parse,
        abilities=probe_abilities(template, chat_format, variables),
        kinds=tuple(kinds),
        refused=frozenset(refused),
    )


def repair(
    row: Mapping[str, Any], context: RepairContext, *, number: int = 0, raw: Any = None
) -> tuple[dict[str, Any], tuple[DataFinding, ...]]:
    """Repair a canonical row.

    Args:
        row: the canonical row; not mutated.
        context: from `repair_context`.
        number: number of the row, for findings.
        raw: the row before it was converted; default: `row`. It shows whether nulls are padding.

    Returns:
        The repaired row, and what was done and noticed.

    Raises:
        RowError: ``QC-DATA-051``, ``-053``, ``-054``, ``-055``; further codes that the context
            names.
    """
    messages = row.get("messages")
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        return dict(row), ()
    notes = Notes(number, context.refused)
    tools = row.get("tools")
    turns = [PlacedMessage(index, message) for index, message in enumerate(messages)]
    turns = read_text_calls(turns, tools, context, notes)
    turns = move_thinking(turns, context, notes)
    turns = drop_padding(turns, tools, row if raw is None else raw, notes)
    turns = write_whole_numbers(turns, tools, notes)
    _check_empty(turns, notes)
    turns = repair_order(turns, context, notes)
    check_marks(turns, context.kinds, raw)
    check_calls(turns, tools, notes)
    return {**row, "messages": [dict(turn.message) for turn in turns]}, tuple(notes.found)


def _check_empty(turns: Sequence[PlacedMessage], notes: Notes) -> None:
    for turn in turns:
        text = text_only(turn.message.get("content"))
        if turn.role == "user" and text is not None and not text.strip():
            notes.warn(
                EMPTY,
                f"{turn.at}.content",
                "the user turn is empty, as where an export lost its text",
                "write what the user said",
            )
