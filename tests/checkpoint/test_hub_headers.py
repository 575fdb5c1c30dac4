"""A hub id whose weights stay on the hub: headers by range requests, counted byte by byte."""

from __future__ import annotations

import fcntl
import json
import math
import os
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.hub_server import Client, File, HubServer, Sparse
from support.model_kit import small_config, small_shapes

from qcore.testing import write_sparse_checkpoint
from qcore.testing.checkpoints import Shapes, sparse_header

# Prints what each of some models is, one after another, in one line; with WHOLE set, the models
# are downloaded as every verb but inspect does.
CODE = """
import json, os, sys
from qcore.checkpoint.checkpoint import Checkpoint
from qcore.errors import QcoreError
from qcore.checkpoint.hub import resolve_model

def told(model):
    at = resolve_model(model, headers_only="WHOLE" not in os.environ)
    found = Checkpoint.open(at.path, source=at.source, revision=at.revision, remote=at.remote)
    refused = []
    for shard in found.shards:
        try:
            found.file(shard)
        except QcoreError as error:
            refused.append([error.code, error.exit_code, error.message])
    return {
        "path": str(found.path), "revision": found.revision, "shards": found.shards,
        "headers": {h.name: [h.dtype, h.shape, h.file, h.start, h.end]
                    for h in found.headers.values()},
        "sidecars": found.sidecars, "headers_only": found.headers_only, "refused": refused,
    }

answers = []
for model in sys.argv[1].split():
    try:
        answers.append(told(model))
    except QcoreError as error:
        answers.append(error.as_json() | {"exit": error.exit_code})
heavy = sorted({"torch", "transformers"} & set(sys.modules))
print(json.dumps({"answers": answers, "heavy": heavy}))
"""

INDEX = "model.safetensors.index.json"
SMALL: dict[str, File] = {
    "config.json": b'{"model_type": "tiny"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"x",
}
NEVER: dict[str, File] = {
    "pytorch_model.bin": b"pickle",
    "README.md": b"card",
    "original/model.safetensors": b"nested",
}


def weights(shapes: Shapes) -> Sparse:
    """A safetensors file of zeros, of true size."""
    head, data = sparse_header(shapes)
    return Sparse(head, len(head) + data)


def sharded(shards: Mapping[str, Shapes]) -> dict[str, File]:
    """Shards and their index."""
    weight_map = {name: shard for shard, shapes in shards.items() for name in shapes}
    index = json.dumps({"weight_map": weight_map}).encode()
    return {INDEX: index} | {shard: weights(shapes) for shard, shapes in shards.items()}


def names(shards: int) -> list[str]:
    return [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]


BIG: dict[str, Shapes] = {
    shard: {f"layers.{n}.{k}.weight": (16384, 8192) for k in "abcdefgh"}
    for n, shard in enumerate(names(3))
}  # 2 GiB a shard
LONG: Shapes = {f"layers.0.experts.{n}.down_proj.weight": (2048, 512) for n in range(1500)}


def expected(shards: Mapping[str, Shapes]) -> dict[str, list[object]]:
    """Where each tensor lies, from shapes alone: bf16, one after another, up to the file's end."""
    places: dict[str, list[object]] = {}
    for shard, shapes in shards.items():
        at = len(sparse_header(shapes)[0])
        for name, shape in shapes.items():
            end = at + 2 * math.prod(shape)
            places[name] = ["BF16", list(shape), shard, at, end]
            at = end
    return places


@pytest.fixture
def ask(hub: HubServer, tmp_path: Path) -> Client:
    (tmp_path / "home").mkdir()
    return Client(hub, tmp_path / "home", CODE)


def one(ask: Client, model: str, **env: str) -> dict[str, Any]:
    (answer,) = some(ask, model, **env)
    return answer


def some(ask: Client, *models: str, **env: str) -> list[dict[str, Any]]:
    answers: Any = ask(" ".join(models), **env)["answers"]
    return list(answers)


def asked_of_storage(hub: HubServer) -> list[tuple[str, str | None]]:
    found = [r for r in hub.requests if r.path.startswith("/lfs/")]
    return sorted((r.path.rpartition("/")[2], r.headers.get("range")) for r in found)


def cached(home: Path) -> list[Path]:
    return [path for path in home.rglob("*") if path.is_file()]


