"""Rows that are refused, skipped, dropped or cut: policies, bounds, counts and the full list."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from support.chat_kit import FORMAT, FakeCheckpoint, bot, own_template, own_tokenizer, user
from support.chat_kit import write_rows as write
from support.faults import Faults, count

from qcore.data.dataset import Dataset, dataset
from qcore.data.policies import Policies
from qcore.data.rejects import Rejects
from qcore.data.rendering.masking import IGNORED
from qcore.data.sources.source import Source
from qcore.errors import InputError, PreflightError, WriteError

GOOD = {"messages": [user("q"), bot("a")]}
LONG = {"messages": [user("q"), bot("word " * 50)]}
TALK = {"messages": [user("q"), bot("a"), user("r"), bot("word " * 50), user("s"), bot("b")]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    own_tokenizer().save(str(folder / "tokenizer.json"))
    return FakeCheckpoint(folder, own_template())


def file_digest(source: Source) -> str:
    return hashlib.sha256(source.files[0].read_bytes()).hexdigest()


def load(checkpoint: Any, path: Path, limit: int = 60, **policies: Any) -> Dataset:
    return dataset(path, checkpoint, FORMAT, limit, policies=Policies(**policies))


def test_a_long_row_is_refused_with_the_length_that_would_do(
    tmp_path: Path, checkpoint: Any
) -> None:
    longer = {"messages": [user("q"), bot("word " * 60)]}
    path = write(tmp_path / "rows.jsonl", [GOOD, LONG, GOOD, longer])
    with pytest.raises(PreflightError) as caught:
        load(checkpoint, path)
    enough = max(len(e.ids) for e in load(checkpoint, path, limit=1000).train)
    for error in caught.value.errors:
        assert error.code == "QC-DATA-011"
        assert f"max_length={enough}, which fits every row" in str(error.fix)
        assert "long_rows=drop" in str(error.fix)
    assert load(checkpoint, path, limit=enough).rows == 4


def test_long_rows_are_dropped_and_counted(tmp_path: Path, checkpoint: Any) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD, LONG, TALK, GOOD])
    found = load(checkpoint, path, long_rows="drop")
    assert [example.row for example in found.train] == [1, 4]
    assert (found.rows, found.dropped) == (2, 2)
    assert found.summary()["dropped_rows"] == 2
    (line,) = (line for line in found.lines() if "QC-DATA-046" in line)
    assert "2 of 4 rows" in line
    assert "max_length=60" in line


def test_turns_are_cut_whole(tmp_path: Path, checkpoint: Any) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD, TALK, LONG])
    whole = load(checkpoint, path, limit=1000)
    found = load(checkpoint, path, long_rows="truncate_turns")
    # The second turn of the talk fits in no sample; the third needs it as context.
    assert [(e.row, e.sample) for e in found.train] == [(1, 1), (2, 1)]
    assert found.train[1].ids == whole.train[1].ids
    assert (found.dropped, found.truncated) == (1, 1)
    one = load(checkpoint, path, long_rows="truncate_turns", history="as_rendered")
    cut = one.train[1]
    assert own_tokenizer().decode(list(cut.ids), skip_special_tokens=False).endswith("a<|im_end|>")
    assert cut.turns == 1


def test_tokens_are_cut_at_the_limit(tmp_path: Path, checkpoint: Any) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD, LONG])
    found = load(checkpoint, path, long_rows="truncate_tokens")
    whole = load(checkpoint, path, limit=1000)
    assert len(found.train[1].ids) == 60
    assert found.train[1].ids == whole.train[1].ids[:60]
    assert found.train[1].labels[-1] != IGNORED
    assert found.train[1].supervised == sum(x != IGNORED for x in found.train[1].labels[1:])
    prompt = {"messages": [user("word " * 80), bot("a")]}
    kept = load(checkpoint, write(path, [GOOD, prompt]), long_rows="truncate_tokens")
    assert (kept.rows, kept.dropped) == (1, 1)  # nothing supervised fits


def test_bad_rows_are_skipped_within_the_bound(tmp_path: Path, checkpoint: Any) -> None:
    bad = {"messages": [user("q")]}
    path = write(tmp_path / "rows.jsonl", [GOOD] * 9 + [bad])
    found = load(checkpoint, path, bad_rows="skip")
    assert (found.rows, found.rejects.count) == (9, 1)
    assert found.summary()["rejected_rows"] == 1
    assert any("1 of 10 rows are bad and were left out" in line for line in found.lines())
    write(path, [GOOD] * 8 + [bad] * 2)
    with pytest.raises(InputError) as caught:
        load(checkpoint, path, bad_rows="skip")
    assert caught.value.code == "QC-DATA-047"
    assert "2 of 10 rows" in caught.value.message
    assert "set bad_rows_limit=0.2" in str(caught.value.fix)
    assert load(checkpoint, path, bad_rows="skip", bad_rows_limit=0.2).rows == 8


def test_the_setting_is_named_where_a_row_is_refused(tmp_path: Path, checkpoint: Any) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD, {"messages": [user("q")]}])
    with pytest.raises(InputError) as caught:
        load(checkpoint, path)
    assert "bad_rows=skip" in str(caught.value.fix)


def test_a_source_has_its_own_policy(tmp_path: Path, checkpoint: Any) -> None:
    bad = {"messages": [user("q")]}
    good = Source(name="good", files=(write(tmp_path / "good.jsonl", [GOOD] * 20),))
    loose = write(tmp_path / "loose.jsonl", [bad, *[GOOD] * 9])
    made = Source(name="loose", files=(loose,), bad_rows="skip")
    found = dataset([good, made], checkpoint, FORMAT, 60)
    assert [example.row for example in found.train] == [*range(1, 21), *range(22, 31)]
    with pytest.raises(InputError) as caught:
        dataset([good, Source(name="loose", files=(loose,))], checkpoint, FORMAT, 60)
    assert caught.value.file == str(loose)
    assert caught.value.field == "line 1, messages"


def test_rows_are_listed_in_full(tmp_path: Path, checkpoint: Any) -> None:
    bad = [{"messages": [user("q"), bot("a"), {"role": "oracle", "content": "x"}]}] * 300
    path = write(tmp_path / "rows.jsonl", [GOOD, *bad, LONG])
    seen: list[Rejects] = []
    with pytest.raises(PreflightError) as caught:
        dataset(path, checkpoint, FORMAT, 60, refused=seen.append)
    assert caught.value.errors[-1].code == "QC-DATA-014"
    assert "301 rows" in caught.value.errors[-1].message
    assert "rejected.jsonl" in str(caught.value.errors[-1].fix)
    seen[0].write(tmp_path / "rejected.jsonl")
    listed = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in listed] == list(range(2, 303))
    first, last = listed[0], listed[-1]
    assert (first["code"], first["field"]) == ("QC-DATA-006", "messages[2].role")
    assert first["file"] == str(path)
    assert "'oracle'" in first["reason"]
    assert last["code"] == "QC-DATA-011"


@pytest.mark.slow
def test_a_hundred_thousand_rows_are_listed_in_constant_memory(tmp_path: Path) -> None:
    import tracemalloc

    from qcore.api import RowError
    from qcore.data.rows import ChatRow

    rejects = Rejects(Policies(bad_rows="skip"))
    tracemalloc.start()
    for n in range(100_000):
        rejects.add(ChatRow(line=n, row=n, messages=()), RowError("QC-DATA-006", "is wrong"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    rejects.write(tmp_path / "rejected.jsonl")
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 100_000


def test_rows_of_another_file_are_only_evaluated(tmp_path: Path, checkpoint: Any) -> None:
    train = Source(name="t", files=(write(tmp_path / "t.jsonl", [GOOD, GOOD]),))
    held = Source(name="e", files=(write(tmp_path / "e.jsonl", [GOOD, GOOD, GOOD]),))
    found = dataset([train], checkpoint, FORMAT, 60, eval_data=[held])
    assert ([e.row for e in found.train], [e.row for e in found.eval]) == ([1, 2], [3, 4, 5])
    summary = found.summary()
    assert (summary["train_rows"], summary["eval_rows"]) == (2, 3)
    assert [s["name"] for s in summary["eval_sources"]] == ["e"]
    assert found.chat.turns_without == 2
    alone = dataset([train], checkpoint, FORMAT, 60).summary()
    assert "eval_sha256" not in alone
    assert (summary["sha256"], summary["eval_sha256"]) == (alone["sha256"], file_digest(held))
    assert any("e: 3 rows, evaluated only" in line for line in found.lines())


def test_evaluated_rows_have_digests_of_their_own(tmp_path: Path, checkpoint: Any) -> None:
    """The same rows in the same order, trained or evaluated: digests that differ."""
    a = Source(name="a", files=(write(tmp_path / "a.jsonl", [GOOD] * 2),))
    b = Source(name="b", files=(write(tmp_path / "b.jsonl", [GOOD, TALK]),))
    both = dataset([a, b], checkpoint, FORMAT, 1000).summary()
    apart = dataset([a], checkpoint, FORMAT, 1000, eval_data=[b]).summary()
    assert both["sha256"] != apart["sha256"]
    assert both["samples_sha256"] != apart["samples_sha256"]
    assert "eval_samples_sha256" not in both
    other = dataset([a], checkpoint, FORMAT, 1000, eval_data=[a]).summary()
    assert other["samples_sha256"] == apart["samples_sha256"]
    assert other["eval_samples_sha256"] != apart["eval_samples_sha256"]


def test_the_grouping_of_samples_into_rows_is_part_of_the_digest(
    tmp_path: Path, checkpoint: Any
) -> None:
    """Two samples of one row, and the same two samples of two rows."""
    talk = [user("q"), bot("a"), user("r"), bot("b")]
    parts = [talk[:2], [user("q"), bot("a") | {"train": False}, *talk[2:]]]
    one = load(checkpoint, write(tmp_path / "one.jsonl", [{"messages": talk}]), 100)
    two = load(
        checkpoint, write(tmp_path / "two.jsonl", [{"messages": part} for part in parts]), 100
    )
    assert [e.ids for e in one.train] == [e.ids for e in two.train]
    assert [e.labels for e in one.train] == [e.labels for e in two.train]
    assert (one.train_sizes, two.train_sizes) == ((2,), (1, 1))
    assert one.samples_sha256 != two.samples_sha256


def test_all_samples_of_a_row_are_on_one_side(tmp_path: Path, checkpoint: Any) -> None:
    talks = [{"messages": [user(f"q{n}"), bot("a"), user("r"), bot(f"b{n}")]} for n in range(20)]
    path = write(tmp_path / "rows.jsonl", talks)
    found = dataset(path, checkpoint, FORMAT, 100, 0.25, 3)
    assert found.train_sizes == (2,) * 15
    assert not {e.row for e in found.train} & {e.row for e in found.eval}


def test_the_list_is_written_whole_or_not_at_all(tmp_path: Path, checkpoint: Any) -> None:
    """It is a part of the adapter folder: a torn one would be published."""
    data = write(tmp_path / "rows.jsonl", [GOOD, {"messages": []}, GOOD, {"messages": []}])
    skipping = load(checkpoint, data, bad_rows="skip", bad_rows_limit=0.5)
    rejects, path = skipping.rejects, tmp_path / "rejected.jsonl"
    path.write_text("old\n")
    for at in range(count(lambda: rejects.write(tmp_path / "other.jsonl")) - 1):
        with Faults(at, errno.ENOSPC), pytest.raises(WriteError):
            rejects.write(path)
        assert path.read_text() == "old\n"
    rejects.write(path)
    assert len(path.read_text().splitlines()) == 2
    assert not list(tmp_path.glob(".*"))
