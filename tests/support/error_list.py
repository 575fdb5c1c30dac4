"""The error codes that docs/errors.md lists, with their exit statuses."""

from __future__ import annotations

import re
from pathlib import Path

ERRORS = Path(__file__).resolve().parents[2] / "docs" / "errors.md"


def listed_codes(page: Path = ERRORS) -> dict[str, int]:
    """Code -> the exit status under which the page lists it.

    Raises:
        ValueError: a code that is listed twice.
    """
    codes: dict[str, int] = {}
    status = 0
    for line in page.read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"## Exit status (\d+):", line):
            status = int(heading[1])
        if entry := re.match(r"- `(QC-[A-Z0-9]+-\d{3})`: \S", line):
            if entry[1] in codes:
                raise ValueError(f"{entry[1]} is listed twice")
            codes[entry[1]] = status
    return codes
