"""Error classes (`QcoreError` and below), stable error codes, and the exit status of each class.

Every failure that a user can cause is one of these classes. An error is one line: where
(file, field or tensor), what was found, what was expected, and the fix. The command line
renders it and exits with ``exit_code``; nothing else in qcore decides an exit status.

    QcoreError
      UsageError      2   a flag, a setting, a value of either
      InputError     65   a checkpoint, an adapter, a data file that is not as it must be
      PluginError    69   a plugin that is missing, broken or in conflict
      WriteError     73   an output that cannot be written
      Interrupted    75   stopped by a signal; a checkpoint was published, --resume goes on
      NumericError   76   NaN or infinity, or an effect that could not be proved
      TrustError     77   something that needs the user's explicit consent
      Stopped       130   Ctrl-C where there is nothing to resume

Codes are ``QC-AREA-NNN``; docs/errors.md lists them and a test keeps the list true.

`contained` is the only broad ``except`` of the package: code of plugins and sinks runs inside it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from typing import Any, Self, TypeVar

_T = TypeVar("_T")
_E = TypeVar("_E", bound=BaseException)


class QcoreError(Exception):
    """Base of everything qcore raises on purpose.

    Args:
        code: stable identifier, ``QC-AREA-NNN``.
        what: the statement, without trailing full stop.
        file: the file at fault, as the user named it.
        field: the config field, tensor, row or flag at fault.
        found: what was there; ``None`` when it says nothing beyond ``what``.
        expected: what should have been there.
        fix: one command or edit that mends it.
    """

    exit_code = 1
    process = ""  #: which of several processes of a run failed: ``rank 1 (host, GPU 1)``

    def __init__(
        self,
        code: str,
        what: str,
        *,
        file: object | None = None,
        field: str | None = None,
        found: object | None = None,
        expected: object | None = None,
        fix: str | None = None,
    ) -> None:
        self.code = code
        self.what = what
        self.file = None if file is None else str(file)
        self.field = field
        self.found = found
        self.expected = expected
        self.fix = fix
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """The whole error on one line, without code and fix."""
        where = ": ".join(part for part in (self.file, self.field) if part)
        facts = []
        if self.found is not None:
            facts.append(f"found {self.found}")
        if self.expected is not None:
            facts.append(f"expected {self.expected}")
        text = f"{where}: {self.what}" if where else self.what
        if facts:
            text = f"{text}: {', '.join(facts)}"
        if self.process:
            text = f"{self.process}: {text}"
        return " ".join(text.split())

    def of_process(self, name: str) -> Self:
        """Copy the error with the name of the process in front of its message."""
        named = copy(self)
        named.process = name
        return named

    def replace(self, **changes: Any) -> Self:
        """Copy the error with other facts: ``error.replace(file=path, fix=None)``.

        Class and code stay.

        Args:
            changes: any of ``what``, ``file``, ``field``, ``found``, ``expected``, ``fix``.
        """
        facts: dict[str, Any] = {
            "what": self.what,
            "file": self.file,
            "field": self.field,
            "found": self.found,
            "expected": self.expected,
            "fix": self.fix,
        }
        return type(self)(self.code, **(facts | changes))

    def __reduce__(self) -> tuple[Any, ...]:
        return restored, (type(self), self.args, self.__dict__)

    def as_json(self) -> dict[str, Any]:
        """The payload of ``{"error": ...}`` that ``--json`` prints."""
        return {
            "code": self.code,
            "message": self.message,
            "file": self.file,
            "field": self.field,
            "fix": self.fix,
        }


def restored(kind: type[_E], args: tuple[Any, ...], state: dict[str, Any]) -> _E:
    """Build an exception that another process has pickled, without its constructor."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class UsageError(QcoreError):
    """A flag, a setting or a value of either is wrong."""

    exit_code = 2


class InputError(QcoreError):
    """A checkpoint, an adapter or a data file is not as it must be."""

    exit_code = 65


