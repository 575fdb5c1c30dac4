"""Our trunk against transformers on the same weights: logits, every gradient, positions."""

from __future__ import annotations

import pytest
import torch
from support.blocks_kit import GivenWeights, Twins, documents, relative, tiny_config, twins

from qcore.api.blocks import Packed
from qcore_qwen35.guards import config_findings
from qcore_qwen35.model import build
from qcore_qwen35.rope import Rope

SHAPES = {
    "equal heads": {"linear_num_value_heads": 2},
    "two value heads a key head": {},
    "three value heads a key head": {"linear_num_value_heads": 6},
    "one key head, square state": {
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_value_head_dim": 16,
    },
    "one kv head": {"num_key_value_heads": 1, "num_attention_heads": 3},
    "all heads rotate": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 1.0,
            "mrope_section": [6, 5, 5],
        }
    },
    "attention first": {"layers": ["full_attention", "linear_attention", "full_attention"]},
}


@pytest.fixture(scope="module", params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def pair(request: pytest.FixtureRequest) -> Twins:
    return twins(tiny_config(**SHAPES[request.param]))


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 130])
def test_logits_equal_the_reference(pair: Twins, length: int) -> None:
    (ids,) = documents(length)
    with torch.no_grad():
        found, wanted = pair.logits(Packed.of([ids])), pair.reference(ids)
    assert float((found - wanted).abs().max()) <= 1e-5


# Not two tokens: there the decay's gradient is a small difference of large numbers, and the
# reference itself is 1.8e-4 away from float64.
@pytest.mark.parametrize("length", [5, 65, 130])
def test_gradients_equal_the_reference(pair: Twins, length: int) -> None:
    (ids,) = documents(length, seed=1)
    batch = Packed.of([ids])
    pair.theirs.zero_grad()
    pair.ours.zero_grad()
    with torch.no_grad():
        embedded = pair.ours.embed(batch)
    mine, other = embedded.clone().requires_grad_(), embedded.clone().requires_grad_()
    weights = torch.randn(length, pair.head.shape[0], generator=torch.Generator().manual_seed(3))
    (pair.logits(batch, mine) * weights).sum().backward()
    theirs = pair.theirs(inputs_embeds=other[None], use_cache=False).logits[0]
    (theirs * weights).sum().backward()
    assert relative(mine.grad, other.grad) <= 1e-4
    wanted = dict(pair.theirs.model.named_parameters())
    compared = 0
    for name, parameter in pair.ours.named_parameters():
        if name == "embed_tokens.weight":
            continue
        assert relative(parameter.grad, wanted[name].grad) <= 1e-4, name
        compared += 1
    assert compared == len(wanted) - 1


def test_the_embedding_gets_its_gradient(pair: Twins) -> None:
    (ids,) = documents(9)
    pair.theirs.zero_grad()
    pair.ours.zero_grad()
    pair.logits(Packed.of([ids])).square().sum().backward()
    pair.reference(ids).square().sum().backward()
    wanted = pair.theirs.model.embed_tokens.weight.grad
    assert relative(pair.ours.embed_tokens.weight.grad, wanted) <= 1e-4


def test_parameter_names_are_the_reference_s() -> None:
    pair = twins(tiny_config())
    assert set(pair.ours.state_dict()) == set(pair.theirs.model.state_dict())


def test_torch_s_own_attention_gives_the_same(pair: Twins) -> None:
    (ids,) = documents(77)
    pair.theirs.set_attn_implementation("sdpa")
    with torch.no_grad():
        found, wanted = pair.logits(Packed.of([ids])), pair.reference(ids)
    pair.theirs.set_attn_implementation("eager")
    assert float((found - wanted).abs().max()) <= 1e-5


