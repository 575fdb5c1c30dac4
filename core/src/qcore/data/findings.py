"""Findings on the rows of a run: what was repaired, dropped or left out, and what it means.

This file decides the record of one finding and how the findings of many rows are put together.
What is looked for is up to `qcore.data.repairs`, `qcore.data.samples` and the other readers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ERROR, WARNING, NOTE = "error", "warning", "note"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFinding:
    """One observation on a row.

    Attributes:
        code: stable code, such as ``QC-DATA-041``.
        severity: ``error``, ``warning`` or ``note``.
        row: number of the row over all sources, from 1; 0 for a finding on all rows.
        field: where in the row: ``messages[1].content``.
        message: what is so.
        fix: what to do about it; empty where nothing needs to be done.
    """

    code: str
    severity: str
    row: int
    field: str
    message: str
    fix: str = ""

    def as_json(self) -> dict[str, Any]:
        """The entry of ``qcore data check --json``."""
        return {
            "code": self.code,
            "severity": self.severity,
            "row": self.row,
            "field": self.field,
            "message": self.message,
            "fix": self.fix,
        }
