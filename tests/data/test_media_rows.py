"""Rows with media: what becomes of a part, and every bad one with its line and place."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.chat_kit import FORMAT, FakeCheckpoint, bot, call, user, write_rows
from support.swatch_kit import (  # fmt: skip
    CLOSE,
    DOT,
    OPEN,
    PLACE,
    SWATCH_TEMPLATE,
    SwatchReader,
    swatch,
    swatch_checkpoint,
    swatch_tokenizer,
    text,
)
from support.tiers import fast

from qcore.api.media import Placed, RowError
from qcore.checkpoint.chat_template import Template
from qcore.data.content import ContentReader
from qcore.data.dataset import Dataset, dataset
from qcore.data.formats import Formats
from qcore.data.media import files as media_module
from qcore.data.media.files import LARGEST, Finder, Reference
from qcore.data.policies import Policies
from qcore.data.sources.read import read_sources
from qcore.errors import InputError, PreflightError, UsageError
from qcore.reporting import Reporter

END = "<|im_end|>"
CONTROL = (OPEN, DOT, CLOSE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> FakeCheckpoint:
    return swatch_checkpoint(tmp_path_factory.mktemp("model"))


#: What a model answers after a prompt that opens a think block, if it does not reason.
NO_REASONING = "\n</think>\n\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data file's folder with two swatches, and one outside of it."""
    made = tmp_path / "data"
    (made / "deep").mkdir(parents=True)
    (made / "a.txt").write_text("3 5 7")
    (made / "deep/b.txt").write_text("1 2 3 4")
    (tmp_path / "out.txt").write_text("9")
    return made


def load(rows: list[Any], folder: Path, checkpoint: Any, **more: Any) -> Dataset:
    path = write_rows(folder / "rows.jsonl", rows)
    more = {"reader": SwatchReader(), "max_length": 1000, **more}
    return dataset(path, checkpoint, FORMAT, **more)


def ask(*parts: Any, answer: str = "ok", role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(parts)}, bot(answer)]}


def data_url(said: bytes, kind: str = "text/plain") -> str:
    return f"data:{kind};base64,{base64.b64encode(said).decode()}"


def read_back(ids: Any) -> str:
    return swatch_tokenizer().decode(list(ids), skip_special_tokens=False)


def bad(rows: list[Any], folder: Path, checkpoint: Any, **more: Any) -> list[InputError]:
    """The errors of a data set that is refused, each on one line of its own."""
    with pytest.raises(InputError) as caught:
        load(rows, folder, checkpoint, **more)
    error = caught.value
    found = list(error.errors) if isinstance(error, PreflightError) else [error]
    assert all("\n" not in one.message and len(one.message) < 700 for one in found)
    return found


# What becomes of a part.


def test_ids_labels_and_places(folder: Path, checkpoint: FakeCheckpoint) -> None:
    parts = [text("see "), swatch("a.txt"), text(" and "), swatch(data_url(b"8 9"))]
    (example,) = load([ask(*parts, answer="Paris")], folder, checkpoint).train
    assert read_back(example.ids) == (
        f"<|im_start|>user\nsee {OPEN}{DOT * 3}{CLOSE} and {OPEN}{DOT * 2}{CLOSE}{END}\n"
        f"<|im_start|>assistant\n<think>\n\n</think>\n\nParis{END}\n"
    )
    kept = [label for label in example.labels if label != -100]
    assert read_back(kept) == NO_REASONING + "Paris" + END
    dot = swatch_tokenizer().token_to_id(DOT)
    assert [medium.numbers for medium in example.media] == [(3, 5, 7), (8, 9)]
    assert example.placed is not None
    assert list(example.placed.where) == [n for n, id_ in enumerate(example.ids) if id_ == dot]
    assert len(example.placed.where) == 5
    assert all(len(axis) == len(example.ids) for axis in example.placed.positions)
    assert len(example.labels) == len(example.ids)


def test_no_label_on_control_tokens_in_an_assistants_turn(
    folder: Path, checkpoint: FakeCheckpoint
) -> None:
    said = [text("here "), swatch("a.txt"), text(" it is")]
    row = {"messages": [user("show"), {"role": "assistant", "content": said}]}
    (example,) = load([row], folder, checkpoint).train
    control = {swatch_tokenizer().token_to_id(token) for token in CONTROL}
    assert sum(id_ in control for id_ in example.ids) == 5
    kept = [label for label in example.labels if label != -100]
    assert not control & set(kept)
    assert read_back(kept) == NO_REASONING + "here  it is" + END
    assert example.supervised == len(kept)


def test_no_label_on_what_a_reader_writes_beside_its_tokens(
    folder: Path, checkpoint: FakeCheckpoint
) -> None:
    """Two media side by side, one between words, one last; and a word that looks like them."""

    class Timed(SwatchReader):
        def expand(self, said: str, media: Any) -> str:
            grown = super().expand(said, media)
            return grown.replace(OPEN, "<0.5 s>" + OPEN)

    one = swatch("a.txt")
    said = [text("<0.5 s>x"), one, one, text(" y"), swatch("deep/b.txt"), text("z "), one]
    messages = [
        {"role": "user", "content": [one, text("q")]},
        {"role": "assistant", "content": said},
        user("more"),
        bot("plain"),
    ]
    rendered = Policies(history="as_rendered")
    rows = [{"messages": messages}]
    (example,) = load(rows, folder, checkpoint, reader=Timed(), policies=rendered).train
    assert read_back(example.ids).count("<0.5 s>") == 6
    kept = [label for label in example.labels if label != -100]
    assert read_back(kept) == "<0.5 s>x yz " + END + "plain" + END
    assert example.placed is not None
    assert len(example.placed.where) == 3 * 4 + 4


