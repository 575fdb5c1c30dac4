"""Hub datasets: the real client and the rules of `datasets`, against a hub on loopback."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support.hub_server import Client, HubServer

from qcore.data.sources import hub_files
from qcore.errors import InputError

datasets = pytest.importorskip("datasets")

ROW = b'{"prompt": "a", "response": "b"}\n'
NAME = "org/chat"
CODE = """
import json, sys
from qcore.data.sources.containers import records
from qcore.data.sources.read import read_sources
from qcore.errors import QcoreError
try:
    out = {"sources": []}
    for source in read_sources(sys.argv[1:]):
        paths = (path.as_posix().partition("/snapshots/")[2] for path in source.files)
        names = [path.partition("/")[2] for path in paths]
        rows = sum(1 for record in records(source))
        out["sources"].append([source.name, source.revision, names, rows, list(source.notes)])
except QcoreError as error:
    out = error.as_json() | {"exit": error.exit_code}
out["heavy"] = sorted({"torch", "transformers"} & set(sys.modules))
print(json.dumps(out))
"""
CARD = b"""---
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: ["main/part-*.jsonl", "extra/a.jsonl"]
  - split: test
    path: main/test.jsonl
- config_name: other
  data_files: other/*.jsonl
---
# Chat
"""
FILES = {
    "README.md": CARD,
    "main/part-1.jsonl": ROW,
    "main/part-2.jsonl": ROW * 2,
    "main/test.jsonl": ROW * 3,
    "extra/a.jsonl": ROW * 4,
    "other/b.jsonl": ROW * 5,
    "main/notes.txt": b"",
    "chat.py": b"raise SystemExit",
}


@pytest.fixture
def ask(hub: HubServer, tmp_path: Path) -> Client:
    (tmp_path / "home").mkdir()
    return Client(hub, tmp_path / "home", CODE)


def mix(tmp_path: Path, **keys: str) -> str:
    lines = "".join(f"    {key}: {value}\n" for key, value in keys.items())
    path = tmp_path / "mix.yaml"
    path.write_text(f"sources:\n  - hub: {NAME}\n{lines}")
    return str(path)


def test_the_default_configuration(ask: Client) -> None:
    commit = ask.hub.add(f"datasets/{NAME}", FILES)
    files = ["main/part-1.jsonl", "main/part-2.jsonl", "extra/a.jsonl"]
    assert ask(NAME) == {"sources": [[NAME, commit, files, 7, []]]}
    fetched = ask.hub.asked("GET", "/resolve/")
    assert not [path for path in fetched if "test" in path or "chat.py" in path or "other" in path]


@pytest.mark.slow
def test_configuration_split_and_revision(ask: Client, tmp_path: Path) -> None:
    old = ask.hub.add(f"datasets/{NAME}", FILES, refs=("v1",))
    ask.hub.add(f"datasets/{NAME}", {"a.jsonl": ROW})
    (found,) = ask(mix(tmp_path, revision="v1", split="test"))["sources"]  # type: ignore[misc]
    assert found == [f"{NAME}@v1 (split test)", old, ["main/test.jsonl"], 3, []]
    (found,) = ask(mix(tmp_path, revision=old, config="other"))["sources"]  # type: ignore[misc]
    assert found[2:4] == [["other/b.jsonl"], 5]
    (found,) = ask(NAME)["sources"]  # type: ignore[misc]
    assert found[2:4] == [["a.jsonl"], 1]


@pytest.mark.slow
def test_no_such_configuration_or_split(ask: Client, tmp_path: Path) -> None:
    ask.hub.add(f"datasets/{NAME}", FILES)
    told = ask(mix(tmp_path, config="mian"))
    assert (told["code"], told["field"], told["fix"], told["exit"]) == (
        "QC-DATA-037", "config", "did you mean main?", 65,
    )  # fmt: skip
    told = ask(mix(tmp_path, split="tests"))
    assert (told["code"], told["field"], told["fix"]) == (
        "QC-DATA-037", "split", "did you mean test?",
    )  # fmt: skip
    assert "expected test, train" in str(told["message"])


@pytest.mark.slow
def test_several_configurations_without_a_default(ask: Client) -> None:
    card = CARD.replace(b"  default: true\n", b"")
    ask.hub.add(f"datasets/{NAME}", FILES | {"README.md": card})
    told = ask(NAME)
    assert told["code"] == "QC-DATA-037"
    assert "several configurations: expected main, other" in str(told["message"])


@pytest.mark.slow
def test_offline(ask: Client) -> None:
    commit = ask.hub.add(f"datasets/{NAME}", FILES)
    told = ask(NAME, HF_HUB_OFFLINE="1")
    assert (told["code"], told["exit"]) == ("QC-HUB-006", 65)
    assert "HF_HUB_OFFLINE is set" in str(told["message"])
    online = ask(NAME)
    assert ask(NAME, HF_HUB_OFFLINE="1") == online
    assert ask(f"{NAME}@{commit}", HF_HUB_OFFLINE="1")["sources"]
    assert ask.hub.requests == []


@pytest.mark.slow
def test_a_cache_that_lacks_files_of_the_split(ask: Client, tmp_path: Path) -> None:
    names = [f"data/train-0000{i}-of-00003.jsonl" for i in range(3)]
    ask.hub.add(f"datasets/{NAME}", dict.fromkeys(names, ROW))
    assert ask(NAME)["sources"]
    for path in (tmp_path / "home").rglob("train-00001-of-00003.jsonl"):
        path.unlink()
    told = ask(NAME, HF_HUB_OFFLINE="1")
    assert told["code"] == "QC-DATA-037"
    assert "found data/train-00001-of-00003.jsonl" in str(told["message"])


@pytest.mark.slow
def test_failures_of_the_hub(ask: Client) -> None:
    told = ask("org/nothing")
    assert (told["code"], told["exit"]) == ("QC-HUB-003", 65)
    assert "no public dataset of that name" in str(told["message"])
    ask.hub.add(f"datasets/{NAME}", FILES)
    assert ask(f"{NAME}@nowhere")["code"] == "QC-HUB-005"
    ask.hub.add("datasets/org/gated", FILES, gated=True, token="t")
    told = ask("org/gated")
    assert (told["code"], told["exit"]) == ("QC-HUB-004", 77)
    assert "/datasets/org/gated" in str(told["fix"])
    ask.hub.close()
    assert ask(NAME)["code"] == "QC-HUB-007"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"chat.py": b""}, "chat.py, which is never run"),
        ({"README.md": b"# Chat"}, "README.md"),
        ({"a.jsonl": ROW, "README.md": CARD}, "cannot be resolved|no data files"),
        ({"a.png": b"x"}, "no data files: found a.png"),
        ({"README.md": b"---\nconfigs: [\n---\n", "a.jsonl": ROW}, "cannot be read"),
        ({"README.md": b"---\nconfigs: 7\n---\n", "a.jsonl": ROW}, "cannot be read"),
    ],
)
def test_repositories_without_rows(ask: Client, files: dict[str, bytes], words: str) -> None:
    ask.hub.add(f"datasets/{NAME}", files)
    told = ask(NAME)
    assert told["code"] == "QC-DATA-037"
    assert any(word in str(told["message"]) for word in words.split("|")), told["message"]


@pytest.mark.parametrize(
    "path", ["/etc/*", "../*", "https://example.org/a.jsonl", "~/a", "a/../../b"]
)
def test_patterns_stay_in_the_repository(path: str) -> None:
    entry = {"data_files": path}
    with pytest.raises(ValueError, match="is not in the repository"):
        hub_files._resolve(entry, ["a.jsonl"], "train")


TREES = {
    "one": ["a.jsonl", "README.md"],
    "names": ["train.jsonl", "test.jsonl", "README.md"],
    "folders": ["data/train/a.jsonl", "data/train/b.jsonl", "data/validation/c.jsonl"],
    "shards": [f"data/{split}-0000{i}-of-00002.csv" for split in ("train", "sft") for i in (0, 1)],
    "dashes": ["my-train-1.csv", "my-dev.csv"],
    "hidden": [".a.jsonl", "__x/a.jsonl", "b.jsonl", "config.json", "dataset_info.json"],
}  # fmt: skip


@pytest.mark.parametrize("tree", TREES)
def test_splits_are_those_of_datasets(tree: str, tmp_path: Path) -> None:
    """Equal to what `datasets` makes of a folder with these files."""
    for name in TREES[tree]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(ROW)
    base = str(tmp_path)
    patterns = datasets.data_files.get_data_patterns(base)
    by_split = datasets.data_files.DataFilesDict.from_patterns(patterns, base_path=base)
    expected = {
        str(split): sorted(str(Path(path).relative_to(tmp_path)) for path in paths)
        for split, paths in by_split.items()
    }
    for split, names in expected.items():
        assert sorted(hub_files._resolve({}, TREES[tree], split)) == names


def test_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError) as caught:
        hub_files.hub_files(NAME)
    assert caught.value.code == "QC-DATA-033"
    assert caught.value.fix == 'pip install "qcore-framework[data]"'
    assert json.dumps(caught.value.as_json())
