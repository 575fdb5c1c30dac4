"""A model folder that is damaged or means harm: one line each, nothing outside is opened."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from support.model_kit import edit_json, write_index, write_json

from qcore.checkpoint.checkpoint import DTYPE_BITS, Checkpoint, read_headers
from qcore.errors import InputError

W, V = "a.weight", "b.weight"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A folder with one weights file of two tensors."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_json(folder / "config.json", {"model_type": "some_type"})
    save_file({W: torch.ones(3, 2), V: torch.zeros(4)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder with an index and two shards."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_json(folder / "config.json", {"model_type": "some_type"})
    save_file({W: torch.ones(3, 2)}, folder / "one.safetensors")
    save_file({V: torch.zeros(4)}, folder / "two.safetensors")
    write_index(folder, {W: "one.safetensors", V: "two.safetensors"})
    return folder


def read_all(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    _ = checkpoint.template, checkpoint.tokenizer_config, checkpoint.generation_config


def refused(folder: Path, code: str, *says: str) -> InputError:
    with pytest.raises(InputError) as caught:
        read_all(folder)
    error = caught.value
    assert error.code == code, error.message
    assert error.exit_code == 65
    assert "\n" not in error.message
    assert error.fix
    for part in says:
        assert part in error.message
    return error


# -- what is there


def test_what_is_read(single: Path):
    (single / "tokenizer.json").write_text("{}")
    write_json(single / "tokenizer_config.json", {"eos_token": "x"})
    write_json(single / "generation_config.json", {"eos_token_id": [1]})
    (single / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (single / "figures").mkdir()
    found = Checkpoint.open(single, source="org/name", revision="abc")
    assert (found.source, found.revision, found.path) == ("org/name", "abc", single)
    assert found.shards == ("model.safetensors",)
    assert found.index is None
    assert found.sidecars == (
        "chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json",
    )  # fmt: skip
    assert found.tokenizer_config == {"eos_token": "x"}
    assert found.generation_config == {"eos_token_id": [1]}
    assert found.template is not None
    assert found.template.text == "{{ messages }}"
    header = found.headers[W]
    assert found.file(header.file).read_bytes()[header.start : header.end] == struct.pack(
        "<6f", *[1.0] * 6
    )
    assert found.total_bytes == 40
    assert not found.headers_only


def test_shards_in_order_of_first_use_and_sidecars_without_them(sharded: Path):
    write_index(sharded, {V: "two.safetensors", W: "one.safetensors"})
    (sharded / "notes.txt").write_bytes(b"a sidecar")
    (sharded / "pytorch_model.bin").write_bytes(b"the weights once more")
    found = Checkpoint.open(sharded)
    assert found.shards == ("two.safetensors", "one.safetensors")
    assert found.sidecars == ("config.json", "notes.txt")
    assert found.copies == ("pytorch_model.bin",)


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
def test_weights_beside_the_shards_that_a_loader_may_prefer_are_refused(sharded: Path, name: str):
    """transformers takes model.safetensors before the index: a merge would not be seen."""
    write_index(sharded, {V: "two.safetensors", W: "one.safetensors"})
    (sharded / name).write_bytes((sharded / "one.safetensors").read_bytes())
    with pytest.raises(InputError) as caught:
        Checkpoint.open(sharded)
    assert caught.value.code == "QC-CKPT-006"
    assert name in caught.value.message


def test_template_from_tokenizer_config_when_there_is_no_file(single: Path):
    write_json(single / "tokenizer_config.json", {"chat_template": "{{ 1 }}"})
    assert Checkpoint.open(single).template.text == "{{ 1 }}"  # type: ignore[union-attr]
    (single / "chat_template.jinja").write_text("{{ 2 }}")
    assert Checkpoint.open(single).template.text == "{{ 2 }}"  # type: ignore[union-attr]


def test_no_template_is_none(single: Path):
    write_json(single / "tokenizer_config.json", {"chat_template": [{"name": "default"}]})
    assert Checkpoint.open(single).template is None


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.int16,
        torch.int32, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
    ],
    ids=str,
)  # fmt: skip
def test_headers_equal_what_safetensors_reads(tmp_path: Path, dtype: torch.dtype):
    tensors = {
        "matrix": torch.arange(15).view(3, 5).to(dtype),
        "scalar": torch.zeros((), dtype=dtype),
        "empty": torch.zeros(0, 7, dtype=dtype),
        "weird name/é\n\U0001f600": torch.ones(1, 2, 3, dtype=dtype),
    }
    path = tmp_path / "m.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "k": "v"})
    ours = {header.name: header for header in read_headers(path)}
    data = path.read_bytes()
    with safe_open(path, "pt") as theirs:
        assert set(theirs.keys()) == set(ours)
        for name in theirs.keys():  # noqa: SIM118
            view = theirs.get_slice(name)
            assert ours[name].dtype == view.get_dtype()
            assert list(ours[name].shape) == view.get_shape()
            flat = tensors[name].reshape(-1)
            raw = flat.view(torch.uint8).tolist() if len(flat) else []
            assert data[ours[name].start : ours[name].end] == bytes(raw)
            assert ours[name].numel == tensors[name].numel()


def test_a_file_without_tensors(tmp_path: Path):
    save_file({}, tmp_path / "m.safetensors")
    assert list(read_headers(tmp_path / "m.safetensors")) == []


def test_dtypes_are_those_of_the_format():
    assert all(bits in (4, 8, 16, 32, 64) for bits in DTYPE_BITS.values())


# -- the folder


def test_no_folder(tmp_path: Path):
    refused(tmp_path / "none", "QC-CKPT-001", "is not a model folder")


def test_a_file_is_no_folder(single: Path):
    refused(single / "config.json", "QC-CKPT-001", "is not a model folder")


def test_an_empty_folder(tmp_path: Path):
    refused(tmp_path, "QC-CKPT-001", "has no config.json")


def _text(text: str | bytes) -> Callable[[Path], object]:
    data = text.encode() if isinstance(text, str) else text
    return lambda path: path.write_bytes(data)


CONFIGS = {
    "not json": (_text("{model_type: 1"), "cannot be read as a JSON object"),
    "empty": (_text(""), "cannot be read as a JSON object"),
    "a list": (_text("[]"), "a JSON list"),
    "null": (_text("null"), "a JSON NoneType"),
    "not utf-8": (_text(b'{"model_type": "\xff\xfe"}'), "cannot be read as a JSON object"),
    "utf-16": (_text('{"model_type": "x"}'.encode("utf-16")), "cannot be read"),
    "nested without end": (_text("[" * 200_000), "cannot be read as a JSON object"),
    "nested objects": (_text('{"a":' * 200_000), "cannot be read as a JSON object"),
    "duplicate key": (_text('{"model_type": "a", "model_type": "b"}'), "'model_type' stands twice"),
    "duplicate key below": (_text('{"model_type": "a", "s": {"n": 1, "n": 2}}'), "'n' stands"),
    "no model_type": (_text("{}"), "model_type: is not a valid model type"),
    "model_type a number": (_text('{"model_type": 3}'), "found 3"),
    "model_type a list": (_text('{"model_type": ["x"]}'), "is not a valid model type"),
    "a huge number": (_text('{"model_type": "x", "n": ' + "9" * 10_000 + "}"), "cannot be read"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_broken_config(single: Path, case: str):
    write, says = CONFIGS[case]
    write(single / "config.json")
    error = refused(single, "QC-CKPT-002", says)
    assert error.file == str(single / "config.json")
    assert len(error.message) < 1000


def test_json_larger_than_any_config(single: Path):
    with (single / "config.json").open("r+b") as file:
        file.truncate(65 * 2**20)
    refused(single, "QC-CKPT-002", "larger than")


def test_config_that_is_a_folder(single: Path):
    (single / "config.json").unlink()
    (single / "config.json").mkdir()
    refused(single, "QC-CKPT-003")


def test_config_that_is_a_pipe_does_not_block(single: Path):
    (single / "config.json").unlink()
    os.mkfifo(single / "config.json")
    refused(single, "QC-CKPT-003")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_a_broken_sidecar(single: Path, name: str):
    (single / name).write_text("{")
    assert refused(single, "QC-CKPT-002").file == str(single / name)


def test_a_template_that_is_not_utf8(single: Path):
    (single / "chat_template.jinja").write_bytes(b"{{ 'caf\xe9' }}")
    error = refused(single, "QC-CKPT-002", "is not UTF-8")
    assert error.file == str(single / "chat_template.jinja")


# -- no weights


def test_no_weights(single: Path):
    (single / "model.safetensors").unlink()
    refused(single, "QC-CKPT-004", "has no weights")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_named_and_never_opened(single: Path, name: str):
    (single / "model.safetensors").unlink()
    (single / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    error = refused(single, "QC-CKPT-007", "pickled weights")
    assert error.file == str(single / name)


# -- the index


INDEXES: dict[str, tuple[Any, str]] = {
    "a list": ([], "QC-CKPT-002"),
    "no weight_map": ({"metadata": {}}, "QC-CKPT-002"),
    "weight_map a list": ({"weight_map": ["one.safetensors"]}, "QC-CKPT-002"),
    "shard a number": ({"weight_map": {W: 1}}, "QC-CKPT-002"),
    "empty": ({"weight_map": {}}, "QC-CKPT-002"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_a_broken_index(sharded: Path, case: str):
    value, code = INDEXES[case]
    write_json(sharded / "model.safetensors.index.json", value)
    refused(sharded, code)


OUTSIDE = {
    "up": "../outside.safetensors",
    "up and back": "../model/one.safetensors",
    "absolute": "/tmp/outside.safetensors",
    "below": "sub/one.safetensors",
    "dot": "./one.safetensors",
    "backslash": "..\\outside.safetensors",
    "drive": "C:outside.safetensors",
    "NUL": "one.safetensors\0.txt",
    "nothing": "",
    "the folder": ".",
    "its parent": "..",
    "url": "https://host/one.safetensors",
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_an_index_that_leaves_the_folder(sharded: Path, tmp_path: Path, case: str):
    save_file({W: torch.ones(3, 2)}, tmp_path / "outside.safetensors")
    (sharded / "sub").mkdir()
    save_file({W: torch.ones(3, 2)}, sharded / "sub" / "one.safetensors")
    write_index(sharded, {W: OUTSIDE[case], V: "two.safetensors"})
    refused(sharded, "QC-CKPT-003", "leaves the model folder")


def test_a_very_long_shard_name(sharded: Path):
    write_index(sharded, {W: "x" * 5000 + ".safetensors"})
    assert len(refused(sharded, "QC-CKPT-003").message) < 500


def test_an_index_that_names_a_missing_shard(sharded: Path):
    (sharded / "two.safetensors").unlink()
    error = refused(sharded, "QC-CKPT-006", "is referenced but does not exist")
    assert error.file == str(sharded / "two.safetensors")


def test_a_tensor_that_no_shard_has(sharded: Path):
    edit_json(
        sharded / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({"c": "two.safetensors"}),
    )
    refused(sharded, "QC-CKPT-006", "no shard has it", ": c:")


def test_a_tensor_in_another_shard_than_the_index_says(sharded: Path):
    write_index(sharded, {W: "two.safetensors", V: "one.safetensors"})
    refused(sharded, "QC-CKPT-006", "is not in the shard that the index names")


def test_a_tensor_that_the_index_does_not_name(sharded: Path):
    save_file({V: torch.zeros(4), "c": torch.ones(1)}, sharded / "two.safetensors")
    refused(sharded, "QC-CKPT-006", "is in a shard but not in the index", ": c:")


def test_a_tensor_in_two_shards(sharded: Path):
    save_file({V: torch.zeros(4), W: torch.ones(3, 2)}, sharded / "two.safetensors")
    refused(sharded, "QC-CKPT-006", "is in two shards")


def test_duplicate_names_in_the_index(sharded: Path):
    (sharded / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}'
    )
    refused(sharded, "QC-CKPT-002", "'a' stands twice")


# -- links


def test_a_shard_that_is_a_link_out_of_the_folder(sharded: Path, tmp_path: Path):
    (sharded / "one.safetensors").rename(tmp_path / "secret")
    (sharded / "one.safetensors").symlink_to(tmp_path / "secret")
    refused(sharded, "QC-CKPT-003")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "chat_template.jinja"])
def test_a_sidecar_that_is_a_link_out_of_the_folder(single: Path, tmp_path: Path, name: str):
    outside = tmp_path / "outside"
    if (single / name).exists():
        (single / name).rename(outside)
    else:
        outside.write_text("{{ 1 }}")
    (single / name).symlink_to(outside)
    refused(single, "QC-CKPT-003")


def test_a_link_inside_the_folder_is_fine(sharded: Path):
    (sharded / "one.safetensors").rename(sharded / "real.blob")
    (sharded / "one.safetensors").symlink_to("real.blob")
    assert set(Checkpoint.open(sharded).headers) == {W, V}


def test_a_link_to_nothing(sharded: Path):
    (sharded / "one.safetensors").unlink()
    (sharded / "one.safetensors").symlink_to("gone")
    refused(sharded, "QC-CKPT-006", "does not exist")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "chat_template.jinja", "tokenizer.json"]
)
def test_the_target_of_a_dangling_link_is_named(single: Path, name: str):
    """Without its target a file counted as absent: another template was read in its place."""
    write_json(single / "tokenizer_config.json", {"chat_template": "other"})
    (single / name).unlink(missing_ok=True)
    (single / name).symlink_to("../../blobs/0123abcd")
    refused(single, "QC-CKPT-006", f"{name}: is a link to ../../blobs/0123abcd, which does not")


def test_a_dangling_link_that_is_not_read(single: Path):
    (single / "README.md").symlink_to("../../blobs/0123abcd")
    read_all(single)


def test_the_index_and_the_shards_that_lack_are_named(single: Path):
    whole = (single / "model.safetensors").read_bytes()
    (single / "model.safetensors").unlink()
    for n in (1, 3):
        (single / f"model-{n:05d}-of-00004.safetensors").write_bytes(whole)
    error = refused(
        single, "QC-CKPT-004", "has shards but no model.safetensors.index.json",
        "2 of 4 shards are absent", "first absent model-00002-of-00004.safetensors",
    )  # fmt: skip
    assert error.fix == (
        "download model.safetensors.index.json and model-00002-of-00004.safetensors and "
        "model-00004-of-00004.safetensors"
    )
    for n in (2, 4):
        (single / f"model-{n:05d}-of-00004.safetensors").write_bytes(whole)
    error = refused(single, "QC-CKPT-004", "has shards but no", "4 of 4 shards")
    assert error.fix == "download model.safetensors.index.json"


def test_a_pointer_of_git_lfs(single: Path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 300\n"
    (single / "model.safetensors").write_bytes(pointer)
    error = refused(single, "QC-CKPT-005", "a Git LFS pointer, not the file")
    assert "git lfs pull" in (error.fix or "")


def test_an_adapter_that_is_named_as_a_model(single: Path):
    (single / "config.json").rename(single / "adapter_config.json")
    error = refused(single, "QC-CKPT-001", "is an adapter, not a model")
    assert "--adapter" in (error.fix or "")


def test_a_link_to_itself(sharded: Path):
    (sharded / "one.safetensors").unlink()
    (sharded / "one.safetensors").symlink_to("one.safetensors")
    with pytest.raises(InputError):
        Checkpoint.open(sharded)


def test_a_link_that_hides_behind_another(single: Path, tmp_path: Path):
    (single / "model.safetensors").rename(tmp_path / "outside")
    (single / "between").symlink_to(tmp_path / "outside")
    (single / "model.safetensors").symlink_to("between")
    refused(single, "QC-CKPT-003")


@pytest.fixture
def cache(single: Path, tmp_path: Path) -> Path:
    """The same model as the hub's cache keeps it: links from a snapshot into blobs."""
    repo = tmp_path / "models--org--name"
    snapshot, blobs = repo / "snapshots" / ("0" * 40), repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(single.iterdir())):
        file.rename(blobs / f"blob{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{number}")
    return snapshot


