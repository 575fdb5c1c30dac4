"""The comparison of golden records reports every difference that no rule excuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from goldens.compare import compare
from goldens.edits import write_json
from goldens.record import digest
from goldens.rules import Rules
from goldens.shapes import shape_of
from safetensors.torch import save_file

RULES = Rules.load()
ADAPTER = "dense/adapter/adapter_model.safetensors"
MANIFEST = "dense/adapter/MANIFEST.json"
METRICS = "dense/adapter/metrics.jsonl"
#: Small results under the names of real cases, whose verbs select the rules.
RESULTS: dict[str, Any] = {
    "setting-range": {"error": {"code": "QC-CONFIG-003", "message": "too large", "fix": None}},
    "plan-moe": {"plans": [{"fits": True, "backends": {"norm": "triton", "loss": "fused"}}]},
    "doctor-kernels": {"kernels": [{"op": "a", "state": "ok"}, {"op": "b", "state": "bad"}]},
    "train-dense": {"steps": 2, "measured": {"peak_bytes": 10, "tokens_per_second": 1.5}},
}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A small record."""
    folder = tmp_path / "old"
    for name, value in RESULTS.items():
        put(folder, f"json/{name}.json", value)
    put(folder, "record.json", {"format": 1, "scratch": "/s", "packages": {"torch": "2.0"}})
    put(folder, "status.json", {"setting-range": 2})
    put(folder, "plain.json", {"setting-range": {"status": 2, "codes": ["QC-CONFIG-003"]}})
    put(folder, "options.json", {"train": {"options": ["--data", "--model"], "verbs": []}})
    put(folder, f"artifacts/{MANIFEST}", {"created": "monday", "meta": {"seed": 1}})
    (folder / f"artifacts/{METRICS}").write_text('{"loss": 1.5, "seconds": 2.0}\n')
    tensors = {name: torch.arange(4.0) for name in ("first", "second")}
    save_file(tensors, folder / "artifacts" / ADAPTER)
    sign(folder)
    return folder


@pytest.fixture
def new(old: Path) -> Path:
    """A record equal to the old one."""
    return Path(shutil.copytree(old, old.parent / "new"))


def put(folder: Path, name: str, value: object) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    write_json(folder / name, value)


def sign(folder: Path) -> None:
    """Digests of the artifacts, as `record` writes them."""
    names = (ADAPTER, MANIFEST, METRICS)
    put(folder, "sha256.json", {name: digest(folder / "artifacts" / name) for name in names})


def edit(folder: Path, name: str, change: Callable[[Any], object]) -> None:
    path = folder / name
    value = json.loads(path.read_text())
    change(value)
    write_json(path, value)


