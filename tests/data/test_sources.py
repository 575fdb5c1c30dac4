"""What a user may name as data: files, folders, mix files; and which rows of a source are used."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from support.conversations import conversations, write_rows

from qcore.config.settings import SPECS
from qcore.data.policies import POLICY_KEYS, Policies
from qcore.data.source_counts import SourceCount
from qcore.data.sources import read as sources
from qcore.data.sources.hub_files import HubFiles
from qcore.data.sources.read import read_sources, refuse_shared
from qcore.data.sources.selection import choose
from qcore.data.sources.source import Source
from qcore.errors import InputError, PreflightError, UsageError
from qcore.io.artifact import publish

EVERY_KEY = """
seed: 7
sources:
  - path: a.jsonl
    format: openai
    weight: 0.25
    fields:
      messages: turns
      roles: {user: [human, prompter]}
    ignore_columns: [score, source]
    media_root: images
    turns: last
    reasoning: mask
    history: as_rendered
    long_rows: drop
    bad_rows: skip
    train: false
    seed: 1_000
  - path: more      # a folder
    count: 10
"""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file, and a folder with two files and other things."""
    write_rows(tmp_path / "a.jsonl", conversations(3))
    more = tmp_path / "more"
    (more / "images").mkdir(parents=True)
    write_rows(more / "c.json", conversations(3))
    write_rows(more / "b.jsonl", conversations(3))
    for name in ("README.md", "dataset_info.json", ".hidden.jsonl", "z.png"):
        (more / name).write_text("{}")
    return tmp_path


def test_files_and_folders(rows: Path) -> None:
    first, second = read_sources(
        [rows / "a.jsonl", str(rows / "more")], format="sharegpt", media_root=rows
    )
    assert first == Source(
        name=str(rows / "a.jsonl"),
        files=(rows / "a.jsonl",),
        format="sharegpt",
        media_root=rows,
    )
    assert second.files == (rows / "more" / "b.jsonl", rows / "more" / "c.json")
    assert (
        second.notes
        == (
            "3 files are not read: README.md, dataset_info.json, z.png",
            "1 subfolders are not read: images",
            "c.json contains JSON lines, although its name ends in .json",
        )[:2]
    )


def test_the_folder_of_converted_rows(tmp_path: Path) -> None:
    """The manifest that `qcore data convert` writes beside the rows is not read as rows."""
    with publish(tmp_path / "converted", "rows") as writer:
        writer.write_text("rows.jsonl", '{"messages": []}\n')
    (source,) = read_sources([tmp_path / "converted"])
    assert source.files == (tmp_path / "converted" / "rows.jsonl",)
    assert source.notes == ("1 files are not read: MANIFEST.json",)


def test_no_words_are_no_sources() -> None:
    assert read_sources([], command="--eval-data") == ()


def test_a_mix(rows: Path) -> None:
    (rows / "mix.yaml").write_text(EVERY_KEY)
    (rows / "images").mkdir()
    first, second = read_sources([rows / "mix.yaml"], format="alpaca")
    assert first == Source(
        name=str(rows / "a.jsonl"),
        files=(rows / "a.jsonl",),
        format="openai",
        fields={"messages": "turns", "roles": {"user": ["human", "prompter"]}},
        ignore_columns=("score", "source"),
        media_root=rows / "images",
        weight=0.25,
        seed=1000,
        turns="last",
        reasoning="mask",
        history="as_rendered",
        long_rows="drop",
        bad_rows="skip",
        train=False,
        mix=(rows / "mix.yaml", hashlib.sha256(EVERY_KEY.encode()).hexdigest()),
    )
    assert (second.count, second.weight, second.seed, second.format) == (10, None, 7, "alpaca")
    assert len(second.files) == 2


INFO = {
    "chats": {"file_name": "a.jsonl"},
    "other": {
        "file_name": "more",
        "formatting": "sharegpt",
        "columns": {"messages": "turns"},
        "num_samples": 4,
    },
}


def test_a_dataset_info(rows: Path) -> None:
    """The list of data sets that LLaMA-Factory keeps beside them."""
    path = rows / "dataset_info.json"
    path.write_text(json.dumps(INFO))
    first, second = read_sources([path])
    assert (first.files, first.fields) == ((rows / "a.jsonl",), {"formatting": "alpaca"})
    assert (len(second.files), second.count) == (2, 4)
    assert second.fields == {"formatting": "sharegpt", "columns": {"messages": "turns"}}
    assert read_sources([f"{path}:other,chats"]) == (second, first)
    with pytest.raises(UsageError) as caught:
        read_sources([f"{path}:othr"])
    assert (caught.value.code, caught.value.fix) == ("QC-DATA-035", "did you mean other?")