def test_a_sharded_model_of_six_gib(ask: Client) -> None:
    commit = ask.hub.add("org/big", SMALL | sharded(BIG) | NEVER)
    found = one(ask, "org/big")
    assert found["headers"] == expected(BIG)
    assert (found["revision"], found["shards"]) == (commit, list(BIG))
    assert found["headers_only"]
    assert ask.hub.sent < 2_000_000, "6 GiB lie there"
    assert asked_of_storage(ask.hub) == [(shard, "bytes=0-99999") for shard in BIG]
    assert [path for path in cached(ask.home) if path.name.endswith(".safetensors")] == []
    assert sum(path.stat().st_size for path in cached(ask.home)) < 20_000
    assert found["sidecars"] == sorted(SMALL)


def test_tensors_cannot_be_read(ask: Client) -> None:
    ask.hub.add("org/big", SMALL | sharded(BIG))
    for shard, (code, status, message) in zip(BIG, one(ask, "org/big")["refused"], strict=True):
        assert (code, status) == ("QC-CKPT-009", 65)
        assert message == f"org/big: {shard}: was not downloaded, only its header was read"


def test_few_requests(ask: Client) -> None:
    ask.hub.add("org/big", SMALL | sharded(BIG))
    one(ask, "org/big")
    assert len(ask.hub.asked(part="/api/")) == 3, "commit, tree, sizes"
    assert len(ask.hub.asked("GET", "/resolve/")) == len(SMALL) + 1 + len(BIG)
    one(ask, "org/big")
    assert len(ask.hub.asked(part="/resolve/")) == len(BIG), "small files come from the cache"


def test_a_single_file(ask: Client) -> None:
    ask.hub.add("org/one", SMALL | {"model.safetensors": weights(BIG[names(3)[0]])})
    found = one(ask, "org/one")
    assert found["headers"] == expected({"model.safetensors": BIG[names(3)[0]]})
    assert found["headers_only"]
    assert ask.hub.sent < 1_000_000
    assert asked_of_storage(ask.hub) == [("model.safetensors", "bytes=0-99999")]


def test_a_small_file_is_asked_for_no_more_than_it_has(ask: Client) -> None:
    data = weights({"a": (3,)})
    ask.hub.add("org/one", SMALL | {"model.safetensors": data})
    assert one(ask, "org/one")["headers"] == expected({"model.safetensors": {"a": (3,)}})
    assert asked_of_storage(ask.hub) == [("model.safetensors", f"bytes=0-{len(data) - 1}")]


def test_a_long_header_takes_a_second_request(ask: Client) -> None:
    data = weights(LONG)
    assert len(data.head) > 150_000
    ask.hub.add("org/one", SMALL | {"model.safetensors": data})
    assert one(ask, "org/one")["headers"] == expected({"model.safetensors": LONG})
    ranges = [r for _, r in asked_of_storage(ask.hub)]
    assert ranges == ["bytes=0-99999", f"bytes=100000-{len(data.head) - 1}"]


# The cache


def test_weights_in_the_cache_are_used(ask: Client) -> None:
    shards = {shard: {f"{shard}.w": (4, 4)} for shard in names(2)}
    commit = ask.hub.add("org/tiny", SMALL | sharded(shards))
    whole = one(ask, "org/tiny", WHOLE="1")
    assert not whole["headers_only"]
    assert one(ask, "org/tiny") == whole
    assert asked_of_storage(ask.hub) == []
    assert one(ask, f"org/tiny@{commit}")["headers"] == whole["headers"]
    assert ask.hub.requests == []
    assert one(ask, "org/tiny", HF_HUB_OFFLINE="1") == whole
    ask.hub.close()
    assert one(ask, "org/tiny") == whole


def test_a_part_of_the_weights_in_the_cache(ask: Client) -> None:
    shards = {shard: {f"{shard}.w": (4, 4)} for shard in names(2)}
    ask.hub.add("org/tiny", SMALL | sharded(shards))
    whole = one(ask, "org/tiny", WHOLE="1")
    (Path(whole["path"]) / names(2)[1]).unlink()
    found = one(ask, "org/tiny")
    assert found["headers_only"]
    assert found["headers"] == whole["headers"]
    assert one(ask, "org/tiny", HF_HUB_OFFLINE="1")["code"] == "QC-HUB-006"


def test_headers_first_and_the_weights_later(ask: Client) -> None:
    shards = {shard: {f"{shard}.w": (4, 4)} for shard in names(2)}
    ask.hub.add("org/tiny", SMALL | sharded(shards))
    first = one(ask, "org/tiny")
    assert one(ask, "org/tiny", HF_HUB_OFFLINE="1", WHOLE="1")["code"] == "QC-HUB-006"
    whole = one(ask, "org/tiny", WHOLE="1")
    assert (first["headers_only"], whole["headers_only"]) == (True, False)
    assert first["headers"] == whole["headers"]
    assert [code for code, _, _ in whole["refused"]] == []


