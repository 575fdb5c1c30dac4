"""An adapter in a foreign layout, read through the claim of a plugin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qcore.adapter.reader import read_adapter
from qcore.api.adapter_claims import AdapterClaim
from qcore.errors import InputError
from qcore.plugins.resolve_model import Identified, identify
from qcore_qwen35.tiny import write

TARGET = "model.language_model.layers.0.mlp.gate_proj.weight"
Shapes = Mapping[str, tuple[int, ...]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Identified:
    folder = tmp_path_factory.mktemp("claims") / "base"
    write(folder)
    return identify(str(folder))


@pytest.fixture
def foreign(base: Identified, tmp_path: Path) -> Path:
    out, into = base.layout.table[TARGET].shape
    tensors = {"blk.0.gate.down": torch.randn(4, into), "blk.0.gate.up": torch.randn(out, 4)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


def _claim(layout: str = "blk", weight: str = TARGET, side: str = "A") -> AdapterClaim:
    names = {"blk.0.gate.down": (weight, side), "blk.0.gate.up": (weight, "B")}
    return AdapterClaim(layout=layout, names=names)


def test_without_a_claim_its_tensors_fit_nothing(base: Identified, foreign: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_adapter(foreign, base.layout, trust_base=True, claims=base.adapter_claims)
    assert caught.value.code in ("QC-ADAPTER-005", "QC-ADAPTER-006")


def test_a_claim_maps_its_tensors_to_weights(base: Identified, foreign: Path) -> None:
    seen: list[Shapes] = []

    def claims(shapes: Shapes) -> list[AdapterClaim]:
        seen.append(shapes)
        return [_claim()]

    adapter = read_adapter(foreign, base.layout, trust_base=True, claims=claims)
    assert {*adapter.pairs} == {TARGET}
    assert adapter.pairs[TARGET].pieces[0].a.name == "blk.0.gate.down"
    assert adapter.pairs[TARGET].scaling == 2.0
    assert adapter.layout == "blk"
    assert seen[0]["blk.0.gate.down"] == (4, base.layout.table[TARGET].shape[1])


@pytest.mark.parametrize(
    "claims",
    [[_claim(), _claim("other")], [_claim(weight="model.nothing.weight")], [_claim(side="C")]],
    ids=["two", "no weight", "no side"],
)
def test_a_claim_that_cannot_be_followed_is_refused(
    base: Identified, foreign: Path, claims: list[AdapterClaim]
) -> None:
    with pytest.raises(InputError) as caught:
        read_adapter(foreign, base.layout, trust_base=True, claims=lambda shapes: claims)
    assert caught.value.code == "QC-ADAPTER-010"


@pytest.mark.parametrize(
    "stacks", [("gate_up_proj",), ("down_proj",), ("gate_up_proj", "down_proj")]
)
def test_a_claim_of_experts_needs_no_declared_parameters(
    tmp_path: Path, stacks: tuple[str, ...]
) -> None:
    write(tmp_path / "base", moe=True)
    base = identify(str(tmp_path / "base"))
    r, tensors, names = 2, {}, {}
    for stack in stacks:
        weight = f"model.language_model.layers.1.mlp.experts.{stack}"
        experts, out, into = base.layout.table[weight].shape
        tensors |= {f"{stack}.down": torch.randn(experts * r, into)}
        tensors |= {f"{stack}.up": torch.randn(out, r * experts)}
        names |= {f"{stack}.down": (weight, "A"), f"{stack}.up": (weight, "B")}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    claim = AdapterClaim(layout="blk", names=names)
    adapter = read_adapter(tmp_path, base.layout, trust_base=True, claims=lambda shapes: [claim])
    told = {(pair.pieces[0].a.name, weight, "A") for weight, pair in adapter.pairs.items()}
    told |= {(pair.pieces[0].b.name, weight, "B") for weight, pair in adapter.pairs.items()}
    assert told == {(name, *where) for name, where in names.items()}
