"""The proof of gradients proved on a CPU: tiny widths, the references in torch.

This file decides that the comparison of `test_gradients` can be believed: in float32 the two
sides agree in every case, transformers' side has the gradients of stock PEFT, errors that are
planted are found. Nothing here needs a card; what a kernel errs is `test_gradients`' to say.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from support.gradient_cases import Case, Routes
from support.gradient_proof import Proof, differing, flips, prove, spread
from support.gradient_slices import SKUS, Slice, plain_attention, text_of
from support.gradient_twin import Twin, fresh_model

from qcore.nn.attention.varlen import varlen_attention

CPU = torch.device("cpu")
ROPE = {
    "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25,
    "mrope_section": [2, 1, 1], "mrope_interleaved": True,
}  # fmt: skip
DENSE: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 4, "rope_parameters": ROPE,
    "tie_word_embeddings": False,
}  # fmt: skip
SPARSE = DENSE | {
    "moe_intermediate_size": 32, "num_experts": 16, "num_experts_per_tok": 4,
    "shared_expert_intermediate_size": 48,
}  # fmt: skip
TEXTS = {"dense": DENSE, "moe": SPARSE}
CASES = {
    "packed": Case(lengths=(150, 1, 77, 33)),
    "padded": Case(lengths=(33, 77, 80), padded=80),
    "forgets": Case(lengths=(150, 1, 77), decay="forgets"),
    "keeps": Case(lengths=(150, 1, 77), decay="keeps"),
}


@pytest.fixture(scope="module", params=list(TEXTS))
def pair(request: pytest.FixtureRequest) -> tuple[Slice, Twin]:
    ours = Slice(TEXTS[request.param], CPU, torch.float32, kernels=False, quantize=False)
    return ours, Twin(ours, torch.float32)


@pytest.fixture(scope="module", params=list(TEXTS))
def trio(request: pytest.FixtureRequest) -> tuple[Slice, Twin, Twin]:
    """As on a card, but for the kernels: NF4, bfloat16, and both of transformers' sides."""
    ours = Slice(TEXTS[request.param], CPU, torch.bfloat16, kernels=False)
    return ours, Twin(ours, torch.bfloat16), Twin(ours, torch.float32)


@pytest.mark.parametrize("case", CASES)
def test_in_float32_both_sides_agree(pair: tuple[Slice, Twin], case: str) -> None:
    ours, theirs = pair
    ours.draw_lora(1)
    ours.set_decay(CASES[case].decay)
    theirs.copy_from(ours)
    mine, their = Routes(), Routes()
    found, want = ours.gradients(CASES[case], mine), theirs.gradients(CASES[case], their)
    proof = prove(case, found, found, want)
    assert max(line.error for line in proof.lines) < 2e-4, proof.row()
    assert len(proof.lines) == 2 * len(list(ours.model.adapters()))
    if ours.moe:
        real = CASES[case].real()
        assert flips(mine.by_layer(), their.by_layer(), real) == [0] * 4
        forced = Routes(forced=their.by_layer())
        assert prove("", ours.gradients(CASES[case], forced), found, found).lines[0].error < 1e-5


@pytest.mark.slow
def test_after_training_both_sides_agree(pair: tuple[Slice, Twin]) -> None:
    ours, theirs = pair
    ours.set_decay("usual")
    losses = ours.train(24)
    assert sum(losses[-8:]) < sum(losses[:8])
    theirs.copy_from(ours)
    case = CASES["packed"]
    proof = prove("", *[ours.gradients(case)] * 2, theirs.gradients(case))
    assert max(line.error for line in proof.lines) < 2e-4, proof.row()


def test_forcing_takes_the_experts_that_it_is_told(pair: tuple[Slice, Twin]) -> None:
    ours, theirs = pair
    if not ours.moe:
        pytest.skip("a dense model routes nothing")
    case = CASES["packed"]
    ours.draw_lora(1)
    theirs.copy_from(ours)
    draw = torch.Generator().manual_seed(9)
    tokens = len(case.real())
    picked = [
        torch.stack([torch.randperm(16, generator=draw)[:4] for _ in range(tokens)])
        for _ in range(4)
    ]
    one, two = Routes(forced=picked), Routes(forced=picked)
    found, want = ours.gradients(case, one), theirs.gradients(case, two)
    for routes in (one, two):
        assert flips(routes.by_layer(), picked, case.real()) == [0] * 4
    assert max(line.error for line in prove("", found, found, want).lines) < 2e-4
    assert max(line.error for line in prove("", found, found, ours.gradients(case)).lines) > 0.1


def test_transformers_side_has_pefts_gradients(pair: tuple[Slice, Twin]) -> None:
    """Linear maps, router and stacks of experts, against stock PEFT on a fresh model."""
    ours, theirs = pair
    ours.draw_lora(1)
    ours.set_decay("usual")
    theirs.copy_from(ours)
    names = [name for name, _ in ours.model.adapters()]
    modules = sorted({n.split(".")[-2] for n in names if n.endswith(".weight")} - {"gate"})
    parameters = ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=modules,
        target_parameters=parameters if ours.moe else None,
        rank_pattern=dict.fromkeys(parameters[1:], 4) if ours.moe else {},
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(fresh_model(ours, torch.float32), config)
    stock = dict(wrapped.named_parameters())
    spelt = {f"{name} {side}": _peft_name(name, side) for name in names for side in "AB"}
    assert {n for n in stock if "lora_" in n} == set(spelt.values())
    with torch.no_grad():
        for name, value in ours.sides():
            stock[spelt[name]].copy_(value)
    case = Case(lengths=(77,))
    ((ids, want),) = case.rows()
    loss = torch.nn.functional.cross_entropy(wrapped(input_ids=ids[None]).logits[0], want)
    loss.backward()
    found = {name: stock[key].grad for name, key in spelt.items()}
    proof = prove("", theirs.gradients(case), theirs.gradients(case), found)
    assert max(line.error for line in proof.lines) < 1e-4, proof.row()