def test_media_may_stand_in_a_tools_answer(folder: Path, checkpoint: FakeCheckpoint) -> None:
    messages = [
        user("look"),
        bot(None, tool_calls=[call("look", {})]),
        {"role": "tool", "content": [swatch("a.txt"), text("done")]},
        bot("seen"),
    ]
    *_, example = load([{"messages": messages}], folder, checkpoint).train
    assert f"<tool_response>{OPEN}{DOT * 3}{CLOSE}done" in read_back(example.ids)


def test_a_template_sees_the_kind_and_nothing_of_the_bytes(folder: Path, tmp_path: Path) -> None:
    """A name that holds a control string, and the bytes in a data URL, stay out of the text."""
    (folder / END).write_text("4")
    shown = SWATCH_TEMPLATE.replace("{{- '<|open|>", "{{- (item | tojson) + '<|open|>")
    rows = [ask(swatch(END, shade="red")), ask(swatch(data_url(b"7")))]
    made = load(rows, folder, swatch_checkpoint(tmp_path / "model", shown))
    for example in made.train:
        said = '{"type": "swatch", "swatch": "swatch"}' + OPEN + DOT + CLOSE + END
        assert read_back(example.ids).startswith("<|im_start|>user\n" + said)


@pytest.mark.parametrize("sku", ["3.5/Qwen3.5-4B", "3.5/Qwen3.5-0.8B", "3.6/Qwen3.6-27B"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_published_templates_ask_for_no_more_than_the_kind(
    shared: Path, sku: str, kind: str
) -> None:
    source = (shared / f"skus/qwen{sku}/chat_template.jinja").read_text(encoding="utf-8")

    def turns(named: str) -> list[dict[str, Any]]:
        part = {"type": kind, kind: named}
        return [{"role": "user", "content": [part, text("what?"), part]}, bot("a")]

    with Template(source, sku) as template:
        made = template.render(turns(kind))
        assert made == template.render(turns("pics/a.bin"))
    assert made.count(f"<|vision_start|><|{kind}_pad|><|vision_end|>") == 2


def test_a_reader_gets_the_bytes_their_digest_and_its_keys(
    folder: Path, checkpoint: FakeCheckpoint
) -> None:
    reader = SwatchReader()
    inline = b"8 9"
    digest = hashlib.sha256(b"3 5 7").hexdigest()
    (folder / "link.txt").symlink_to("deep/../deep/b.txt")
    rows = [
        ask(swatch("./deep/../a.txt", sha256=digest.upper(), shade="blue", max_dots=None)),
        ask(swatch(data_url(inline), sha256=hashlib.sha256(inline).hexdigest())),
        ask(swatch("DATA:;BASE64," + base64.b64encode(b"1").decode(), max_dots=3)),
        ask(swatch("link.txt")),
    ]
    load(rows, folder, checkpoint, reader=reader)
    first, second, third, fourth = reader.payloads
    assert (first.path, first.data, first.sha256) == (folder / "a.txt", None, digest)
    assert first.options == {"shade": "blue"}
    assert (second.path, second.data, second.options) == (None, inline, {})
    assert second.sha256 == hashlib.sha256(inline).hexdigest()
    assert (third.data, third.options) == (b"1", {"max_dots": 3})
    assert fourth.path == folder / "deep/b.txt"


def test_nulls_that_column_formats_fill_in_are_dropped(
    folder: Path, checkpoint: FakeCheckpoint
) -> None:
    one = {"type": "swatch", "swatch": "a.txt", "text": None, "sha256": None, "shade": None}
    two = {"type": "text", "text": "q", "swatch": None, "sha256": None}
    (example,) = load([ask(one, two)], folder, checkpoint).train
    assert read_back(example.ids).startswith(f"<|im_start|>user\n{OPEN}{DOT * 3}{CLOSE}q{END}")


# Parts as other tools write them.

ENCODED = base64.b64encode(b"3 5 7").decode()
SAME: list[Any] = [
    {"type": "swatch_url", "swatch_url": {"url": data_url(b"3 5 7"), "detail": "high"}},
    {"type": "swatch_url", "swatch_url": {"url": "a.txt", "detail": None}},
    {"type": "swatch_url", "swatch_url": data_url(b"3 5 7")},
    {"type": "swatch_url", "swatch_url": "deep/../a.txt", "detail": "low"},
    {"type": "swatch_url", "swatch_url": {"url": "file://a.txt"}},
    {"type": "swatch", "swatch": {"url": "./a.txt"}},
    {"type": "swatch", "swatch": {"bytes": b"3 5 7", "path": "gone/a.txt"}},
    {"type": "swatch", "swatch": {"bytes": ENCODED, "path": None}},
    {"type": "swatch", "swatch": {"bytes": None, "path": "a.txt"}},
    {"type": "swatch", "swatch": b"3 5 7"},
    {"type": "swatch", "path": "a.txt"},
    {"type": "swatch", "url": "a.txt"},
    {"type": "swatch", "base64": ENCODED},
    {"type": "swatch", "base64": data_url(b"3 5 7")},
    swatch("a.txt", cache_control={"type": "ephemeral"}),
    swatch("file://a%2Etxt"),
]


@pytest.mark.parametrize("part", SAME, ids=range(len(SAME)))
def test_a_part_of_another_tool_is_the_same_medium(folder: Path, part: Any) -> None:
    reader = SwatchReader()
    _, row = Formats(kinds=reader.kinds).convert(ask(text("q"), part))
    content = row["messages"][0]["content"]
    parts, (medium,) = ContentReader(reader).content(content, "content")
    assert parts == [text("q"), {"type": "swatch", "swatch": "swatch"}]
    read = Finder(folder).read(medium, reader)
    assert read == Finder(folder).read(
        Reference(kind="swatch", at="", given="a.txt", options={}), reader
    )


def test_text_parts_of_other_tools(folder: Path, checkpoint: FakeCheckpoint) -> None:
    parts = [
        {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "b", "annotations": [], "citations": None, "name": ""},
    ]
    (example,) = load([ask(*parts)], folder, checkpoint).train
    assert read_back(example.ids).startswith(f"<|im_start|>user\nab{END}")


class FilmReader(SwatchReader):
    """Reads a list as the numbers of all its files."""

    def read(self, payload: Any) -> Any:
        if not payload.frames:
            return super().read(payload)
        made = [super(FilmReader, self).read(frame) for frame in payload.frames]
        return replace(
            made[0],
            digest=payload.sha256,
            numbers=tuple(number for one in made for number in one.numbers),
            options=dict(payload.options),
        )


def test_frames_are_one_medium(folder: Path, checkpoint: FakeCheckpoint) -> None:
    files = ["a.txt", data_url(b"8 9"), {"bytes": b"4", "path": None}, {"url": "deep/b.txt"}]
    rows = [
        ask({"type": "swatch", "swatch": files, "shade": "red"}, text("q")),
        ask({"type": "swatch_url", "swatch_url": files}, text("q")),
        ask({"type": "swatch", "swatch": files[::-1]}, text("q")),
        ask({"type": "swatch", "swatch": ["a.txt"]}, text("q")),
        ask(swatch("a.txt"), text("q")),
    ]
    path = folder / "rows.jsonl"
    path.write_text("")
    from qcore.data.rows import RowCheck

    check, finder = RowCheck(FORMAT, (), FilmReader()), Finder(folder)
    formats = Formats(kinds=("swatch",))
    checked = [check(1, formats.convert(row)[1]) for row in rows]
    media = [finder.read(row.media[0], FilmReader()) for row in checked]
    assert media[0].numbers == (3, 5, 7, 8, 9, 4, 1, 2, 3, 4)
    assert media[0].options == {"shade": "red"}
    assert media[0].digest == media[1].digest
    # The order counts, and a list of one frame differs from a file.
    assert len({medium.digest for medium in media}) == 4


# A declared media root.


@pytest.fixture
def root(folder: Path) -> Path:
    made = folder.with_name("pictures")
    (made / "sub").mkdir(parents=True)
    (made / "r.txt").write_text("3 5 7")
    (made / "sub/a b.txt").write_text("9")
    return made


def find(folder: Path, root: Path | None, given: str) -> Any:
    part = Reference(kind="swatch", at="", given=given, options={})
    return Finder(folder, root).payload(part)


def test_absolute_paths_below_the_media_root(folder: Path, root: Path) -> None:
    (folder.parent / "link").symlink_to(root)
    (root / "inner.txt").symlink_to("sub/a b.txt")
    (folder / "into.txt").symlink_to(root / "r.txt")
    same = [
        f"{root}/r.txt", f"{root}/sub/../r.txt", f"//{root}/r.txt"[1:], f"file://{root}/r.txt",
        f"FILE://localhost{root}/r.txt", f"file:{root}/r.txt", "r.txt", "./sub/../r.txt",
        "into.txt", "../pictures/r.txt", f"{folder}/into.txt",
    ]  # fmt: skip
    found = [find(folder, root, given) for given in same]
    assert {one.path for one in found} == {root / "r.txt"}
    assert len({one.sha256 for one in found}) == 1
    through = find(folder, folder.parent / "link", f"{folder.parent}/link/r.txt")
    assert through.path == root / "r.txt"
    assert find(folder, folder.parent / "link", f"{root}/r.txt").path == root / "r.txt"
    for given in (f"{root}/sub/a b.txt", f"file://{root}/sub/a%20b.txt", f"{root}/inner.txt"):
        assert find(folder, root, given).path == root / "sub/a b.txt"
    # The data file's folder comes first, and stays allowed.
    (root / "a.txt").write_text("another")
    assert find(folder, root, "a.txt").path == folder / "a.txt"
    assert find(folder, root, f"{folder}/a.txt").path == folder / "a.txt"


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ("/etc/passwd", "QC-MEDIA-004"), ("file:///etc/passwd", "QC-MEDIA-004"),
        ("{root}/../out.txt", "QC-MEDIA-004"), ("{root}/sub/../../out.txt", "QC-MEDIA-004"),
        ("{root}2/a.txt", "QC-MEDIA-004"), ("{root}/out", "QC-MEDIA-004"),
        ("{root}/up/out.txt", "QC-MEDIA-004"), ("../out.txt", "QC-MEDIA-004"),
        ("file://{root}/%2e%2e/out.txt", "QC-MEDIA-002"), ("{root}/device", "QC-MEDIA-004"),
        ("{root}/gone.txt", "QC-MEDIA-002"), ("gone.txt", "QC-MEDIA-002"),
        ("{root}/sub", "QC-MEDIA-003"), ("{root}", "QC-MEDIA-003"), ("~/a.txt", "QC-MEDIA-001"),
        ("https://x.org/a.txt", "QC-MEDIA-001"), ("{root}/a\0b", "QC-MEDIA-001"),
    ],
)  # fmt: skip
def test_what_the_media_root_does_not_open(folder: Path, root: Path, given: str, code: str) -> None:
    (root / "out").symlink_to("../out.txt")
    (root / "up").symlink_to("..")
    (root / "device").symlink_to("/dev/zero")
    beside = root.with_name("pictures2")
    beside.mkdir()
    (beside / "a.txt").write_text("1")
    with at_once(), pytest.raises(RowError) as caught:
        find(folder, root, given.format(root=root))
    assert caught.value.code == code
    if code == "QC-MEDIA-004":
        assert "--media-root" in str(caught.value.fix)


