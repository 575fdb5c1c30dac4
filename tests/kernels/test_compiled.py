"""Every Triton kernel compiles for Hopper; see `compiled`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def compiled(*ops: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one interprets kernels, and a kernel is one or the other."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compiled.py")), *ops],
        capture_output=True, text=True, check=False, env=environment, timeout=900,
    )  # fmt: skip


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper():
    done = compiled()
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    counts = dict(re.findall(r"^([\w:]+): (\d+) in", done.stdout, re.MULTILINE))
    assert len(counts) >= 17
    assert "0" not in counts.values(), counts


@pytest.mark.slow
def test_a_kernel_that_no_check_launches_is_named():
    done = compiled("qwen35::swiglu")
    assert done.returncode > 0
    missed = set(re.findall(r"^(\S+): no check launches it$", done.stdout, re.MULTILINE))
    # An entry of core and one of the plugin; no helper that kernels call, nor what was launched.
    assert {"qcore.nn.loss_triton._rows", "qcore_qwen35.ops.moe.triton._route"} <= missed
    assert not any("swiglu" in name or "_entry" in name for name in missed)