def test_a_hub_cache_snapshot_is_accepted(cache: Path):
    found = Checkpoint.open(cache)
    assert set(found.headers) == {W, V}
    assert found.file("config.json") == cache / "config.json"


def test_a_link_to_a_snapshot_is_accepted(cache: Path, tmp_path: Path):
    (tmp_path / "short").symlink_to(cache)
    assert set(Checkpoint.open(tmp_path / "short").headers) == {W, V}


@pytest.mark.parametrize("to", ["../../../outside", "../../refs/main", "../../blobs/sub/x"])
def test_a_snapshot_may_link_into_its_own_blobs_only(cache: Path, tmp_path: Path, to: str):
    target = Path(os.path.normpath(cache / to))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("{{ 1 }}")
    (cache / "chat_template.jinja").symlink_to(to)
    refused(cache, "QC-CKPT-003")


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "a/b", "", ".", "..", "\0"])
def test_file_refuses_what_is_no_plain_name(single: Path, name: str):
    with pytest.raises(InputError) as caught:
        Checkpoint.open(single).file(name)
    assert caught.value.code == "QC-CKPT-003"


# -- the safetensors file


def raw(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, end: int, *, dtype: object = "U8", shape: object = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape,
            "data_offsets": [start, end]}  # fmt: skip


