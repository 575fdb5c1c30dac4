"""A folder that was published, carded, cached and downloaded again verifies, merges, generates."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.cli_kit import apart
from support.e2e_kit import write_stock
from support.hub_server import HubServer

from qcore.config.settings import Settings
from qcore.errors import InputError
from qcore.inference.generate import Generator
from qcore.io.artifact import read_manifest, verify
from qcore.merging.merge import merge
from qcore.training.train import train

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    """A folder with a base, an adapter and what it merges to."""
    folder = tmp_path_factory.mktemp("round")
    write_stock(folder / "base", "vl")
    settings = Settings(
        max_steps=2, r=4, quantization="none", dtype="fp32", save_steps=1, learning_rate=1e-2,
        per_device_train_batch_size=2, gradient_accumulation_steps=1, gradient_checkpointing=False,
    )  # fmt: skip
    train(str(folder / "base"), rows, folder / "ada", settings, device="cpu")
    merge(str(folder / "base"), folder / "ada", folder / "merged")
    return folder


def carded(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n# Ada\n")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / ".cache" / "huggingface").mkdir(parents=True)


def renamed(folder: Path) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": "org/base"}
    path.write_text(json.dumps(config))


def cached(folder: Path) -> None:
    """The folder becomes a snapshot of the hub's cache."""
    blobs = folder.parent / "models--org--ada" / "blobs"
    snapshot = folder.parent / "models--org--ada" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    folder.rename(blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    folder.symlink_to(snapshot)


def bare(folder: Path) -> None:
    """The two files and the manifest are all that was uploaded."""
    for path in folder.iterdir():
        if path.name not in (WEIGHTS, "adapter_config.json", "MANIFEST.json"):
            path.unlink()


@pytest.mark.parametrize("change", [carded, renamed, cached, bare])
def test_what_happens_to_folders(
    home: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    adapter = shutil.copytree(home / "ada", tmp_path / "ada")
    change(adapter)
    report = verify(adapter)
    assert report.ok, report.problems
    merged = merge(str(home / "base"), adapter, tmp_path / "out", prove=False)
    same = "model.safetensors"
    assert (tmp_path / "out" / same).read_bytes() == (home / "merged" / same).read_bytes()
    edited = [line for line in merged.warnings if "base_model_name_or_path was edited" in line]
    assert len(edited) == (change is renamed)
    assert read_manifest(tmp_path / "out").meta["merged"][0]["adapter"] == str(adapter)


def test_an_edit_that_acts_is_refused_by_field(home: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(home / "ada", tmp_path / "ada")
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    with pytest.raises(InputError) as caught:
        merge(str(home / "base"), adapter, tmp_path / "out")
    error = caught.value
    assert (error.code, error.exit_code, error.field) == ("QC-ADAPTER-008", 65, "lora_alpha")
    assert int(str(error.found)) == 2 * int(str(error.expected)) == 2 * config["lora_alpha"]
    assert error.file == str(path)
    with pytest.raises(InputError, match="lora_alpha"):
        Generator(str(home / "base"), adapter=adapter, device="cpu")


@pytest.mark.parametrize("change", [carded, cached])
def test_a_merged_folder_too(home: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    merged = shutil.copytree(home / "merged", tmp_path / "merged")
    change(merged)
    report = verify(merged)
    assert report.ok, report.problems
    generator = Generator(str(merged), device="cpu", dtype="fp32")
    assert generator.prompt("hi", max_new_tokens=2).tokens >= 1


@pytest.mark.slow
def test_from_the_hub(home: Path, hub: HubServer, tmp_path: Path) -> None:
    """Every verb that takes an adapter, by hub id, revision and folder."""
    published = shutil.copytree(home / "ada", tmp_path / "ada")
    carded(published)
    shutil.copytree(home / "ada.run" / "checkpoint-1", published / "checkpoint-1")
    commit = hub.add("org/ada", published, refs=("main", "v1"))
    hub.add("org/ada", {"README.md": b"nothing here yet"})
    base, env = home / "base", hub.env(tmp_path / "home")

    def run(*arguments: object) -> str:
        done = apart(*arguments, env=env, cwd=tmp_path)
        assert done.code == 0, done.err
        return done.out

    assert "as the manifest says" in run("verify", "org/ada@v1")
    assert "checkpoint" in run("verify", "org/ada/checkpoint-1@v1")
    run("merge", "--model", base, "--adapter", "org/ada@v1", "--output", "out")
    same = "model.safetensors"
    assert (tmp_path / "out" / same).read_bytes() == (home / "merged" / same).read_bytes()
    (entry,) = read_manifest(tmp_path / "out").meta["merged"]
    assert (entry["adapter"], entry["revision"]) == ("org/ada@v1", commit)
    greedy = ("--prompt", "hi", "--max-new-tokens", 4, "--temperature", 0, "--device", "cpu")
    mine = run("generate", base, "--adapter", "org/ada@v1", *greedy)
    assert mine == run("generate", base, "--adapter", home / "ada", *greedy)
    run("merge", "--model", base, "--adapter", "org/ada/checkpoint-1@v1", "--output", "first")

    hub.add("org/merged", tmp_path / "out")
    assert "as the manifest says" in run("verify", "org/merged")
    assert run("generate", "org/merged", *greedy)
    again = ("merge", "--model", "org/merged", "--adapter", home / "ada", "--output", "twice")
    refused = apart(*again, env=env, cwd=tmp_path)
    assert (refused.code, "QC-MERGE-002" in refused.err) == (65, True), refused.err


@pytest.mark.slow
def test_a_base_and_an_adapter_of_the_hub(
    home: Path, rows: Path, hub: HubServer, tmp_path: Path
) -> None:
    """The adapter of a base on the hub names the id and the commit; training goes on from it."""
    commit = hub.add("org/base", home / "base", refs=("main", "v2"))
    hub.add("org/ada", home / "ada")
    steps = ("--set", "max_steps=1", "--device", "cpu", "--set", "gradient_accumulation_steps=1")
    train_on = ("train", "--model", "org/base@v2", "--data", rows, "--output", "next", *steps)
    done = apart(*train_on, "--adapter", "org/ada", env=hub.env(tmp_path / "home"), cwd=tmp_path)
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "next" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", commit)
    card = (tmp_path / "next" / "README.md").read_text()
    assert card.startswith("---\nbase_model: org/base\n")
    assert re.search(rf"qcore merge --model org/base@{commit} ", card)
    initial = read_manifest(tmp_path / "next").meta["init_adapter"]
    assert initial["source"] == "org/ada"
