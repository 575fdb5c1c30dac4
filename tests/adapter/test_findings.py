"""What a matrix of a wrong shape is called: a wrong config, or a wrong base."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcore.adapter.findings import Findings
from qcore.checkpoint.checkpoint import Header


@pytest.mark.parametrize(
    ("found", "expected", "rank_dim", "fix"),
    [
        ((4, 24), (8, 24), -2, "r or rank_pattern"),
        ((128, 4), (128, 8), -1, "r or rank_pattern"),
        ((16, 4, 24), (16, 8, 24), -2, "r or rank_pattern"),
        ((4, 23), (4, 24), -2, "name the base"),
        ((127, 4), (128, 4), -1, "name the base"),
        ((4, 23), (8, 24), -2, "name the base"),
        ((96,), (4, 24), -2, "name the base"),
        ((23,), (24,), None, "name the base"),
    ],
)
def test_only_a_wrong_rank_is_a_fault_of_the_config(
    found: tuple[int, ...], expected: tuple[int, ...], rank_dim: int | None, fix: str
) -> None:
    findings = Findings(Path("adapter_model.safetensors"))
    header = Header(name="q_proj", dtype="F32", shape=found, file="", start=0, end=0)
    assert not findings.check_tensor(header, expected, rank_dim=rank_dim)
    (problem,) = findings.problems
    assert problem.code == "QC-ADAPTER-007"
    assert fix in (problem.fix or "")


def test_integers_are_refused_and_floats_of_the_shape_are_not() -> None:
    findings = Findings(Path("adapter_model.safetensors"))
    for dtype, right in (("I32", False), ("BF16", True)):
        header = Header(name="q_proj", dtype=dtype, shape=(4, 24), file="", start=0, end=0)
        assert findings.check_tensor(header, (4, 24), rank_dim=-2) is right
    assert [problem.what for problem in findings.problems] == ["is not floating point"]
