"""Collects the errors and notes of one adapter, so that all of them are reported at once.

This file decides that errors are raised once for each kind, or handed to a caller that reports all.
`qcore.adapter.matching` and `qcore.adapter.declared_targets` add to it. It imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError, QcoreError, one_of_each, raise_all


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

    def report(self, problems: list[QcoreError] | None) -> None:
        """Raise the errors, one of each kind, or add all of them to `problems` if it is a list."""
        if problems is None:
            raise_all(one_of_each(self.problems))
        else:
            problems += self.problems
