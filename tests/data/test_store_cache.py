"""Kept stores: what a second start finds, what makes it render again, and what happens to them."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import closing
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
)
from support.chat_kit import write_rows as write
from support.faults import Faults
from support.sinks import Heard
from support.swatch_kit import SwatchReader, swatch, swatch_checkpoint, text

import qcore.data.dataset as module
from qcore.data.dataset import Dataset, dataset
from qcore.data.findings import Findings
from qcore.data.policies import Policies
from qcore.data.rendering.masking import Example
from qcore.data.source_counts import SourceCount
from qcore.data.sources.source import Source
from qcore.data.store import stamps
from qcore.data.store.cache import StoreCache
from qcore.errors import InputError, UsageError, WriteError
from qcore.io.run_lock import Lock
from qcore.reporting import Note, ProgressStarted

GB = 10**9
CODES = {errno.ENOSPC: "QC-WRITE-003", errno.EIO: "QC-WRITE-004"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    own_tokenizer().save(str(folder / "tokenizer.json"))
    return FakeCheckpoint(folder, own_template())


def rows(count: int = 6) -> list[Any]:
    return [
        {"messages": [user(f"question {n}"), bot(f"answer {n}"), user("more"), bot("x" * n + ".")]}
        for n in range(count)
    ]


class QuickRenderer:
    """Makes two samples of each row without its template, for tests of what is around it."""

    def __init__(self, template: Any, chat_format: Any, words: Any, options: Any, rejects: Any):
        self.template, self.rejects = template, rejects
        self.findings, self.counts = Findings(), []
        self.dropped = self.truncated = 0
        self.asked, self.switch = {}, ""

    @property
    def rows(self) -> int:
        return sum(count.rows for count in self.counts)

    @property
    def notes(self) -> Any:
        return closing(self)

    def close(self) -> None: ...

    def examples(self, sources: Any) -> Iterator[Example]:
        for source in sources:
            (path,) = source.files
            content = path.read_bytes()
            count = SourceCount(source, sha256=hashlib.sha256(content).hexdigest())
            self.counts.append(count)
            for line, row in enumerate(content.splitlines(), 1):
                count.rows += 1
                ids = array("i", list(row))
                for sample in (1, 2):
                    yield Example(
                        ids=ids, labels=ids, line=line, row=line, sample=sample, turns=1,
                        supervised=len(ids) - 1,
                    )  # fmt: skip


class Runs:
    """Starts of a run over the same cache; `rendered` counts those that rendered.

    Args:
        folder: of all files.
        checkpoint: the model.
        monkeypatch: counts renderers.
        real: the renderer.
    """

    def __init__(
        self, folder: Path, checkpoint: Any, monkeypatch: pytest.MonkeyPatch, real: Any
    ) -> None:
        self.folder = folder / "cache"
        self.data = write(folder / "rows.jsonl", rows())
        self.checkpoint = checkpoint
        self.rendered = 0
        self.heard = Heard()

        def renderer(*args: Any) -> Any:
            self.rendered += 1
            return real(*args)

        monkeypatch.setattr(module, "Renderer", renderer)

    def cache(self, **more: Any) -> StoreCache:
        self.heard = Heard()
        return StoreCache(self.folder, **{"most": GB, "reporter": self.heard.reporter, **more})

    def __call__(self, data: Any = None, *, cache: Any = None, **more: Any) -> Dataset:
        given: Any = {"max_length": 1000, "chat_format": FORMAT, **more}
        cache = cache or self.cache()
        return dataset(data or self.data, self.checkpoint, cache=cache, **given)

    @property
    def entries(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.name[0] != ".")

    @property
    def notes(self) -> list[str]:
        return [event.text for event in self.heard.events if isinstance(event, Note)]


@pytest.fixture
def runs(tmp_path: Path, checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tmp_path, checkpoint, monkeypatch, QuickRenderer)


@pytest.fixture
def whole(tmp_path: Path, checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Runs whose rows are rendered by the template."""
    return Runs(tmp_path, checkpoint, monkeypatch, module.Renderer)


def told(made: Dataset) -> tuple[list[str], dict[str, Any], list[Any], Any]:
    return list(made.lines()), made.summary(), list(made.rejects.entries()), made.chat


