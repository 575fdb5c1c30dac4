"""DoRA in whole models and runs, against stock PEFT on the same 4-bit base in float32."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support.change_kit import assert_merged
from support.e2e_kit import (
    documents,
    loaded_adapter,
    ours,
    random_b,
    stock,
    wanted,
    wrapped,
    write_stock,
)
from support.run_kit import SHORT, start, stop_at
from support.sinks import Heard
from torch import Tensor

from qcore.api.blocks import Packed
from qcore.config.settings import Settings
from qcore.errors import Interrupted, NumericError, UsageError
from qcore.io.artifact import read_manifest
from qcore.merging.merge import merge
from qcore.nn.model import Model
from qcore.nn.qlora.lora_layer import Lora
from qcore.plugins.resolve_model import identify
from qcore.training.initial_adapter import AdapterWords, start_from

pytestmark = pytest.mark.usefixtures("one_thread")
DORA = Lora(r=4, lora_alpha=6, use_dora=True)
LENGTHS = (1, 63, 17, 30)
GROUPS = {False: ("attn", "gdn", "mlp"), True: ("attn", "gdn", "shared_expert")}
RUN = SHORT | {
    "max_steps": 3, "use_dora": True, "target_groups": ("attn", "mlp"), "learning_rate": 5e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(once: Callable[..., Path]) -> Mapping[bool, Path]:
    """A dense base, and a mixture of experts."""
    return {
        moe: once(f"dora-{moe}", lambda folder, moe=moe: write_stock(folder / "base", moe=moe))
        for moe in (False, True)
    }


def with_magnitudes(model: Model) -> Model:
    """B and m as if trained."""
    random_b(model)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, module in model.adapters():
            m = module.lora_magnitude_vector
            assert m is not None
            m.mul_(1 + 0.2 * torch.randn(m.shape, generator=generator))
    return model


def peers(base: Path, model: Model, *, moe: bool) -> Any:
    """Stock PEFT over the values that our weights have, dequantized, with our A, B and m."""
    held: Any = model.lora_layers
    plain = stock(base, "vl", moe=moe)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name in held and parameter.dim() == 2:
                parameter.copy_(held[name].dense())
            elif name in held:
                for expert, value in enumerate(parameter):
                    value.copy_(held[name].dense_slice(expert))
    named = [name.removesuffix(".weight") for name, _ in model.adapters()]
    peer = wrapped(plain, target_modules=named, r=DORA.r, lora_alpha=6, use_dora=True)
    with torch.no_grad():
        for name, own in model.adapters():
            for theirs, mine in zip(factors(peer, name), own.factors, strict=True):
                theirs.copy_(mine)
    return peer


def factors(peer: Any, name: str) -> list[Tensor]:
    layer = peer.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
    assert isinstance(layer, peft.tuners.lora.LoraLayer)
    sides = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    return [side["default"].weight for side in sides]


@pytest.mark.parametrize("policy", ["none", "elementwise", "full"])
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "experts"])
def test_gradients_of_a_pack_are_pefts(bases: Mapping[bool, Path], moe: bool, policy: str) -> None:
    base = bases[moe] / "base"
    model = with_magnitudes(ours(base, lora=DORA, groups=GROUPS[moe], quantize=True)).train()
    assert any(module.four_bit for _, module in model.adapters())
    docs, targets = documents(LENGTHS), wanted(documents(LENGTHS))
    loss = model.loss(Packed.of(docs, targets), recompute=policy)
    loss.backward()
    peer = peers(base, model, moe=moe)
    total = torch.zeros(())
    for ids, target in zip(docs, targets, strict=True):
        logits = peer(input_ids=ids[None], use_cache=False).logits[0]
        total = total + F.cross_entropy(logits, target, reduction="sum", ignore_index=-100)
    total.backward()
    assert float(loss) == pytest.approx(float(total), rel=1e-5)
    for name, own in model.adapters():
        for mine, theirs in zip(own.factors, factors(peer, name), strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            gap = float((mine.grad - theirs.grad).norm())
            assert gap <= 1e-4 * float(theirs.grad.norm()), (name, mine.shape)


def test_a_run_is_pefts_adapter_and_merges(
    bases: Mapping[bool, Path], rows: Path, tmp_path: Path
) -> None:
    base, heard = bases[False] / "base", Heard()
    out = tmp_path / "out"
    start(base, rows, out, RUN | {"quantization": "none"}, reporter=heard.reporter)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["use_dora"] is True
    assert "merge it with the base first" in (out / "README.md").read_text()
    values = load_file(out / "adapter_model.safetensors")
    magnitudes = [name for name in values if name.endswith(".lora_magnitude_vector")]
    assert len(magnitudes) == len(values) // 3 > 0
    coverage = read_manifest(out).meta["coverage"]
    trained = sum(line["trained"] for line in coverage)
    assert trained == sum(value.numel() for value in values.values())
    peer = loaded_adapter(stock(base, "vl"), out)
    plain = stock(base, "vl").state_dict()
    for name in magnitudes:
        stem = name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
        moved = values[name] - plain[f"{stem}.weight"].norm(dim=1)
        assert 0 < float(moved.abs().max()) < 3 * 1.01 * 5e-3  # three steps of AdamW
        assert torch.equal(peer.state_dict()[f"{name}.default.weight"], values[name])
    report = merge(str(base), out, tmp_path / "merged")
    assert report.proof is not None
    assert len(assert_merged(peer, base, tmp_path / "merged")) == len(magnitudes)


@pytest.mark.slow
def test_a_resumed_run_is_the_same_bit_for_bit(
    bases: Mapping[bool, Path], rows: Path, tmp_path: Path
) -> None:
    base, options = bases[False] / "base", RUN | {"save_steps": 1}
    start(base, rows, tmp_path / "whole", options)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Interrupted):
            start(base, rows, tmp_path / "again", options)
    start(base, rows, tmp_path / "again", options, resume=True)
    one, two = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "again")
    )
    assert one == two


@pytest.mark.slow
def test_a_run_starts_from_one(bases: Mapping[bool, Path], rows: Path, tmp_path: Path) -> None:
    base = bases[False] / "base"
    options = {key: value for key, value in RUN.items() if key not in ("r", "lora_alpha")}
    start(base, rows, tmp_path / "first", RUN)
    start(base, rows, tmp_path / "out", options | {"max_steps": 1}, init_adapter=tmp_path / "first")
    first, now = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "out")
    )
    assert first.keys() == now.keys()
    moved = {name: float((now[name] - first[name]).abs().max()) for name in first}
    assert all(0 < value < 1.01 * 5e-3 for value in moved.values())
    words = AdapterWords(
        init_adapter=tmp_path / "first",
        origins=dict.fromkeys(Settings().to_dict(), "default") | {"use_dora": "flag"},
    )
    with pytest.raises(UsageError) as error:
        start_from(words, identify(str(base)), Settings())
    assert (error.value.code, error.value.field) == ("QC-TRAIN-011", "use_dora")


def test_experts_have_no_dora_as_in_peft(
    bases: Mapping[bool, Path], rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as error:
        start(bases[True] / "base", rows, tmp_path / "out", RUN | {"target_groups": ()})
    assert (error.value.code, error.value.field) == ("QC-LORA-003", "use_dora")
    with pytest.raises(ValueError, match="use_dora"):
        wrapped(
            stock(bases[True] / "base", "vl", moe=True),
            target_parameters=["mlp.experts.down_proj"], use_dora=True,
        )  # fmt: skip


def test_rows_of_zeros_are_refused(bases: Mapping[bool, Path], rows: Path, tmp_path: Path) -> None:
    base = write_stock(tmp_path / "base")
    values = load_file(base / "model.safetensors")
    name = next(name for name in values if name.endswith("mlp.up_proj.weight"))
    values[name][3] = 0
    save_file(values, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericError) as error:
        start(base, rows, tmp_path / "out", RUN)
    assert (error.value.code, error.value.field) == ("QC-TRAIN-014", name)
    assert not (tmp_path / "out").exists()
