"""Media of several rows read at once: the same samples and errors, and only where it is allowed."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from support.chat_kit import FORMAT, FakeCheckpoint, bot, write_rows
from support.swatch_kit import Swatch, SwatchReader, swatch, swatch_checkpoint, text

from qcore.api.media import Payload
from qcore.data.dataset import Dataset, dataset
from qcore.data.policies import Policies

ROWS = 150


class ReadsTogether(SwatchReader):
    """Each of the first reads waits until another one is under way."""

    concurrent = True

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[str] = set()
        self._both = threading.Barrier(2)
        self._left = 2

    def read(self, payload: Payload) -> Swatch:
        self.threads.add(threading.current_thread().name)
        if self._left > 0:
            self._left -= 1
            self._both.wait(60)
        return super().read(payload)


class ReadsAlone(SwatchReader):
    """Says nothing of threads."""

    def read(self, payload: Payload) -> Swatch:
        assert threading.current_thread() is threading.main_thread()
        return super().read(payload)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> FakeCheckpoint:
    return swatch_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Rows with one or two swatches; some files are missing, some hold something else."""
    made = []
    for n in range(ROWS):
        if n % 17 != 3:
            bad = n % 23 == 4
            (tmp_path / f"{n}.txt").write_text("red" if bad else " ".join(["3"] * (1 + n % 5)))
        parts = [text(f"{n} "), swatch(f"{n}.txt"), *([swatch("0.txt")] if n % 2 else [])]
        made.append({"messages": [{"role": "user", "content": parts}, bot(f"answer {n}")]})
    return write_rows(tmp_path / "rows.jsonl", made)


def load(path: Path, checkpoint: Any, reader: Any, workers: int) -> Dataset:
    policies = Policies(bad_rows="skip", bad_rows_limit=0.5)
    return dataset(
        path, checkpoint, FORMAT, 1000, reader=reader, workers=workers, policies=policies
    )


def contents(data: Dataset) -> Any:
    return (
        [(one.ids, one.labels, one.row, one.media) for one in data.train],
        list(data.rejects.entries()),
        json.dumps(data.summary(), sort_keys=True),
    )


@pytest.mark.parametrize("workers", [2, 5])
def test_several_at_once_give_the_same(
    rows: Path, checkpoint: FakeCheckpoint, workers: int
) -> None:
    reader = ReadsTogether()
    found = load(rows, checkpoint, reader, workers)
    alone = load(rows, checkpoint, SwatchReader(), 1)
    assert 5 < alone.rejects.count < len(alone.train) == ROWS - alone.rejects.count
    assert contents(found) == contents(alone)
    assert 2 <= len(reader.threads - {"MainThread"}) <= workers


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reader_that_allows_no_threads(
    rows: Path, checkpoint: FakeCheckpoint, workers: int
) -> None:
    found = load(rows, checkpoint, ReadsAlone(), workers)
    assert contents(found) == contents(load(rows, checkpoint, SwatchReader(), 1))


def test_one_worker_reads_in_its_own_thread(rows: Path, checkpoint: FakeCheckpoint) -> None:
    class Own(ReadsAlone):
        concurrent = True

    load(rows, checkpoint, Own(), 1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("media")]
