"""bfloat16: every rounding where the reference has it; hand-written gradients against autograd."""

from __future__ import annotations

import pytest
import torch
from support.blocks_kit import Twins, documents, relative, tiny_config, twins
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5 as reference

from qcore.api.blocks import Packed
from qcore_qwen35.ops.attention.reference import output_gate
from qcore_qwen35.ops.norm.reference import gated_norm, rms_norm
from qcore_qwen35.ops.swiglu.reference import swiglu
from qcore_qwen35.rope import rotate

HALF = torch.bfloat16


@pytest.fixture(scope="module")
def pair() -> Twins:
    return twins(tiny_config(), dtype=HALF)


def test_norms_are_bit_equal(pair: Twins) -> None:
    x = (torch.randn(50, 48) * 3).to(HALF)
    theirs = pair.theirs.model.layers[0].input_layernorm
    assert torch.equal(rms_norm(x, theirs.weight, 1e-6), theirs(x))
    gated = pair.theirs.model.layers[0].linear_attn.norm
    o, z = (torch.randn(50, 4, 24).to(HALF) for _ in "oz")
    assert torch.equal(gated_norm(o, z, gated.weight, 1e-6), gated(o, z))


def test_mlp_is_bit_equal(pair: Twins) -> None:
    x = torch.randn(50, 48).to(HALF)
    assert torch.equal(pair.ours.layers[0].mlp(x), pair.theirs.model.layers[0].mlp(x))


def test_rope_is_bit_equal(pair: Twins) -> None:
    positions = torch.arange(300)
    batch = Packed(torch.zeros(300, dtype=torch.int64), (0, 300), positions)
    cos, sin = pair.ours.layers[3].mixer.rope.tables(batch, HALF)
    x = torch.randn(1, 300, 4, 32).to(HALF)
    wanted_cos, wanted_sin = pair.theirs.model.rotary_emb(x, positions.expand(3, 1, -1))
    assert torch.equal(cos[:, 0], wanted_cos[0])
    assert torch.equal(sin[:, 0], wanted_sin[0])
    wanted, _ = reference.apply_rotary_pos_emb(x, x, wanted_cos, wanted_sin, unsqueeze_dim=2)
    assert torch.equal(rotate(x[0], cos, sin), wanted[0])


def test_delta_net_is_bit_equal_but_for_sums_in_another_order(pair: Twins) -> None:
    x = torch.randn(130, 48).to(HALF)
    with torch.no_grad():
        found = pair.ours.layers[0].mixer(x, Packed.of([torch.zeros(130, dtype=torch.int64)]))
        wanted = pair.theirs.model.layers[0].linear_attn(x[None])[0]
    assert float((found == wanted).float().mean()) > 0.97
    assert relative(found.float(), wanted.float()) < 0.01


def test_attention_is_as_close(pair: Twins) -> None:
    x = torch.randn(90, 48).to(HALF)
    batch = Packed.of([torch.zeros(90, dtype=torch.int64)])
    embeddings = pair.theirs.model.rotary_emb(x[None], torch.arange(90).expand(3, 1, -1))
    mask = torch.full((90, 90), float("-inf")).triu(1)[None, None].to(HALF)
    with torch.no_grad():
        found = pair.ours.layers[3].mixer(x, batch)
        wanted = pair.theirs.model.layers[3].self_attn(x[None], embeddings, mask)[0][0]
    assert relative(found.float(), wanted.float()) < 0.02


def test_the_whole_model_errs_no_more_than_the_reference(pair: Twins) -> None:
    (ids,) = documents(100)
    single = twins(tiny_config())
    single.theirs.load_state_dict(pair.theirs.state_dict())
    with torch.no_grad():
        exact = single.reference(ids)
        ours = pair.logits(Packed.of([ids])).float()
        theirs = pair.reference(ids).float()
    mine, other = (ours - exact).square().mean().sqrt(), (theirs - exact).square().mean().sqrt()
    assert float(mine) < 1.15 * float(other)


def test_bfloat16_gradients_err_no_more_than_the_reference(pair: Twins) -> None:
    """Root mean square error against float32 on the same numbers, input of the trunk."""
    (ids,) = documents(80)
    batch = Packed.of([ids])
    single = twins(tiny_config())
    single.theirs.load_state_dict(pair.theirs.state_dict())
    weights = torch.randn(80, 97)
    grads = []
    for logits, dtype in (
        (lambda e: single.logits(batch, e), torch.float32),
        (lambda e: pair.logits(batch, e), HALF),
        (lambda e: pair.theirs(inputs_embeds=e[None], use_cache=False).logits[0], HALF),
    ):
        e = pair.ours.embed(batch).detach().to(dtype).requires_grad_()
        (grad,) = torch.autograd.grad((logits(e).float() * weights).sum(), e)
        grads.append(grad.float())
    exact, mine, other = grads
    assert float((mine - exact).square().mean()) < 1.3 * float((other - exact).square().mean())


def naive_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + weight)


def naive_gated_norm(o: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    unit = o * torch.rsqrt(o.pow(2).mean(-1, keepdim=True) + 1e-6)
    return unit * weight * torch.nn.functional.silu(z)


PAIRS = {
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-6), naive_rms_norm, ((3, 5, 8), (8,))),
    "gated_norm": (
        lambda o, z, w: gated_norm(o, z, w, 1e-6), naive_gated_norm, ((5, 2, 8), (5, 2, 8), (8,)),
    ),
    "swiglu": (swiglu, lambda a, b: torch.nn.functional.silu(a) * b, ((4, 6), (4, 6))),
    "output_gate": (output_gate, lambda o, g: o * torch.sigmoid(g), ((4, 2, 6), (4, 2, 6))),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_hand_written_functions_in_float64(name: str) -> None:
    ours, naive, shapes = PAIRS[name]
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.allclose(ours(*given), naive(*given), atol=1e-12)
    scale = torch.randn_like(naive(*given))
    mine = torch.autograd.grad((ours(*given) * scale).sum(), given)
    theirs = torch.autograd.grad((naive(*given) * scale).sum(), given)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    assert torch.autograd.gradcheck(ours, given)
