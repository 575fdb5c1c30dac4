"""Collects the errors and notes of one adapter, so that all of them are reported at once.

This file decides nothing: `qcore.adapter.matching` and `qcore.adapter.declared_targets` add to it,
and `qcore.adapter.reader` raises. It imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError, QcoreError


@dataclass(frozen=True, slots=True)
class Findings:
    """What is wrong with an adapter for a base, and what the report says of it.

    Attributes:
        path: the file of the adapter's tensors, for errors.
        problems: the errors.
        notes: lines for the report; warnings begin with ``warning:``.
    """

    path: Path
    problems: list[QcoreError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def problem(
        self, code: str, what: str, field: str, *, fix: str,
        found: object | None = None, expected: object | None = None,
    ) -> None:  # fmt: skip
        """Add an error of the file."""
        self.problems.append(
            InputError(
                code, what, file=self.path, field=field, found=found, expected=expected, fix=fix
            )
        )
