"""YaRN: tables, logits and gradients against transformers, and what is refused of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.blocks_kit import tiny_config
from support.e2e_kit import (
    documents,
    figure,
    our_logits,
    ours,
    pairs,
    random_b,
    stock,
    stock_logits,
    wanted,
    wrapped,
    write_stock,
)
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextRotaryEmbedding

from qcore.api.blocks import Packed
from qcore.api.records import Severity
from qcore.nn.qlora.lora_layer import Lora
from qcore_qwen35.guards import config_findings
from qcore_qwen35.rope import Rope

#: As documented for the real models: what replaces rope_parameters to extend the context.
REAL: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10_000_000,
    "partial_rotary_factor": 0.25,
    "mrope_section": [11, 11, 10],
    "mrope_interleaved": True,
    "factor": 4.0,
    "original_max_position_embeddings": 262_144,
}
LEFT_OUT = "left out"


def text(**rope: Any) -> dict[str, Any]:
    """The text section of the real rope with changes."""
    merged = {key: value for key, value in (REAL | rope).items() if value != LEFT_OUT}
    return tiny_config(head_dim=256, max_position_embeddings=262_144, rope_parameters=merged)


CASES: dict[str, dict[str, Any]] = {
    "as documented": {},
    "factor 1": {"factor": 1},
    "factor 1.5": {"factor": 1.5},
    "factor 2": {"factor": 2.0},
    "factor 3.853": {"factor": 1_010_000 / 262_144},
    "factor 32": {"factor": 32},
    "a short context": {"original_max_position_embeddings": 4096},
    "so short that no frequency stays": {"original_max_position_embeddings": 64},
    "borders not rounded": {"truncate": False, "original_max_position_embeddings": 8192},
    "borders coincide": {"beta_fast": 8.0, "beta_slow": 8.0, "truncate": False},
    "other borders": {"beta_fast": 64, "beta_slow": 0.5},
    "null borders": {"beta_fast": None, "beta_slow": None},
    "attention factor": {"attention_factor": 0.9},
    "null attention factor": {"attention_factor": None},
    "mscale": {"mscale": 0.707, "mscale_all_dim": 1.0},
    "half of mscale": {"mscale": 0.707},
    "mscale 0": {"mscale": 0.707, "mscale_all_dim": 0.0},
    "another theta": {"rope_theta": 10_000.0},
    "partial factor left out": {"partial_rotary_factor": LEFT_OUT},
    "sections left out": {"mrope_section": LEFT_OUT, "mrope_interleaved": LEFT_OUT},
    "the whole head": {"partial_rotary_factor": 1.0, "mrope_section": [44, 42, 42]},
    "type, as older files say": {"rope_type": LEFT_OUT, "type": "yarn"},
}


def theirs(config: dict[str, Any]) -> Qwen3_5TextRotaryEmbedding:
    return Qwen3_5TextRotaryEmbedding(Qwen3_5TextConfig(**copy.deepcopy(config)))


def batch(positions: Tensor) -> Packed:
    count = positions.shape[-1]
    return Packed(torch.zeros(count, dtype=torch.int64), (0, count), positions)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables(case: str, axes: int, dtype: torch.dtype) -> None:
    config = text(**CASES[case])
    assert [f for f in config_findings(config) if f.severity is Severity.ERROR] == []
    line = torch.tensor([0, 1, 2, 63, 1000, 262_143, 262_144, 900_001])
    positions = line if axes == 1 else torch.stack([line, line // 3, line % 701])
    rope, reference = Rope.of(config), theirs(config)
    assert rope.scaling == pytest.approx(reference.attention_scaling, rel=1e-12)
    assert torch.equal(rope.frequencies(), reference.inv_freq)
    given = positions[None, None] if axes == 1 else positions[:, None]
    expected = reference(torch.zeros(1, dtype=dtype), given)
    for mine, other in zip(rope.tables(batch(positions), dtype), expected, strict=True):
        assert mine.dtype == dtype
        assert torch.equal(mine[:, 0], other[0])


def test_the_attention_factor_of_the_real_models() -> None:
    assert Rope.of(text()).scaling == pytest.approx(1.138629, abs=5e-7)
    plain = tiny_config(head_dim=256, rope_parameters=REAL | {"rope_type": "default"})
    assert Rope.of(plain).scaling == 1.0


def test_fast_frequencies_stay_and_slow_ones_are_slowed_down() -> None:
    """By hand: frequency j turns 262144 / (2 pi 1e7 ** (j / 32)) times within the context."""
    stretched, plain = (Rope.of(text(rope_type=kind)).frequencies() for kind in ("yarn", "default"))
    turns = 262_144 / (2 * torch.pi) * plain.double()
    # j is 14.2 at 32 turns and 21.1 at one; the borders lie at 14 and 22.
    assert int((turns > 32).sum()) == 15
    assert int((turns > 1).sum()) == 22
    assert torch.equal(stretched[:15], plain[:15])
    assert torch.allclose(stretched[22:], plain[22:] / 4, rtol=1e-6)
    ratio = plain / stretched
    assert bool((ratio[14:22].diff() > 0).all())


def test_the_tables_are_made_once_for_all_layers_and_apart_from_plain_ones() -> None:
    given = batch(torch.arange(5))
    rope, plain = Rope.of(text()), Rope.of(text(rope_type="default"))
    first = rope.tables(given, torch.float32)
    assert rope.tables(given, torch.float32)[0] is first[0]
    assert not torch.equal(plain.tables(given, torch.float32)[0], first[0])


# -- the whole model

#: A context so short that the documents below lie in all three ranges of it.
SHORT: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("yarn")
    return write_stock(
        folder, "text", rope_parameters=dict(SHORT), max_position_embeddings=128, head_dim=32
    )


def test_logits(extended: Path) -> None:
    docs = documents((37, 1, 120, 5))
    expected = stock_logits(stock(extended, "text"), docs)
    model = ours(extended)
    found = our_logits(model, docs)
    gap = float((found - expected).abs().max())
    figure(f"logits under YaRN differ by {gap:.1e} of {float(expected.abs().max()):.2f}")
    assert gap <= 1e-5
    # The bound would see YaRN left out.
    for layer in model.trunk.layers:
        if hasattr(layer, "self_attn"):
            plain = {**SHORT, "rope_type": "default"}
            config = {"head_dim": 32, "rope_parameters": plain}
            layer.self_attn.rope = Rope.of(config)
    assert float((our_logits(model, docs) - expected).abs().max()) > 1e-3


def test_gradients(extended: Path) -> None:
    names = ["q_proj", "k_proj"]
    reference = wrapped(stock(extended, "text"), r=4, lora_alpha=6, target_modules=names)
    model = ours(extended, lora=Lora(r=4, lora_alpha=6))
    random_b(model)
    adapters = dict(model.adapters())
    theirs = {name: (a, b) for name, a, b in pairs(reference, "text")}
    with torch.no_grad():
        for name, module in adapters.items():
            if name in theirs:
                theirs[name][0].copy_(module.lora_A)
                theirs[name][1].copy_(module.lora_B)
            else:
                module.lora_B.zero_()
    docs = documents((70, 9))
    targets = wanted(docs)
    losses = [
        cross_entropy(
            reference(input_ids=ids[None], use_cache=False).logits[0], target, reduction="sum"
        )
        for ids, target in zip(docs, targets, strict=True)
    ]
    sum(losses, torch.zeros(())).backward()
    model.train().loss(Packed.of(docs, targets), recompute="full").backward()
    assert theirs
    worst = 0.0
    for name, sides in theirs.items():
        for mine, other in zip((adapters[name].lora_A, adapters[name].lora_B), sides, strict=True):
            assert float(other.grad.abs().max()) > 0
            worst = max(worst, float((mine.grad - other.grad).abs().max() / other.grad.abs().max()))
    figure(f"gradients of q and k under YaRN differ by {worst:.1e}")
    assert worst <= 1e-4


# -- what is refused

REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no theta": ({"rope_theta": LEFT_OUT}, "012", "rope_parameters.rope_theta"),
    "theta 1": ({"rope_theta": 1}, "012", "rope_parameters.rope_theta"),
    "theta of 400 digits": ({"rope_theta": 10**400}, "012", "rope_parameters.rope_theta"),
    "no factor": ({"factor": LEFT_OUT}, "011", "rope_parameters.factor"),
    "null factor": ({"factor": None}, "011", "rope_parameters.factor"),
    "factor below 1": ({"factor": 0.5}, "011", "rope_parameters.factor"),
    "factor is text": ({"factor": "4"}, "011", "rope_parameters.factor"),
    "factor is true": ({"factor": True}, "011", "rope_parameters.factor"),
    "factor is NaN": ({"factor": float("nan")}, "011", "rope_parameters.factor"),
    "no trained context": (
        {"original_max_position_embeddings": LEFT_OUT}, "011", "original_max_position_embeddings"
    ),
    "a trained context of 0": (
        {"original_max_position_embeddings": 0}, "011", "original_max_position_embeddings"
    ),
    "a trained context of 262144.0": (
        {"original_max_position_embeddings": 262144.0}, "011", "original_max_position_embeddings"
    ),
    "beta_fast below beta_slow": ({"beta_fast": 1, "beta_slow": 32}, "011", "beta_fast"),
    "beta_fast 0": ({"beta_fast": 0}, "011", "beta_fast"),
    "attention_factor below 0": ({"attention_factor": -1.0}, "011", "attention_factor"),
    "mscale is text": ({"mscale": "1"}, "011", "mscale"),
    "truncate null": ({"truncate": None}, "011", "truncate"),
    "a key nobody reads": ({"attn_factor": 1.0}, "011", "attn_factor"),
    "not interleaved": ({"mrope_interleaved": False}, "011", "mrope_interleaved"),
    "two sections": ({"mrope_section": [16, 16]}, "011", "mrope_section"),
    "dynamic": ({"rope_type": "dynamic"}, "011", "rope_type"),
    "longrope as type": ({"rope_type": LEFT_OUT, "type": "longrope"}, "011", "rope_type"),
    "no type": ({"rope_type": None}, "011", "rope_type"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    change, code, field = REFUSED[case]
    (found,) = config_findings(text(**change))
    assert found.code == f"QC-QWEN35-{code}"
    assert found.severity is Severity.ERROR
    assert (found.field or "").endswith(field)
    if "rope_type" in field:
        assert str(change.get("type", change["rope_type"])) in (found.found or "")


def test_rope_scaling_takes_the_place_of_rope_parameters_so_it_is_refused() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    config = {**text(rope_type="default"), "rope_scaling": scaling}
    read = Qwen3_5TextConfig(**copy.deepcopy(config)).rope_parameters
    assert (read["rope_type"], read["rope_theta"]) == ("yarn", 10_000.0)
    assert "rope_scaling" in [found.field for found in config_findings(config)]


def test_a_trained_context_beside_rope_parameters_wins_so_it_is_refused() -> None:
    config = {**text(), "original_max_position_embeddings": 1024}
    read = theirs(config).config.rope_parameters
    assert read["original_max_position_embeddings"] == 1024
    (found,) = config_findings(config)
    assert (found.code, found.found) == ("QC-QWEN35-011", "1024")


def test_a_dropped_theta_would_become_10000() -> None:
    config = text(rope_theta=LEFT_OUT)
    assert Qwen3_5TextConfig(**copy.deepcopy(config)).rope_parameters["rope_theta"] == 10_000.0
    assert [found.code for found in config_findings(config)] == ["QC-QWEN35-012"]


@pytest.mark.parametrize(
    ("longest", "warns"), [(262_144, False), (1_048_576, False), (1_010_000, True)]
)
def test_the_factor_beside_the_ratio_of_lengths(longest: int, warns: bool) -> None:
    config = {**text(), "max_position_embeddings": longest}
    found = list(config_findings(config))
    assert [one.code for one in found] == ["QC-QWEN35-014"] * warns
    assert all(one.severity is Severity.WARNING for one in found)
