"""Where an adapter is: a folder or a hub id; each wrong place is named, with one that is right."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.hub_server import Client, HubServer

from qcore.adapter.locate import locate_adapter
from qcore.errors import InputError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TENSORS = {f"layers.{n}.lora_{x}.weight": torch.full((2, 3), n) for n in range(3) for x in "AB"}


def adapter(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text("{}")
    save_file(TENSORS, folder / WEIGHTS)
    return folder


def refused(place: Path | str) -> InputError:
    with pytest.raises(InputError) as caught:
        locate_adapter(place)
    error = caught.value
    assert error.exit_code == 65
    assert "\n" not in str(error)
    return error


def test_a_folder_is_itself(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "org" / "ada")
    found = locate_adapter(folder)
    assert (found.path, found.source, found.revision) == (folder, str(folder), None)


# -- subfolders


def multi(folder: Path) -> list[Path]:
    return [adapter(folder / "sft")]


def checkpoints(folder: Path) -> list[Path]:
    places = [adapter(folder / f"checkpoint-{n}") for n in (500, 1000, 90)]
    return [places[1], places[0], places[2]]


def deep(folder: Path) -> list[Path]:
    return [adapter(folder / "runs" / "a" / "final")]


def run_folder(folder: Path) -> list[Path]:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("")
    return checkpoints(folder)


@pytest.mark.parametrize("make", [multi, checkpoints, deep, run_folder])
def test_the_folder_above_it(tmp_path: Path, make: Callable[[Path], list[Path]]) -> None:
    folder = tmp_path / "outer"
    places = make(folder)
    error = refused(folder)
    assert error.code == "QC-ADAPTER-003"
    assert (error.fix or "").startswith(f"did you mean {places[0]}")
    assert all(str(place) in (error.fix or "") for place in places)


def test_a_run_folder_is_named_and_so_is_what_it_published(tmp_path: Path) -> None:
    newest = run_folder(tmp_path / "ada.run")[0]
    error = refused(tmp_path / "ada.run")
    assert "is the run folder of a training" in error.message
    assert (error.fix or "").startswith(f"did you mean {newest}")
    adapter(tmp_path / "ada")
    error = refused(tmp_path / "ada.run")
    assert (error.fix or "").startswith(f"did you mean {tmp_path / 'ada'}, {newest} or ")


# -- other wrong places


def test_a_file_and_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = adapter(tmp_path / "ada")
    error = refused(folder / WEIGHTS)
    assert "is a file" in error.message
    assert error.fix == f"name the folder: {folder}"
    (tmp_path / "alone").touch()
    assert refused(tmp_path / "alone").fix == "name the folder that training wrote"
    for place in (tmp_path / "not-there", "not-there", "/no/such/place", "./org/ada"):
        error = refused(place)
        assert (error.code, error.message.partition(": ")[2][:14]) == (
            "QC-ADAPTER-003", "no such folder",
        )  # fmt: skip
    assert refused(tmp_path / "adda").fix == f"did you mean {folder}?"
    monkeypatch.chdir(tmp_path)
    adapter(tmp_path / "runs" / "one" / "ada")
    assert refused("runs/one/adda").fix == "did you mean runs/one/ada?"
    assert refused("https://host/org/ada").fix == "did you mean org/ada?"


def test_dangling_links(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "ada")
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("../../blobs/0123")
    error = refused(folder)
    assert error.code == "QC-CKPT-006"
    assert "is a link to ../../blobs/0123, which does not exist" in error.message
    (tmp_path / "last").symlink_to("gone")
    assert "is a link to gone, which does not exist" in refused(tmp_path / "last").message


def without_config(folder: Path) -> None:
    (folder / CONFIG).unlink()


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def of_mlx(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapters.safetensors")


def a_model(folder: Path) -> None:
    (folder / CONFIG).rename(folder / "config.json")
    (folder / WEIGHTS).rename(folder / "model.safetensors")


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_config, f"has no {CONFIG}"),
        (without_weights, f"has no {WEIGHTS}"),
        (of_mlx, "is an adapter of MLX"),
        (a_model, "is a model, not an adapter"),
        (emptied, "is empty"),
    ],
)
def test_what_a_folder_is_or_lacks(
    tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    folder = adapter(tmp_path / "ada")
    change(folder)
    error = refused(folder)
    assert error.code == "QC-ADAPTER-003"
    assert words in error.message


def obeyed(fix: str | None, words: str) -> None:
    """Run the command of a fix."""
    match = re.fullmatch(rf"{words}: (python -c .*)", fix or "")
    assert match is not None, fix
    command = shlex.split(match[1])
    subprocess.run([sys.executable, *command[1:]], check=True, timeout=120)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "ada")
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert locate_adapter(folder).path == folder, "safetensors come first"
    (folder / WEIGHTS).unlink()
    error = refused(folder)
    assert error.code == "QC-CKPT-007"
    assert (error.fix or "").startswith("convert it: python -c ")


@pytest.mark.slow
def test_the_conversion_of_a_pickle_works(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "ada's")
    torch.save(TENSORS, folder / "adapter_model.bin")
    assert locate_adapter(folder).path == folder, "safetensors come first"
    (folder / WEIGHTS).unlink()
    error = refused(folder)
    assert (error.code, error.exit_code) == ("QC-CKPT-007", 65)
    assert "holds a pickle, which qcore never opens" in error.message
    obeyed(error.fix, "convert it")
    assert locate_adapter(folder).path == folder
    converted = load_file(folder / WEIGHTS)
    assert all(torch.equal(converted[name], value) for name, value in TENSORS.items())


# -- hub ids

CODE = """
import json, sys
from qcore.errors import QcoreError
from qcore.adapter.locate import locate_adapter
try:
    found = locate_adapter(sys.argv[1])
    out = {"path": str(found.path), "source": found.source, "revision": found.revision}
