"""Tool calls and their results: which result belongs to which call.

This file decides what becomes of results that do not pair with the calls of the assistant turn
before them. A template renders results in the order of the row and most render no ids, so that the
order pairs them: results get the order of their calls. A result that belongs to no call, a second
one of a call, and a call without one before another turn are refused. Another number of results
than of calls without ids is reported alone: one may hold several, or several one.

Codes: ``QC-DATA-050`` results in another order, ``-051`` refused, ``-052`` another
number of results than of calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...api.media import RowError
from .notes import Notes, PlacedMessage

_REORDERED, _REFUSED, _UNPAIRED = "QC-DATA-050", "QC-DATA-051", "QC-DATA-052"


def pair_results(turns: list[PlacedMessage], notes: Notes) -> list[PlacedMessage]:
    """The turns with the results of each turn in the order of its calls.

    Args:
        turns: the row's turns; what stands after the last answer is not checked for missing
            results, because it is left out.
        notes: receives the findings.

    Raises:
        RowError: ``QC-DATA-051``; ``-052`` if its warnings refuse a row.
    """
    made: list[PlacedMessage] = []
    place = 0
    while place < len(turns):
        turn = turns[place]
        place += 1
        if turn.role == "tool":
            _orphan(turn, "is a tool result without a preceding tool call",
                    "put it after the assistant turn with the tool_calls")  # fmt: skip
        made.append(turn)
        if not turn.calls:
            continue
        end = next((n for n in range(place, len(turns)) if turns[n].role != "tool"), len(turns))
        made += _paired(turn, turns[place:end], end < len(turns), notes)
        place = end
    return made


def _paired(
    turn: PlacedMessage, results: Sequence[PlacedMessage], goes_on: bool, notes: Notes
) -> Sequence[PlacedMessage]:
    """The results of one turn in the order of its calls."""
    ids = [call.get("id") if isinstance(call, Mapping) else None for call in turn.calls]
    named = [result.message.get("tool_call_id") for result in results]
    distinct = all(ids) and len(set(ids)) == len(ids)
    if distinct:
        _check_ids(results, ids)
    if goes_on:
        _check_missing(turn, ids, named, distinct, notes)
    if not distinct or not all(named):
        return results
    order = sorted(results, key=lambda result: ids.index(result.message["tool_call_id"]))
    if any(a is not b for a, b in zip(order, results, strict=True)):
        notes.note(_REORDERED, results[0].at, "tool results were put in the order of their calls")
    return order


def _check_ids(results: Sequence[PlacedMessage], ids: Sequence[Any]) -> None:
    """Refuse results that name no call of the turn, or one that has a result already."""
    seen: set[Any] = set()
    for result in results:
        named = result.message.get("tool_call_id")
        if not named:
            continue
        if named not in ids:
            _orphan(result, "is the result of a call that the turn before it does not make",
                    f"tool_call_id is one of: {', '.join(map(str, ids))[:80]}")  # fmt: skip
        if named in seen:
            _orphan(result, "is a second result of one call",
                    "keep one of them, or write the id of the call that it belongs to"
                    )  # fmt: skip
        seen.add(named)


def _check_missing(
    turn: PlacedMessage, ids: Sequence[Any], named: Sequence[Any], distinct: bool, notes: Notes
) -> None:
    """Refuse or report calls without a result before another turn."""
    if len(named) == len(ids):
        return
    lacking = [one for one in ids if one not in named] if distinct and all(named) else []
    if not named or lacking:
        raise RowError(
            _REFUSED,
            "makes a call that has no result, although the conversation goes on",
            at=turn.at,
            found=f"call {', '.join(map(str, lacking))}"[:80] if named else None,
            expected="a tool turn for each call",
            fix="put the result after the turn, as a turn of role tool",
        )
    notes.warn(
        _UNPAIRED,
        f"{turn.at}.tool_calls",
        f"{len(ids)} calls have {len(named)} result{'s' if len(named) > 1 else ''}",
        "write a tool turn for each call",
    )


def _orphan(turn: PlacedMessage, what: str, fix: str) -> None:
    named = turn.message.get("tool_call_id")
    found = None if named is None else f"tool_call_id {named!r}"[:80]
    raise RowError(_REFUSED, what, at=turn.at, found=found, fix=fix)