def flip(path: Path) -> None:
    """Change one bit of the last byte."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_equal_records_have_no_difference(old: Path, new: Path) -> None:
    assert list(compare(old, new, RULES)) == []


def test_one_bit_of_an_adapter_is_reported_with_its_tensor(old: Path, new: Path) -> None:
    path = new / "artifacts" / ADAPTER
    flip(path)
    sign(new)
    (line,) = compare(old, new, RULES)
    at = path.stat().st_size - 1
    assert line == f"file {ADAPTER}: differs at byte {at} of {at + 1}, in tensor second"


def test_an_artifact_that_is_not_what_was_recorded_is_reported(old: Path, new: Path) -> None:
    flip(new / "artifacts" / ADAPTER)
    lines = list(compare(old, new, RULES))
    assert lines[0] == (
        f"file {ADAPTER}: {new / 'artifacts' / ADAPTER} is not what its record's sha256.json says"
    )


CHANGES: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "a value": (
        "json/train-dense.json", lambda v: v.update(steps=3), "json train-dense: steps: 2 -> 3"
    ),
    "a key": (
        "json/plan-moe.json", lambda v: v["plans"][0].update(fit=v["plans"][0].pop("fits")),
        "json plan-moe: plans[0].fit: key is new: true",
    ),
    "a type": (
        "json/train-dense.json", lambda v: v.update(steps=2.0),
        "json train-dense: steps: 2 (int) -> 2.0 (float)",
    ),
    "the type of an excused value": (
        "json/setting-range.json", lambda v: v["error"].update(fix="take 1"),
        'json setting-range: error.fix: "<null>" -> "<str>"',
    ),
    "an error code": (
        "json/setting-range.json", lambda v: v["error"].update(code="QC-CONFIG-002"),
        'json setting-range: error.code: "QC-CONFIG-003" -> "QC-CONFIG-002"',
    ),
    "the backend of an op": (
        "json/plan-moe.json", lambda v: v["plans"][0]["backends"].update(norm="reference"),
        'json plan-moe: plans[0].backends[1]: "triton" -> "reference"',
    ),
    "an exit status": (
        "status.json", lambda v: v.update({"setting-range": 65}),
        "exit status setting-range: 2 -> 65",
    ),
    "a case": (
        "status.json", lambda v: v.update({"extra": 0}), "exit status extra: key is new: 0"
    ),
    "an error without --json": (
        "plain.json", lambda v: v["setting-range"].update(codes=[]),
        "without --json setting-range.codes: 1 -> 0 entries",
    ),
    "an option": (
        "options.json", lambda v: v["train"]["options"].remove("--model"),
        "--help train.options: 2 -> 1 entries",
    ),
    "the version of torch": (
        "record.json", lambda v: v["packages"].update(torch="2.1"),
        'record packages torch: "2.0" -> "2.1"',
    ),
    "a value of a manifest": (
        f"artifacts/{MANIFEST}", lambda v: v["meta"].update(seed=2),
        f"file {MANIFEST}: meta.seed: 1 -> 2",
    ),
    "a loss": (
        f"artifacts/{METRICS}", lambda v: v.update(loss=1.25),
        f"file {METRICS}: [0].loss: 1.5 -> 1.25",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_difference_is_reported(old: Path, new: Path, name: str) -> None:
    file, change, line = CHANGES[name]
    edit(new, file, change)
    if file.endswith(".jsonl"):
        (new / file).write_text(json.dumps(json.loads((new / file).read_text())) + "\n")
    sign(new)
    assert line in list(compare(old, new, RULES))


def test_files_that_are_missing_or_new_are_reported(old: Path, new: Path) -> None:
    (new / "json" / "plan-moe.json").rename(new / "json" / "plan-ai.json")
    (new / "artifacts" / METRICS).unlink()
    assert list(compare(old, new, RULES)) == [
        "json plan-ai: new",
        "json plan-moe: missing",
        f"file {METRICS}: missing",
    ]


EXCUSED: dict[str, tuple[str, Callable[[Any], object]]] = {
    "a sentence": (
        "json/setting-range.json", lambda v: v["error"].update(message="must be at most 1")
    ),
    "names of ops as keys": (
        "json/plan-moe.json",
        lambda v: v["plans"][0].update(backends={"x.loss": "fused", "y.norm": "triton"}),
    ),
    "names of ops as values, and their order": (
        "json/doctor-kernels.json",
        lambda v: v.update(kernels=[{"op": "x", "state": "bad"}, {"op": "y", "state": "ok"}]),
    ),
    "a timing": (
        "json/train-dense.json", lambda v: v["measured"].update(tokens_per_second=9.0)
    ),
    "a date": (f"artifacts/{MANIFEST}", lambda v: v.update(created="tuesday")),
}  # fmt: skip


@pytest.mark.parametrize("name", EXCUSED)
def test_what_is_excused_is_no_difference(old: Path, new: Path, name: str) -> None:
    file, change = EXCUSED[name]
    edit(new, file, change)
    sign(new)
    assert list(compare(old, new, RULES)) == []


def test_rules_with_an_unknown_reason_are_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "rules.json", {"taste": {"*": ["error.code"]}})
    with pytest.raises(ValueError, match="unknown reason taste"):
        Rules.load(tmp_path / "rules.json")


def test_a_shape_has_keys_and_types_of_all_entries() -> None:
    value = {
        "a": [{"x": 1, "y": None}, {"x": 2.5}],
        "b": [],
        "c": [1, "text", [True], [None]],
        "d": [{"e": {"f": 1}}, {"e": {"g": 2}}],
    }
    assert shape_of(value) == {
        "a": [{"x": "float|int", "y?": "null"}],
        "b": [],
        "c": ["int|str", ["bool|null"]],
        "d": [{"e": {"f?": "int", "g?": "int"}}],
    }
