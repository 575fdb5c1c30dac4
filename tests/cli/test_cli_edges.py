"""What click lets pass, and what the system says: one line and the right status all the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def run(*arguments: str | bytes) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qcore", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        (("inspect", "x" * 300), 65, "QC-CLI-006"),
        (("inspect", b"n\xffn"), 2, "QC-CLI-003"),
        (("presets", "show", "quick", "--json", "--json"), 2, "QC-CLI-004"),
        (("train", "--data", "a", "--output", "b", "--preset", "a", "--preset=b"), 2, "QC-CLI-004"),
        (("generate", "m", "--prompt", "p", "--temperature", "1e9"), 2, "QC-CLI-001"),
        (("generate", "m", "--prompt", "p", "--max-new-tokens", "9" * 20), 2, "QC-CLI-001"),
    ],
)
def test_one_line_and_the_status(
    arguments: tuple[str | bytes, ...], status: int, code: str
) -> None:
    done = run(*arguments)
    assert done.returncode == status
    text = done.stdout + done.stderr
    assert code in text
    assert "Traceback" not in text


def test_set_may_stand_more_than_once(tmp_path: Path) -> None:
    done = run("train", "--data", "a", "--output", str(tmp_path / "o"), "--set", "r=1",
               "--set", "seed=1")  # fmt: skip
    assert "QC-CLI-002" in done.stderr


@pytest.mark.parametrize("after", [0.15, 0.25, 0.35, 0.5])
def test_an_interrupt_is_never_swallowed(after: float, tmp_path: Path) -> None:
    """Also while torch is imported, whose import of numpy eats KeyboardInterrupt."""
    from qcore_qwen35.tiny import write

    write(tmp_path / "base")
    command = [sys.executable, "-m", "qcore", "generate", str(tmp_path / "base"),
               "--prompt", "hi", "--max-new-tokens", "100000", "--json"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    # Before Python's own start-up is over, the signal ends the process by itself.
    assert process.returncode in (130, -signal.SIGINT)
    if process.returncode == 130:
        assert json.loads(out)["error"]["code"] == "QC-CLI-005"


def test_a_reader_that_leaves_early_is_no_defect() -> None:
    command = f"{sys.executable} -m qcore presets list | head -1"
    done = subprocess.run(
        ["/bin/sh", "-c", command], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.stderr == ""