class PluginError(QcoreError):
    """A plugin is missing, broken or in conflict with another."""

    exit_code = 69


class WriteError(QcoreError):
    """An output cannot be written; nothing half-written stays behind."""

    exit_code = 73


class Interrupted(QcoreError):
    """A signal stopped the run; what is needed to resume was published."""

    exit_code = 75


class NumericError(QcoreError):
    """A number is not finite, or an effect could not be proved."""

    exit_code = 76


class TrustError(QcoreError):
    """Something needs the user's explicit consent."""

    exit_code = 77


class Stopped(QcoreError):
    """Ctrl-C where there is nothing to resume; the status that shells give it."""

    exit_code = 130


class PreflightError(InputError):
    """Several findings at once; each is an error of its own.

    ``exit_code`` is that of the first finding, so a single finding behaves like itself.
    """

    def __init__(self, errors: list[QcoreError]) -> None:
        first = errors[0]
        self.errors = tuple(errors)
        super().__init__(
            first.code,
            first.what,
            file=first.file,
            field=first.field,
            found=first.found,
            expected=first.expected,
            fix=first.fix,
        )
        self.exit_code = first.exit_code

    def replace(self, **changes: Any) -> Self:
        """Copy the findings, the first of them with other facts; see `QcoreError.replace`."""
        first, *others = self.errors
        return type(self)([first.replace(**changes), *others])

    def of_process(self, name: str) -> Self:
        """Copy the findings, each with the name of the process."""
        named = super().of_process(name)
        named.errors = tuple(error.of_process(name) for error in self.errors)
        return named

    def as_json(self) -> dict[str, Any]:
        return {**super().as_json(), "all": [error.as_json() for error in self.errors]}


@contextlib.contextmanager
def collected(problems: list[QcoreError]) -> Iterator[None]:
    """Append an error that the block raises to `problems`, several findings one by one."""
    try:
        yield
    except PreflightError as error:
        problems.extend(error.errors)
    except QcoreError as error:
        problems.append(error)


def one_of_each(problems: Sequence[QcoreError]) -> list[QcoreError]:
    """The first problem of each kind (code and statement), saying how many there are.

    A wrong config puts hundreds of tensors in the wrong; that is one fault and one line.
    """
    kinds: dict[tuple[str, str], list[QcoreError]] = {}
    for problem in problems:
        kinds.setdefault((problem.code, problem.what), []).append(problem)
    told = []
    for first, *others in kinds.values():
        if others:
            first = first.replace(what=f"{first.what} (one of {len(others) + 1})")
        told.append(first)
    return told


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known word closest to a misspelled one; ``None`` where none is close.

    Args:
        word: as the user wrote it; case counts.
        known: the words that would have been right.
        cutoff: similarity from 0 to 1 that a suggestion must reach.
    """
    import difflib

    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)


def raise_all(problems: Sequence[QcoreError]) -> None:
    """Raise the one problem, or all of them as a `PreflightError`; nothing when there is none."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise PreflightError(list(problems))


class Failure:
    """What went wrong in foreign code, on one line; `error` is the exception, if there was one."""

    def __init__(self, text: str, error: BaseException | None = None) -> None:
        self.text = " ".join(text.split())
        self.error = error

    def __str__(self) -> str:
        return self.text


def contained(call: Callable[[], _T], /, *, prints: bool = False) -> _T | Failure:
    """Call foreign code: any exception but KeyboardInterrupt becomes a `Failure`.

    Args:
        call: the foreign code.
        prints: whether it may print to stdout, as a plugin's command does. Otherwise its output
            goes to stderr, because stdout may be one JSON object.
    """
    try:
        with contextlib.nullcontext() if prints else contextlib.redirect_stdout(sys.stderr):
            return call()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  SystemExit too: a plugin may call sys.exit
        return Failure(cause_of(error), error)


def cause_of(error: BaseException) -> str:
    """Type, message and innermost frame of an exception that foreign code raised."""
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