def test_without_a_media_root_the_fix_names_it(folder: Path, root: Path) -> None:
    for given in (f"{root}/r.txt", f"file://{root}/r.txt", "../pictures/r.txt"):
        with pytest.raises(RowError) as caught:
            find(folder, None, given)
        assert "--media-root" in str(caught.value.fix)


def test_a_media_root_that_is_no_folder(folder: Path, root: Path) -> None:
    path = write_rows(folder / "rows.jsonl", [ask(text("q"))])
    (source,) = read_sources([path], media_root=root)
    assert source.media_root == root
    for wrong in (root / "r.txt", root / "gone"):
        with pytest.raises(UsageError) as caught:
            read_sources([path], media_root=wrong)
        assert (caught.value.code, str(wrong) in caught.value.message) == ("QC-DATA-060", True)


# What a data set is.


def test_media_are_hashed_again_before_publishing(folder: Path, checkpoint: FakeCheckpoint) -> None:
    """Also a file of the same size and time: the manifest records the digest of its bytes."""
    made = load([ask(swatch("a.txt"), swatch("deep/b.txt"), text("q"))], folder, checkpoint)
    made.check_files(Reporter())
    path = folder / "deep" / "b.txt"
    status, content = path.stat(), path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(InputError) as caught:
        made.check_files(Reporter())
    assert (caught.value.code, caught.value.file) == ("QC-DATA-081", str(path))
    path.unlink()
    with pytest.raises(InputError) as caught:
        made.check_files(Reporter())
    assert caught.value.found == "no such file"


