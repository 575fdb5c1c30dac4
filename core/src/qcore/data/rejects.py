"""Rows that are refused: counted, listed in full, and either an error or skipped within a bound.

This file decides when bad rows stop a run (``bad_rows``, ``bad_rows_limit``), which of them an
error shows, and what ``rejected.jsonl`` holds. Why a row is refused is decided where it is read.

Codes: ``QC-DATA-011`` a row is too long, ``-014`` more bad rows than are shown, ``-047`` more rows
are skipped than ``bad_rows_limit`` allows.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from ..api.media import RowError
from ..errors import InputError, PreflightError
from .policies import SKIP, Policies

if TYPE_CHECKING:
    from .sources.source import Source

SHOWN = 20  #: bad rows that an error shows; the others are counted
REJECTED = "rejected.jsonl"
MOST = 1 << 20  #: the largest max_length


class Place(Protocol):
    """Where a row comes from."""

    @property
    def row(self) -> int: ...

    @property
    def line(self) -> int: ...

    @property
    def path(self) -> Path | None: ...

    @property
    def source(self) -> Source | None: ...


@dataclass(frozen=True, slots=True)
class RecordPlace:
    """The place of a record that did not become a row.

    Attributes:
        row: number over all sources, from 1.
        line: line in the file, or number of the record.
        path: the file.
        source: its source.
    """

    row: int
    line: int
    path: Path | None
    source: Source | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _TooLong:
    row: int
    line: int
    path: Path | None
    source: Source | None
    tokens: int
    error: RowError


class Rejects:
    """Collects the refused rows of a data set.

    Args:
        policies: of the run; a source's own ``bad_rows`` goes before it.

    Attributes:
        count: refused rows.
        skipped: those of them that ``bad_rows=skip`` leaves out.
    """

    def __init__(self, policies: Policies | None = None) -> None:
        self.policies = policies or Policies()
        self.count = 0
        self.skipped = 0
        self._kept: list[tuple[int, InputError]] = []
        self._too_long: list[_TooLong] = []
        # A file, because a hundred thousand refused rows must not be held in memory.
        self._list: BinaryIO | None = None

    def add(self, place: Place, error: RowError | InputError) -> None:
        """Record the error of a row."""
        self.count += 1
        if isinstance(error, RowError):
            at, error = error.at, error.error(place.path, place.line)
        else:
            at = ""
            error = error.replace(file=error.file or place.path)
        self._write(place, error, at)
        if self.policies.over(place.source).bad_rows == SKIP:
            self.skipped += 1
        # Errors arrive slightly out of order: keep twice as many and sort them.
        elif len(self._kept) < 2 * SHOWN:
            if error.code != "QC-DATA-011":  # whose fix names long_rows
                fix = "or set bad_rows=skip to leave such rows out"
                error = error.replace(fix=f"{error.fix}, {fix}" if error.fix else fix[3:])
            self._kept.append((place.row, error))

    def add_too_long(self, place: Place, tokens: int, error: RowError) -> None:
        """Record a row that is too long; its fix names the length that fits every row."""
        self._too_long.append(
            _TooLong(
                row=place.row, line=place.line, path=place.path, source=place.source,
                tokens=tokens, error=error,
            )
        )  # fmt: skip

    def _add_too_long(self) -> None:
        if not self._too_long:
            return
        enough = max(row.tokens for row in self._too_long)
        for row in self._too_long:
            more = f", or {row.error.fix}" if row.error.fix else ""
            length = f"max_length={enough}, which fits every row, or " if enough <= MOST else ""
            row.error.fix = f"set {length}long_rows=drop, truncate_turns or truncate_tokens{more}"
            self.add(row, row.error)
        self._too_long = []

    def _write(self, place: Place, error: InputError, at: str) -> None:
        if self._list is None:
            self._list = tempfile.TemporaryFile()  # noqa: SIM115, closed with this object
        entry = {
            "row": place.row,
            "file": str(place.path) if place.path is not None else None,
            "line": place.line,
            "code": error.code,
            "field": at,
            "reason": _reason(error),
            "fix": error.fix or "",
        }
        self._list.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")

    def stop(self, rows: int) -> None:
        """Raise the errors that stop the run, if any; a `PreflightError` for several.

        Args:
            rows: rows of all sources, refused ones included.

        Raises:
            InputError: the errors in the order of the rows, followed by ``QC-DATA-014`` with the
                number of bad rows if there are more than `SHOWN`; ``QC-DATA-047``.
        """
        self._add_too_long()
        refused = self.count - self.skipped
        errors: list[Any] = [error for _, error in sorted(self._kept, key=lambda kept: kept[0])]
        errors = errors[:SHOWN]
        if refused > len(errors):
            errors.append(
                InputError(
                    "QC-DATA-014",
                    f"{refused} rows are bad, of which the first {len(errors)} are shown",
                    file=errors[0].file,
                    fix=f"fix these and run it again; {REJECTED} lists all of them",
                )
            )
        limit = self.policies.bad_rows_limit
        if not errors and self.skipped > limit * rows:
            first = next(self.entries())
            errors.append(
                InputError(
                    "QC-DATA-047",
                    f"{self.skipped} of {rows} rows are bad, more than bad_rows=skip may leave out",
                    file=first["file"],
                    field=f"line {first['line']}, the first of them",
                    found=first["reason"],
                    expected=f"at most {limit:.0%} of the rows (bad_rows_limit={limit:g})",
                    fix=f"fix the rows, or set bad_rows_limit={_above(self.skipped / rows)}",
                )
            )
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise PreflightError(errors)

    def entries(self) -> Iterator[dict[str, Any]]:
        """The entries of ``rejected.jsonl``, in the order of their detection."""
        if self._list is None:
            return
        self._list.seek(0)
        for line in self._list:
            yield json.loads(line)
        self._list.seek(0, 2)

    def write(self, path: Path) -> None:
        """Write ``rejected.jsonl``; nothing is written without refused rows."""
        self._add_too_long()
        if self._list is None:
            return
        self._list.seek(0)
        with path.open("wb") as file:
            shutil.copyfileobj(self._list, file)
        self._list.seek(0, 2)


def _reason(error: InputError) -> str:
    found = f": found {error.found}" if error.found is not None else ""
    expected = f", expected {error.expected}" if error.expected is not None else ""
    return f"{error.what}{found}{expected}"


def _above(fraction: float) -> str:
    """The fraction rounded up to a value that is easy to read."""
    return f"{min(1.0, -(-fraction * 100 // 1) / 100):g}"


def template_refusal(place: Place, error: InputError) -> InputError:
    """Turn an error of the chat template into an error of the row."""
    return error.replace(
        what=f"the chat template {error.what}",
        file=place.path,
        field=f"line {place.line}",
        expected=None,
        fix="fix the row; the template comes with the checkpoint",
    )