@pytest.mark.parametrize("before", ["nothing", "the small files"])
def test_offline(ask: Client, before: str) -> None:
    ask.hub.add("org/big", SMALL | sharded(BIG))
    if before != "nothing":
        one(ask, "org/big")
    error = one(ask, "org/big", HF_HUB_OFFLINE="1")
    assert (error["code"], error["exit"]) == ("QC-HUB-006", 65)
    assert ask.hub.requests == []


def test_no_network_with_the_small_files_in_the_cache(ask: Client) -> None:
    ask.hub.add("org/big", SMALL | sharded(BIG))
    one(ask, "org/big")
    ask.hub.close()
    error = one(ask, "org/big")
    assert (error["code"], error["exit"]) == ("QC-HUB-007", 65)


# Who may, and what is there


def test_gated_missing_and_no_such_revision(ask: Client) -> None:
    ask.hub.add("org/gated", SMALL | sharded(BIG), token="hf_right", gated=True)
    ask.hub.add("org/big", SMALL | sharded(BIG), refs=("v1",))
    found = some(ask, "org/gated", "org/nope", "org/big@v9", "org/big@v1")
    assert [(a.get("code"), a.get("exit")) for a in found] == [
        ("QC-HUB-004", 77), ("QC-HUB-003", 65), ("QC-HUB-005", 65), (None, None),
    ]  # fmt: skip
    assert one(ask, "org/gated", HF_TOKEN="hf_wrong")["code"] == "QC-HUB-004"
    assert one(ask, "org/gated", HF_TOKEN="hf_right")["headers"] == expected(BIG)
    at_hub = [r for r in ask.hub.requests if not r.path.startswith("/lfs/")]
    assert {r.headers.get("authorization") for r in at_hub} == {"Bearer hf_right"}
    at_storage = [r for r in ask.hub.requests if r.path.startswith("/lfs/")]
    assert len(at_storage) == len(BIG)
    assert not any("authorization" in r.headers for r in at_storage), "the token stays at the hub"


def test_repositories_without_weights(ask: Client) -> None:
    ask.hub.add("org/bin", SMALL | {"pytorch_model.bin": b"pickle", "a.safetensors": b""})
    ask.hub.add("org/none", SMALL | {"README.md": b"card"})
    ask.hub.add("org/card", {"README.md": b"card"})
    ask.hub.add("org/bare", {"model.safetensors": weights({"a": (1,)}), "tokenizer.json": b"{}"})
    found = some(ask, "org/bin", "org/none", "org/card", "org/bare")
    codes = ["QC-CKPT-007", "QC-CKPT-004", "QC-HUB-009", "QC-CKPT-001"]
    assert [answer["code"] for answer in found] == codes
    assert found[0]["file"] == "org/bin: pytorch_model.bin"
    assert ask.hub.asked(part="/lfs/") == []


# Index and headers, damage and harm: the same codes as in a folder


def raw(header: object, size: int, *, length: int | None = None) -> Sparse:
    text = json.dumps(header).encode()
    head = struct.pack("<Q", len(text) if length is None else length) + text
    return Sparse(head, size if size > 8 else len(head) + size)


def entry(start: int, end: int, **other: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]} | other


