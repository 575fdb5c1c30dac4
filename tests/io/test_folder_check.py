"""Which changes of a folder are problems: those of the files that act, and no others."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcore.io.artifact import MANIFEST, publish, verify
from qcore.io.safe_path import cache_blobs, stored_file

CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "base_model_name_or_path": "/home/me/base", "r": 4, "lora_alpha": 12,
    "use_dora": False, "target_modules": ["model.q_proj", "model.k_proj"],
}  # fmt: skip
EDITABLE = ("base_model_name_or_path", "task_type")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    with publish(tmp_path / "ada") as out:
        out.write_json("adapter_config.json", CONFIG, editable=EDITABLE)
        out.write_bytes("adapter_model.safetensors", bytes(300))
        out.write_text("README.md", "# card\n")
        out.write_text("metrics.jsonl", "{}\n")
        out.write_text("tokenizer.json", "{}\n")
    return tmp_path / "ada"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    with publish(tmp_path / "merged", kind="model") as out:
        for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
            out.write_text(name, "{}\n")
        out.write_bytes("model.safetensors", bytes(300))
        out.write_text("README.md", "# base\n")
        out.write_text("LICENSE", "words\n")
    return tmp_path / "merged"


def cached(folder: Path, below: str = "") -> Path:
    """The folder as it lies in the hub's cache."""
    entry = folder.parent / "cache" / "models--org--it"
    snapshot = entry / "snapshots" / "abc" / below
    snapshot.mkdir(parents=True)
    (entry / "blobs").mkdir()
    for n, path in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(path, entry / "blobs" / f"{n:040x}")
        up = "../" * (2 + bool(below))
        (snapshot / path.name).symlink_to(f"{up}blobs/{n:040x}")
    return snapshot