def test_a_second_start_renders_nothing_and_says_the_same(whole: Runs) -> None:
    bad = [*rows(4), {"messages": [user("q")]}, {"messages": [user("a"), user("b"), bot("c")]}]
    data = write(whole.data, [*bad, {"messages": [user("q"), bot("word " * 300)]}])
    given: Any = {
        "policies": Policies(bad_rows="skip", bad_rows_limit=0.5, long_rows="drop"),
        "max_length": 400, "variables": {}, "eval_fraction": 0.25, "seed": 3,
        "eval_data": [Source(name="held", files=(write(data.with_name("held.jsonl"), rows(2)),))],
    }  # fmt: skip
    first = whole(**given)
    again = whole(**given)
    assert whole.rendered == 1
    assert (first, told(first)) == (again, told(again))
    assert told(first)[2]
    assert {one.code for one in first.findings} >= {"QC-DATA-046", "QC-DATA-047", "QC-DATA-050"}
    assert [a == b for a, b in zip(first.train, again.train, strict=True)] == [True] * len(
        first.train
    )
    assert again == whole(**given, cache=StoreCache(None, 0))
    listed = [data.with_name(name) for name in ("first.jsonl", "again.jsonl")]
    for made, path in zip((first, again), listed, strict=True):
        made.rejects.write(path)
    assert listed[0].read_bytes() == listed[1].read_bytes() != b""
    assert whole.notes == []


def test_the_split_is_not_part_of_the_identity(runs: Runs) -> None:
    made = [runs(eval_fraction=0.4, seed=seed) for seed in range(5)]
    assert len({one.samples_sha256 for one in made}) > 1
    assert runs.rendered == 1