@pytest.mark.parametrize("section", [[3, 3, 2], [4, 2, 2], [8, 0, 0]])
def test_three_axes_of_positions(section: list[int]) -> None:
    rope = {**tiny_config()["rope_parameters"], "mrope_section": section}
    pair = twins(tiny_config(rope_parameters=rope))
    (ids,) = documents(41)
    positions = torch.stack([torch.arange(41), torch.arange(41) // 3, torch.arange(41) % 7])
    batch = Packed(ids=ids, cu_seqlens=(0, 41), positions=positions)
    with torch.no_grad():
        found = pair.logits(batch)
        wanted = pair.reference(ids, position_ids=positions[:, None])
        text = pair.reference(ids)
    assert float((found - wanted).abs().max()) <= 1e-5
    if section[1]:
        assert float((found - text).abs().max()) > 1e-2


def test_equal_axes_are_text() -> None:
    pair = twins(tiny_config())
    (ids,) = documents(30)
    batch = Packed(ids=ids, cu_seqlens=(0, 30), positions=torch.arange(30).expand(3, -1))
    with torch.no_grad():
        assert torch.equal(pair.logits(batch), pair.logits(Packed.of([ids])))


def test_positions_are_relative_and_read_from_the_batch() -> None:
    pair = twins(tiny_config())
    (ids,) = documents(30)
    shifted = Packed(ids=ids, cu_seqlens=(0, 30), positions=torch.arange(30) + 11)
    spread = Packed(ids=ids, cu_seqlens=(0, 30), positions=torch.arange(30) * 2)
    with torch.no_grad():
        plain = pair.logits(Packed.of([ids]))
        assert float((pair.logits(shifted) - plain).abs().max()) <= 2e-5
        assert float((pair.logits(spread) - plain).abs().max()) > 1e-2


def test_a_vision_language_config_is_read_through_its_text_section() -> None:
    pair = twins(tiny_config())
    whole = {"model_type": "qwen3_5", "text_config": tiny_config(), "vision_config": {}}
    trunk = build(GivenWeights(whole, pair.theirs.model.state_dict(), torch.float32))
    batch = Packed.of(documents(12))
    assert torch.equal(trunk.embed(batch), pair.ours.embed(batch))
    assert len(trunk.layers) == 4


@pytest.mark.parametrize(
    ("change", "code", "field"),
    [
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "011", "rope_type"),
        ({"rope_parameters": {"rope_type": "default"}}, "012", "rope_theta"),
        ({"rope_parameters": None}, "011", "rope_parameters"),
        ({"attn_output_gate": False}, "010", "attn_output_gate"),
        ({"output_gate_type": "tanh"}, "010", "output_gate_type"),
        ({"attention_bias": True}, "010", "attention_bias"),
        ({"hidden_act": "gelu"}, "010", "hidden_act"),
        ({"attention_dropout": 0.1}, "010", "attention_dropout"),
    ],
)
def test_other_forms_are_refused(change: dict[str, object], code: str, field: str) -> None:
    found = list(config_findings(tiny_config(**change)))
    assert found, "the blocks would compute something else"
    assert found[0].code == f"QC-QWEN35-{code}"
    assert field in (found[0].field or "")
    assert not list(config_findings(tiny_config()))


def test_rope_of_the_real_models() -> None:
    text = tiny_config(head_dim=256)
    text["rope_parameters"] = {
        "rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
    }  # fmt: skip
    rope = Rope.of(text)
    assert (rope.theta, rope.dim, rope.section) == (1e7, 64, (11, 11, 10))
    # Which axis drives frequency j, by hand: T H W T H W ... and the 32 of them 11, 11, 10.
    batch = Packed(torch.zeros(1, dtype=torch.int64), (0, 1), torch.tensor([[0], [1], [2]]))
    cos, _ = rope.tables(batch, torch.float32)
    frequencies = 1e7 ** (-torch.arange(32) / 32)
    axis = torch.tensor([0, 1, 2] * 10 + [0, 1])
    assert axis.bincount().tolist() == [11, 11, 10]
    assert torch.allclose(cos[0, 0, :32], (axis * frequencies).cos(), atol=1e-6)