def test_the_mix_of_the_documentation(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    (rows / "mix.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
    (rows / "a.jsonl").rename(rows / "chats.jsonl")
    asked: list[object] = []

    def resolve(name: str, revision: str, **more: str) -> HubFiles:
        asked.append((name, revision, more["config"], more["split"]))
        return HubFiles(files=(rows / "chats.jsonl",), revision="0" * 40)

    monkeypatch.setattr(sources, "hub_files", resolve)
    one, two, three = read_sources([rows / "mix.yaml"])
    assert (one.weight, two.count, two.bad_rows, three.revision) == (0.5, 1000, "skip", "0" * 40)
    assert two.fields == {"messages": "dialog"}
    assert asked == [("ORG/NAME", "main", "default", "train")]


def test_a_mix_lies_anywhere(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixes = rows / "mixes"
    mixes.mkdir()
    absolute = json.dumps(str(rows / "more" / "b.jsonl"))
    (mixes / "m.yml").write_text(f"sources:\n  - path: ../a.jsonl\n  - path: {absolute}\n")
    monkeypatch.chdir(rows)
    first, second = read_sources(["mixes/m.yml"])
    assert first.files[0].resolve() == rows / "a.jsonl"
    assert second.files == (rows / "more" / "b.jsonl",)


def test_all_faults_are_reported_together(rows: Path) -> None:
    (rows / "mix.yaml").write_text("sources:\n  - path: a.json\n  - path: nowhere\n")
    (rows / "bad.jsonl").write_bytes(b"PK\x03\x04")
    with pytest.raises(PreflightError) as caught:
        read_sources([rows / "mix.yaml", rows / "bad.jsonl", rows / "a.jsonI"])
    assert [(error.code, error.field) for error in caught.value.errors] == [
        ("QC-DATA-030", "line 2, sources.0.path"),
        ("QC-DATA-030", "line 3, sources.1.path"),
        ("QC-DATA-003", "line 1"),
        ("QC-DATA-001", None),
    ]
    assert caught.value.errors[0].fix == f"did you mean {rows / 'a.jsonl'}?"
    assert caught.value.errors[3].fix == f"did you mean {rows / 'a.jsonl'}?"


def test_a_file_that_is_read_twice_is_noted(rows: Path) -> None:
    (rows / "link.jsonl").symlink_to("a.jsonl")
    first, second = read_sources([rows / "a.jsonl", rows / "link.jsonl"])
    assert first.notes == ()
    assert second.notes == ("1 files are read a second time: link.jsonl",)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("train.jsonl", "test.jsonl"), "test.jsonl, train.jsonl"),
        (("train-00000-of-2.jsonl", "train-00001-of-2.jsonl", "chat_DEV.json"),
         "chat_DEV.json, train-00000-of-2.jsonl"),
        (("a.jsonl", "a.json"), "a.json, a.jsonl"),
        (("a.jsonl", "a.csv.gz", "b.csv"), "a.csv.gz, a.jsonl"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_one_set_of_rows(
    tmp_path: Path, names: tuple[str, ...], found: str
) -> None:
    for name in names:
        write_rows(tmp_path / name, conversations(1))
    with pytest.raises(InputError) as caught:
        read_sources([tmp_path])
    assert (caught.value.code, caught.value.found) == ("QC-DATA-039", found)
    assert caught.value.file == str(tmp_path)


def test_a_folder_of_one_split(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl", "latest.jsonl", "my_test_notes.jsonl"):
        write_rows(tmp_path / name, conversations(1))
    (found,) = read_sources([tmp_path])
    assert len(found.files) == 4


def test_a_file_that_is_trained_and_evaluated_on(rows: Path) -> None:
    (rows / "link.jsonl").symlink_to("a.jsonl")
    train, other = read_sources([rows / "a.jsonl"]), read_sources([rows / "more"])
    refuse_shared(train, other)
    refuse_shared(train, ())
    with pytest.raises(InputError) as caught:
        refuse_shared(train, (*other, *read_sources([rows / "link.jsonl"])))
    assert (caught.value.code, caught.value.file) == (
        "QC-DATA-039",
        str(rows / "link.jsonl"),
    )


def source(**options: object) -> Source:
    return Source(name="s", files=(), **options)  # type: ignore[arg-type]


def test_all_rows_are_chosen_without_a_share() -> None:
    assert choose(5, source(), 0) == [0, 1, 2, 3, 4]
    assert choose(5, source(weight=1.0), 0) == [0, 1, 2, 3, 4]
    assert choose(0, source(weight=0.5), 0) == []


@pytest.mark.parametrize("rows", [1, 2, 10, 999, 100_000])
@pytest.mark.parametrize("weight", [0.001, 0.1, 0.5, 0.999])
def test_a_weight_chooses_its_share(rows: int, weight: float) -> None:
    chosen = choose(rows, source(weight=weight), 3)
    assert len(chosen) == max(1, round(rows * weight))
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(range(rows))


def test_smaller_choices_are_part_of_larger_ones() -> None:
    chosen = [set(choose(1000, source(count=count), 5)) for count in (10, 11, 500, 1000)]
    assert all(small < large for small, large in pairwise(chosen))
    assert set(choose(1000, source(weight=0.5), 5)) == chosen[2]


def test_the_seed_decides() -> None:
    one, two = (choose(1000, source(count=100), seed) for seed in (0, 1))
    assert one == choose(1000, source(count=100), 0) != two
    assert choose(1000, source(count=100, seed=1), 0) == two
    assert choose(1000, source(count=100, seed=2**63 - 1), 0)


def test_a_source_without_a_share_needs_no_seed() -> None:
    assert source().seeded(4) == source()
    assert source(count=3).seeded(4) == source(count=3, seed=4)
    assert source(weight=0.5, seed=0).seeded(4).seed == 0


def test_every_row_is_as_likely() -> None:
    seeds = 400
    counts = Counter(index for seed in range(seeds) for index in choose(50, source(count=10), seed))
    assert len(counts) == 50
    # Binomial(400, 0.2): mean 80, standard deviation 8; five of them.
    assert all(abs(count - 80) < 40 for count in counts.values())
    pairs = Counter(tuple(choose(6, source(count=2), seed)) for seed in range(600))
    assert len(pairs) == 15  # every pair of six


def test_too_few_rows() -> None:
    with pytest.raises(InputError) as caught:
        choose(9, source(count=10), 0)
    assert (caught.value.code, caught.value.fix) == (
        "QC-DATA-036",
        "set count: 9 or leave it out",
    )


def test_the_manifest_states_what_a_source_sets(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    mix = tmp_path / "mix.yaml"
    mix.write_text(
        "seed: 3\nsources:\n  - path: rows.jsonl\n    format: openai\n    count: 1\n"
        "    fields: {messages: turns}\n    ignore_columns: [score]\n    media_root: .\n"
        "    turns: last\n    bad_rows: skip\n    bad_rows_limit: 0.2\n    train: false\n"
        "  - path: rows.jsonl\n"
    )
    first, second = read_sources([mix])
    summary = SourceCount(first).summary()
    assert {
        "format": "openai",
        "count": 1,
        "seed": 3,
        "fields": {"messages": "turns"},
        "ignore_columns": ["score"],
        "media_root": str(tmp_path),
        "turns": "last",
        "bad_rows": "skip",
        "bad_rows_limit": 0.2,
        "train": False,
        "mix": {"file": "mix.yaml", "sha256": hashlib.sha256(mix.read_bytes()).hexdigest()},
    }.items() <= summary.items()
    json.dumps(summary)
    plain = SourceCount(second).summary()
    assert not {"format", "fields", "train", "turns", "config"} & plain.keys()
    assert plain["mix"] == summary["mix"]
    (alone,) = read_sources([tmp_path / "rows.jsonl"])
    assert "mix" not in SourceCount(alone).summary()


def test_the_manifest_names_configuration_and_split_of_a_hub_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": []}\n')
    found = HubFiles(files=(path,), revision="c0ffee", note="")
    monkeypatch.setattr("qcore.data.sources.read.hub_files", lambda *_, **__: found)
    mix = tmp_path / "mix.yaml"
    mix.write_text("sources:\n  - hub: a/b\n    config: main\n    split: test\n")
    (source,) = read_sources([mix])
    summary = SourceCount(source).summary()
    assert (summary["config"], summary["split"], summary["revision"]) == ("main", "test", "c0ffee")


@pytest.mark.parametrize("key", POLICY_KEYS)
def test_a_mix_takes_the_choices_of_the_settings(tmp_path: Path, key: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    for choice in SPECS[key].choices:
        (tmp_path / "mix.yaml").write_text(f"sources:\n  - path: rows.jsonl\n    {key}: {choice}\n")
        (source,) = read_sources([tmp_path / "mix.yaml"])
        assert getattr(source, key) == choice
        assert replace(Policies(), **{key: choice}) == Policies().over(source)


def test_formats_and_fields_are_checked_with_the_sources(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": []}\n')
    with pytest.raises(UsageError) as caught:
        read_sources([rows], format="sharegpd")
    assert (caught.value.code, caught.value.field) == ("QC-DATA-027", "format")
    assert "did you mean sharegpt?" in str(caught.value.fix)
    mix = tmp_path / "mix.yaml"
    for line, code, field in (
        ("format: sharegpd", "QC-DATA-027", "line 2, sources.0.format"),
        ("fields: {massages: x}", "QC-DATA-028", "line 2, sources.0.fields.massages"),
    ):
        mix.write_text(f"sources:\n  - path: rows.jsonl\n    {line}\n")
        with pytest.raises(UsageError) as caught:
            read_sources([mix])
        error = caught.value
        assert (error.code, error.file, error.field) == (code, str(mix), field)
