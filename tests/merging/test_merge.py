"""A merged checkpoint is its base, tensor by tensor, plus the adapter; or there is none."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.conversations import conversations, write_rows
from support.e2e_kit import (
    LINEARS,
    ROOT,
    documents,
    figure,
    loaded_adapter,
    stock,
    stock_logits,
    write_stock,
)
from support.faults import Faults, count, killed
from support.sinks import Heard
from torch import Tensor

from qcore.adapter.delta import Deltas
from qcore.adapter.reader import read_adapter
from qcore.api.parameters import LINEAR, Aim, Part, Region, Row, Table, cat
from qcore.checkpoint.checkpoint import Checkpoint
from qcore.checkpoint.layout import locate
from qcore.config.settings import Settings
from qcore.errors import InputError, NumericError, QcoreError, WriteError
from qcore.io.artifact import read_manifest, verify
from qcore.merging.merge import merge
from qcore.merging.rewrite import MergePass
from qcore.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def base(once: Callable[..., Path]) -> Path:
    """The vision-language class with a tower, mtp, an untied head, in several files."""

    def write(folder: Path) -> None:
        write_stock(folder, "vl", tied=False, mtp=True, shard="60KB", dtype=torch.bfloat16)
        (folder / "README.md").write_text("a card\n")
        assert len(list(folder.glob("*.safetensors"))) > 3

    return once("merge-base", write)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", conversations(12))


def trained(base: Path, rows: Path, out: Path, **settings: Any) -> Path:
    options: dict[str, Any] = {
        "max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "r": 4,
        "lora_alpha": 12, "learning_rate": 2e-2, "dtype": "fp32", "save_steps": 0,
    }  # fmt: skip
    train(str(base), rows, out, Settings(**(options | settings)), device="cpu")
    return out


@pytest.fixture(scope="module")
def adapter(base: Path, rows: Path, once: Callable[..., Path]) -> Path:
    folder = once("merge-adapter", lambda home: trained(base, rows, home / "adapter"))
    return folder / "adapter"


def foreign(adapter: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """The adapter as another tool would leave it: no manifest, and something changed."""
    folder.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(adapter / "adapter_config.json", folder / "adapter_config.json")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def split(data: bytes) -> tuple[bytes, dict[str, bytes]]:
    """A safetensors file -> its header's bytes, and every tensor's."""
    (size,) = struct.unpack("<Q", data[:8])
    head = json.loads(data[8 : 8 + size])
    body = data[8 + size :]
    spans = {name: entry["data_offsets"] for name, entry in head.items() if name != "__metadata__"}
    return data[: 8 + size], {name: body[at:end] for name, (at, end) in spans.items()}


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def exact(base: Path, adapter: Path) -> dict[str, Tensor]:
    """``W + scaling B A`` in float64 of every weight that the adapter changes, by hand."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    found, weights = load_file(adapter / "adapter_model.safetensors"), tensors(base)
    result = {}
    for name, a in found.items():
        if ".lora_A." in name:
            b = found[name.replace("lora_A", "lora_B")]
            weight = name.removeprefix("base_model.model.").replace(".lora_A", "")
            delta = config["lora_alpha"] / config["r"] * (b.double() @ a.double())
            result[weight] = weights[weight].double() + delta
    return result


# -- the contract


def test_a_drop_in_for_its_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    before = files(base)
    report = merge(str(base), adapter, tmp_path / "out")
    assert files(base) == before
    after = files(tmp_path / "out")
    assert verify(tmp_path / "out").ok
    assert after.keys() - {"MANIFEST.json"} == before.keys()
    changed = set()
    for name, data in before.items():
        if not name.endswith(".safetensors"):
            assert after[name] == data, name  # index, config, tokenizer, template, card
            continue
        (head, old), (head_after, new) = split(data), split(after[name])
        assert head_after == head, name
        assert new.keys() == old.keys()
        changed |= {tensor for tensor in old if new[tensor] != old[tensor]}
    touched = {
        name
        for name in tensors(base)
        if name.startswith(f"{ROOT}layers.") and name.split(".")[-2] in LINEARS
    }
    assert changed == touched
    assert len(touched) == 25
    carried = {name.split(".")[0] if name.startswith("mtp") else name.split(".")[1]
               for name in tensors(base).keys() - touched}  # fmt: skip
    assert {"mtp", "visual"} <= carried
    assert (report.changed, report.pairs) == (25, 25)
    assert report.proof is not None
    figure(f"proof: {dict(report.proof)}")
    assert report.proof["difference"] <= 1e-4
    assert report.proof["effect"] > 0.1
    for name, value in exact(base, adapter).items():
        assert torch.equal(tensors(tmp_path / "out")[name], value.to(torch.bfloat16)), name


