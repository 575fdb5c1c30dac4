"""Rows in several processes: the same samples, findings and errors; no process is left behind."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.chat_kit import (
    FORMAT,
    TEMPLATE,
    FakeCheckpoint,
    bot,
    own_template,
    own_tokenizer,
    user,
    write_rows,
)
from support.tiers import fast

from qcore.api.media import RowError
from qcore.data.dataset import Dataset, dataset
from qcore.data.policies import Policies
from qcore.data.rendering import row_pool
from qcore.data.rendering.row_pool import RowPool, worker_count
from qcore.data.sources.source import Source
from qcore.errors import InputError, PreflightError, QcoreError, UsageError
from qcore.io.cores import available_cores, quota

TALK = [user("2+2?"), bot("4", reasoning_content="pair"), user("+3?"), bot(" 7", thinking="sum")]


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Good rows of several formats, with findings, and bad ones in between."""
    for n in range(count):
        if n % 37 == 5:
            yield {"messages": [user("q"), bot("<|im_end|>")]}
        elif n % 41 == 6:
            yield {"messages": [user("no answer")]}
        elif n % 29 == 7:
            yield {"messages": [*TALK, user("long " * 90), bot("word " * (90 + n))]}
        elif n % 5 == 0:
            yield {"messages": TALK, "score": n}
        elif n % 7 == 0:
            yield {"instruction": f"say {n}", "input": "", "output": f"{n} é"}
        else:
            yield {"messages": [user(f"say {n}"), bot(f"{n} 👍🏽")]}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Any:
    own_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return FakeCheckpoint(tmp_path, own_template(TEMPLATE))


def load(checkpoint: Any, sources: list[Source], workers: int, **more: Any) -> Dataset:
    options: dict[str, Any] = {
        "policies": Policies(long_rows="truncate_turns", bad_rows="skip", bad_rows_limit=0.5)
    }
    return dataset(sources, checkpoint, FORMAT, 200, workers=workers, **(options | more))


def told(data: Dataset) -> Any:
    """Everything that a run reads of a data set."""
    summary = data.summary()
    return (
        [(e.ids, e.labels, e.row, e.sample, e.line, e.supervised, e.turns, e.reasoned)
         for e in (*data.train, *data.eval)],
        json.dumps(summary, sort_keys=True),
        list(data.findings), list(data.lines()), list(data.rejects.entries()),
        data.chat,
    )  # fmt: skip


