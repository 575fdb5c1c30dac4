"""Rows that are refused, skipped, dropped or cut: counted by source and listed in full.

This file decides when bad rows stop a run (``bad_rows``, ``bad_rows_limit``), which of them an
error shows, and what ``rejected.jsonl`` holds. Why a row is refused is decided where it is read,
and which rows are too long in `qcore.data.rendering.fitting`.

Codes: ``QC-DATA-011`` a row is too long, ``-014`` more bad rows than are shown, ``-015`` a source
without a row that is left, ``-046`` (in the list) a row that ``long_rows`` dropped or cut, ``-047``
more rows are skipped than ``bad_rows_limit`` allows.
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Protocol

from ..api.media import RowError
from ..errors import InputError, PreflightError
from ..io.atomic import rewrite
from .findings import ERROR, WARNING, DataFinding
from .policies import SKIP, Policies

if TYPE_CHECKING:
    from .source_counts import SourceCount
    from .sources.source import Source

SHOWN = 20  #: bad rows that an error shows; the others are counted
REJECTED = "rejected.jsonl"
MOST = 1 << 20  #: the largest max_length
#: What became of a row of the list. A refused row stops the run; ``bad_rows=skip`` leaves a skipped
#: one out, ``long_rows`` drops or cuts one that is too long.
REFUSED, SKIPPED, DROPPED, CUT = "refused", "skipped", "dropped", "cut"
TOO_LONG: Final = "QC-DATA-011"
LONG: Final = "QC-DATA-046"


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

    @property
    def unit(self) -> str: ...


@dataclass(frozen=True, slots=True)
class RecordPlace:
    """The place of a record that did not become a row.

    Attributes:
        row: number over all sources, from 1.
        line: line in the file, or number of the record.
        path: the file.
        source: its source.
        unit: what `line` counts; see `Record.unit`.
    """

    row: int
    line: int
    path: Path | None
    source: Source | None
    unit: str = "line"


class Rejects:
    """Collects the rows of a data set that are refused, skipped, dropped or cut.

    Args:
        policies: of the run; a source's own values go before them.
        listing: name of the file to which the caller writes the list; empty: to none.

    Attributes:
        count: refused rows, skipped ones included.
        skipped: those of them that ``bad_rows=skip`` leaves out.
        long: rows that are too long, by action (`DROPPED`, `CUT`) and ``long_rows``.
    """

    def __init__(self, policies: Policies | None = None, listing: str = "") -> None:
        self.policies = policies or Policies()
        self.listing = listing
        self.count = 0
        self.skipped = 0
        self.long: Counter[tuple[str, str]] = Counter()
        self._kept: list[tuple[int, InputError]] = []
        self._enough = 0  # tokens of the longest refused row
        # A file, because a hundred thousand refused rows must not be held in memory.
        self._list: BinaryIO | None = None
        self._final = False  # whether the fixes of the list name the length that fits every row

    @property
    def listed(self) -> int:
        """Number of entries of the list."""
        return self.count + sum(self.long.values())

    def add(self, place: Place, error: RowError | InputError) -> None:
        """Record the error of a row."""
        self._add(place, error)

    def add_too_long(self, place: Place, tokens: int, error: RowError) -> None:
        """Record a row that is too long; its fix names the length that fits every row."""
        self._enough = max(self._enough, tokens)
        self._add(place, error, tokens)

    def add_long(self, place: Place, tokens: int, max_length: int, *, cut: bool) -> None:
        """Record a row that is too long and that ``long_rows`` dropped or cut."""
        action = CUT if cut else DROPPED
        self.long[action, self.policies.over(place.source).long_rows] += 1
        error = InputError(
            LONG, "is longer than max_length", file=place.path,
            found=f"{tokens} tokens", expected=f"at most {max_length}",
        )  # fmt: skip
        self._write(place, error, "", action)

    def _add(self, place: Place, error: RowError | InputError, tokens: int = 0) -> None:
        self.count += 1
        if isinstance(error, RowError):
            at, error = error.at, error.error(place.path, place.line, place.unit)
        else:
            at = ""
            error = error.replace(file=error.file or place.path)
        skip = self.policies.over(place.source).bad_rows == SKIP
        self._write(place, error, at, SKIPPED if skip else REFUSED, tokens)
        if skip:
            self.skipped += 1
        # Errors arrive slightly out of order: keep twice as many and sort them.
        elif len(self._kept) < 2 * SHOWN:
            if error.code != TOO_LONG:  # whose fix names long_rows
                fix = "or set bad_rows=skip to leave such rows out"
                error = error.replace(fix=f"{error.fix}, {fix}" if error.fix else fix[3:])
            self._kept.append((place.row, error))

    def _write(
        self, place: Place, error: InputError, at: str, action: str, tokens: int = 0
    ) -> None:
        if self._list is None:
            self._list = tempfile.TemporaryFile()  # noqa: SIM115, closed with this object
        entry = {
            "row": place.row,
            "file": str(place.path) if place.path is not None else None,
            "line": place.line,
            "place": place_of(place),
            "code": error.code,
            "field": at,
            "reason": _reason(error),
            "fix": error.fix or "",
            "action": action,
        }
        if tokens:
            entry["tokens"] = tokens
        self._list.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")

    def _length_fix(self, fix: str | None) -> str:
        """The fix of a row that is too long, known once the longest one is."""
        more = f", or {fix}" if fix else ""
        fits = f"max_length={self._enough}, which fits every row, or "
        length = fits if self._enough <= MOST else ""
        return f"set {length}long_rows=drop, truncate_turns or truncate_tokens{more}"

    def stop(self, counts: Sequence[SourceCount]) -> None:
        """Raise the errors that stop the run, if any; a `PreflightError` for several.

        Args:
            counts: what came from each source; their numbers of refused, skipped, dropped and cut
                rows are set.

        Raises:
            InputError: the errors in the order of the rows, followed by ``QC-DATA-014`` with the
                number of bad rows if there are more than `SHOWN`; without such errors ``-047`` for
                a source that loses more than ``bad_rows_limit``, ``-015`` for one that loses all.
        """
        self.tally(counts)
        errors: list[Any] = [
            error.replace(fix=self._length_fix(error.fix)) if error.code == TOO_LONG else error
            for _, error in sorted(self._kept, key=lambda kept: kept[0])[:SHOWN]
        ]
        refused = self.count - self.skipped
        if refused > len(errors):
            listed = f"; {self.listing} lists all of them" if self.listing else ""
            errors.append(
                InputError(
                    "QC-DATA-014",
                    f"{refused} rows are bad, of which the first {len(errors)} are shown",
                    file=errors[0].file,
                    fix=f"correct these and run it again{listed}",
                )
            )
        if not errors:
            lost = ((count, self._lost(count, len(counts) > 1)) for count in counts)
            errors = [
                error.replace(file=error.file or _name(count)) for count, error in lost if error
            ]
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise PreflightError(errors)

    def tally(self, counts: Sequence[SourceCount]) -> None:
        """Set how many rows of each source were refused, skipped, dropped and cut."""
        firsts = [count.first for count in counts]
        found: Counter[tuple[int, str]] = Counter()
        for entry in self.entries():
            found[bisect_right(firsts, entry["row"]) - 1, entry["action"]] += 1
        for index, count in enumerate(counts):
            count.refused = found[index, REFUSED] + found[index, SKIPPED]
            count.skipped = found[index, SKIPPED]
            count.dropped, count.truncated = found[index, DROPPED], found[index, CUT]

    def _lost(self, count: SourceCount, several: bool) -> InputError | None:
        """The error of a source that loses too many rows."""
        limit, rows = self.policies.over(count.source).bad_rows_limit, count.rows
        if count.skipped > limit * rows:
            first = next(
                entry for entry in self.entries()
                if entry["row"] >= count.first and entry["action"] == SKIPPED
            )  # fmt: skip
            of = " of the source" if several else ""
            return InputError(
                "QC-DATA-047",
                f"{count.skipped} of {rows} rows{of} are bad, more than bad_rows=skip may leave "
                "out",
                file=first["file"],
                field=f"{first['place']}, the first of them",
                found=first["reason"],
                expected=f"at most {limit:.0%} of the rows (bad_rows_limit={limit:g})",
                fix=f"correct the rows, or set bad_rows_limit={_above(count.skipped / rows)}",
            )
        if rows and count.refused + count.dropped >= rows:
            return InputError(
                "QC-DATA-015",
                "has no row left",
                found=f"{rows} rows, {count.refused} refused, {count.dropped} too long",
                fix=_fix_lost(count),
            )
        return None

    def state(self) -> dict[str, Any]:
        """The counts, as JSON; the list is apart."""
        return {
            "count": self.count,
            "skipped": self.skipped,
            "long": [[*key, count] for key, count in self.long.items()],
        }

    @classmethod
    def of(cls, policies: Policies, state: Mapping[str, Any], listed: Path) -> Rejects:
        """The rows of an earlier rendering, of which none stopped the run.

        Args:
            policies: of the run.
            state: as `state` has it.
            listed: the entries, one a line.
        """
        rejects = cls(policies, listing=REJECTED)
        rejects.count, rejects.skipped = state["count"], state["skipped"]
        rejects.long = Counter({(action, rule): n for action, rule, n in state["long"]})
        rejects._final = True
        if rejects.listed:
            rejects._list = listed.open("rb")
        return rejects

    def entries(self) -> Iterator[dict[str, Any]]:
        """The entries of ``rejected.jsonl``, in the order of their detection."""
        if self._list is None:
            return
        self._list.seek(0)
        for line in self._list:
            entry = json.loads(line)
            if entry["code"] == TOO_LONG and not self._final:
                entry["fix"] = self._length_fix(entry["fix"])
            yield entry
        self._list.seek(0, 2)

    def findings(self) -> Iterator[DataFinding]:
        """A finding for each entry: an error if the row stops the run, else a warning."""
        for entry in self.entries():
            yield DataFinding(
                code=entry["code"],
                severity=ERROR if entry["action"] == REFUSED else WARNING,
                row=entry["row"],
                field=entry["field"],
                message=entry["reason"],
                fix=entry["fix"],
            )

    def write(self, path: Path) -> None:
        """Write ``rejected.jsonl``, as a whole; nothing is written without an entry.

        Raises:
            WriteError: ``QC-WRITE-003`` to ``-006``.
        """
        if self._list is None:
            return
        lines = (json.dumps(entry, ensure_ascii=False).encode() for entry in self.entries())
        rewrite(path, (line + b"\n" for line in lines))


def _fix_lost(count: SourceCount) -> str:
    if not count.dropped:
        return "fix its rows, or leave the source out"
    return "raise max_length, or leave the source out"


def _name(count: SourceCount) -> str:
    source = count.source
    return str(source.files[0]) if len(source.files) == 1 else source.name


def _reason(error: InputError) -> str:
    found = f": found {error.found}" if error.found is not None else ""
    expected = f", expected {error.expected}" if error.expected is not None else ""
    return f"{error.what}{found}{expected}"


def _above(fraction: float) -> str:
    """The fraction rounded up to a value that is easy to read."""
    return f"{min(1.0, -(-fraction * 100 // 1) / 100):g}"


def place_of(place: Place) -> str:
    """The place of a row in its file: ``line 3``."""
    return f"{place.unit} {place.line}"


def template_refusal(place: Place, error: InputError) -> InputError:
    """Turn an error of the chat template into an error of the row."""
    return error.replace(
        what=f"the chat template {error.what}",
        file=place.path,
        field=place_of(place),
        expected=None,
        fix="fix the row; the template comes with the checkpoint",
    )
