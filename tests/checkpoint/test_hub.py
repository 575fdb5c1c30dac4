"""Models by hub id: the real client, in a process of its own, against a hub on loopback."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from support.hub_server import Client, HubServer

from qcore.checkpoint.hub import resolve_model
from qcore.errors import InputError

# The transcript of the child: one JSON line, and nothing else on either stream.
CODE = """
import json, sys
from qcore.errors import QcoreError
from qcore.checkpoint.hub import resolve_model
try:
    found = resolve_model(sys.argv[1])
    out = {"path": str(found.path), "source": found.source, "revision": found.revision}
except QcoreError as error:
    out = error.as_json() | {"exit": error.exit_code}
out["heavy"] = sorted({"torch", "transformers"} & set(sys.modules))
print(json.dumps(out))
"""

SHARDS = {f"model-0000{n}-of-00003.safetensors": bytes([n]) * 3000 for n in (1, 2, 3)}
MODEL = {
    "config.json": b'{"model_type": "tiny"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "vocab.json": b"{}",
    "merges.txt": b"",
    "special_tokens_map.json": b"{}",
    "added_tokens.json": b"{}",
    "chat_template.jinja": b"x",
    "chat_template.json": b"{}",
    "preprocessor_config.json": b"{}",
    "video_preprocessor_config.json": b"{}",
    "processor_config.json": b"{}",
    "model.safetensors.index.json": b"{}",
    "MANIFEST.json": b"{}",
    **SHARDS,
}
NEVER = {
    "pytorch_model.bin": b"pickle",
    "pytorch_model.bin.index.json": b"{}",
    "training_args.bin": b"pickle",
    "optimizer.pt": b"pickle",
    "model.gguf": b"gguf",
    "modeling_tiny.py": b"raise SystemExit",
    "README.md": b"card",
    ".gitattributes": b"",
    "original/model.safetensors": b"nested",
    "onnx/config.json": b"{}",
}


@pytest.fixture
def ask(hub: HubServer, tmp_path: Path) -> Client:
    (tmp_path / "home").mkdir()
    return Client(hub, tmp_path / "home", CODE)


def test_a_sharded_model_without_what_is_not_needed(ask: Client) -> None:
    commit = ask.hub.add("org/tiny", MODEL | NEVER)
    found = ask("org/tiny")
    assert (found["source"], found["revision"]) == ("org/tiny", commit)
    folder = Path(str(found["path"]))
    got = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert got == MODEL
    for name in NEVER:
        assert not [path for path in ask.hub.asked(part=name) if path.endswith(f"/{name}")]
    assert folder.is_relative_to(ask.home), "the cache is the client's own"


def test_the_second_run_fetches_no_file(ask: Client) -> None:
    ask.hub.add("org/tiny", MODEL)
    first = ask("org/tiny")
    assert ask.hub.asked("GET", "/resolve/")
    assert ask("org/tiny") == first
    assert ask.hub.asked(part="/resolve/") == []
    assert ask.hub.asked(part="/lfs/") == []


def test_a_new_commit_is_seen_and_only_its_files_are_fetched(ask: Client) -> None:
    ask.hub.add("org/tiny", MODEL)
    ask("org/tiny")
    commit = ask.hub.add("org/tiny", MODEL | {"config.json": b'{"new": 1}'})
    found = ask("org/tiny")
    assert found["revision"] == commit
    assert [p.rpartition("/")[2] for p in ask.hub.asked("GET", "/resolve/")] == ["config.json"]
    assert ask.hub.asked(part="/lfs/") == []


def test_revisions(ask: Client) -> None:
    old = ask.hub.add("org/tiny", MODEL, refs=("v1", "refs/pr/1"))
    new = ask.hub.add("org/tiny", MODEL | {"config.json": b"{}"})
    assert ask("org/tiny")["revision"] == new
    for name in ("v1", "refs/pr/1", old):
        found = ask(f"org/tiny@{name}")
        assert (found["revision"], found["source"]) == (old, f"org/tiny@{name}")
    assert Path(str(found["path"]), "config.json").read_bytes() == MODEL["config.json"]
    error = ask("org/tiny@v9")
    assert (error["code"], error["exit"]) == ("QC-HUB-005", 65)
    assert "not this revision" in str(error["message"])


def test_a_cached_commit_asks_nothing(ask: Client) -> None:
    commit = ask.hub.add("org/tiny", MODEL)
    ask("org/tiny")
    assert ask(f"org/tiny@{commit}")["revision"] == commit
    assert ask.hub.requests == []


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline(ask: Client, variable: str) -> None:
    ask.hub.add("org/tiny", MODEL)
    error = ask("org/tiny", **{variable: "1"})
    assert (error["code"], error["exit"]) == ("QC-HUB-006", 65)
    assert "cache" in str(error["message"])
    assert "\n" not in str(error["message"])
    first = ask("org/tiny")
    assert ask("org/tiny", **{variable: "1"}) == first
    assert ask.hub.requests == []


def test_offline_with_a_part_in_the_cache(ask: Client) -> None:
    ask.hub.add("org/tiny", MODEL)
    folder = Path(str(ask("org/tiny")["path"]))
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert ask("org/tiny", HF_HUB_OFFLINE="1")["code"] == "QC-HUB-006"


def test_no_network(ask: Client) -> None:
    ask.hub.add("org/tiny", MODEL)
    first = ask("org/tiny")
    ask.hub.close()
    assert ask("org/tiny") == first, "the cache serves"
    error = ask("org/other")
    assert (error["code"], error["exit"]) == ("QC-HUB-007", 65)
    assert ask.hub.url in str(error["message"])
    assert "\n" not in str(error["message"])


def test_a_hub_in_trouble(ask: Client) -> None:
    ask.hub.fail_with = 500
    error = ask("org/tiny")
    assert error["code"] == "QC-HUB-008"
    assert "status 500" in str(error["message"])


def test_a_cut_download_goes_on_where_it_was(ask: Client) -> None:
    data = bytes(range(250)) * 100_000  # the client keeps whole chunks of 10 MiB
    ask.hub.add("org/tiny", {"config.json": b"{}", "model.safetensors": data})
    ask.hub.cut_next = True
    folder = Path(str(ask("org/tiny")["path"]))
    assert (folder / "model.safetensors").read_bytes() == data
    ranges = [r.headers.get("range") for r in ask.hub.requests if r.path.startswith("/lfs/")]
    assert ranges == [None, f"bytes={10 << 20}-"]


def test_a_bar_on_a_terminal(ask: Client) -> None:
    ask.hub.add("org/tiny", MODEL)
    screen, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with os.fdopen(screen, "rb", buffering=0) as shown:
        subprocess.run(
            [sys.executable, "-c", CODE, "org/tiny"],
            env=ask.hub.env(ask.home),
            stdout=subprocess.DEVNULL,
            stderr=terminal,
            timeout=60,
            check=True,
        )
        os.close(terminal)
        assert b"100%" in shown.read(65536)


def test_the_token(ask: Client) -> None:
    ask.hub.add("org/secret", MODEL, token="hf_right")
    error = ask("org/secret")
    assert (error["code"], error["exit"]) == ("QC-HUB-003", 65)
    assert "HF_TOKEN" in str(error["fix"])
    assert ask.hub.requests
    assert not any("authorization" in r.headers for r in ask.hub.requests)
    assert "path" in ask("org/secret", HF_TOKEN="hf_right")
    at_hub = [r for r in ask.hub.requests if not r.path.startswith("/lfs/")]
    assert {r.headers.get("authorization") for r in at_hub} == {"Bearer hf_right"}
    at_storage = [r for r in ask.hub.requests if r.path.startswith("/lfs/")]
    assert len(at_storage) == 3
    assert not any("authorization" in r.headers for r in at_storage), "the token stays at the hub"


def test_a_gated_model(ask: Client) -> None:
    ask.hub.add("org/gated", MODEL, token="hf_right", gated=True)
    for env in ({}, {"HF_TOKEN": "hf_wrong"}):
        error = ask("org/gated", **env)
        assert (error["code"], error["exit"]) == ("QC-HUB-004", 77)
        assert f"{ask.hub.url}/org/gated" in str(error["fix"])
    assert "path" in ask("org/gated", HF_TOKEN="hf_right")


def test_no_such_model(ask: Client) -> None:
    error = ask("org/nope")
    assert (error["code"], error["exit"], error["file"]) == ("QC-HUB-003", 65, "org/nope")
    (ask.home.parent / "runs" / "tiny").mkdir(parents=True)
    error = ask("runs/tinny")
    assert error["fix"] == "did you mean runs/tiny?"


def test_a_repository_without_a_model(ask: Client) -> None:
    ask.hub.add("org/card", {"README.md": b"x"})
    assert ask("org/card")["code"] == "QC-HUB-009"


def test_a_cache_that_cannot_be_written(ask: Client) -> None:
    ask.hub.add("org/tiny", MODEL)
    (ask.home / "hub").write_text("in the way")
    error = ask("org/tiny")
    assert error["exit"] == 73
    assert str(ask.home / "hub") in str(error["message"])


# What needs no hub.


def test_a_folder_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = resolve_model(str(tmp_path))
    assert (found.path, found.source, found.revision) == (tmp_path, str(tmp_path), None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny@v1").mkdir(parents=True)
    assert resolve_model("org/tiny@v1").revision is None, "a folder of that name wins"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/org").path == tmp_path / "org"


@pytest.mark.parametrize(
    ("model", "code", "fix"),
    [
        ("./modles/tiny", "001", "did you mean models/tiny?"),
        ("models/tiny/deep", "001", None),
        ("modles", "001", "did you mean models?"),
        ("models/tiny/", "", None),
        ("models/file.safetensors", "002", "name a model folder or a hub id"),
        ("https://hub.example/org/tiny", "001", "did you mean org/tiny?"),
        ("org/tiny@", "001", None),
        ("org/tiny@../../x", "001", None),
        ("org/ti ny", "001", None),
        ("org/tiny@a b", "001", None),
        ("", "", None),
        ("gpt", "001", None),
        ("a/b/c/d", "001", None),
        ("\0", "001", None),
    ],
)
def test_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, code: str, fix: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "file.safetensors").write_bytes(b"")
    if not code:
        assert resolve_model(model).path.is_dir()
        return
    with pytest.raises(InputError) as caught:
        resolve_model(model)
    assert caught.value.code == f"QC-HUB-{code}"
    assert "\n" not in caught.value.message
    if fix is not None:
        assert caught.value.fix == fix
