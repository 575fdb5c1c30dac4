"""Every Triton kernel compiles for Hopper; see `compiled`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def test_every_kernel_compiles_for_hopper():
    """In a process of its own: this one interprets kernels, and a kernel is one or the other."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compiled.py"))],
        capture_output=True, text=True, check=False, env=environment, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    counts = dict(re.findall(r"^(\w+): (\d+) in", done.stdout, re.MULTILINE))
    assert len(counts) >= 17
    assert "0" not in counts.values(), counts
