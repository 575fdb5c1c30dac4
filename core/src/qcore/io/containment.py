"""Containment: foreign code is called here, and what it raises becomes a value.

This file holds the only broad ``except`` of qcore. It decides what of foreign code is contained
(every exception but KeyboardInterrupt, and standard output) and how a failure reads on one line.
What a failure means is left to the caller: a status of a plugin, or an error that names it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


class Failure:
    """What went wrong in foreign code, on one line; `error` when something was raised."""

    def __init__(self, text: str, error: BaseException | None = None) -> None:
        self.text = " ".join(text.split())
        self.error = error

    def __str__(self) -> str:
        return self.text


def contained(call: Callable[[], _T], /) -> _T | Failure:
    """Call foreign code: whatever it raises becomes a `Failure`, less KeyboardInterrupt.

    What it prints goes to stderr, because stdout may be one JSON object.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return call()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  SystemExit too: a plugin may call sys.exit
        return Failure(_cause(error), error)


def _cause(error: BaseException) -> str:
    """Type, message and place of what foreign code raised; the place is its innermost frame."""
    try:
        text = str(error)[:300]
    except (Exception, SystemExit):  # noqa: BLE001  a message is foreign code as well
        text = "(its message cannot be shown)"
    frame, where = error.__traceback__, ""
    while frame is not None:
        name = os.path.basename(frame.tb_frame.f_code.co_filename)
        where = f" ({name}:{frame.tb_lineno})"
        frame = frame.tb_next
    return f"{type(error).__name__}: {text}{where}" if text else f"{type(error).__name__}{where}"
