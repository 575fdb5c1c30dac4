"""Training marks of messages: which turns a row trains, in the spellings of other tools.

This file decides what ``train``, ``training``, ``trainable``, ``weight``, ``loss``, ``loss_mask``,
``loss_scale``, ``train_detail`` and ``training_detail`` say of one turn: true, false, or nothing.
A turn is trained or not; a mark that trains a part of a turn, a fraction, or a turn of another role
is refused, because ignoring it would train what the row excludes.

Code: ``QC-DATA-022``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...api.media import RowError
from ..tool_fields import kind
from .reading import CALL
from .unread import meaningless

MARKS = ("train", "training", "trainable", "weight", "loss", "loss_mask", "loss_scale")
DETAILS = ("train_detail", "training_detail")
_FLAGS = ("train", "training", "trainable", "loss_mask")
_ALL = frozenset((*MARKS, *DETAILS))


def mark_of(given: Mapping[str, Any], content: Any, role: str, at: str) -> bool | None:
    """What the marks of a message say; ``None`` without one.

    Args:
        given: the message, without keys that mean nothing.
        content: its content, which spans with a mark of their own are about.
        role: canonical role.
        at: place of the message in the row.

    Raises:
        RowError: ``QC-DATA-022``.
    """
    if not given.keys() & _ALL:
        return None
    values = {key: flag(given[key], f"{at}.{key}") for key in MARKS if key in given}
    for key in DETAILS:
        if key in given:
            values[key] = _spans(given[key], content, f"{at}.{key}")
    if role not in ("assistant", CALL):
        for key in (*_FLAGS, *DETAILS):
            if values.get(key):
                raise _unkept(
                    f"{at}.{key}", f"marks a turn of the {role} for training",
                    expected="false: only assistant turns are trained",
                )  # fmt: skip
        return None
    if len(set(values.values())) > 1:
        raise _unkept(at, "has marks that contradict each other", found=", ".join(values))
    return next(iter(values.values()), None)


def mark_of_parts(
    parts: list[Any], trained: bool | None, role: str, at: str
) -> tuple[bool | None, list[Any]]:
    """The mark of a content whose parts have marks, and the parts without them.

    Raises:
        RowError: ``QC-DATA-022`` when the parts differ.
    """
    values = set()
    bare: list[Any] = []
    for index, part in enumerate(parts):
        if not isinstance(part, dict) or not ({"train", "weight"} & part.keys()):
            bare.append(part)
            values.add(trained)
            continue
        here = f"{at}[{index}]"
        values |= {
            flag(part[key], f"{here}.{key}")
            for key in ("train", "weight")
            if not meaningless(part.get(key))
        } or {trained}
        bare.append({key: value for key, value in part.items() if key not in ("train", "weight")})
    if values <= {trained}:
        return trained, bare
    if role not in ("assistant", CALL) and True not in values:
        return None, bare
    if len(values) > 1 or role not in ("assistant", CALL):
        raise _part_of_turn(at)
    return values.pop(), bare


def flag(value: Any, at: str) -> bool:
    """A mark as a boolean.

    Raises:
        RowError: ``QC-DATA-022`` for another value than true, false, 1 and 0.
    """
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise _unkept(
        at,
        "is not a mark of training",
        found=kind(value),
        expected="true, false, 1 or 0: a turn is trained or not",
        fix="write 1 to train it, 0 to keep it as context",
    )


def _spans(detail: Any, content: Any, at: str) -> bool:
    """Whether Axolotl's spans (``end_offset`` inclusive) train all of a content, or none of it."""
    if not isinstance(detail, list) or not all(isinstance(span, dict) for span in detail):
        raise _unkept(at, "is not a list of spans", found=kind(detail))
    kept = [span for span in detail if flag(span.get("train"), f"{at}[].train")]
    if not kept:
        return False
    offsets = [(span.get("begin_offset"), span.get("end_offset")) for span in kept]
    if not all(isinstance(offset, int) for pair in offsets for offset in pair):
        raise _unkept(at, "has a span without begin_offset and end_offset")
    reached = 0
    for begin, end in sorted(offsets):
        if begin > reached:
            raise _part_of_turn(at)
        reached = max(reached, end + 1)
    if not isinstance(content, str) or reached < len(content):
        raise _part_of_turn(at)
    return True


def _part_of_turn(at: str) -> RowError:
    return _unkept(
        at,
        "trains a part of a turn",
        expected="the same mark for the whole turn",
        fix="mark the turn as a whole; qcore masks reasoning apart with the setting reasoning=mask",
    )


def _unkept(
    at: str, what: str, *, found: str | None = None, expected: str | None = None,
    fix: str | None = None,
) -> RowError:  # fmt: skip
    return RowError("QC-DATA-022", what, at=at, found=found, expected=expected, fix=fix)