def edited(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def carded(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Ada\n")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")


def downloaded(folder: Path) -> None:
    """What `hf download --local-dir` leaves."""
    cache = folder / ".cache" / "huggingface" / "download"
    cache.mkdir(parents=True)
    (cache / "adapter_config.json.metadata").write_text("abc\n")


def cloned(folder: Path) -> None:
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main\n")


HARMLESS: dict[str, Callable[[Path], object]] = {
    "card": carded,
    "download": downloaded,
    "clone": cloned,
    "finder": lambda folder: (folder / ".DS_Store").write_bytes(b"\0"),
    "no card": lambda folder: (folder / "README.md").unlink(),
    "folder": lambda folder: (folder / "eval").mkdir(),
    "dangling link": lambda folder: (folder / "last").symlink_to("nowhere"),
    "pipe": lambda folder: os.mkfifo(folder / "pipe"),
}


@pytest.mark.parametrize("change", HARMLESS)
@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_what_does_not_act_is_a_note(
    request: pytest.FixtureRequest, kind: str, change: str
) -> None:
    folder: Path = request.getfixturevalue(kind)
    HARMLESS[change](folder)
    report = verify(folder)
    assert report.ok, report.problems
    assert report.notes


def test_two_files_of_an_adapter_are_enough(adapter: Path) -> None:
    for name in ("README.md", "metrics.jsonl", "tokenizer.json"):
        (adapter / name).unlink()
    assert verify(adapter).ok


@pytest.mark.parametrize("below", ["", "checkpoint-4"])
def test_links_of_the_hubs_cache_are_followed(adapter: Path, below: str) -> None:
    snapshot = cached(adapter, below)
    report = verify(snapshot)
    assert (report.ok, report.notes) == (True, [])
    blob = (snapshot / "adapter_model.safetensors").resolve()
    blob.write_bytes(bytes(299) + b"x")
    assert verify(snapshot).problems == ["adapter_model.safetensors: content differs (sha256)"]
    blob.unlink()
    (problem,) = verify(snapshot).problems
    assert problem.startswith("adapter_model.safetensors: a link to ../")
    assert problem.endswith("which does not exist")


def test_a_link_to_elsewhere_is_a_problem(adapter: Path, tmp_path: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.rename(tmp_path / "away")
    weights.symlink_to(tmp_path / "away")
    assert verify(adapter).problems == [f"{weights.name}: a link that leaves the folder"]


def test_only_blobs_of_the_same_entry_are_stored_files(adapter: Path, tmp_path: Path) -> None:
    snapshot = cached(adapter)
    assert cache_blobs(snapshot) == tmp_path / "cache" / "models--org--it" / "blobs"
    other = tmp_path / "cache" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "x").write_bytes(b"")
    (snapshot / "x").symlink_to(other / "x")
    assert stored_file(snapshot, "x") is None
    assert stored_file(snapshot, "../x") is None
    assert cache_blobs(adapter) is None


# -- adapter_config.json


def test_the_base_may_be_renamed(adapter: Path) -> None:
    edited(adapter, base_model_name_or_path="org/base", task_type="CAUSAL_LM")
    report = verify(adapter)
    assert report.ok, report.problems
    name = "adapter_config.json"
    assert report.notes == [
        f"{name}: base_model_name_or_path was edited to 'org/base', from '/home/me/base'",
        f"{name}: task_type was edited to 'CAUSAL_LM', from absent",
    ]


def test_a_config_that_peft_wrote_again_is_the_same(adapter: Path) -> None:
    """PEFT writes targets in any order and fields that are off; git rewrites line ends."""
    edited(adapter, target_modules=["model.k_proj", "model.q_proj"], megatron_config=None,
           modules_to_save=None, bias="none", layers_to_transform=[])  # fmt: skip
    path = adapter / "adapter_config.json"
    path.write_bytes(path.read_bytes().replace(b", ", b",\r\n"))
    manifest = adapter / MANIFEST
    manifest.write_bytes(manifest.read_bytes().replace(b"\n", b"\r\n"))
    report = verify(adapter)
    assert report.ok, report.problems


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"lora_alpha": 24}, "lora_alpha is 24, expected 12"),
        ({"r": 8}, "r is 8, expected 4"),
        ({"use_dora": True}, "use_dora is True, expected False"),
        ({"use_rslora": True}, "use_rslora is True, expected absent"),
        ({"target_modules": ["model.q_proj"]}, "target_modules is ['model.q_proj'], expected"),
        ({"r": None}, "r is absent, expected 4"),
        ({"lora_alpha": 0}, "lora_alpha is 0, expected 12"),
    ],
)
def test_other_edits_are_refused_by_field(
    adapter: Path, fields: dict[str, Any], problem: str
) -> None:
    edited(adapter, **fields, base_model_name_or_path="org/base")
    report = verify(adapter)
    assert not report.ok
    (line,) = report.problems
    assert line.startswith(f"adapter_config.json: {problem}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [("{", "cannot be read as JSON"), ("[]", "not a JSON object"),
     ('{"r": 4, "r": 4}', "cannot be read as JSON"), ("", "cannot be read as JSON")],
)  # fmt: skip
def test_a_config_that_is_none(adapter: Path, text: str, problem: str) -> None:
    (adapter / "adapter_config.json").write_text(text)
    assert problem in verify(adapter).problems[0]


# -- what acts


def test_weights_act(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(b"x" + bytes(299))
    assert verify(adapter).problems == [f"{path.name}: content differs (sha256)"]
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 300\n")
    assert verify(adapter).problems == [f"{path.name}: a Git LFS pointer; run git lfs pull"]
    path.unlink()
    assert verify(adapter).problems == [f"{path.name}: missing"]


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"]
)
def test_files_of_a_model_act(model: Path, name: str) -> None:
    path = model / name
    path.write_bytes(b"x" * path.stat().st_size)
    assert verify(model).problems == [f"{name}: content differs (sha256)"]
    path.unlink()
    assert verify(model).problems == [f"{name}: missing"]


@pytest.mark.parametrize(
    "name",
    ["model-00002.safetensors", "model.safetensors.index.json", "adapter_config.json",
     "added_tokens.json", "generation_config.json", "preprocessor_config.json"],
)  # fmt: skip
def test_a_new_file_that_loaders_read_is_a_problem(model: Path, name: str) -> None:
    (model / name).write_text("{}")
    assert verify(model).problems == [f"{name}: not in the manifest, and loaders would read it"]
    (model / "original").mkdir()
    (model / name).rename(model / "original" / name)
    assert verify(model).notes == ["original/: not in the manifest"]


def test_a_caller_names_the_files_that_act(adapter: Path) -> None:
    (adapter / "tokenizer.json").write_text("[]")
    assert verify(adapter).ok
    assert not verify(adapter, acting=("tokenizer.json",)).ok
