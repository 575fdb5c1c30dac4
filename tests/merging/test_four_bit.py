"""Bases that bitsandbytes stored in 4 bits: read and held as they are, trained on, merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.change_kit import written
from support.cli_kit import here
from support.conversations import conversations, write_rows
from support.e2e_kit import CPU, LENGTHS, LINEARS, documents, our_logits, ours, write_stock
from support.four_bit_kit import decoded, quantized, write_decoded, write_four_bit
from support.moe_kit import exact, tensors_of
from support.tiers import fast

from qcore.checkpoint.checkpoint import Checkpoint
from qcore.checkpoint.fingerprint import fingerprints
from qcore.checkpoint.four_bit import four_bit_weights
from qcore.config.settings import Settings
from qcore.errors import InputError, NumericError, QcoreError
from qcore.inference.generate import Generator
from qcore.io.artifact import read_manifest
from qcore.merging.merge import merge
from qcore.nn.four_bit import read_four_bit
from qcore.nn.load import load
from qcore.nn.model import Model
from qcore.nn.qlora.linear import Linear
from qcore.plugins.resolve_model import identify
from qcore.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
SKIPPED = r"layers\.0\.mlp\.up_proj|layers\.3\.self_attn\.k_proj"
KINDS: dict[str, dict[str, Any]] = {
    "nf4-double": {}, "nf4": {"nested": False}, "fp4": {"kind": "fp4", "nested": False},
    "fp4-double": {"kind": "fp4"}, "blocks-of-128": {"blocksize": 128},
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(once: Callable[..., Path]) -> Path:
    return once(
        "four-bit-plain",
        lambda home: write_stock(home, "vl", tied=False, mtp=True, dtype=torch.bfloat16),
    )


@pytest.fixture(scope="module")
def base(plain: Path, once: Callable[..., Path]) -> Path:
    return (
        once("four-bit", lambda home: write_four_bit(plain, home / "base", skip=SKIPPED)) / "base"
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", conversations(8))


def trained(base: Path, rows: Path, out: Path, **settings: Any) -> Path:
    options: dict[str, Any] = {
        "max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "r": 4,
        "lora_alpha": 12, "learning_rate": 2e-2, "dtype": "fp32", "save_steps": 0,
    }  # fmt: skip
    train(str(base), rows, out, Settings(**(options | settings)), device="cpu")
    return out


@pytest.fixture(scope="module")
def adapter(base: Path, rows: Path, once: Callable[..., Path]) -> Path:
    return once("four-bit-adapter", lambda home: trained(base, rows, home / "a")) / "a"


# -- read


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_are_those_of_bitsandbytes(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """bitsandbytes' own dequantize_4bit, and NumPy; for rows that it misreads NumPy alone."""
    tensors = {}
    weights = {"a": (96, 128), "b": (130, 64), "c": (48, 80), "d": (7, 33)}
    for name, shape in weights.items():
        weight = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.3).to(dtype)
        parts = quantized(weight, **KINDS[kind])
        tensors |= {f"{name}.weight{leaf}": value for leaf, value in parts.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    checkpoint = Checkpoint.open(tmp_path)
    found, problems = four_bit_weights(checkpoint)
    assert (len(found), problems) == (4, [])
    for name, weight in found.items():
        mine = read_four_bit(checkpoint, weight)
        assert mine.dtype == dtype
        assert torch.equal(mine, decoded(name, tensors)), name
        if weight.shape[-1] % weight.blocksize == 0:
            parts = {
                leaf.removeprefix(f"{name}."): value
                for leaf, value in tensors.items()
                if leaf.startswith(f"{name}.")
            }
            state = bnb.QuantState.from_dict(parts, torch.device("cpu"))
            assert torch.equal(mine, bnb.dequantize_4bit(tensors[name], state)), name


def loaded(folder: Path, *, quantize: bool) -> tuple[Model, dict[str, str]]:
    found = identify(str(folder))
    config = found.checkpoint.config
    model = Model(found.decision.architecture, config, found.layout, torch.bfloat16, {})
    return model, load(model, found.layout, found.checkpoint, device=CPU, quantize=quantize)


def test_codes_are_held_as_they_are(base: Path, plain: Path) -> None:
    tensors = tensors_of(base)
    model, _ = loaded(base, quantize=True)
    stored = {name for name in tensors if f"{name}.absmax" in tensors}
    held = 0
    for name, layer in model.lora_layers.items():
        assert isinstance(layer, Linear)
        assert layer.four_bit == (name in stored), name  # what was skipped stays plain
        if layer.four_bit:
            assert layer.nf4 is not None
            assert torch.equal(layer.nf4.packed, tensors[name])
            assert torch.equal(layer.nf4.state.absmax, tensors[f"{name}.absmax"])
            assert torch.equal(layer.dense(), decoded(name, tensors)), name
            held += 1
    assert held == len(stored) == 23
    again, _ = loaded(plain, quantize=True)  # what qcore quantizes itself is the same
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    assert torch.equal(again.lora_layers[name].dense(), model.lora_layers[name].dense())


def test_one_fingerprint_with_the_decoded_copy(base: Path, tmp_path: Path) -> None:
    copy = write_decoded(base, tmp_path / "copy")
    one, two = identify(str(base)), identify(str(copy))
    digests = loaded(base, quantize=True)[1]
    assert digests == loaded(base, quantize=False)[1]
    assert fingerprints(one.layout, digests) == fingerprints(
        two.layout, loaded(copy, quantize=False)[1]
    )
    assert one.layout.parameters == two.layout.parameters
    docs = documents(LENGTHS)
    assert torch.equal(our_logits(ours(base), docs), our_logits(ours(copy), docs))


# -- trained on, merged


def test_the_merge_is_decoded_plus_delta(
    base: Path, adapter: Path, plain: Path, tmp_path: Path
) -> None:
    report = merge(str(base), adapter, tmp_path / "out", dequantize=True)
    by_hand = write_decoded(base, tmp_path / "hand")
    sums, after = exact(by_hand, adapter), tensors_of(tmp_path / "out")
    assert after.keys() == tensors_of(plain).keys()
    for name, value in tensors_of(by_hand).items():
        wanted = sums[name].bfloat16() if name in sums else value
        assert torch.equal(after[name], wanted), name
    assert (report.decoded, report.changed) == (23, 25)
    assert report.proof is not None
    assert report.proof["difference"] <= 1e-4
    assert report.proof["effect"] > 0.1
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    meta = read_manifest(tmp_path / "out").meta
    assert meta["decoded"] == {"from": "bitsandbytes 4-bit", "to": "bf16", "tensors": 23}
    again = merge(str(by_hand), adapter, tmp_path / "again")
    assert again.changed == report.changed
    two = tensors_of(tmp_path / "again")
    assert all(torch.equal(after[name], two[name]) for name in after)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_merges(plain: Path, tmp_path: Path, kind: str) -> None:
    written(plain, tmp_path / "a", {"target_modules": list(LINEARS)})
    base = write_four_bit(plain, tmp_path / "base", **KINDS[kind])
    report = merge(str(base), tmp_path / "a", tmp_path / "out", trust_base=True, dequantize=True)
    sums = exact(write_decoded(base, tmp_path / "hand"), tmp_path / "a")
    after = tensors_of(tmp_path / "out")
    assert report.changed == len(sums) == 25
    assert all(torch.equal(after[name], value.bfloat16()) for name, value in sums.items())


@pytest.mark.slow
def test_a_target_in_4_bits_is_refused_and_the_fix_works(
    base: Path, adapter: Path, tmp_path: Path, capsys: Any
) -> None:
    common = ("merge", "--model", base, "--adapter", adapter, "--output", tmp_path / "out")
    ended = here(capsys, *common)
    line = ended.error("QC-MERGE-008")
    assert ended.code == 65
    assert "--dequantize" in line
    assert "in 4 bits, which is too coarse" in line
    assert here(capsys, *common, "--dequantize").code == 0


def test_plain_targets_merge_and_4_bits_are_carried(plain: Path, tmp_path: Path) -> None:
    base = write_four_bit(plain, tmp_path / "base", pattern=r"mlp\.\w+_proj\.weight$")
    written(plain, tmp_path / "a", {"target_modules": ["q_proj"]})
    report = merge(str(base), tmp_path / "a", tmp_path / "out", trust_base=True)
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    different = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(different) == report.changed > 0
    assert all(name.endswith("q_proj.weight") for name in different)
    assert report.proof is not None
    assert "stand_ins" not in report.proof


@pytest.mark.parametrize("kind", fast(["fp4-double", "nf4", "blocks-of-128"]))
def test_what_nf4_storage_cannot_hold(
    plain: Path, rows: Path, tmp_path: Path, kind: str, capsys: Any
) -> None:
    base = write_four_bit(plain, tmp_path / "base", **KINDS[kind])
    with pytest.raises(QcoreError) as error:
        trained(base, rows, tmp_path / "a")
    assert error.value.code == "QC-LOAD-005"
    assert "quantization=none" in str(error.value.fix)
    with pytest.raises(QcoreError) as error:
        Generator(str(base), device="cpu", quantization="nf4")
    assert error.value.code == "QC-LOAD-005"
    if kind == "nf4":
        trained(base, rows, tmp_path / "a", quantization="none", max_steps=1)
        merge(str(base), tmp_path / "a", tmp_path / "out", dequantize=True)
        assert (tmp_path / "a" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_the_other_verbs(base: Path, adapter: Path, rows: Path, capsys: Any) -> None:
    told = here(capsys, "inspect", base, "--json").json
    assert told["quantisation"]["format"] == "bitsandbytes 4-bit"
    assert told["quantisation"]["readable"] is True
    assert told["unaccounted"] == told["differences"] == []
    plan = here(capsys, "plan", base, "--json", "--set", "max_length=64")
    assert plan.code == 0, plan.err
    ended = here(
        capsys, "generate", base, "--adapter", adapter, "--prompt", "x", "--device", "cpu",
        "--max-new-tokens", "2", "--quantization", "nf4",
    )  # fmt: skip
    assert ended.code == 0, ended.err


# -- what is wrong


def changed(base: Path, folder: Path, name: str, value: torch.Tensor | None) -> Path:
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


WEIGHT = "model.language_model.layers.1.mlp.up_proj.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"


def as_state(**values: Any) -> torch.Tensor:
    good = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [96, 64],
        "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05,
    }  # fmt: skip
    return torch.tensor(list(json.dumps(good | values).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "value",
    [
        as_state(shape=[96, 65]), as_state(blocksize=0), as_state(blocksize=32),
        as_state(dtype="int8"), as_state(quant_type="fp4"), as_state(nested_offset=None),
        as_state(shape="x"), torch.tensor(list(b"{"), dtype=torch.uint8), as_state()[:-9],
    ],
)  # fmt: skip
def test_a_state_that_contradicts_the_tensors(
    base: Path, tmp_path: Path, value: torch.Tensor
) -> None:
    with pytest.raises(InputError) as error:
        identify(str(changed(base, tmp_path / "bad", STATE, value)))
    assert (error.value.code, error.value.field) == ("QC-KEY-008", STATE)


def test_a_companion_that_is_missing_or_wrong(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        identify(str(changed(base, tmp_path / "one", f"{WEIGHT}.nested_absmax", None)))
    assert error.value.code == "QC-KEY-008"
    other = torch.linspace(-1, 1, 16)
    folder = changed(base, tmp_path / "two", f"{WEIGHT}.quant_map", other)
    with pytest.raises(InputError) as error:
        loaded(folder, quantize=False)
    assert error.value.code == "QC-LOAD-004"
    folder = changed(base, tmp_path / "three", f"{WEIGHT}.nested_absmax", torch.tensor([torch.nan]))
    with pytest.raises(NumericError) as numeric:
        loaded(folder, quantize=True)
    assert numeric.value.code == "QC-LOAD-003"
