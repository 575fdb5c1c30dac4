"""Order of turns: what serving cannot produce is joined or trimmed, else refused.

This file decides what becomes of turns that no served conversation has:

- system turns at the start are joined; a later one is refused if the template refuses it;
- user turns in a row are joined by an empty line, and so are assistant turns whose parts keep
  their order: reasoning, text, calls;
- an answer before the first user turn becomes context, because there is no prompt for it;
- turns after the last answer are removed, because nothing of them is trained;
- turns of one role in a row of different names are refused, because a name would be lost.

`qcore.data.repairs.results` pairs tool results with their calls.

Codes: ``QC-DATA-050`` rewritten without loss, ``-051`` refused, ``-052`` a turn without a prompt or
an answer.
"""

from __future__ import annotations

from typing import Any

from ...api.media import RowError
from .notes import Notes, PlacedMessage, RepairContext, text_only
from .results import pair_results

JOINED, ORDER, UNANSWERED = "QC-DATA-050", "QC-DATA-051", "QC-DATA-052"
_GAP = "\n\n"


def repair_order(
    turns: list[PlacedMessage], context: RepairContext, notes: Notes
) -> list[PlacedMessage]:
    """The turns in an order that serving can produce.

    Raises:
        RowError: ``QC-DATA-051``; ``-052`` if its warnings refuse a row.
    """
    made: list[PlacedMessage] = []
    for turn in turns:
        before = made[-1] if made else None
        if before is not None and before.role == turn.role in ("user", context.assistant):
            made[-1] = _joined(before, turn, context)
            notes.note(JOINED, turn.at, f"{turn.role} turns in a row were joined")
        elif turn.role == "system" and made and not context.abilities.late_system:
            made[-1] = _system(made, turn)
            notes.note(JOINED, turn.at, "system turns in a row were joined")
        else:
            made.append(turn)
    made = pair_results(made, notes)
    return _trimmed(_unprompted(made, context, notes), context, notes)


def _joined(first: PlacedMessage, second: PlacedMessage, context: RepairContext) -> PlacedMessage:
    """Two turns of one role as one."""
    changed: dict[str, Any] = {}
    _check_names(first, second)
    if first.role == context.assistant:
        _check_joined(first, second)
        thoughts = [
            text for turn in (first, second)
            for text in [turn.message.get("reasoning_content")] if text
        ]  # fmt: skip
        if thoughts:
            changed["reasoning_content"] = thoughts[0]
        if second.calls:
            changed["tool_calls"] = [*first.calls, *second.calls]
    content = _content(first.message.get("content"), second.message.get("content"))
    return first.but(content=content, **changed)


def _check_names(first: PlacedMessage, second: PlacedMessage) -> None:
    names = [turn.message.get("name") for turn in (first, second)]
    if names[0] != names[1]:
        raise RowError(
            ORDER,
            f"differs from the name of the {second.role} turn before it",
            at=f"{second.at}.name",
            found=" and ".join("no name" if name is None else repr(name) for name in names)[:80],
            expected="one speaker in turns of one role in a row",
            fix="write who speaks into the content of both turns, and leave name out",
        )


def _check_joined(first: PlacedMessage, second: PlacedMessage) -> None:
    said = {turn.index: text_only(turn.message.get("content")) != "" for turn in (first, second)}
    thought = {turn.index: bool(turn.message.get("reasoning_content")) for turn in (first, second)}
    train = [turn.message.get("train") for turn in (first, second)]
    if first.calls and said[second.index]:
        what = "follows an assistant turn whose calls have no result"
        fix = "put the results of the calls between the turns, as turns of role tool"
    elif thought[second.index] and (thought[first.index] or said[first.index] or first.calls):
        what = "is an assistant turn with reasoning right after another assistant turn"
        fix = "put the user turn or the tool results between them"
    elif train[0] != train[1]:
        what = "is marked for training unlike the assistant turn before it"
        fix = "give both turns the same mark, or put the user turn between them"
    else:
        return
    raise RowError(
        ORDER,
        what,
        at=second.at,
        found=f"two assistant turns, messages {first.index} and {second.index}",
        expected="a turn that serving can produce",
        fix=fix,
    )


def _content(first: Any, second: Any) -> Any:
    """Two contents, an empty line between them."""
    if first in (None, "", []):
        return "" if second is None else second
    if second in (None, "", []):
        return first
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}{_GAP}{second}"
    return [*_parts(first), {"type": "text", "text": _GAP}, *_parts(second)]


def _parts(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _system(made: list[PlacedMessage], turn: PlacedMessage) -> PlacedMessage:
    """The system turn that a further one is joined to."""
    if made[-1].role == "system" and len(made) == 1:
        _check_names(made[-1], turn)
        content = _content(made[-1].message.get("content"), turn.message.get("content"))
        return made[-1].but(content=content)
    raise RowError(
        ORDER,
        "is a system turn that is not the first turn, which the chat template refuses",
        at=turn.at,
        expected="one system turn at the start",
        fix="write its text into the first system turn, or into the user turn that it belongs to",
    )


def _unprompted(
    turns: list[PlacedMessage], context: RepairContext, notes: Notes
) -> list[PlacedMessage]:
    """Make answers before the first user turn context."""
    if context.abilities.answers_first:
        return turns
    made = list(turns)
    for place, turn in enumerate(turns):
        if turn.role == "user":
            break
        if turn.role == context.assistant and turn.message.get("train") is not False:
            made[place] = turn.but(train=False)
            notes.warn(
                UNANSWERED,
                turn.at,
                "answers no user turn: the template renders no prompt for it, so it is context "
                "and is not trained",
                "put the user turn before it",
            )
    return made


def _trimmed(
    turns: list[PlacedMessage], context: RepairContext, notes: Notes
) -> list[PlacedMessage]:
    """Remove the turns after the last answer."""
    last = max((n for n, turn in enumerate(turns) if turn.role == context.assistant), default=-1)
    rest = turns[last + 1 :]
    if last < 0 or not rest:
        return turns
    notes.warn(
        UNANSWERED,
        rest[0].at,
        f"{_count(rest)} at the end without an answer: left out, because nothing in it is trained",
        "add the answer",
    )
    return turns[: last + 1]


def _count(turns: list[PlacedMessage]) -> str:
    roles = " and ".join(dict.fromkeys(turn.role for turn in turns))
    return f"{len(turns)} {roles} turn{'s' if len(turns) > 1 else ''}"
