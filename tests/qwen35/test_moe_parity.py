"""Our mixture of experts against transformers' on the same weights, and proof that it can fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.blocks_kit import documents, relative
from support.e2e_kit import figure
from support.moe_kit import MoeTwins, moe_config, twins
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qcore.api.blocks import Packed
from qcore.nn.moe.experts import Experts, Routing
from qcore_qwen35 import moe

ALLOWED = 1e-5
SHAPES: dict[str, dict[str, Any]] = {
    "two of seven": {},
    "one of seven": {"num_experts_per_tok": 1},
    "three of five": {"num_experts_per_tok": 3, "num_experts": 5},
    "all of three": {"num_experts_per_tok": 3, "num_experts": 3},
    "most idle": {"num_experts": 40},
    "wide experts": {"moe_intermediate_size": 56, "shared_expert_intermediate_size": 8},
    "attention first": {"layers": ["full_attention", "linear_attention", "full_attention"]},
}


@pytest.fixture(scope="module", params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def pair(request: pytest.FixtureRequest) -> MoeTwins:
    return twins(moe_config(**SHAPES[request.param]))


@pytest.fixture(scope="module", params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def trained(request: pytest.FixtureRequest) -> MoeTwins:
    """Experts by autograd: every parameter gets a gradient."""
    return twins(moe_config(**SHAPES[request.param]), core=False)


@pytest.fixture(scope="module")
def plain() -> MoeTwins:
    return twins(moe_config())


def gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max())


def picks(pair: MoeTwins, docs: Sequence[Tensor]) -> list[Tensor]:
    """Which experts our routers pick, per layer ``[T, k]``."""
    found: list[Tensor] = []
    real = moe.route

    def heard(scores: Tensor, k: int) -> Any:
        weights, chosen, probabilities = real(scores, k)
        found.append(chosen)
        return weights, chosen, probabilities

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(moe, "route", heard)
        pair.logits(Packed.of(docs))
    return found


# -- logits


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 130])
def test_logits_equal_the_reference(pair: MoeTwins, length: int) -> None:
    (ids,) = documents(length)
    with torch.no_grad():
        found, wanted = pair.logits(Packed.of([ids])), pair.reference(ids)
    # On logits of order 5 both sides are 1e-5 off float64, so the bound would say nothing.
    assert 0.2 < float(wanted.abs().max()) < 1
    assert gap(found, wanted) <= ALLOWED
    figure(f"{length} tokens: logits differ by {gap(found, wanted):.1e}")


def test_experts_without_tokens_are_there() -> None:
    pair = twins(moe_config(**SHAPES["most idle"]))
    docs = documents(3)
    chosen = picks(pair, docs)
    assert all(len(layer.unique()) < 40 for layer in chosen)
    with torch.no_grad():
        assert gap(pair.logits(Packed.of(docs)), pair.reference(docs[0])) <= ALLOWED


def test_packed_documents_equal_each_alone(pair: MoeTwins) -> None:
    docs = documents(7, 1, 66, 30)
    with torch.no_grad():
        found = pair.logits(Packed.of(docs))
        wanted = torch.cat([pair.reference(ids) for ids in docs])
    assert gap(found, wanted) <= ALLOWED


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_documents_equal_the_reference_s_padded_batch(pair: MoeTwins, side: str) -> None:
    docs = documents(7, 1, 66, 30)
    ids = pad_sequence(docs, batch_first=True, padding_side=side)
    mask = pad_sequence([torch.ones_like(d) for d in docs], batch_first=True, padding_side=side)
    with torch.no_grad():
        found = pair.logits(Packed.of(docs))
        theirs = pair.theirs(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert gap(found, theirs[mask.bool()]) <= ALLOWED


@pytest.mark.parametrize("sizes", [[1] * 12, [70, 1, 1, 1], [2, 64, 1, 65, 3], [1, 2, 3, 30]])
def test_decoding_with_a_cache_equals_the_whole(plain: MoeTwins, sizes: list[int]) -> None:
    (ids,) = documents(sum(sizes))
    caches = [layer.new_cache(len(ids), torch.device("cpu")) for layer in plain.ours.layers]
    out, start = [], 0
    with torch.no_grad():
        for size in sizes:
            positions = torch.arange(start, start + size)
            batch = Packed(ids[start : start + size], (0, size), positions)
            out.append(plain.logits(batch, caches=caches))
            start += size
        assert gap(torch.cat(out), plain.logits(Packed.of([ids]))) <= ALLOWED
        assert gap(torch.cat(out), plain.reference(ids)) <= ALLOWED


# -- gradients


def compare_gradients(trained: MoeTwins, docs: list[Tensor]) -> float:
    """The largest relative difference over every parameter and the input of the trunk.

    With one expert a token its weight is always 1: the router's gradient is the rounding of 0,
    on either side, and is measured by the largest of all.
    """
    batch = Packed.of(docs)
    trained.theirs.zero_grad()
    trained.ours.zero_grad()
    with torch.no_grad():
        embedded = trained.ours.embed(batch)
    mine, other = embedded.clone().requires_grad_(), embedded.clone().requires_grad_()
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(len(embedded), trained.head.shape[0], generator=generator)
    (trained.logits(batch, mine) * weights).sum().backward()
    theirs = torch.cat(
        [
            trained.theirs(inputs_embeds=x[None], use_cache=False).logits[0]
            for x in other.split([len(ids) for ids in docs])
        ]
    )
    (theirs * weights).sum().backward()
    worst = relative(mine.grad, other.grad)
    wanted = dict(trained.theirs.model.named_parameters())
    ours = trained.weights()
    assert ours.keys() == wanted.keys()
    names = wanted.keys() - {"embed_tokens.weight"}
    largest = max(float(wanted[name].grad.abs().max()) for name in names)
    for name in names:
        if float(wanted[name].grad.abs().max()) < 1e-5 * largest:
            assert name.endswith("mlp.gate.weight")
            worst = max(worst, gap(ours[name].grad, wanted[name].grad) / largest)
        else:
            worst = max(worst, relative(ours[name].grad, wanted[name].grad))
    return worst


@pytest.mark.parametrize("lengths", [(5,), (65,), (130,), (9, 40, 3)], ids=str)
def test_gradients_equal_the_reference(trained: MoeTwins, lengths: tuple[int, ...]) -> None:
    worst = compare_gradients(trained, documents(*lengths, seed=1))
    figure(f"{lengths}: gradients differ by {worst:.1e} relative")
    assert worst <= 1e-4


def test_core_s_experts_give_the_input_the_same_gradient(plain: MoeTwins) -> None:
    docs = documents(40, 9)
    other = twins(moe_config(), core=False)
    grads = []
    for pair in (plain, other):
        x = pair.ours.embed(Packed.of(docs)).detach().requires_grad_()
        pair.logits(Packed.of(docs), x).square().sum().backward()
        grads.append(x.grad)
    assert relative(*grads) <= 1e-5


# -- the load-balancing loss


def reference_aux(pair: MoeTwins, docs: list[Tensor]) -> Tensor:
    """Theirs, the documents as one padded batch."""
    ids = pad_sequence(docs, batch_first=True)
    mask = pad_sequence([torch.ones_like(d) for d in docs], batch_first=True)
    told = pair.theirs(
        input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True
    )
    aux: Tensor = told.aux_loss
    return aux


@pytest.mark.parametrize("lengths", [(5,), (65,), (7, 1, 30, 12)], ids=str)
def test_the_load_balancing_loss(trained: MoeTwins, lengths: tuple[int, ...]) -> None:
    docs = documents(*lengths)
    trained.theirs.zero_grad()
    trained.ours.zero_grad()
    batch = Packed.of(docs)
    trained.hidden(batch)
    found = trained.ours.aux_loss(batch)
    assert found is not None
    wanted = reference_aux(trained, docs)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    found.backward()
    wanted.backward()
    theirs, worst = dict(trained.theirs.model.named_parameters()), 0.0
    if trained.theirs.num_experts == trained.theirs.num_experts_per_tok:
        assert found.item() == pytest.approx(3)  # whoever is picked: no gradient but rounding
        return
    for name, parameter in trained.weights().items():
        other = theirs[name].grad
        if other is None or not other.any():  # what comes after the last router
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            worst = max(worst, relative(parameter.grad, other))
    figure(f"{lengths}: loss {found.item():.4f} of {wanted.item():.4f}, gradients {worst:.1e}")
    assert worst <= 1e-4


def test_without_the_mask_the_reference_says_something_else(plain: MoeTwins) -> None:
    """So the comparison above would show padding that took part."""
    docs = documents(7, 1, 30, 12)
    ids = pad_sequence(docs, batch_first=True)
    with torch.no_grad():
        wrong = plain.theirs(input_ids=ids, output_router_logits=True).aux_loss
        assert abs(float(wrong - reference_aux(plain, docs))) > 1e-3


def test_balanced_is_k_and_collapsed_is_more() -> None:
    even = moe.Balance(torch.full((8,), 6), torch.full((8,), 3.0), 24)
    assert float(moe.balance_loss({"router of layer a": even})) == pytest.approx(2)
    picked, probability = torch.zeros(8), torch.zeros(8)
    picked[:2], probability[0] = 24, 24.0
    one = moe.Balance(picked, probability, 24)
    assert float(moe.balance_loss({"router of layer a": one})) == pytest.approx(8)


# -- proof that these comparisons can fail: one rule changed at a time


def without(rule: str) -> Callable[..., Tensor]:
    """The block again in plain words, with one rule changed; unchanged for an empty `rule`."""

    def forward(self: moe.Moe, x: Tensor, batch: Packed) -> Tensor:
        scores = self.gate(x)
        probabilities = F.softmax(scores, -1, dtype=torch.float32)
        weights, chosen = torch.topk(probabilities, self.k, -1)
        if rule == "lowest picked":
            weights, chosen = torch.topk(probabilities, self.k, -1, largest=False)
        if rule == "sigmoid for softmax":
            weights = torch.sigmoid(scores).gather(-1, chosen)
        if rule != "not renormalised":
            weights = weights / weights.sum(-1, keepdim=True)
        if rule == "evenly weighted":
            weights = torch.full_like(weights, 1 / self.k)
        if rule == "weights in another order":
            weights = weights.flip(-1)
        routing = Routing.of(chosen, scores.shape[-1])
        rows = routing.gather(x)
        if rule == "weight before the experts":
            rows = rows * weights.flatten()[routing.order][:, None]
            weights = torch.ones_like(weights)
        gate, up = self.experts.gate_up_proj(rows, routing).chunk(2, -1)
        if rule == "gate and up exchanged":
            gate, up = up, gate
        inner = F.silu(gate) * up
        if rule == "gate and up interleaved":
            both = self.experts.gate_up_proj(rows, routing)
            inner = F.silu(both[:, ::2]) * both[:, 1::2]
        out = routing.combine(self.experts.down_proj(inner, routing), weights)
        shared = self.shared_expert(x)
        if rule == "shared expert dropped":
            return out
        if rule != "shared gate dropped":
            shared = torch.sigmoid(self.shared_expert_gate(x)) * shared
        return out + shared

    return forward


RULES = (
    "lowest picked", "sigmoid for softmax", "not renormalised", "evenly weighted",
    "weights in another order", "weight before the experts", "gate and up exchanged",
    "gate and up interleaved", "shared expert dropped", "shared gate dropped",
)  # fmt: skip


def error(pair: MoeTwins) -> float:
    docs = documents(67)
    with torch.no_grad():
        return gap(pair.logits(Packed.of(docs)), pair.reference(docs[0]))


@pytest.mark.parametrize("rule", ["", *RULES])
def test_a_changed_rule_fails(plain: MoeTwins, monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    monkeypatch.setattr(moe.Moe, "forward", without(rule))
    found = error(plain)
    figure(f"{rule or 'unchanged'}: {found:.1e}")
    assert found > 100 * ALLOWED if rule else found <= ALLOWED


def test_the_softmax_after_the_pick_is_the_same_function(plain: MoeTwins) -> None:
    """So is a weight before down_proj, which is linear: neither is a fault that logits can show.

    Softmax of the picked scores is the renormalised softmax of all. Probabilities differ,
    and with them the load-balancing loss.
    """
    scores = torch.randn(50, 7)
    weights, chosen, probabilities = moe.route(scores, 3)
    assert torch.allclose(F.softmax(scores.gather(-1, chosen), -1), weights, atol=1e-6)
    assert torch.allclose(probabilities.sum(-1), torch.ones(50))


def test_experts_in_another_order_fail(plain: MoeTwins, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Experts.dense_slice
    monkeypatch.setattr(Experts, "dense_slice", lambda self, e: real(self, (e + 1) % self.shape[0]))
    assert error(plain) > 100 * ALLOWED


def test_a_row_routed_to_its_neighbour_fails(
    plain: MoeTwins, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Routing.of

    def rolled(chosen: Tensor, experts: int) -> Routing:
        routing = real(chosen, experts)
        routing.inverse = routing.inverse.roll(1)
        return routing

    monkeypatch.setattr(Routing, "of", staticmethod(rolled))
    assert error(plain) > 100 * ALLOWED


# -- bfloat16


def test_bfloat16_errs_no_more_than_the_reference() -> None:
    """Sizes are multiples of eight: below that transformers' grouped product refuses.

    A rounding may send a token to another expert, on either side. That is a step of its logits
    and not an error of arithmetic: such tokens are counted, and medians are compared.
    """
    config = moe_config(num_experts=8, layers=["linear_attention", "full_attention"])
    docs = documents(*[100] * 8)
    half = twins(config, dtype=torch.bfloat16)
    assert half.theirs.config._experts_implementation == "grouped_mm"
    single = twins(config, like=half)
    with torch.no_grad():
        exact, right = told(single, docs)
        theirs, other = told(half, docs)
        ours = half.logits(Packed.of(docs)).float()
    mine, peer = ((x - exact).abs() for x in (ours, theirs))
    chosen = sets(torch.cat(picks(half, docs)), 8)
    flips = [float((x != right).any(-1).float().mean()) for x in (chosen, other)]
    figure(
        f"bf16: off by {float(mine.median()):.2e} (rms {float(mine.square().mean().sqrt()):.2e}), "
        f"transformers {float(peer.median()):.2e} ({float(peer.square().mean().sqrt()):.2e}); "
        f"routed elsewhere than in fp32 {flips[0]:.1%}, transformers {flips[1]:.1%}"
    )
    assert float(mine.median()) < 1.05 * float(peer.median())
    assert flips[0] <= flips[1] + 0.01


def told(pair: MoeTwins, docs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Their logits ``[T, V]`` float32, and the experts picked ``[layers T, E]``."""
    runs = [pair.theirs(d[None], use_cache=False, output_router_logits=True) for d in docs]
    layers = zip(*(run.router_logits for run in runs), strict=True)
    scores = torch.cat([torch.cat(layer) for layer in layers])
    picked = F.softmax(scores, -1, dtype=torch.float32).topk(2)[1]
    return torch.cat([run.logits[0] for run in runs]).float(), sets(picked, scores.shape[-1])


def sets(chosen: Tensor, experts: int) -> Tensor:
    """``[T, k]`` -> which experts, in no order, ``[T, E]``."""
    return F.one_hot(chosen, experts).sum(-2)


@pytest.mark.parametrize("seed", range(3))
def test_one_block_in_bfloat16_is_closer_than_the_reference(seed: int) -> None:
    """The reference rounds each weighted row and then their sum; ours rounds the sum alone."""
    half = twins(moe_config(num_experts=8), dtype=torch.bfloat16, seed=seed)
    single = twins(moe_config(num_experts=8), like=half)
    x = torch.randn(400, 48).to(torch.bfloat16)
    with torch.no_grad():
        found = half.ours.layers[0].mlp(x, Packed.of([torch.zeros(400, dtype=torch.int64)]))
        wanted = half.theirs.model.layers[0].mlp(x[None])[0]
        exact = single.theirs.model.layers[0].mlp(x[None].float())[0]
    mine, peer = (float((y.float() - exact).abs().mean()) for y in (found, wanted))
    figure(f"one block in bf16: mean error {mine:.2e}, transformers {peer:.2e}")
    assert mine <= peer