def _peft_name(name: str, side: str) -> str:
    path = name.replace("model.language_model.", "base_model.model.model.").removesuffix(".weight")
    # The first stack is wrapped first, so it is the innermost.
    path = path.replace("experts.gate_up_proj", "experts.base_layer")
    if path.endswith(".experts.down_proj"):
        path = path.removesuffix(".down_proj")
    return f"{path}.lora_{side}.default.weight"


@pytest.mark.slow
def test_bfloat16_errs_as_transformers_does(trio: tuple[Slice, Twin, Twin]) -> None:
    """The references in torch; with the experts of the float32 run where there are any."""
    ours, theirs, reference = trio
    proofs = []
    for seed in (0, 1):
        case = Case(lengths=(150, 1, 77, 33), seed=seed)
        ours.draw_lora(seed)
        ours.set_decay("usual")
        theirs.copy_from(ours)
        reference.copy_from(ours)
        free = Routes()
        want = reference.gradients(case, free)
        runs = {}
        for who, side in (("ours", ours), ("theirs", theirs)):
            routes = Routes(forced=free.by_layer()) if ours.moe else None
            runs[who] = side.gradients(case, routes)
            if ours.moe:
                loose = Routes()
                off = prove("", *[side.gradients(case, loose)] * 2, want)
                print(who, "free", flips(loose.by_layer(), free.by_layer(), case.real()), off.row())
        proofs.append(prove(f"seed {seed}", runs["ours"], runs["theirs"], want))
        print(proofs[-1].row())
    print(spread(*proofs))
    assert all(proof.mean_ratio < 1.15 for proof in proofs)


def test_planted_errors_are_found(pair: tuple[Slice, Twin]) -> None:
    ours, _ = pair
    want = ours.gradients(CASES["packed"])
    draw = torch.Generator().manual_seed(0)

    def noisy(by: float) -> dict[str, torch.Tensor]:
        return {
            name: g + by * g.norm() / g.numel() ** 0.5 * torch.randn(g.shape, generator=draw)
            for name, g in want.items()
        }

    theirs, alike = noisy(0.01), noisy(0.01)
    assert prove("", alike, theirs, want).violations() == []
    name = next(iter(want))
    for wrong in (-want[name], 1.02 * want[name], 0 * want[name], torch.nan * want[name]):
        (first, *_) = prove("", alike | {name: wrong}, theirs, want).violations()
        assert first.startswith(name.split("layers.")[1].split(".weight")[0])
    assert any("all tensors" in one for one in prove("", noisy(0.011), theirs, want).violations())
    with pytest.raises(AssertionError, match="other tensors"):
        prove("", {k: v for k, v in want.items() if k != name}, theirs, want)
    with pytest.raises(AssertionError, match="is zero"):
        prove("", alike, theirs, want | {name: 0 * want[name]})


def test_chance_is_drawn_anew_and_a_kernel_errs_again(pair: tuple[Slice, Twin]) -> None:
    """One tensor 1.4 times as far off as theirs: in one draw of five, or in each."""
    ours, _ = pair
    draw = torch.Generator().manual_seed(0)
    wants = [ours.gradients(replace(CASES["packed"], seed=seed)) for seed in range(5)]
    name = max(wants[0], key=lambda one: wants[0][one].numel())

    def noisy(want: dict[str, torch.Tensor], more: float) -> dict[str, torch.Tensor]:
        return {
            n: g + (more if n == name else 1) * 0.01 * g.norm() / g.numel() ** 0.5
            * torch.randn(g.shape, generator=draw) for n, g in want.items()
        }  # fmt: skip

    def proof(unlucky: int) -> Proof:
        first, *others = (
            prove("", noisy(want, 1.4 if n < unlucky else 1.0), noisy(want, 1.0), want)
            for n, want in enumerate(wants)
        )
        return replace(first, again=tuple(others))

    chance, kernel = proof(1), proof(5)
    assert chance.doubtful == kernel.doubtful == [name]
    assert chance.violations() == []
    assert "over 5 draws" in chance.row()
    assert len(kernel.violations()) == 1
    assert replace(chance, again=()).violations()
    wrong = prove("", wants[1] | {name: -wants[1][name]}, noisy(wants[1], 1.0), wants[1])
    assert any("cosine" in one for one in replace(chance, again=(wrong,)).violations())


def test_two_runs_agree_bit_for_bit(trio: tuple[Slice, Twin, Twin]) -> None:
    ours, *_ = trio
    case = CASES["packed"]
    assert differing(ours.gradients(case), ours.gradients(case)) == []
    assert ours.train(3, seed=2) == ours.train(3, seed=2)


def test_plain_attention_is_attention() -> None:
    """What is put in attention's place where two runs must agree."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(47, h, 32, generator=draw, requires_grad=True) for h in (4, 2, 2))
    args = (q, k, v, (0, 30, 31, 47), 0.2)
    one, two = plain_attention(*args), varlen_attention(*args)
    torch.testing.assert_close(one, two)
    grads = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (one, two)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("sku", SKUS)
def test_widths_are_those_of_the_records(sku: str) -> None:
    text = text_of(sku)
    assert text["num_hidden_layers"] == 4
    assert text["head_dim"] == 256
    assert ("num_experts" in text) == (sku == "35B-A3B")
    hidden = {"0.8B": 1024, "2B": 2048, "4B": 2560, "9B": 4096, "27B": 5120, "35B-A3B": 2048}
    assert text["hidden_size"] == hidden[sku]
