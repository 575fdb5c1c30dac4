"""Rows of thousands of turns: the policy on long rows decides, in seconds and bounded memory."""

from __future__ import annotations

import time
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

from qcore.data.dataset import Dataset, dataset
from qcore.data.policies import Policies
from qcore.data.rendering import row_work
from qcore.errors import InputError

SHORT = {"messages": [user("q"), bot("a")]}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Any:
    own_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return FakeCheckpoint(tmp_path, own_template(TEMPLATE))


def load(checkpoint: Any, tmp_path: Path, count: int, limit: int, **policies: Any) -> Dataset:
    talk = [said for n in range(count) for said in (user(f"q {n}"), bot(f"a {n}"))]
    rows = write_rows(tmp_path / "rows.jsonl", [SHORT, {"messages": talk}, SHORT])
    return dataset(rows, checkpoint, FORMAT, limit, policies=Policies(**policies))


@pytest.mark.timing
@pytest.mark.parametrize("turns", [2_000, 20_000])
def test_a_row_of_many_turns_ends_in_seconds(checkpoint: Any, tmp_path: Path, turns: int) -> None:
    start = time.process_time()
    if turns < 10_000:
        with pytest.raises(InputError) as caught:
            load(checkpoint, tmp_path, turns, 200)
        assert caught.value.code == "QC-DATA-011"
        assert "long_rows=drop" in str(caught.value.fix)
        cut = load(checkpoint, tmp_path, turns, 200, long_rows="truncate_turns")
        assert (cut.rows, cut.dropped, cut.truncated) == (3, 0, 1)
    left = load(checkpoint, tmp_path, turns, 200, long_rows="drop")
    assert (left.rows, left.dropped, left.truncated) == (2, 1, 0)
    assert time.process_time() - start < 20


def test_the_turns_that_fit_are_those_of_a_row_within_the_bound(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load(checkpoint, tmp_path, 60, 200, long_rows="truncate_turns")
    monkeypatch.setattr("qcore.data.rendering.row_renderer.MOST_WORK", 1 << 20)
    monkeypatch.setattr(row_work, "MOST_WORK", 1 << 20)
    cut = load(checkpoint, tmp_path, 60, 200, long_rows="truncate_turns")
    assert (cut.rows, cut.dropped, cut.truncated) == (3, 0, 1)
    ids = [[e.ids.tolist() for e in data.train] for data in (whole, cut)]
    labels = [[e.labels.tolist() for e in data.train] for data in (whole, cut)]
    assert ids[0] == ids[1]
    assert labels[0] == labels[1]
    entries = [list(data.rejects.entries()) for data in (whole, cut)]
    assert entries[0] == entries[1]


def test_a_row_that_fits_but_has_too_many_turns_is_refused(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcore.data.rendering.row_renderer.MOST_WORK", 1 << 20)
    for policy in ("refuse", "drop", "truncate_turns"):
        with pytest.raises(InputError) as caught:
            load(checkpoint, tmp_path, 60, 4000, long_rows=policy)
        error = caught.value
        assert (error.code, error.found) == ("QC-DATA-078", "60 trained turns in 120 messages")
        assert "turns=last" in str(error.fix)
    assert load(checkpoint, tmp_path, 60, 4000, turns="last").rows == 3
