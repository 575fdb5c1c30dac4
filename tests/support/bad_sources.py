"""Bad paths, folders and mix files."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

from support.bad_file_kit import MIB, TWO, Bad, of


def _pipe(folder: Path, name: str = "rows.jsonl") -> str:
    os.mkfifo(folder / name)
    return str(folder / name)


def _socket(folder: Path) -> str:
    here = os.getcwd()
    os.chdir(folder)  # the name of a socket has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("rows.jsonl")
    finally:
        os.chdir(here)
    return str(folder / "rows.jsonl")


def _link(target: str, name: str = "rows.jsonl") -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / name).symlink_to(target)
        return str(folder / name)

    return make


def _folder(*files: str, broken: str = "") -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        made = folder / "made"
        made.mkdir()
        for name in files:
            (made / name).parent.mkdir(exist_ok=True)
            (made / name).write_bytes(TWO)
        if broken:
            (made / broken).symlink_to("nowhere")
        return str(made)

    return make


def _secret(folder: Path) -> str:
    path = folder / "rows.jsonl"
    path.write_bytes(TWO)
    path.chmod(0)
    return str(path)


def word(text: str) -> Callable[[Path], str]:
    return lambda folder: text.replace("FOLDER", str(folder))


PATHS = {
    "missing": Bad(word("FOLDER/rows.jsonl"), "QC-DATA-001", "No such file", None),
    "missing, relative": Bad(word("nowhere/rows.jsnl"), "QC-DATA-001", "No such file", None),
    "missing folder": Bad(word("FOLDER/a/b/c"), "QC-DATA-001", "No such file", None),
    "missing mix": Bad(word("mix.yaml"), "QC-DATA-001", "No such file", None),
    "a URL": Bad(word("https://example.org/rows.jsonl"), "QC-DATA-001", "No such file", None),
    "three words": Bad(word("a/b/c"), "QC-DATA-001", "No such file", None),
    "revision with ..": Bad(word("org/name@a..b"), "QC-DATA-001", "No such file", None),
    "a long name": Bad(word("FOLDER/" + "x" * 300), "QC-DATA-001", "", None),
    "pipe": Bad(_pipe, "QC-DATA-001", "found a pipe", None),
    "pipe named .gz": Bad(lambda folder: _pipe(folder, "rows.jsonl.gz"), "QC-DATA-001", "a pipe",
        None),
    "pipe named .parquet": Bad(lambda folder: _pipe(folder, "r.parquet"), "QC-DATA-001", "a pipe",
        None),
    "pipe named .yaml": Bad(lambda folder: _pipe(folder, "mix.yaml"), "QC-DATA-001", "a pipe",
        None),
    "socket": Bad(_socket, "QC-DATA-001", "found a socket", None),
    "/dev/zero": Bad(word("/dev/zero"), "QC-DATA-001", "found a device", None),
    "/dev/null": Bad(word("/dev/null"), "QC-DATA-001", "found a device", None),
    "/dev/zero through a link": Bad(_link("/dev/zero"), "QC-DATA-001", "found a device", None),
    "link loop": Bad(_link("rows.jsonl"), "QC-DATA-001", "symbolic links", None),
    "broken link": Bad(_link("nowhere"), "QC-DATA-001", "No such file", None),
    "no permission": Bad(_secret, "QC-DATA-001", "Permission denied", None),
    "empty folder": Bad(_folder(), "QC-DATA-030", "an empty folder", None),
    "folder without data": Bad(_folder("README.md", "a.png"), "QC-DATA-030", "README.md, a.png",
        None),
    "folder of folders": Bad(_folder("train/a.jsonl"), "QC-DATA-030", "train", None),
    "folder of hidden files": Bad(_folder(".a.jsonl"), "QC-DATA-030", "an empty folder", None),
    "folder of metadata": Bad(_folder("dataset_info.json", "state.json"), "QC-DATA-030",
        "state.json", None),
    "folder with a broken link": Bad(_folder("a.jsonl", broken="b.jsonl"), "QC-DATA-001",
        "No such file", None, "b.jsonl"),
    "nothing": Bad(word(" "), "QC-DATA-038", "not a path", "--data", "-"),
    "NUL": Bad(word("a\0b"), "QC-DATA-038", "not a path", "--data", "-"),
}  # fmt: skip


def mix(text: str | bytes, words: str, field: str | None, code: str = "QC-DATA-035") -> Bad:
    def make(folder: Path) -> str:
        (folder / "rows.jsonl").write_bytes(TWO)
        (folder / "empty").mkdir()
        path = folder / "mix.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return Bad(make, code, words, field)


def entry(*lines: str, words: str, field: str | None = "line 3, sources.0") -> Bad:
    """A mix with one source: a path and these lines."""
    return mix("sources:\n  - path: rows.jsonl\n" + "".join(f"    {line}\n" for line in lines),
        words, field)  # fmt: skip


MIXES = {
    "empty": mix("", "an empty file", "line 1"),
    "a list": mix("- path: rows.jsonl\n", "something else", "line 1"),
    "a word": mix("rows.jsonl\n", "something else", "line 1"),
    "unknown key": mix("source:\n  - path: rows.jsonl\n", "unknown key 'source'", "line 2, source"),
    "only a seed": mix("seed: 1\n", "no sources", "line 1"),
    "no sources": mix("sources: []\n", "no sources", "line 1, sources"),
    "sources is a mapping": mix("sources:\n  path: rows.jsonl\n", "no sources", "line 2, sources"),
    "a source is a word": mix("sources:\n  - rows.jsonl\n", "something else", "line 2, sources.0"),
    "unknown key of a source": entry("wieght: 0.5", words="unknown key 'wieght'",
        field="line 3, sources.0.wieght"),
    "neither": mix("sources:\n  - weight: 0.5\n", "neither of path and hub", "line 2, sources.0"),
    "both": entry("hub: org/name", words="both of path and hub", field="line 2, sources.0"),
    "missing source": mix("sources:\n  - path: rows.jsonl\n  - path: row.jsonl\n",
        "does not exist", "line 3, sources.1.path", "QC-DATA-030"),
    "missing folder": mix("sources:\n  - path: nowhere/\n", "does not exist",
        "line 2, sources.0.path", "QC-DATA-030"),
    "empty path": mix("sources:\n  - path: ''\n", "no text", "line 2, sources.0.path"),
    "null path": mix("sources:\n  - path:\n", "no text", "line 2, sources.0.path"),
    "path is a list": mix("sources:\n  - path: [a, b]\n", "no text", "line 2, sources.0.path"),
    "not a hub id": mix("sources:\n  - hub: a/b/c\n", "'a/b/c'", "line 2, sources.0.hub"),
    "hub with a revision": mix("sources:\n  - hub: a/b@main\n", "'a/b@main'",
        "line 2, sources.0.hub"),
    "revision with ..": mix("sources:\n  - hub: a/b\n    revision: a..b\n", "'a..b'",
        "line 3, sources.0.revision"),
    "a slice": mix("sources:\n  - hub: a/b\n    split: train[:10]\n", "a slice",
        "line 3, sources.0.split"),
    "revision of a path": entry("revision: main", words="revision of a path"),
    "split of a path": entry("split: train", words="split of a path"),
    "weight 0": entry("weight: 0", words="found 0"),
    "weight -1": entry("weight: -1", words="found -1"),
    "weight 2": entry("weight: 2", words="found 2"),
    "weight nan": entry("weight: nan", words="'nan'"),
    "weight half": entry("weight: half", words="'half'"),
    "weight in percent": entry("weight: 50%", words="'50%'"),
    "weight and count": entry("weight: 0.5", "count: 3", words="weight and count",
        field="line 4, sources.0.count"),
    "count 0": entry("count: 0", words="found 0"),
    "count 1.5": entry("count: 1.5", words="'1.5'"),
    "count -1": entry("count: -1", words="found -1"),
    "count of 5000 digits": entry("count: " + "9" * 5000, words="a whole number"),
    "seed -1": entry("seed: -1", words="found -1"),
    "seed x": mix("seed: x\nsources:\n  - path: rows.jsonl\n", "'x'", "line 1, seed"),
    "turns": entry("turns: lst", words="'lst'"),
    "reasoning": entry("reasoning: yes", words="'yes'"),
    "history": entry("history: served", words="'served'"),
    "long_rows": entry("long_rows: truncate", words="'truncate'"),
    "bad_rows": entry("bad_rows: skp", words="'skp'"),
    "train": entry("train: yes", words="'yes'"),
    "fields is a list": entry("fields: [a]", words="no mapping"),
    "fields is empty": entry("fields: {}", words="no mapping"),
    "a field is empty": entry("fields: {messages: }", words="no text"),
    "ignore_columns is a word": entry("ignore_columns: source", words="something else"),
    "ignore_columns is empty": entry("ignore_columns: []", words="something else"),
    "key twice": entry("weight: 0.5", "weight: 0.6", words="twice", field=None),
    "tab": mix("sources:\n\t- path: rows.jsonl\n", "line 2 is refused", None, "QC-YAML-002"),
    "anchor": mix("sources: &a\n  - path: rows.jsonl\n", "the anchor", None, "QC-YAML-002"),
    "tag": mix("sources: !!python/tuple [a]\n", "the tag", None, "QC-YAML-002"),
    "two documents": mix("sources: []\n---\nsources: []\n", "second document", None, "QC-YAML-002"),
    "not UTF-8": mix(b"sources:\n  - path: \xff\n", "line 2 is refused", None, "QC-YAML-002"),
    "2 MiB": mix("#" * (2 * MIB), "more than 1 MiB", None, "QC-YAML-002"),
    "broken": mix("sources: [\n", "refused", None, "QC-YAML-002"),
    "deep": mix("sources: " + "[" * 20 + "]" * 20, "levels", None, "QC-YAML-002"),
    "an empty folder": mix("sources:\n  - path: empty\n", "an empty folder", None, "QC-DATA-030"),
    "1001 sources": mix("sources:\n" + "  - path: rows.jsonl\n" * 1001, "1001 sources",
        "line 2, sources"),
}  # fmt: skip
MIXES["key twice"] = Bad(MIXES["key twice"].make, "QC-YAML-002", "twice", None)
MIXES["an empty folder"] = Bad(
    MIXES["an empty folder"].make, "QC-DATA-030", "an empty", None, "empty"
)


def info(text: str, words: str, field: str | None, code: str = "QC-DATA-035") -> Bad:
    return Bad(of("dataset_info.json", text.encode()), code, words, field)


INFOS = {
    "empty": info("", "is not JSON", None),
    "a list": info("[]", "is not a dataset_info.json", None),
    "no entries": info("{}", "is not a dataset_info.json", None),
    "of datasets": info('{"features": {"a": {"dtype": "string"}}}', "is not a dataset_info", None),
    "entry twice": info('{"a": {"file_name": "a"}, "a": {"file_name": "b"}}', "duplicate", None),
    "missing file": info('{"a": {"file_name": "a.json"}}', "not exist", "a.file_", "QC-DATA-030"),
    "number as a file": info('{"a": {"file_name": 7}}', "is not a name", "a.file_name"),
    "script": info('{"a": {"script_url": "x"}}', "cannot be read", "a.script_url"),
    "hub folder": info('{"a": {"hf_hub_url": "a/b", "folder": "c"}}', "cannot", "a.folder"),
    "not a hub id": info('{"a": {"hf_hub_url": "https://a/b"}}', "hub id", "a.hf_hub_url"),
    "no samples": info('{"a": {"file_name": "a", "num_samples": 0}}', "number", "a.num_samples"),
    "pipe": Bad(lambda folder: _pipe(folder, "dataset_info.json"), "QC-DATA-001", "a pipe", None),
}
