"""``metrics.jsonl``: whole rows, cut back in one step."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from support.faults import Faults, count, killed

from qcore.errors import WriteError
from qcore.io.metrics_log import MetricsLog, sync_rows


def test_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"step": 1, "loss": float("nan"), "more": [float("inf"), {"x": -float("inf")}]})
        assert path.read_bytes().endswith(b"\n"), "a row is there when write returns"
        log.write({"step": 2, "loss": 0.5})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0] == {"step": 1, "loss": "NaN", "more": ["Infinity", {"x": "-Infinity"}]}
    assert rows[1] == {"step": 2, "loss": 0.5}


def test_a_torn_row_goes_when_the_log_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    with MetricsLog(path) as log:
        log.write({"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_truncate_after(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.truncate_after(3)
    assert not path.exists()
    log.write({"run": "a"})
    for step in range(1, 8):
        log.write({"step": step})
    with path.open("ab") as file:
        file.write(b'{"step": 3, "tor')
    log.truncate_after(4)
    log.write({"step": 5, "again": True})
    log.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [{"step": n} for n in range(1, 5)]
    assert rows == [{"run": "a"}, *steps, {"step": 5, "again": True}]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_under_faults(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    old = b"".join(b'{"step": %d}\n' % n for n in range(9))
    new = old[: len(old) // 9 * 5]

    def job() -> None:
        MetricsLog(path).truncate_after(4)

    path.write_bytes(old)
    for n in range(count(job)):
        path.write_bytes(old)
        with Faults(n, errno.ENOSPC), pytest.raises(WriteError):
            job()
        assert path.read_bytes() in (old, new)
        assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    for n in range(count(job)):
        path.write_bytes(old)
        assert killed(job, n)
        assert path.read_bytes() in (old, new)


def test_rows_are_durable_after_a_sync(tmp_path: Path) -> None:
    """File and name: a checkpoint that claims the rows is published after it."""
    path = tmp_path / "metrics.jsonl"
    sync_rows(path)  # nothing was written yet
    with MetricsLog(path) as log:
        log.write({"step": 1})
        with Faults() as faults:
            sync_rows(path)
        calls = [(name, args[0]) for name, args, _ in faults.log]
        assert [name for name, _ in calls] == ["open", "fsync", "open", "fsync"]
        assert [where for name, where in calls if name == "open"] == [path, tmp_path]
        with Faults(0, errno.EIO), pytest.raises(WriteError) as error:
            sync_rows(path)
        assert error.value.code == "QC-WRITE-004"