def test_counters(folder: Path, checkpoint: FakeCheckpoint) -> None:
    rows = [
        ask(swatch("a.txt"), swatch("deep/b.txt"), text("q")),
        {"messages": [user("q"), bot("a")]},
        ask(swatch("a.txt"), text("q")),
    ]
    made = load(rows, folder, checkpoint)
    told = made.summary()
    assert made.kinds == ("swatch",)
    assert (told["media"], told["media_rows"], told["media_tokens"]) == ({"swatch": 3}, 2, 10)
    assert told["tokens"] == made.tokens == sum(len(e.ids) for e in made.train)
    json.dumps(told)
    split = load(rows, folder, checkpoint, eval_fraction=0.4)
    assert split.eval
    assert split.summary()["media_sha256"] == told["media_sha256"]
    # The data file is the same, what its rows refer to is not.
    (folder / "a.txt").write_text("3 5 8")
    again = load(rows, folder, checkpoint).summary()
    assert again["sha256"] == told["sha256"]
    assert again["media_sha256"] != told["media_sha256"]


@pytest.mark.slow
def test_keys_of_their_own_are_those_of_trained_rows(
    folder: Path, checkpoint: FakeCheckpoint
) -> None:
    rows = [ask(swatch("a.txt", shade=shade), text(f"q{shade}")) for shade in ("red", "blue")]
    rows += [ask(swatch("a.txt", max_dots=3), text("q")), ask(swatch("deep/b.txt"), text("q"))]
    assert load(rows, folder, checkpoint).summary()["media_keys"] == {
        "swatch": ["max_dots", "shade"]
    }
    for seed in range(20):
        split = load(rows, folder, checkpoint, eval_fraction=0.25, seed=seed)
        (held,) = split.eval
        wanted = ["shade"] if held.line == 3 else ["max_dots", "shade"]
        assert split.summary()["media_keys"] == {"swatch": wanted}


def test_rows_of_text_are_what_they_are_without_a_reader(
    folder: Path, checkpoint: FakeCheckpoint
) -> None:
    rows = [{"messages": [user(f"q {n}"), bot(f"a {n}")]} for n in range(20)]
    made = load(rows, folder, checkpoint, eval_fraction=0.25)
    assert made == load(rows, folder, checkpoint, eval_fraction=0.25, reader=None)
    assert made.kinds == ()
    assert not [key for key in made.summary() if "media" in key]
    assert all(e.media == () and e.placed is None for e in made.train)


def test_split_is_by_media_too(folder: Path, checkpoint: FakeCheckpoint) -> None:
    """Rows that are equal in their tokens are held out by what they show, not by their order."""
    rows = [ask(swatch(data_url(b"%d" % number)), text("q")) for number in range(24)]

    def held(given: list[Any]) -> set[str]:
        made = load(given, folder, checkpoint, eval_fraction=0.25, seed=3)
        assert len({tuple(e.ids) for e in (*made.train, *made.eval)}) == 1
        return {e.media[0].digest for e in made.eval}

    assert len(held(rows)) == 6
    assert held(rows) == held(rows[::-1])