@pytest.mark.parametrize(
    "more",
    [
        {"max_length": 999},
        {"policies": Policies(turns="last")},
        {"policies": Policies(bad_rows_limit=0.2)},
        {"chat_format": replace(FORMAT, splits_content=True)},
        {"reader": SwatchReader()},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_decides_tokens_is_part_of_the_identity(runs: Runs, more: dict[str, Any]) -> None:
    runs()
    runs(**more)
    assert (runs.rendered, len(runs.entries)) == (2, 2)
    runs()
    runs(**more)
    assert runs.rendered == 2


def test_sources_template_and_model_are_part_of_it(runs: Runs, tmp_path: Path) -> None:
    source = Source(name="a", files=(runs.data,))
    runs([source])
    for other in (
        replace(source, name="b"), replace(source, train=True, turns="last"),
        replace(source, count=3, seed=1), replace(source, count=3, seed=2),
    ):  # fmt: skip
        before = runs.rendered
        runs([other])
        assert runs.rendered == before + 1, other
    runs([replace(source, notes=("a note",))])
    assert runs.rendered == 5
    twin = tmp_path / "twin"
    shutil.copytree(runs.checkpoint.path, twin)
    runs.checkpoint = FakeCheckpoint(twin, own_template())
    runs([source])
    assert runs.rendered == 5  # another folder with the same files
    (twin / "config.json").write_text('{"a": 1}')
    runs([source])
    assert runs.rendered == 6
    runs.checkpoint = FakeCheckpoint(twin, own_template(TEMPLATE + " "))
    runs([source])
    assert runs.rendered == 7


def settle(path: Path) -> None:
    """Date a file back, so that its time stamp alone says that it is the same."""
    os.utime(path, ns=(1_700_000_000 * 10**9,) * 2)


def test_a_changed_file_is_read_again_and_replaces_its_store(runs: Runs) -> None:
    first = runs()
    write(runs.data, rows(7))
    assert runs().rows == 7
    assert (runs.rendered, len(runs.entries)) == (2, 1)
    assert first.train[0].ids  # its files are open


def test_a_file_of_the_same_content_is_not_rendered_again(runs: Runs) -> None:
    settle(runs.data)
    runs()
    content = runs.data.read_bytes()
    runs.data.unlink()
    runs.data.write_bytes(content)  # another inode and another time
    runs()
    assert runs.rendered == 1


def test_a_recognized_file_is_not_hashed(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(runs.data)
    hashed: list[Path] = []
    real = stamps._hash
    monkeypatch.setattr(stamps, "_hash", lambda p, advance: hashed.append(p) or real(p, advance))
    runs()
    runs()
    assert hashed == []
    runs(cache=runs.cache(verify=True))
    assert hashed == [runs.data]


def test_a_file_that_was_just_written_is_hashed(runs: Runs) -> None:
    """A second write within the resolution of the time stamp leaves it as it was."""
    runs()
    status = runs.data.stat()
    content = runs.data.read_bytes().replace(b"question 1", b"question 9")
    runs.data.write_bytes(content)
    os.utime(runs.data, ns=(status.st_atime_ns, status.st_mtime_ns))
    found = runs()
    assert runs.rendered == 2
    assert found.sha256 != ""


def forged(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change the content of a data file, which every time stamp hides."""
    settle(runs.data)
    runs()
    runs.data.write_bytes(runs.data.read_bytes().replace(b"question 1", b"question 9"))
    settle(runs.data)
    monkeypatch.setattr(stamps.Stamp, "matches", lambda *_: True)


def test_verifying_finds_a_change_that_time_stamps_hide(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    forged(runs, monkeypatch)
    runs()
    assert runs.rendered == 1
    with pytest.raises(InputError, match="its size and time did not") as caught:
        runs(cache=runs.cache(verify=True))
    assert (caught.value.code, caught.value.file) == ("QC-DATA-081", str(runs.data))
    runs()  # as the fix says
    assert runs.rendered == 2


def test_files_are_hashed_again_before_the_end_of_a_run(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = runs()
    monkeypatch.setattr(stamps, "_LONG", 10)
    made.check_files(runs.heard.reporter)
    assert any(isinstance(event, ProgressStarted) for event in runs.heard.events)
    runs.data.write_bytes(runs.data.read_bytes() + b"\n")
    with pytest.raises(InputError) as caught:
        made.check_files(runs.heard.reporter)
    assert (caught.value.code, caught.value.file) == ("QC-DATA-081", str(runs.data))
    runs.data.unlink()
    with pytest.raises(InputError, match="no such file"):
        made.check_files(runs.heard.reporter)


def test_a_file_that_changes_while_it_is_read_is_an_error(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(*_: object) -> None:
        runs.data.write_bytes(runs.data.read_bytes() + b"\n")

    monkeypatch.setattr(QuickRenderer, "close", change)
    for cache in (runs.cache(), StoreCache(None, 0)):
        with pytest.raises(InputError, match="changed while its rows were read"):
            runs(cache=cache)
    assert runs.entries == []


# Media.


def media_rows(folder: Path, *, ending: str = ".jsonl") -> Path:
    (folder / "a.txt").write_text("3 5 7")
    data = "data:text/plain;base64,OCA5"
    parts = ([swatch("a.txt", shade="red"), text("q")], [text("q")], [swatch(data), text("q")])
    given = [{"messages": [{"role": "user", "content": some}, bot("a")]} for some in parts]
    if ending == ".json":
        (folder / "rows.json").write_text(json.dumps(given))
        return folder / "rows.json"
    return write(folder / "rows.jsonl", given)


def test_media_are_read_again(whole: Runs, tmp_path: Path) -> None:
    whole.checkpoint = swatch_checkpoint(tmp_path / "swatches")
    data = media_rows(tmp_path)
    first = whole(data, reader=SwatchReader())
    again = whole(data, reader=SwatchReader())
    assert whole.rendered == 1
    assert (first, told(first)) == (again, told(again))
    assert [medium.numbers for example in again.train for medium in example.media] == [
        (3, 5, 7), (8, 9),
    ]  # fmt: skip
    assert first.summary()["media_keys"] == {"swatch": ["shade"]}
    (tmp_path / "a.txt").write_text("3 5 8")
    other = whole(data, reader=SwatchReader())
    assert whole.rendered == 2
    assert other.summary()["media_sha256"] != first.summary()["media_sha256"]


def test_media_that_cannot_be_read_again_keep_no_store(whole: Runs, tmp_path: Path) -> None:
    class Remembers(SwatchReader):
        """Has the values of what it has read, as a cache of pixels has."""

        seen: dict[str, Any] = {}  # noqa: RUF012

        def read(self, payload: Any) -> Any:
            if payload.sha256 not in self.seen:
                self.seen[payload.sha256] = super().read(payload)
            return self.seen[payload.sha256]

    whole.checkpoint = swatch_checkpoint(tmp_path / "swatches")
    data = media_rows(tmp_path, ending=".json")  # a JSON array has no access by row
    made = whole(data, reader=Remembers())
    assert [len(example.media) for example in made.train] == [1, 0, 1]
    assert whole.entries == []


# Damage, full disks, other runs.


@pytest.mark.parametrize(
    "name", ["tokens.bin", "index.bin", "rendered.json", "stamps.json", "MANIFEST.json"]
)
@pytest.mark.parametrize("how", ["cut", "gone", "flipped"])
def test_a_damaged_store_is_made_again_with_one_line(runs: Runs, name: str, how: str) -> None:
    first = list(runs().train)
    (entry,) = runs.entries
    path = entry / name
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[:-3])
    else:
        path.write_bytes(bytes([data[0] ^ 0x55]) + data[1:])
    again = runs()
    if (name, how) == ("tokens.bin", "flipped"):  # found when the sample is read
        with pytest.raises(InputError) as caught:
            list(again.train)
        assert (caught.value.code, caught.value.field) == ("QC-DATA-080", "row 1, sample 1")
        again = runs()
    else:
        assert len(runs.notes) == 1
        assert "damaged" in runs.notes[0]
    assert runs.rendered == 2
    assert first == list(again.train)
    runs()
    assert runs.rendered == 2


def test_a_store_may_be_deleted_at_any_time(runs: Runs) -> None:
    first = runs()
    shutil.rmtree(runs.folder)
    assert list(first.train) == list(runs().train)
    assert (runs.rendered, runs.notes) == (2, [])


@pytest.mark.parametrize("code", CODES)
def test_a_disk_that_fails_is_one_error_and_leaves_nothing(runs: Runs, code: int) -> None:
    with Faults() as calls:
        runs()
    shutil.rmtree(runs.folder)
    runs.folder.mkdir()
    errors = []
    for at in range(code % 2, calls.calls, 2):
        try:
            with Faults(at, code):
                runs(cache=StoreCache(runs.folder, GB))
        except WriteError as error:
            errors.append(error)
        else:  # what follows the publication costs nothing
            assert runs.entries
        assert [path.name for path in runs.folder.iterdir() if "partial" in path.name] == []
        shutil.rmtree(runs.folder)
        runs.folder.mkdir()
    assert len(errors) > 10
    assert {error.code for error in errors} == {CODES[code]}
    assert all("QCORE_DATA_CACHE" in str(error.fix) for error in errors)


def test_a_folder_that_cannot_be_written_keeps_none(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    runs.folder = tmp_path / "file" / "cache"
    made = runs()
    assert len(made.train) == 12
    (note,) = runs.notes
    assert "is not writable" in note
    assert "QCORE_DATA_CACHE" in note


def test_refused_rows_keep_no_store(whole: Runs) -> None:
    write(whole.data, [*rows(2), {"messages": [user("q")]}])
    for _ in range(2):
        with pytest.raises(InputError):
            whole()
    assert whole.rendered == 2
    assert list(whole.folder.iterdir()) == []


def test_what_killed_runs_left_is_deleted_by_the_next(runs: Runs) -> None:
    """A lock tells whose run lives; the age of a folder does not."""
    runs()
    left = [f".{'a' * 32}.{kind}-0123456789abcdef" for kind in ("partial", "trash")]
    alive, foreign, lock = f".{'b' * 32}.partial-0123456789abcdef", ".mine", f".{'a' * 32}.lock"
    for name in (*left, alive, foreign):
        (runs.folder / name).mkdir()
        (runs.folder / name / "tokens.bin").write_bytes(b"x")
    (runs.folder / lock).write_text("{}")
    descriptor = os.open(runs.folder / alive, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    runs()  # renders nothing
    assert sorted(path.name for path in runs.folder.glob(".*")) == sorted((alive, foreign))
    os.close(descriptor)


def test_stores_beyond_the_limit_are_evicted(runs: Runs) -> None:
    runs()
    (first,) = runs.entries
    size = sum(path.stat().st_size for path in first.iterdir())
    for length in (500, 600, 700):
        runs(max_length=length, cache=runs.cache(most=int(2.5 * size)))
        assert len(runs.entries) == 2
        os.utime(runs.entries[0], (time.time() + 5,) * 2)
    runs(max_length=800, cache=runs.cache(most=size // 2))
    assert len(runs.entries) == 2  # it is not kept itself
    assert "are not kept" in runs.notes[0]


def test_a_run_waits_for_another_one_of_the_same_rows(runs: Runs) -> None:
    runs()
    (entry,) = runs.entries
    kept = entry.rename(runs.folder.with_name("kept"))
    lock = Lock(runs.folder, f".{entry.name}.lock").acquire()

    def publish() -> None:
        time.sleep(0.3)
        kept.rename(entry)
        lock.release()

    other = threading.Thread(target=publish)
    other.start()
    made = runs()
    other.join()
    assert (runs.rendered, len(made.train)) == (1, 12)
    assert runs.notes == ["another run makes the tokens of the same rows: waiting for it"]


def test_variables_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: Runs
) -> None:
    monkeypatch.delenv("QCORE_DATA_CACHE_GB", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    reporter = runs.heard.reporter
    cache = StoreCache.of_user(reporter)
    assert (cache.folder, cache.most) == (tmp_path / "qcore/data", 50 * GB)
    monkeypatch.setenv("QCORE_DATA_CACHE", str(tmp_path / "other"))
    monkeypatch.setenv("QCORE_DATA_CACHE_GB", "0.5")
    cache = StoreCache.of_user(reporter)
    assert (cache.folder, cache.most) == (tmp_path / "other", GB // 2)
    monkeypatch.setenv("QCORE_DATA_CACHE_GB", "0")
    assert StoreCache.of_user(reporter).folder is None
    for word in ("-1", "many", "nan", "inf"):
        monkeypatch.setenv("QCORE_DATA_CACHE_GB", word)
        with pytest.raises(UsageError) as caught:
            StoreCache.of_user(reporter)
        assert caught.value.code == "QC-DATA-082"