GOOD = save({W: torch.ones(3, 2), V: torch.zeros(4)})

DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "less than a header"),
    "seven bytes": (GOOD[:7], "less than a header"),
    "header cut": (GOOD[:30], "a header of"),
    "data cut by one byte": (GOOD[:-1], "the header accounts for"),
    "data cut whole": (GOOD[:-40], "the header accounts for"),
    "a byte too many": (GOOD + b"\0", "the header accounts for"),
    "header length lies by far": (raw({}, length=2**63), "a header of"),
    "header length of all ones": (b"\xff" * 16, "a header of"),
    "header length short": (raw({"a": entry(0, 4)}, bytes(4), length=10), "does not parse"),
    "header length long": (raw({"a": entry(0, 4)}, bytes(4), length=70), "a header of"),
    "header not json": (raw(b"{'a': 1}"), "does not parse"),
    "header not utf-8": (raw(b'{"\xff": {}}'), "does not parse"),
    "header a list": (raw([]), "not a mapping"),
    "header a number": (raw(b"3"), "not a mapping"),
    "header nested without end": (raw(b"[" * 100_000), "does not parse"),
    "duplicate keys": (
        raw(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', bytes(1)),
        "'a' stands twice",
    ),
    "entry a list": (raw({"a": []}), "not a tensor"),
    "entry null": (raw({"a": None}), "not a tensor"),
    "unknown dtype": (raw({"a": entry(0, 4, dtype="Q4_K")}, bytes(4)), "dtype 'Q4_K'"),
    "dtype a list": (raw({"a": entry(0, 4, dtype=["U8"])}, bytes(4)), "dtype ['U8']"),
    "no dtype": (raw({"a": {"shape": [1], "data_offsets": [0, 1]}}, bytes(1)), "dtype None"),
    "wrong dtype for its bytes": (
        raw({"a": entry(0, 4, dtype="BF16", shape=[4])}, bytes(4)), "4 bytes for BF16 (4,)"
    ),
    "no shape": (raw({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, bytes(1)), "shape None"),
    "shape negative": (raw({"a": entry(0, 4, shape=[-4])}, bytes(4)), "shape [-4]"),
    "shape a float": (raw({"a": entry(0, 4, shape=[4.0])}, bytes(4)), "shape [4.0]"),
    "shape of booleans": (raw({"a": entry(0, 1, shape=[True])}, bytes(1)), "shape [True]"),
    "shape of strings": (raw({"a": entry(0, 4, shape=["4"])}, bytes(4)), "shape ['4']"),
    "shape overflows": (raw({"a": entry(0, 4, shape=[2**62, 4])}, bytes(4)), "4 bytes for U8"),
    "shape of a million sizes": (raw({"a": entry(0, 1, shape=[2**62] * 10**6)}, bytes(1)), "shape"),
    "a name of a million letters": (raw({"a" * 10**6: []}), "not a tensor"),
    "a dtype of a million letters": (raw({"a": entry(0, 1, dtype="x" * 10**6)}), "dtype"),
    "duplicates among many": (
        raw(b"{" + b",".join(b'"%d":{}' % n for n in range(100_000)) + b',"99999":{}}'),
        "'99999' stands twice",
    ),
    "utf-16": (raw('{"a": {}}'.encode("utf-16")), "does not parse"),
    "shape huge": (raw({"a": entry(0, 4, shape=[2**80])}, bytes(4)), "shape"),
    "no offsets": (raw({"a": {"dtype": "U8", "shape": [1]}}, bytes(1)), "offsets None"),
    "three offsets": (
        raw({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, bytes(2)),
        "offsets [0, 1, 2]",
    ),
    "offsets reversed": (raw({"a": entry(4, 0, shape=[4])}, bytes(4)), "bytes for U8"),
    "offsets negative": (raw({"a": entry(-8, -4, shape=[4])}, bytes(4)), "offsets [-8, -4]"),
    "offset beyond the file": (raw({"a": entry(0, 400)}, bytes(4)), "the header accounts for"),
    "overlap": (
        raw({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)), "overlap or belong to no tensor"
    ),
    "two tensors on the same bytes": (
        raw({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)), "overlap or belong to no tensor"
    ),
    "a hole": (raw({"a": entry(0, 2), "b": entry(3, 5)}, bytes(5)), "overlap or belong"),
    "a hole at the start": (raw({"a": entry(2, 4)}, bytes(4)), "overlap or belong"),
    "a zip": (b"PK\x03\x04" + bytes(60), "a header of"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file(single: Path, case: str):
    data, says = DAMAGED[case]
    (single / "model.safetensors").write_bytes(data)
    error = refused(single, "QC-CKPT-005", "is damaged", says)
    assert error.file == str(single / "model.safetensors")
    assert len(error.message) < 1000


def flips_one_byte(path: Path, seed: int) -> bool:
    """Changes one byte of a header, drawn from ``seed``; whether the file was refused."""
    generator = torch.Generator().manual_seed(seed)
    length = 8 + struct.unpack("<Q", GOOD[:8])[0]
    at = int(torch.randint(length, (1,), generator=generator))
    data = bytearray(GOOD)
    data[at] = int(torch.randint(256, (1,), generator=generator))
    path.write_bytes(data)
    try:
        headers = list(read_headers(path))
    except InputError:
        return True
    with safe_open(path, "pt") as theirs:  # never more lenient than the format's own reader
        assert {header.name for header in headers} == set(theirs.keys()), f"seed {seed}: byte {at}"
    return False


@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param(range(0, 300, 7), id="sample"),
        pytest.param(range(300), id="all", marks=pytest.mark.slow),
    ],
)
def test_any_one_byte_of_the_header_changed_is_refused_or_harmless(tmp_path: Path, seeds: range):
    refused = [flips_one_byte(tmp_path / "m.safetensors", seed) for seed in seeds]
    assert True in refused
    assert False in refused


def test_an_unreadable_file_is_one_line(single: Path, monkeypatch: pytest.MonkeyPatch):
    if os.geteuid() == 0:
        real = Path.open

        def denied(self: Path, *args: Any, **kwargs: Any) -> Any:
            if self.name == "model.safetensors":
                raise PermissionError(13, "Permission denied", str(self))
            return real(self, *args, **kwargs)

        monkeypatch.setattr(Path, "open", denied)
    else:
        (single / "model.safetensors").chmod(0)
    refused(single, "QC-READ-001")