def test_length_counts_what_media_grow_to(folder: Path, checkpoint: FakeCheckpoint) -> None:
    (folder / "long.txt").write_text("7 " * 300)
    rows = [ask(swatch("long.txt"), text("q"))]
    (example,) = load(rows, folder, checkpoint).train
    length = len(example.ids)
    assert load(rows, folder, checkpoint, max_length=length).longest == length
    (error,) = bad(rows, folder, checkpoint, max_length=length - 1)
    assert (error.code, error.field) == ("QC-DATA-011", "line 1")
    assert f"found {length} tokens, 300 of them media" in error.message
    assert "its media smaller" in str(error.fix)


def test_a_file_is_digested_once(
    folder: Path, checkpoint: FakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def sha256(*given: bytes) -> Any:
        made.append(1)
        return hashlib.sha256(*given)

    monkeypatch.setattr(media_module, "hashlib", SimpleNamespace(sha256=sha256))
    rows = [ask(swatch("a.txt"), swatch("deep/../a.txt"), text("q"))] * 5
    reader = SwatchReader()
    load(rows, folder, checkpoint, reader=reader)
    assert (len(reader.payloads), len(made)) == (10, 1)
    finder = Finder(folder)
    part = Reference(kind="swatch", at="", given="a.txt", options={})
    first = finder.payload(part).sha256
    (folder / "a.txt").write_text("another")
    assert finder.payload(part).sha256 == hashlib.sha256(b"another").hexdigest() != first


def test_memory_is_bounded_whatever_a_row_refers_to(
    folder: Path, checkpoint: FakeCheckpoint
) -> None:
    size = 8 << 20
    with (folder / "big.txt").open("wb") as file:
        file.write(b"1 2 3" + b" " * 5000)
        file.truncate(256 << 20)
    inline = data_url(b"4 5".ljust(size))
    path = folder / "rows.jsonl"
    with path.open("w") as rows:
        for number in range(12):
            part = swatch("big.txt" if number % 2 else inline)
            rows.write(json.dumps(ask(part, text("q"))) + "\n")
    reader = SwatchReader()
    reader.keeps = False
    tracemalloc.start()
    made = dataset(path, checkpoint, FORMAT, 100, reader=reader)
    left, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert made.summary()["media_tokens"] == 6 * 3 + 6 * 2
    assert peak < 7 * size  # a line as bytes, text and JSON, then its payload: of one row
    assert left < 1 << 20


# What is refused.


@contextmanager
def at_once() -> Iterator[None]:
    """Fail rather than hang when something blocks."""

    def late(*_: Any) -> None:
        raise AssertionError("it blocked")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 20)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# what the part names, code, something that the message says
NAMES: list[tuple[str, str, str]] = [
    ("http://127.0.0.1/a.txt", "QC-MEDIA-001", "a URL; nothing is fetched"),
    ("HTTPS://example.org/a.txt", "QC-MEDIA-001", "a URL; nothing is fetched"),
    ("file:///etc/passwd", "QC-MEDIA-001", "no media root is declared"),
    ("file://localhost/etc/passwd", "QC-MEDIA-001", "no media root is declared"),
    ("file://a%00.txt", "QC-MEDIA-001", "control character"),
    ("file://../out.txt", "QC-MEDIA-004", "outside"),
    ("file://%2e%2e/out.txt", "QC-MEDIA-002", "not there"),
    ("file://", "QC-MEDIA-001", "is empty"),
    ("FILE:a.txt", "QC-MEDIA-001", "nothing is fetched"),
    ("s3://bucket/a.txt", "QC-MEDIA-001", "nothing is fetched"),
    ("C:\\pics\\a.txt", "QC-MEDIA-001", "not a relative path"),
    ("/etc/passwd", "QC-MEDIA-001", "no media root is declared"),
    ("//host/share/a.txt", "QC-MEDIA-001", "not a relative path"),
    ("~/a.txt", "QC-MEDIA-001", "not a relative path"),
    ("deep\\b.txt", "QC-MEDIA-001", "backslash"),
    ("", "QC-DATA-006", "no path or data URL"),
    ("  ", "QC-MEDIA-001", "is empty"),
    ("a\0.txt", "QC-MEDIA-001", "character"),
    ("a\ud800.txt", "QC-MEDIA-001", "character"),
    ("data:text/plain,3", "QC-MEDIA-001", "not in base64"),
    ("data:text/plain;base64", "QC-MEDIA-001", "not in base64"),
    ("data:;base64,MyA1IDc", "QC-MEDIA-001", "does not decode"),
    ("data:;base64,My A1", "QC-MEDIA-001", "does not decode"),
    ("data:;base64,MyA_", "QC-MEDIA-001", "does not decode"),
    ("data:;base64,MyA1é", "QC-MEDIA-001", "does not decode"),
    ("data:;base64," + "A" * 5001, "QC-MEDIA-001", "does not decode"),
    ("absent.txt", "QC-MEDIA-002", "is not there"),
    ("a.txt/b.txt", "QC-MEDIA-002", "is not there"),
    ("link_nowhere", "QC-MEDIA-002", "is not there"),
    ("x" * 300, "QC-MEDIA-002", "cannot be read"),
    (".", "QC-MEDIA-003", "a folder"),
    ("deep", "QC-MEDIA-003", "a folder"),
    ("pipe", "QC-MEDIA-003", "a named pipe"),
    ("link_pipe", "QC-MEDIA-003", "a named pipe"),
    ("loop", "QC-MEDIA-003", "leads back"),
    ("../out.txt", "QC-MEDIA-004", "outside"),
    ("..", "QC-MEDIA-004", "outside"),
    ("deep/../../out.txt", "QC-MEDIA-004", "outside"),
    ("../data2/a.txt", "QC-MEDIA-004", "outside"),
    ("link_out", "QC-MEDIA-004", "outside"),
    ("link_up/out.txt", "QC-MEDIA-004", "outside"),
    ("link_device", "QC-MEDIA-004", "outside"),
    ("link_beside/a.txt", "QC-MEDIA-004", "outside"),
    ("huge.txt", "QC-MEDIA-005", f"at most {LARGEST}"),
]


