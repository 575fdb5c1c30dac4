"""Collects the errors and notes of one adapter, so that all of them are reported at once.

This file decides that errors are raised once for each kind, or handed to a caller that reports all,
and what a matrix of a wrong shape or dtype is called.
`qcore.adapter.matching` and `qcore.adapter.declared_targets` add to it. It imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint.checkpoint import Header
from ..errors import InputError, QcoreError, one_of_each, raise_all

_FLOATS = ("F32", "F16", "BF16", "F64")


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

    def check_tensor(
        self, header: Header, shape: tuple[int, ...], *, rank_dim: int | None = None
    ) -> bool:
        """Check that a tensor has a shape and floating-point values.

        Args:
            header: the tensor.
            shape: the expected shape.
            rank_dim: the dimension with the ranks, of a matrix of LoRA.

        Returns:
            Whether it has both; otherwise ``QC-ADAPTER-007`` is added.
        """
        right, floats = header.shape == shape, header.dtype in _FLOATS
        if not right:
            self.problem(
                "QC-ADAPTER-007", "has the wrong shape", header.name,
                found=list(header.shape), expected=list(shape),
                fix=_shape_fix(header.shape, shape, rank_dim),
            )  # fmt: skip
        if not floats:
            self.problem(
                "QC-ADAPTER-007", "is not floating point", header.name,
                found=header.dtype, expected="F32", fix="export the adapter again",
            )  # fmt: skip
        return right and floats

    def report(self, problems: list[QcoreError] | None) -> None:
        """Raise the errors, one of each kind, or add all of them to `problems` if it is a list."""
        if problems is None:
            raise_all(one_of_each(self.problems))
        else:
            problems += self.problems


def _shape_fix(found: tuple[int, ...], expected: tuple[int, ...], rank_dim: int | None) -> str:
    """Return the fix: of the config if only the rank differs, else of the base."""
    if rank_dim is not None and len(found) == len(expected):
        differing = [dim for dim in range(len(found)) if found[dim] != expected[dim]]
        if differing == [rank_dim % len(found)]:
            return "restore adapter_config.json: its r or rank_pattern is not that of the tensors"
    return "name the base that the adapter was trained on"
