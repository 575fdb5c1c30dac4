"""A plan is the same whether Triton is installed or not: kernels are modeled, not launched."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support.cli_kit import apart

from qcore_qwen35 import tiny

#: ``qcore`` where neither Triton nor its metadata are installed.
_WITHOUT = """
import importlib.metadata as metadata, sys
sys.modules["triton"] = None
version = metadata.version
def absent(name):
    if name == "triton":
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = absent
from qcore.cli.main import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_a_plan_does_not_depend_on_triton(tmp_path: Path, kind: str) -> None:
    base = tmp_path / "base"
    tiny.write(base, moe=kind == "experts")
    words = ("plan", base, "--gpu", "H200", "--max-length", 256, "--json")
    with_triton = apart(*words)
    without = apart(*words, command=(sys.executable, "-c", _WITHOUT))
    assert with_triton.code == without.code == 0, without.err
    assert json.loads(without.out) == json.loads(with_triton.out)
    assert "not installed here" not in without.out