@pytest.mark.parametrize(
    ("given", "code", "says"), fast(NAMES, *NAMES[::11], names=3), ids=range(len(NAMES))
)
def test_what_names_no_bytes_is_one_line(
    folder: Path, checkpoint: FakeCheckpoint, given: str, code: str, says: str
) -> None:
    beside = folder.with_name("data2")
    beside.mkdir()
    (beside / "a.txt").write_text("1")
    for name, target in {
        "link_out": "../out.txt", "link_up": "..", "link_pipe": "pipe", "loop": "loop",
        "link_device": "/dev/zero", "link_nowhere": "absent.txt", "link_beside": "../data2",
    }.items():  # fmt: skip
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe")
    with (folder / "huge.txt").open("wb") as file:
        file.truncate(LARGEST + 1)
    reader = SwatchReader()
    rows = [{"messages": [user("q"), bot("a")]}, ask(text("q"), swatch(given))]
    path = write_rows(folder / "rows.jsonl", [])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with at_once(), pytest.raises(InputError) as caught:
        dataset(path, checkpoint, FORMAT, 1000, reader=reader)
    error = caught.value
    assert (error.code, error.field) == (code, "line 2, messages[0].content[1]")
    assert says in error.message
    assert "\n" not in error.message
    assert len(error.message) < 600
    assert reader.payloads == []


def test_names_that_are_only_unusual_are_files(folder: Path, checkpoint: FakeCheckpoint) -> None:
    names = ["./~a", "./a:b", "..a", "a b", "हिन्दी.txt", "deep/./../..a", "<|dot|>"]
    for name in names:
        (folder / name).write_text("1")
    made = load([ask(swatch(name)) for name in names], folder, checkpoint)
    assert made.rows == len(names)


@pytest.mark.parametrize("given", ["a.txt", data_url(b"3 5 7")])
def test_another_digest_than_stated(folder: Path, checkpoint: FakeCheckpoint, given: str) -> None:
    digest = hashlib.sha256(b"3 5 7").hexdigest()
    (error,) = bad([ask(swatch(given, sha256="0" * 64))], folder, checkpoint)
    assert (error.code, error.field) == ("QC-MEDIA-006", "line 1, messages[0].content[0]")
    assert f"found {digest}, expected {'0' * 64}" in error.message