def test_any_number_of_processes_gives_the_same(checkpoint: Any, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    first = write_rows(tmp_path / "first.jsonl", list(rows(300)))
    with first.open("ab") as file:
        file.write(b'{"messages": [\n[1]\n')
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([{"messages": TALK, "n": float(n)} for n in range(200)])
    pq.write_table(table, tmp_path / "second.parquet", row_group_size=90)
    sources = [
        Source(name="first", files=(first,), reasoning="mask"),
        Source(name="second", files=(tmp_path / "second.parquet",), count=150),
    ]
    alone = load(checkpoint, sources, 1)
    assert alone.rejects.count > 15
    assert alone.samples > alone.rows > 400
    assert alone.truncated > 5
    for workers in (2, 3):
        assert told(load(checkpoint, sources, workers)) == told(alone)


def test_errors_are_those_of_one_process(checkpoint: Any, tmp_path: Path) -> None:
    """An error of a file comes after the rows before it, an unknown format before any row."""
    path = write_rows(tmp_path / "rows.jsonl", list(rows(200)))
    pack = tmp_path / "cut.jsonl.gz"
    import gzip

    pack.write_bytes(gzip.compress(path.read_bytes())[:-20])
    for source in (
        Source(name="refused", files=(path,)),
        Source(name="cut", files=(pack,)),
        Source(name="format", files=(path,), format="nothing"),
    ):
        found = []
        for workers in (1, 2):
            with pytest.raises(QcoreError) as caught:
                load(checkpoint, [source], workers, policies=Policies())
            error = caught.value
            every = error.errors if isinstance(error, PreflightError) else (error,)
            found.append((type(error), [one.as_json() for one in every]))
        assert found[0] == found[1]


def test_a_process_that_ends_is_an_error_with_its_rows(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": TALK}] * 300)
    real = row_pool._Worker.ask

    def ask(self: Any, chunk: Any) -> None:
        if chunk.chunk[0].row == 129:
            self._process.kill()
        real(self, chunk)

    monkeypatch.setattr(row_pool._Worker, "ask", ask)
    with pytest.raises(InputError) as caught:
        load(checkpoint, [Source(name="rows", files=(path,))], 2)
    error = caught.value
    assert (error.code, error.file, error.exit_code) == ("QC-DATA-079", str(path), 65)
    assert error.field is not None
    assert error.field.endswith(" to 192")
    assert "SIGKILL" in error.message


def test_a_failure_that_is_not_a_rows_is_raised_here() -> None:
    with RowPool(pickle.dumps("no setup"), 1) as pool, pytest.raises(ValueError, match="unpack"):
        list(pool.outcomes([[]]))  # type: ignore[list-item]


_PARENT = """
import sys, time, pathlib
from support.chat_kit import *
from qcore.data.dataset import dataset
from qcore.data.rendering import row_pool
from qcore.data.sources.source import Source
folder = pathlib.Path(sys.argv[1])
checkpoint = FakeCheckpoint(folder, own_template(TEMPLATE))
real = row_pool.RowPool.__enter__
def enter(self):
    made = real(self)
    print(*[one._process.pid for one in made._workers], flush=True)
    return made
row_pool.RowPool.__enter__ = enter
dataset([Source(name="r", files=(folder / "rows.jsonl",))], checkpoint, FORMAT, 200, workers=2)
"""


@pytest.mark.parametrize("number", fast([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
def test_nothing_is_left_when_the_parent_ends(
    checkpoint: Any, tmp_path: Path, number: signal.Signals
) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"messages": TALK * 5}] * 20_000)
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,
    )  # fmt: skip
    assert parent.stdout is not None
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert len(workers) == 2
    time.sleep(1)
    everyone = {pid for worker in workers for pid in (worker, *_children(worker))}
    if number == signal.SIGINT:  # a terminal sends it to all of them
        os.killpg(parent.pid, number)
    else:
        parent.send_signal(number)
    assert parent.wait(timeout=30) != 0
    deadline = time.monotonic() + 30
    while any(map(_lives, everyone)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in everyone if _lives(pid)]


def _children(pid: int) -> list[int]:
    try:
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in words.split()]


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_chat_format_that_cannot_be_sent_is_noted(checkpoint: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": TALK}])
    kept = replace(FORMAT, parse=lambda text, tools: {"role": "assistant", "content": text})
    source = Source(name="rows", files=(path,))
    found = dataset([source], checkpoint, kept, 200, workers=2)
    assert [one.severity for one in found.findings if one.code == "QC-DATA-083"] == ["note"]
    alone = dataset([source], checkpoint, kept, 200, workers=1)
    assert not [one for one in alone.findings if one.code == "QC-DATA-083"]


def test_errors_can_be_pickled() -> None:
    for error in (
        UsageError("QC-A-001", "is wrong", file="f", field="x", found=3, expected="y", fix="z"),
        PreflightError([InputError("QC-A-001", "a"), UsageError("QC-A-002", "b")]),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert (again.as_json(), again.exit_code) == (error.as_json(), error.exit_code)
    row = RowError("QC-A-003", "no", at="a.b", found=1, expected=2, fix="c").within("row")
    again = pickle.loads(pickle.dumps(row))
    assert (str(again), again.error(None, 4).as_json()) == (str(row), row.error(None, 4).as_json())


def test_the_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x" * 1000)
    source = Source(name="rows", files=(path, tmp_path / "missing"))
    assert [worker_count(wanted, [source]) for wanted in (-1, 0, 1, 2, 5)] == [1, 1, 1, 2, 5]
    monkeypatch.setattr(row_pool, "_SMALL", 1000)
    monkeypatch.setattr(row_pool, "available_cores", lambda: 7)
    assert worker_count(-1, [source, replace(source, name="again")]) == 7
    monkeypatch.setattr(row_pool, "available_cores", lambda: 700)
    assert worker_count(-1, [source]) == 32


def test_cores_are_bounded_by_the_control_group(tmp_path: Path) -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)
    assert quota(tmp_path) == float("inf")
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert quota(tmp_path) == float("inf")
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("250000\n")
    assert quota(tmp_path) == 2.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert quota(tmp_path) == 2.5
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert quota(tmp_path) == 1.5