def test_transformers_loads_it_and_says_the_same(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(str(base), adapter, tmp_path / "out")
    docs = documents((33, 70))
    model = stock(base, "vl")
    plain = stock_logits(model, docs)
    adapted = stock_logits(loaded_adapter(stock(base, "vl"), adapter), docs)
    with torch.no_grad():
        for name, value in exact(base, adapter).items():
            model.get_parameter(name).copy_(value)
    unrounded = stock_logits(model, docs)
    merged, told = type(model).from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["mismatched_keys"]
    assert all(name.startswith("mtp.") for name in told["unexpected_keys"])
    rounded = stock_logits(merged.eval(), docs)
    effect = float((adapted - plain).abs().max())
    before = float((unrounded - adapted).abs().max())
    after = float((rounded - unrounded).abs().max())
    figure(f"effect {effect:.2f}; unrounded {before:.1e}, rounding {after:.1e}")
    assert effect > 0.1
    assert before <= 1e-4
    assert 0 < after <= 0.2 * effect
    with torch.no_grad():
        for name, value in exact(base, adapter).items():
            model.get_parameter(name).copy_(value.to(torch.bfloat16))
    assert torch.equal(rounded, stock_logits(model, docs))


def test_a_text_only_save_of_the_same_weights_is_the_same_base(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    loaded = stock(base, "text", torch.bfloat16)
    fresh = type(loaded)(loaded.config).to(torch.bfloat16)  # `loaded` would save the hub's names
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(text)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(base / name, text / name)
    merge(str(text), adapter, tmp_path / "out")
    mine = tensors(tmp_path / "out")
    for name, value in exact(base, adapter).items():
        assert torch.equal(mine[name.replace(ROOT, "model.", 1)], value.to(torch.bfloat16))


# -- what must not be merged


def refused(error: pytest.ExceptionInfo[QcoreError], code: str, status: int) -> None:
    assert (error.value.code, error.value.exit_code) == (code, status), error.value


def test_another_base_is_refused_at_its_first_tensor(adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_stock(other, "vl", tied=False, mtp=True, shard="60KB", dtype=torch.bfloat16, seed=9)
    heard = Heard()
    with pytest.raises(InputError) as error:
        merge(str(other), adapter, tmp_path / "out", reporter=heard.reporter)
    refused(error, "QC-MERGE-001", 65)
    assert heard.done == 0
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize(
    ("tensor", "same"),
    [
        (f"{ROOT}layers.3.self_attn.q_norm.weight", False),
        ("lm_head.weight", False),
        ("mtp.fc.weight", True),
        ("model.visual.blocks.0.attn.qkv.weight", True),
    ],
)
def test_the_base_is_what_was_trained_on(
    base: Path, adapter: Path, tmp_path: Path, tensor: str, same: bool
) -> None:
    """One bit of a tensor that took part makes another base; of one that did not, it does not."""
    copy = shutil.copytree(base, tmp_path / "base")
    shard = json.loads((copy / INDEX).read_text())["weight_map"][tensor]
    with safe_open(copy / shard, "pt") as file:
        metadata = file.metadata()
    found = load_file(copy / shard)
    found[tensor].view(torch.uint8).view(-1)[0] ^= 1
    save_file(found, copy / shard, metadata=metadata)
    if same:
        merge(str(copy), adapter, tmp_path / "out")
        assert torch.equal(tensors(tmp_path / "out")[tensor], found[tensor])
        return
    with pytest.raises(InputError) as error:
        merge(str(copy), adapter, tmp_path / "out")
    refused(error, "QC-MERGE-001", 65)
    assert error.value.field == tensor
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_twice_and_a_chain(base: Path, rows: Path, adapter: Path, tmp_path: Path) -> None:
    merge(str(base), adapter, tmp_path / "one")
    with pytest.raises(InputError) as error:
        merge(str(tmp_path / "one"), adapter, tmp_path / "out")
    refused(error, "QC-MERGE-002", 65)
    second = trained(tmp_path / "one", rows, tmp_path / "second", seed=5)
    merge(str(tmp_path / "one"), second, tmp_path / "two")
    entries = read_manifest(tmp_path / "two").meta["merged"]
    assert [Path(entry["adapter"]).name for entry in entries] == ["adapter", "second"]
    assert len({entry["sha256"] for entry in entries}) == 2
    assert verify(tmp_path / "two").ok
    for again in (adapter, second):
        with pytest.raises(InputError) as error:
            merge(str(tmp_path / "two"), again, tmp_path / "out")
        refused(error, "QC-MERGE-002", 65)
    assert not (tmp_path / "out").exists()


def poison(value: float) -> Callable[[dict[str, Tensor]], object]:
    def change(found: dict[str, Tensor]) -> None:
        next(iter(found.values()))[0, 1] = value

    return change


def zero(found: dict[str, Tensor]) -> None:
    for name, value in found.items():
        if ".lora_B." in name:
            value.zero_()


def overflow(found: dict[str, Tensor]) -> None:
    for value in found.values():
        value.fill_(1e19)


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "NaN": (poison(float("nan")), "QC-MERGE-003"),
    "infinity": (poison(float("-inf")), "QC-MERGE-003"),
    "overflow in the sum": (overflow, "QC-MERGE-003"),
    "zero": (zero, "QC-MERGE-004"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_that_must_not_be_merged(
    base: Path, adapter: Path, tmp_path: Path, fault: str
) -> None:
    change, code = FAULTS[fault]
    bad = foreign(adapter, tmp_path / "bad", change)
    with pytest.raises(NumericError) as error:
        merge(str(base), bad, tmp_path / "out", trust_base=True)
    refused(error, code, 76)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize("ours", [True, False], ids=["with manifest", "without"])
def test_an_adapter_that_is_cut(base: Path, adapter: Path, tmp_path: Path, ours: bool) -> None:
    bad = shutil.copytree(adapter, tmp_path / "bad")
    path = bad / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    if not ours:
        (bad / "MANIFEST.json").unlink()
    with pytest.raises(InputError) as error:
        merge(str(base), bad, tmp_path / "out", trust_base=True)
    assert error.value.exit_code == 65
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


# -- interrupted


@pytest.mark.parametrize(
    ("fault", "points"),
    [
        pytest.param(errno.ENOSPC, 2, id="full"),
        pytest.param(errno.ENOSPC, 12, id="full, more points", marks=pytest.mark.slow),
        pytest.param(errno.EIO, 12, id="input/output error", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fails_leaves_nothing(
    base: Path, adapter: Path, tmp_path: Path, fault: int, points: int
) -> None:
    calls = count(lambda: merge(str(base), adapter, tmp_path / "whole"))
    shutil.rmtree(tmp_path / "whole")
    assert calls > 50
    before = files(base)
    for at in random.Random(1).sample(range(calls - 4), points):
        with Faults(at=at, action=fault), pytest.raises(WriteError) as error:
            merge(str(base), adapter, tmp_path / "out")
        assert error.value.exit_code == 73, at
        assert list(tmp_path.iterdir()) == [], at
    assert files(base) == before


@pytest.mark.parametrize(
    ("points", "shares"),
    [
        pytest.param(2, (0.5,), id="sample"),
        pytest.param(8, (0.1, 0.4, 0.7, 0.95), id="more points", marks=pytest.mark.slow),
    ],
)
def test_a_killed_merge_leaves_no_result_and_the_next_cleans_up(
    base: Path, adapter: Path, tmp_path: Path, points: int, shares: tuple[float, ...]
) -> None:
    def job() -> None:
        merge(str(base), adapter, tmp_path / "out")

    calls = count(lambda: merge(str(base), adapter, tmp_path / "whole"))
    whole = files(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole")
    for at in random.Random(2).sample(range(calls - 6), points):
        assert killed(job, at)
        assert not (tmp_path / "out").exists(), at
    began = time.perf_counter()
    job()
    took = time.perf_counter() - began
    shutil.rmtree(tmp_path / "out")
    for share in shares:
        child = os.fork()
        if child == 0:
            try:
                job()
            finally:
                os._exit(0)
        time.sleep(share * took)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (tmp_path / "out").exists():  # it was faster than the signal
            assert verify(tmp_path / "out").ok
            shutil.rmtree(tmp_path / "out")
    job()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    after = files(tmp_path / "out")
    assert {n: d for n, d in after.items() if n != "MANIFEST.json"} == {
        n: d for n, d in whole.items() if n != "MANIFEST.json"
    }


# -- the checks can fail


def halved(self: Deltas, name: str, weight: Tensor, region: Region) -> Iterator[Any]:
    for view, total in REAL(self, name, weight, region):
        yield view, (total + view.double()) / 2


def first_rows(self: Deltas, name: str, weight: Tensor, region: Region) -> Iterator[Any]:
    for view, total in REAL(self, name, weight, region):
        half = len(view) // 2
        yield view[:half], total[:half]
        yield view[half:], view[half:].double()


REAL = Deltas.add


@pytest.mark.parametrize("broken", [halved, first_rows])
def test_a_wrong_sum_is_caught(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Any
) -> None:
    monkeypatch.setattr(Deltas, "add", broken)
    with pytest.raises(NumericError) as error:
        merge(str(base), adapter, tmp_path / "out")
    refused(error, "QC-MERGE-005", 76)
    assert list(tmp_path.iterdir()) == []


def test_a_sum_that_is_written_elsewhere_is_caught(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MergePass._change

    def rolled(self: Any, path: Any, cut: Any) -> Any:
        changed = real(self, path, cut)
        if cut.header.name.endswith("layers.1.mlp.up_proj.weight"):
            changed = changed._replace(weight=changed.weight.roll(-1, 0))
        return changed

    monkeypatch.setattr(MergePass, "_change", rolled)
    with pytest.raises(NumericError, match="up_proj") as error:
        merge(str(base), adapter, tmp_path / "out")
    refused(error, "QC-MERGE-007", 76)
    assert list(tmp_path.iterdir()) == []


# -- a tensor that lies on disk in pieces


def test_a_tensor_in_pieces(tmp_path: Path) -> None:
    """One linear map, stored as two tensors in two files: each gets its rows of B A."""
    generator = torch.Generator().manual_seed(4)
    a, b = (torch.randn(shape, generator=generator) for shape in ((3, 10), (14, 3)))
    whole = torch.randn(14, 10, generator=generator).bfloat16()
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    for number, name in enumerate(("gate", "up")):
        part = whole[7 * number : 7 * number + 7].clone()
        save_file({f"model.{name}.weight": part}, base / f"{name}.safetensors")
    names = {f"model.{name}.weight": f"{name}.safetensors" for name in ("gate", "up")}
    (base / INDEX).write_text(json.dumps({"weight_map": names}))
    (base / "config.json").write_text(json.dumps({"model_type": "two_pieces"}))
    row = Row("model.gate_up.weight", "2*ffn hidden", "mlp", kind=LINEAR,
              also=cat("model.gate.weight", "model.up.weight"))  # fmt: skip
    part = Part(name="text", owner="test", rows=(row,), dims={"ffn": 7, "hidden": 10},
                groups={"mlp": Aim.ON})  # fmt: skip
    stem = "base_model.model.model.gate_up"
    save_file(
        {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b},
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["gate_up"]})
    )
    checkpoint = Checkpoint.open(base)
    layout = locate(Table([part]), checkpoint)
    told = read_adapter(adapter, layout, trust_base=True)
    merger = MergePass(
        SimpleNamespace(checkpoint=checkpoint, layout=layout, quantization=None), told
    )  # type: ignore[arg-type]
    found = []
    for shard in ("gate.safetensors", "up.safetensors"):
        data = b"".join(bytes(chunk) for chunk in merger.shard(shard, lambda amount: None))
        (tensor,) = split(data)[1].values()
        found.append(torch.frombuffer(bytearray(tensor), dtype=torch.bfloat16).view(7, 10))
    merger.check()
    expected = (whole.double() + 2 * (b.double() @ a.double())).bfloat16()
    assert torch.equal(torch.cat(found), expected)
    assert merger.changed == 2
