"""What a rank that fails leaves for the others, and which failure of several is the cause.

This file decides the record of a failure, its file, and the order in which failures explain each
other: a rank that is lost makes every other rank fail in its next collective. The file is the one
that ``torchrun`` names in ``TORCHELASTIC_ERROR_FILE``, in torch's own format, so that a plain
``torchrun`` shows the same line. Who writes a record, and who reads it, is up to `rank` and
`launch`.

Codes: ``QC-PARALLEL-011`` a rank that ended without an error.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from .. import errors
from ..errors import Interrupted, PreflightError, QcoreError

#: ``own``: an error of the rank itself; ``hang``: a rank that did not arrive; ``gone``: one that
#: ended without an error; ``contact``: the connection was lost, by a reason that is unknown here.
Kind = Literal["own", "hang", "gone", "contact"]
#: Repeating the command cannot repair these; the other statuses may pass.
PERMANENT: Final = frozenset((2, 65, 69, 76, 77))
LOST: Final = "run the same command again, with --auto-resume it goes on from the newest checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How one rank failed.

    Attributes:
        rank: the rank that the error is about.
        by: the rank that reports it.
        place: how it is named: ``rank 1 (host, GPU 1)``.
        error: the error.
        kind: what the error says about other ranks.
        time: of the failure, in seconds since the epoch.
        trace: the traceback, for ``--debug``.
    """

    rank: int
    by: int
    place: str
    error: QcoreError
    kind: Kind = "own"
    time: float = field(default_factory=time.time)
    trace: str = ""

    def named(self) -> QcoreError:
        """The error with the rank in front of it, unless it names one."""
        return self.error if self.error.process else self.error.of_process(self.place)

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {
            "rank": self.rank, "by": self.by, "place": self.place, "kind": self.kind,
            "time": self.time, "trace": self.trace, "error": packed(self.error),
        }  # fmt: skip

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Failure:
        """Read `as_json`."""
        return cls(**{**record, "error": unpacked(record["error"])})

    def write(self, path: Path) -> None:
        """Write the record in the format of torch's error files, complete or not at all."""
        text = self.named().message
        extra = {"py_callstack": text, "timestamp": str(int(self.time))}
        torch = {"message": text, "extraInfo": extra}
        content = json.dumps({"message": torch, "qcore": self.as_json()})
        with suppress(OSError):  # the launcher then reports how the process ended
            new = path.with_name(f".{path.name}")
            new.write_text(content, encoding="utf-8")
            os.replace(new, path)


def read(path: Path) -> Failure | None:
    """The record in a file; ``None`` without one."""
    try:
        return Failure.from_json(json.loads(path.read_bytes())["qcore"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def packed(error: QcoreError) -> dict[str, Any]:
    """An error as JSON; what was found and expected as texts."""
    facts = {name: getattr(error, name) for name in ("file", "field", "fix")}
    texts = {name: getattr(error, name) for name in ("found", "expected")}
    known = getattr(errors, type(error).__name__, None) is type(error)
    record: dict[str, Any] = {
        "class": type(error).__name__ if known else "QcoreError",
        "code": error.code,
        "what": error.what,
        "process": error.process,
        **facts,
        **{name: None if value is None else str(value) for name, value in texts.items()},
    }
    if isinstance(error, PreflightError):
        record["all"] = [packed(each) for each in error.errors]
    return record


def unpacked(record: Mapping[str, Any]) -> QcoreError:
    """The error of `packed`."""
    if "all" in record:
        return PreflightError([unpacked(each) for each in record["all"]])
    facts = dict(record)
    kind, process = getattr(errors, facts.pop("class")), facts.pop("process")
    error: QcoreError = kind(facts.pop("code"), facts.pop("what"), **facts)
    return error.of_process(process)


def ended(rank: int, place: str, status: int) -> Failure:
    """The failure of a process that left no record.

    Args:
        rank: its rank.
        place: its name.
        status: exit status; minus the signal that ended it.
    """
    if status < 0:
        with suppress(ValueError):
            name = signal.Signals(-status).name
            why = "; the system kills a process when memory runs out" if name == "SIGKILL" else ""
            return _gone(rank, place, f"was ended by {name}{why}", rank)
    return _gone(rank, place, f"ended with status {status} and no error", rank)


def vanished(rank: int, place: str, by: int) -> Failure:
    """The failure of a process that rank `by` no longer finds."""
    why = "ended without an error; the system kills a process when memory runs out"
    return _gone(rank, place, why, by)


def _gone(rank: int, place: str, what: str, by: int) -> Failure:
    error = QcoreError("QC-PARALLEL-011", what, fix=LOST)
    return Failure(rank=rank, by=by, place=place, error=error, kind="gone")


def cause(failures: Sequence[Failure], *, stopping: bool = False) -> QcoreError:
    """The error to report of a run whose ranks failed.

    An error that several ranks raise alike comes from the command or its files, and that of the
    first rank reads as in a run of one process: neither names a rank.

    Args:
        failures: of all ranks that failed; at least one.
        stopping: the user has sent a signal, after which ranks may be killed.
    """
    first = min(failures, key=lambda failure: (_order(failure, stopping), failure.time))
    same = sum(_said(other) == _said(first) for other in failures)
    general = isinstance(first.error, Interrupted) or first.rank == 0 or same > 1
    if first.kind == "own" and general and first.error.code != "QC-INTERNAL-001":
        return first.error
    return first.named()


def _order(failure: Failure, stopping: bool) -> int:
    """How early a failure is in the chain that ends the run."""
    interrupted = isinstance(failure.error, Interrupted)
    if failure.kind == "own" and not interrupted:
        return 0
    if failure.kind == "hang":
        return 1
    if interrupted:
        return 2 if stopping else 4
    return 3 if failure.kind == "gone" else 5


def _said(failure: Failure) -> tuple[str, str]:
    return failure.error.code, failure.error.message


def without_echoes(failures: Iterable[Failure]) -> list[Failure]:
    """Failures without the accounts that other ranks gave of a rank which left its own."""
    failures = list(failures)
    spoke = {failure.rank for failure in failures if failure.kind == "own"}
    return [f for f in failures if f.kind in ("own", "hang") or f.rank not in spoke]