GIB = 2**30
A, B = names(2)
TWO = {A: {"a": (2, 2)}, B: {"b": (2, 2)}}
#: What takes the place of the only weights file, and what is said.
DAMAGED: dict[str, tuple[File, str]] = {
    "empty": (b"", "0 bytes, less than a header"),
    "cut": (Sparse(weights(LONG).head, len(weights(LONG)) - 1), "the header accounts for"),
    "cut in the header": (Sparse(weights(LONG).head, 120_000), "in a file of 120000"),
    "longer than the format allows": (raw({}, GIB, length=GIB // 2), "a header of 536870912"),
    "longer than the file": (raw({}, GIB, length=2**63), "a header of"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "no json": (Sparse(struct.pack("<Q", 200_000), GIB), "does not parse"),
    "overlap": (raw({"a": entry(0, 4), "b": entry(2, 6)}, 6), "overlap or belong to no tensor"),
    "hole": (raw({"a": entry(0, 2), "b": entry(3, 5)}, 5), "overlap or belong to no tensor"),
    "unknown dtype": (raw({"a": entry(0, 4, dtype="Q4_K")}, 4), "dtype 'Q4_K'"),
    "other bytes than its shape": (raw({"a": entry(0, 4, shape=[5])}, 4), "4 bytes for U8"),
    "not a tensor": (raw({"a": 3}, 4), "not a tensor"),
}
#: Files beside the small ones, the code, what is said.
DISAGREE: dict[str, tuple[dict[str, File], str, str]] = {
    "no such shard": (
        {k: v for k, v in sharded(TWO).items() if k != B}, "QC-CKPT-006", "does not exist"
    ),
    "nested": (
        sharded({f"sub/{A}": TWO[A]}), "QC-CKPT-003", "leaves the model folder"
    ),
    "up": (sharded({f"../{A}": TWO[A]}), "QC-CKPT-003", "leaves the model folder"),
    "another repository": (
        sharded({f"../../../org/other/resolve/main/{A}": TWO[A]}), "QC-CKPT-003", "leaves"
    ),
    "a query": (sharded({f"{A}?x=1#y.safetensors": TWO[A]}), "", ""),
    "in the other shard": (
        sharded(TWO) | {A: weights(TWO[B]), B: weights(TWO[A])}, "QC-CKPT-006", "the index names"
    ),
    "not in the index": (
        sharded(TWO) | {A: weights(TWO[A] | {"c": (1,)})}, "QC-CKPT-006", "but not in the index"
    ),
    "in no shard": (
        sharded(TWO) | {A: weights({"c": (1,)})}, "QC-CKPT-006", "no shard has it"
    ),
    "in two shards": (
        sharded(TWO) | {B: weights(TWO[A] | TWO[B])}, "QC-CKPT-006", "is in two shards"
    ),
    "a stray file": (
        sharded(TWO) | {"model.safetensors": weights(TWO[A])}, "QC-CKPT-006", "some loaders"
    ),
    "no weight_map": ({INDEX: b"{}"}, "QC-CKPT-002", "weight_map"),
}  # fmt: skip


def test_damaged_headers(ask: Client) -> None:
    models = [f"org/{case.replace(' ', '-')}" for case in DAMAGED]
    for model, (data, _) in zip(models, DAMAGED.values(), strict=True):
        ask.hub.add(model, SMALL | {"model.safetensors": data})
    answers = some(ask, *models)
    for model, (_, says), error in zip(models, DAMAGED.values(), answers, strict=True):
        assert (error["code"], error["exit"]) == ("QC-CKPT-005", 65), model
        assert error["file"] == f"{model}: model.safetensors"
        assert says in error["message"]
        assert "\n" not in error["message"]
    assert ask.hub.sent < 300_000 * len(models)
    assert ask.hub.sent < 2_000_000


def test_index_and_headers_that_disagree(ask: Client) -> None:
    models = [f"org/{case.replace(' ', '-')}" for case in DISAGREE]
    for model, (files, _, _) in zip(models, DISAGREE.values(), strict=True):
        ask.hub.add(model, SMALL | files)
    answers = some(ask, *models)
    for model, (_, code, says), found in zip(models, DISAGREE.values(), answers, strict=True):
        if not code:
            assert set(found["headers"]) == {"a"}, model
            continue
        assert (found["code"], found["exit"]) == (code, 65), model
        assert says in found["message"], model
    assert ask.hub.asked(part="org/other") == []


# Servers that answer otherwise


def test_a_server_that_ignores_ranges(ask: Client) -> None:
    ask.hub.ranges = "ignored"
    ask.hub.add("org/big", SMALL | sharded(BIG))
    ask.hub.add("org/long", SMALL | {"model.safetensors": Sparse(weights(LONG).head, 3 * GIB)})
    ask.hub.add("org/long-good", SMALL | {"model.safetensors": weights(LONG)})
    big, long, good = some(ask, "org/big", "org/long", "org/long-good")
    assert big["headers"] == expected(BIG)
    assert long["code"] == "QC-CKPT-005"
    assert "the header accounts for" in long["message"], "the whole header was read"
    assert good["headers"] == expected({"model.safetensors": LONG})
    # The kernel's buffers take some megabytes of each connection before the client hangs up.
    assert ask.hub.sent < 60_000_000, "11 GB lie there"


@pytest.mark.parametrize("ranges", ["shifted", "resized"])
def test_a_server_that_answers_with_other_bytes(ask: Client, ranges: str) -> None:
    ask.hub.ranges = ranges
    ask.hub.add("org/big", SMALL | sharded(BIG))
    error = one(ask, "org/big")
    assert (error["code"], error["exit"]) == ("QC-HUB-008", 65)
    assert "status 206, bytes " in error["message"]


def test_an_answer_that_breaks_off_is_asked_on(ask: Client) -> None:
    ask.hub.add("org/one", SMALL | {"model.safetensors": weights(LONG)})
    ask.hub.cut_next = True
    assert one(ask, "org/one")["headers"] == expected({"model.safetensors": LONG})
    ranges = [r for _, r in asked_of_storage(ask.hub)]
    assert ranges[:2] == ["bytes=0-99999", f"bytes=100000-{len(weights(LONG).head) - 1}"]
    assert ranges[2:] == ["bytes=50000-99999"]


LIBRARY = """
import json, sys
from huggingface_hub import HfApi

try:
    found = HfApi().parse_safetensors_file_metadata(sys.argv[1], "model.safetensors")
    answer = sorted(found.tensors)
except Exception as error:
    answer = type(error).__name__
print(json.dumps({"answer": answer, "heavy": []}))
"""


def test_what_the_clients_own_reader_does_not_refuse(ask: Client) -> None:
    """Why `RemoteWeights` reads headers itself; each of these is an error of ours above."""
    size = 32 << 20
    ask.code = LIBRARY
    cut = weights({"a": (4,)})
    ask.hub.add("org/cut", {"model.safetensors": Sparse(cut.head, len(cut) - 1)})
    assert ask("org/cut")["answer"] == ["a"], "a file that was cut"
    twice = json.dumps({"a": entry(0, 4), "b": entry(0, 4)}).replace('"b"', '"a"').encode()
    ask.hub.add("org/twice", {"model.safetensors": Sparse(_framed(twice), len(twice) + 12)})
    assert ask("org/twice")["answer"] == ["a"], "a key that stands twice"
    ask.hub.add("org/long", {"model.safetensors": weights(LONG)})
    ask.hub.cut_next = True
    assert ask("org/long")["answer"] == "RemoteProtocolError", "it is not asked on"
    ask.hub.ranges = "ignored"
    ask.hub.add("org/big", {"model.safetensors": weights({"a": (size // 2,)})})
    assert ask("org/big")["answer"] == ["a"]
    assert ask.hub.sent > size, "the whole file, into memory"


def _framed(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


# Many shards, and a bar for who waits


def shown(hub: HubServer, home: Path, model: str) -> bytes:
    """What a terminal shows."""
    screen, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with os.fdopen(screen, "rb", buffering=0) as seen:
        subprocess.run(
            [sys.executable, "-c", CODE, model],
            env=hub.env(home),
            stdout=subprocess.DEVNULL,
            stderr=terminal,
            timeout=60,
            check=True,
        )
        os.close(terminal)
        text = b""
        try:
            while part := seen.read(65536):
                text += part
        except OSError:  # Linux says so at the end
            pass
        return text


@pytest.mark.slow
def test_many_shards_in_parallel_and_a_bar_after_a_second(ask: Client) -> None:
    shards = {shard: {f"{shard}.w": (GIB // 2**15, 2**14)} for shard in names(94)}
    ask.hub.add("org/many", SMALL | sharded(shards))
    assert one(ask, "org/many")["headers"] == expected(shards)
    assert len(asked_of_storage(ask.hub)) == 94
    ask.hub.add("org/few", SMALL | sharded(TWO))
    assert b"Reading headers" not in shown(ask.hub, ask.home, "org/few")
    ask.hub.delay = 0.3
    text = shown(ask.hub, ask.home, "org/many")
    assert b"Reading headers" in text
    assert b"94/94" in text


# The verb


def test_inspect_says_the_same_of_a_hub_id_as_of_a_folder(ask: Client, tmp_path: Path) -> None:
    folder = write_sparse_checkpoint(tmp_path / "model", small_config(), small_shapes(), shards=2)
    commit = ask.hub.add("org/small", folder)

    def report(model: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "qcore", "inspect", model, "--json"],
            env=ask.hub.env(ask.home),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    at_hub = report("org/small")
    assert at_hub.pop("revision") == commit
    assert at_hub["tensors"] == len(small_shapes())
    assert len(asked_of_storage(ask.hub)) == 2
    here = report(str(folder))
    here.pop("revision")
    for answer in (at_hub, here):  # the files that they name differ
        answer["findings"] = [(one["code"], one["for"]) for one in answer["findings"]]
    assert at_hub == here