def test_a_file_that_may_not_be_read(
    folder: Path, checkpoint: FakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a user who is not root, whom permissions do not stop."""
    real = os.open

    def refuse(path: Any, *more: Any, **named: Any) -> int:
        if str(path).endswith("a.txt"):
            raise PermissionError(13, "Permission denied")
        return real(path, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    (error,) = bad([ask(swatch("a.txt"))], folder, checkpoint)
    assert error.code == "QC-MEDIA-002"
    assert "cannot be read: found 'a.txt': Permission denied" in error.message


def test_a_pipe_put_in_a_files_place_does_not_block(
    folder: Path, checkpoint: FakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = (folder / "a.txt").lstat()
    os.mkfifo(folder / "pipe")
    monkeypatch.setattr(Path, "lstat", lambda _: status)
    part = Reference(kind="swatch", at="", given="pipe", options={})
    with at_once(), pytest.raises(RowError, match="not a regular file"):
        Finder(folder).payload(part)


# the part, code, place inside of the part, something that message or fix says
PARTS: list[tuple[Any, str, str, str]] = [
    ({"type": "swatch"}, "QC-DATA-006", "", "no path or data URL"),
    ({"type": "swatch", "swatch": None}, "QC-DATA-006", "", "no path or data URL"),
    ({"type": "swatch", "swatch": ["a.txt"]}, "QC-DATA-006", ".swatch", "a list of 1"),
    ({"type": "swatch", "swatch": []}, "QC-DATA-006", "", "no path or data URL"),
    ({"type": "swatch", "swatch": ["a.txt", ["a.txt"]]}, "QC-DATA-006", ".swatch[1]", "a list"),
    ({"type": "swatch", "swatch": ["a.txt", 3]}, "QC-DATA-006", ".swatch[1]", "number 3"),
    ({"type": "swatch", "swatch": ["a.txt", "no"]}, "QC-MEDIA-002", ".swatch[1]", "not there"),
    ({"type": "swatch", "swatch": ["a.txt"], "sha256": "0" * 64}, "QC-DATA-006", ".sha256",
     "lists several"),
    ({"type": "swatch", "swatch": 3}, "QC-DATA-006", ".swatch", "number 3"),
    ({"type": "swatch", "swatch": {}}, "QC-DATA-006", "", "no path or data URL"),
    ({"type": "swatch", "swatch": {"bytes": None, "path": None}}, "QC-DATA-006", "",
     "no path or data URL"),
    ({"type": "swatch", "swatch": {"bytes": [3, 5]}}, "QC-DATA-006", ".swatch[0]", "number 3"),
    ({"type": "swatch", "swatch": {"bytes": "a.txt"}}, "QC-MEDIA-001", "", "does not decode"),
    ({"type": "swatch", "swatch": {"url": "a.txt", "shade": "red"}}, "QC-DATA-024",
     ".swatch.shade", "unknown key"),
    ({"type": "swatch", "swatch": "a.txt", "path": "a.txt"}, "QC-DATA-024", "",
     "twice: found swatch, path"),
    ({"type": "swatch_url"}, "QC-DATA-006", "", "no path or data URL"),
    ({"type": "swatch_url", "swatch_url": {"url": "https://x.org/a.txt", "detail": "low"}},
     "QC-MEDIA-001", "", "download it first"),
    (swatch("a.txt", shadee="red"), "QC-DATA-006", ".shadee", 'did you mean "shade"?'),
    (swatch("a.txt", text="q"), "QC-DATA-006", ".text", "a separate part"),
    ({"type": "swatch", "data": "a.txt"}, "QC-MEDIA-001", "", "does not decode"),
    (swatch("a.txt", sha256="00"), "QC-DATA-006", ".sha256", "64 hex"),
    (swatch("a.txt", sha256="g" * 64), "QC-DATA-006", ".sha256", "64 hex"),
    (swatch("a.txt", sha256=0), "QC-DATA-006", ".sha256", "the number 0"),
    ({"type": "my_swatch", "swatch_url": "a.txt"}, "QC-DATA-009", "",
     'write {"type": "swatch", "swatch": <path'),
    ({"type": "swach", "swach": "a.txt"}, "QC-DATA-009", "", 'did you mean "swatch"?'),
    ({"type": "image", "image": "a.png"}, "QC-DATA-009", "", "expected text or swatch"),
    ({"type": "text", "cache_control": {"type": "ephemeral"}}, "QC-DATA-006", "",
     "not a valid text part"),
    ({"type": ["swatch"], "swatch": "a.txt"}, "QC-DATA-006", "", "not a valid text part"),
    (text(f"a {DOT} b"), "QC-DATA-008", ".text", repr(DOT)),
    (text(f"{OPEN}"), "QC-DATA-008", ".text", repr(OPEN)),
    (swatch("deep/no.txt"), "QC-SWATCH-001", "", "is no swatch"),
    (swatch("a.txt", shade="green"), "QC-SWATCH-002", ".shade", "is no shade"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("part", "code", "at", "says"), fast(PARTS, *PARTS[::3], names=4), ids=range(len(PARTS))
)
def test_a_bad_part_is_one_line_with_its_place(
    folder: Path, checkpoint: FakeCheckpoint, part: Any, code: str, at: str, says: str
) -> None:
    (folder / "deep/no.txt").write_text("words")
    (error,) = bad([ask(text("q"), part)], folder, checkpoint)
    assert (error.code, error.field) == (code, f"line 1, messages[0].content[1]{at}")
    assert says in f"{error.message} {error.fix}"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [("swatch", "a.txt", "as a separate part"), ("citations", [{"url": "x"}], "to metadata")],
)
def test_an_unknown_key_of_a_text_part(key: str, value: Any, says: str) -> None:
    with pytest.raises(RowError, match="unknown key of a text part") as caught:
        ContentReader(SwatchReader()).content(
            [{"type": "text", "text": "q", key: value}], "content"
        )
    assert (caught.value.code, caught.value.at) == ("QC-DATA-006", f"content[0].{key}")
    assert says in str(caught.value.fix)


def test_media_in_a_system_message(folder: Path, checkpoint: FakeCheckpoint) -> None:
    system = {"role": "system", "content": [text("be kind"), swatch("a.txt")]}
    row = {"messages": [system, user("q"), bot("a")]}
    (error,) = bad([row], folder, checkpoint)
    assert (error.code, error.field) == ("QC-DATA-006", "line 1, messages[0].content[1]")
    assert "system message" in error.message


def test_an_answer_of_media_alone_says_nothing(folder: Path, checkpoint: FakeCheckpoint) -> None:
    row = {"messages": [user("q"), {"role": "assistant", "content": [swatch("a.txt")]}]}
    (error,) = bad([row], folder, checkpoint)
    assert (error.code, error.field) == ("QC-DATA-010", "line 1, messages[1]")


def test_media_without_a_reader(folder: Path, checkpoint: FakeCheckpoint) -> None:
    rows = [ask(swatch("a.txt"), text("q"))]
    why = "the checkpoint has no tower"
    (error,) = bad(rows, folder, checkpoint, reader=None, unread=why)
    assert (error.code, error.field) == ("QC-DATA-009", "line 1, messages[0].content[0]")
    assert f"found 'swatch', expected text parts: {why}" in error.message


def test_control_in_text_is_refused_wherever_it_stands(
    folder: Path, checkpoint: FakeCheckpoint
) -> None:
    """The tokens are not marked special: only the reader says what they are."""
    plain = [
        {"messages": [user(f"say {PLACE}"), bot("a")]},
        {"messages": [user("q"), bot(f"a {CLOSE}")]},
        {"messages": [user("q"), bot("a")], "tools": [{"name": "f", "description": DOT}]},
    ]
    assert load(plain, folder, checkpoint, reader=None).rows == 3
    found = bad(plain, folder, checkpoint)
    assert [(e.code, e.field) for e in found] == [
        ("QC-DATA-008", "line 1, messages[0].content"),
        ("QC-DATA-008", "line 2, messages[1].content"),
        ("QC-DATA-008", "line 3, tools[0].function.description"),
    ]


def test_special_tokens_of_media_are_refused_without_a_reader(shared: Path, folder: Path) -> None:
    """No chat format names them: the published tokenizer marks them special."""
    names = ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    source = shared / "skus/qwen3.5/Qwen3.5-4B/chat_template.jinja"
    template = Template(source.read_text(encoding="utf-8"), "4B")
    made = FakeCheckpoint(shared / "skus/tokenizer", template)
    rows = [{"messages": [user(f"what is <|{name}|>?"), bot("a")]} for name in names]
    assert not {f"<|{name}|>" for name in names} & {*FORMAT.control}
    found = bad(rows, folder, made, reader=None)
    assert [(e.code, e.field) for e in found] == [
        ("QC-DATA-008", f"line {number}, messages[0].content") for number in range(1, 6)
    ]


def test_all_bad_rows_of_every_step_in_the_order_of_the_file(
    folder: Path, checkpoint: FakeCheckpoint
) -> None:
    (folder / "long.txt").write_text("7 " * 300)
    late = {"role": "system", "content": "late"}
    found = bad(
        [
            ask(swatch("a.txt"), text("q")),
            ask(swatch("absent.txt"), text("q")),
            {"messages": [user("q"), late, bot("a")]},
            ask(swatch("long.txt"), text("q")),
            ask(swatch("a.txt", sha256="1" * 64), text("q")),
            ask(swatch("../out.txt"), swatch("absent.txt")),
            {"messages": [user("q")]},
            ask(swatch(data_url(b"word")), text("q")),
            ask(swatch("a.txt"), text("q")),
        ],
        folder,
        checkpoint,
        max_length=200,
    )
    assert [(e.code, e.field) for e in found] == [
        ("QC-MEDIA-002", "line 2, messages[0].content[0]"),
        ("QC-DATA-051", "line 3, messages[1]"),
        ("QC-DATA-011", "line 4"),
        ("QC-MEDIA-006", "line 5, messages[0].content[0]"),
        ("QC-MEDIA-004", "line 6, messages[0].content[0]"),
        ("QC-DATA-010", "line 7, messages"),
        ("QC-SWATCH-001", "line 8, messages[0].content[0]"),
    ]


# A template or a tokenizer that does not do what the reader says.


def test_another_number_of_placeholders(folder: Path, tmp_path: Path) -> None:
    """Right in the proof, wrong in one row: the reader's refusal gets the row's line."""
    twice = SWATCH_TEMPLATE.replace(f"'{PLACE}'", f"'{PLACE}' * (2 if loop.first else 1)")
    made = swatch_checkpoint(tmp_path / "model", twice)
    rows = [ask(text("q"), swatch("a.txt")), ask(swatch("a.txt"), text("q"))]
    (error,) = bad(rows, folder, made)
    assert (error.code, error.field) == ("QC-SWATCH-003", "line 2")


def test_a_template_that_loses_media_is_one_error(folder: Path, tmp_path: Path) -> None:
    lost = SWATCH_TEMPLATE.replace(f"'{PLACE}'", "''")
    found = bad(
        [ask(swatch("a.txt"), text("q"))] * 3, folder, swatch_checkpoint(tmp_path / "m", lost)
    )
    assert [error.code for error in found] == ["QC-MASK-003"]
    assert "a part of type 'swatch' is dropped" in found[0].message


def test_a_template_that_refuses_a_kind_refuses_its_rows_alone(
    folder: Path, tmp_path: Path
) -> None:
    refusing = SWATCH_TEMPLATE.replace(f"'{PLACE}'", "raise_exception('No swatches.')")
    made = swatch_checkpoint(tmp_path / "model", refusing)
    plain = {"messages": [user("q"), bot("a")]}
    assert load([plain], folder, made).rows == 1
    (error,) = bad([plain, ask(swatch("a.txt"))], folder, made)
    assert (error.code, error.field) == ("QC-TEMPLATE-002", "line 2")
    assert "No swatches." in error.message


def test_a_tokenizer_without_the_readers_tokens(folder: Path, checkpoint: FakeCheckpoint) -> None:
    reader = SwatchReader()
    reader.control = (*CONTROL, "<|other|>")
    (error,) = bad([ask(swatch("a.txt"))], folder, checkpoint, reader=reader)
    assert error.code == "QC-PRE-003"
    assert "'<|other|>'" in error.message


@pytest.mark.parametrize(
    "wrong", fast(["fewer", "more", "twice", "beside", "beyond", "positions"], "fewer", "beside")
)
def test_places_are_proved(folder: Path, checkpoint: FakeCheckpoint, wrong: str) -> None:
    class Reader(SwatchReader):
        def place(self, ids: Any, media: Any) -> Placed:
            right = super().place(ids, media)
            where, positions = right.where[:], right.positions
            match wrong:
                case "fewer":
                    del where[0]
                case "more":
                    where.insert(0, where[0] - 1)
                case "twice":
                    where[1] = where[0]
                case "beside":
                    where[0] = 0
                case "beyond":
                    where[-1] = len(ids)
                case _:
                    positions = (positions[0], positions[1][:-1])
            return Placed(where=where, positions=positions)

    (error,) = bad([ask(swatch("a.txt"), text("q"))], folder, checkpoint, reader=Reader())
    assert (error.code, error.field) == ("QC-MASK-004", "line 1")