except QcoreError as error:
    out = error.as_json() | {"exit": error.exit_code}
out["heavy"] = sorted({"torch", "transformers"} & set(sys.modules))
print(json.dumps(out))
"""
FILES = {
    CONFIG: b"{}", WEIGHTS: b"weights", "MANIFEST.json": b"{}", "tokenizer.json": b"{}",
    "chat_template.jinja": b"x",
}  # fmt: skip
NEVER = {
    "README.md": b"card", ".gitattributes": b"", "adapter_model.bin": b"pickle",
    "model.safetensors": b"base", "training_args.bin": b"pickle", "optimizer.safetensors": b"o",
}  # fmt: skip


def below(folder: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": data for name, data in files.items()}


@pytest.fixture
def ask(hub: HubServer, tmp_path: Path) -> Client:
    (tmp_path / "home").mkdir()
    return Client(hub, tmp_path / "home", CODE)


def content(answer: Mapping[str, object]) -> dict[str, bytes]:
    folder = Path(str(answer["path"]))
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_adapter_on_the_hub(ask: Client) -> None:
    commit = ask.hub.add("org/ada", FILES | NEVER | below("checkpoint-9", FILES))
    found = ask("org/ada")
    assert (found["source"], found["revision"]) == ("org/ada", commit)
    assert content(found) == FILES
    assert ask("org/ada") == found
    assert ask.hub.asked(part="/lfs/") == [], "it is cached"
    assert ask("org/ada", HF_HUB_OFFLINE="1") == found


@pytest.mark.parametrize(
    "folder", ["checkpoint-1000", pytest.param("runs/last [1]", marks=pytest.mark.slow)]
)
def test_a_folder_and_a_revision(ask: Client, folder: str) -> None:
    old = ask.hub.add("org/ada", below(folder, FILES | NEVER), refs=("v1", "refs/pr/1"))
    ask.hub.add("org/ada", below(folder, FILES | {CONFIG: b'{"r": 2}'}) | FILES)
    for revision in ("v1", old, "refs/pr/1"):
        found = ask(f"org/ada/{folder}@{revision}")
        assert found["revision"] == old, found
        assert str(found["path"]).endswith(f"/snapshots/{old}/{folder}")
        assert content(found) == FILES
    assert content(ask(f"org/ada/{folder}"))[CONFIG] == b'{"r": 2}'


@pytest.mark.parametrize(
    ("files", "source", "words", "fix"),
    [
        (below("checkpoint-9", FILES) | below("checkpoint-10", FILES), "org/ada", "has no",
         "did you mean org/ada/checkpoint-10 or org/ada/checkpoint-9?"),
        (below("sft", FILES), "org/ada@main", "has no", "did you mean org/ada/sft@main?"),
        (below("sft", FILES) | FILES, "org/ada/stf", "org/ada has no folder stf",
         "did you mean org/ada or org/ada/sft?"),
        ({"config.json": b"{}", "model.safetensors": b""}, "org/ada", "is a model", "--model"),
        ({CONFIG: b"{}", "adapter_model.bin": b""}, "org/ada", "holds a pickle",
         "hf download org/ada --local-dir FOLDER, then convert it: python -c"),
        ({CONFIG: b"{}"}, "org/ada", f"has no {WEIGHTS}", ""),
    ],
)  # fmt: skip
def test_what_a_repository_lacks(
    ask: Client, files: dict[str, bytes], source: str, words: str, fix: str
) -> None:
    ask.hub.add("org/ada", files)
    error = ask(source)
    assert error["exit"] == 65
    assert words in str(error["message"])
    assert fix in str(error["fix"])
    fetched = ask.hub.asked("GET", "/resolve/")
    assert not [path for path in fetched if path.endswith((".bin", "/model.safetensors"))]


@pytest.mark.parametrize(
    ("source", "code", "fix"),
    [
        ("org/none", "QC-HUB-003", "check the name"),
        ("org/ada@v9", "QC-HUB-005", "name a branch"),
        ("org/ada@v1/checkpoint-5", "QC-HUB-005", "ORG/NAME/FOLDER@REVISION"),
        ("org/ada/../other", "QC-ADAPTER-003", ""),
        ("org/ada@", "QC-ADAPTER-003", ""),
    ],
)
def test_an_id_that_leads_nowhere(ask: Client, source: str, code: str, fix: str) -> None:
    ask.hub.add("org/ada", FILES)
    error = ask(source)
    assert (error["code"], error["exit"]) == (code, 65)
    assert fix in str(error["fix"])


def test_the_hub_is_not_reached(ask: Client) -> None:
    ask.hub.close()
    error = ask("org/ada", HF_HUB_DOWNLOAD_TIMEOUT="1", HF_HUB_ETAG_TIMEOUT="1")
    assert (error["code"], error["exit"]) == ("QC-HUB-007", 65)
    assert ask("org/ada", HF_HUB_OFFLINE="1")["code"] == "QC-HUB-006"
