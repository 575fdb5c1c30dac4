"""Summarizes the problems that `qcore.checkpoint.layout.survey` collects, for the user.

This file decides that one cause is one error: the first problem of each code, and missing tensors
together with unknown ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import QcoreError, one_of_each

#: Codes for missing tensors; unknown tensors in the same checkpoint are reported with them.
_MISSING = ("QC-KEY-001", "QC-KEY-004", "QC-KEY-005")


def faults(problems: Sequence[QcoreError]) -> list[QcoreError]:
    """Summarize the problems of `survey` for the user: one error per code.

    If tensors are missing and others are unknown, both are one error: a misspelled name, swapped
    layers or another layout causes both.
    """
    by_code: dict[str, QcoreError] = {}
    for error in one_of_each(problems):
        by_code.setdefault(error.code, error)
    missing = next((by_code[code] for code in _MISSING if code in by_code), None)
    if missing is None or "QC-KEY-002" not in by_code:
        return list(by_code.values())
    del by_code["QC-KEY-002"]
    names = [error.field for error in problems if error.code == "QC-KEY-002"]
    unknown = f"{len(names)} that belong to no part, first {names[0]}"
    by_code[missing.code] = missing.replace(
        found=f"{missing.found}; {unknown}" if missing.found else unknown
    )
    return list(by_code.values())
