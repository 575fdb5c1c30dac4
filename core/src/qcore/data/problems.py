"""Bad rows of a data set: counted, the first ones reported, all of them written to a file.

This file decides how many errors a user sees, in which order, and what ``rejected.jsonl`` holds.
Memory is constant for any number of bad rows. Whether a bad row ends the run is decided by the
policy ``bad_rows`` in `qcore.data.dataset`; what is bad is decided by the readers and checks.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import IO, Any, Final, Self

from ..errors import InputError, PreflightError
from ..io.atomic import writing

SHOWN: Final = 20  #: bad rows that are reported; the others are counted
REJECTED: Final = "rejected.jsonl"  #: usual name of the file with all bad rows
_ENCODE: Final = json.JSONEncoder(ensure_ascii=False).encode
_PLACE: Final = re.compile(r"line (\d+)(?:, )?")


class Problems:
    """Collects the bad rows of one or several files: counts all, keeps the first `SHOWN`.

    Args:
        path: the file, if there is only one; `QC-DATA-014` names it.
        rejected: JSON Lines file that gets every bad row as it is added, with the keys ``line``,
            ``file``, ``code``, ``field`` and ``reason``. Its content from an earlier run is
            removed. Rows may be slightly out of order, as they are added.
    """

    def __init__(self, path: Path | None = None, *, rejected: Path | None = None) -> None:
        self.path = path
        self.rejected = rejected
        self.count = 0
        self.codes: dict[str, int] = {}
        self._files: dict[str | None, int] = {}
        self._kept: list[tuple[tuple[int, int], InputError]] = []
        self._file: IO[str] | None = None
        if rejected is not None:
            with writing(rejected):
                rejected.unlink(missing_ok=True)

    def add(self, line: int, error: InputError) -> None:
        """Record the error of a line; the error names the file.

        Raises:
            WriteError: `rejected` cannot be written.
        """
        self.count += 1
        self.codes[error.code] = self.codes.get(error.code, 0) + 1
        order = self._files.setdefault(error.file, len(self._files))
        # Schema and mask errors arrive slightly out of order: keep twice as many and sort them.
        if len(self._kept) < 2 * SHOWN:
            self._kept.append(((order, line), error))
        if self.rejected is not None:
            self._write(self.rejected, line, error)

    def first(self) -> list[InputError]:
        """The first `SHOWN` errors in the order of files and lines.

        If there are more, the last entry is ``QC-DATA-014`` with the exact number of bad rows.
        """
        kept = sorted(self._kept, key=lambda kept: kept[0])
        errors = [error for _, error in kept][:SHOWN]
        if self.count > len(errors):
            place = "" if self.rejected is None else f"; {self.rejected.name} lists all of them"
            errors.append(
                InputError(
                    "QC-DATA-014",
                    f"{self.count} rows are bad, of which the first {len(errors)} are shown{place}",
                    file=self.path if len(self._files) < 2 else None,
                    fix="fix these and run it again",
                )
            )
        return errors

    def stop(self) -> None:
        """Close `rejected` and raise the collected errors, if any; a `PreflightError` for several.

        Raises:
            InputError: the errors of `first`.
        """
        self.close()
        errors: list[Any] = list(self.first())
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise PreflightError(errors)

    def close(self) -> None:
        """Close `rejected`; a later `add` continues it."""
        if self._file is not None and self.rejected is not None:
            file, self._file = self._file, None
            with writing(self.rejected):
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, path: Path, line: int, error: InputError) -> None:
        with writing(path):
            if self._file is None:
                self._file = path.open("a", encoding="utf-8", errors="backslashreplace")
            self._file.write(_ENCODE(entry(line, error)) + "\n")


def entry(line: int, error: InputError) -> dict[str, Any]:
    """The entry of ``rejected.jsonl`` for one bad row."""
    place = error.field or ""
    if match := _PLACE.match(place):
        place = place[match.end() :]
    return {
        "line": line,
        "file": error.file,
        "code": error.code,
        "field": place,
        "reason": error.replace(file=None, field=None).message,
    }
