"""The Triton delta rule on a card against the torch form in float32: outputs and gradients.

Hopper with Triton 3.4 to 3.7.0 miscompiles another library's gated backward
(https://github.com/fla-org/flash-linear-attention/issues/640), so every gradient is compared,
for decays near 0 and near 1, with NaN in the memory that buffers are made from.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qcore_qwen35.ops.delta_rule import Chunks, chunked_delta_rule, recurrent_delta_rule

pytestmark = pytest.mark.gpu

NAMES = ("o", "state", "dq", "dk", "dv", "dg", "dbeta", "dinitial")
#: log decay: (lowest, highest)
DECAYS = {"usual": (-0.5, 0.0), "near 1": (-1e-4, 0.0), "near 0": (-30.0, -10.0), "mixed": (-20, 0)}
LENGTHS = [(1,), (64,), (1000, 1, 77, 64), (4097,)]
#: Relative error of bf16 inputs; 5e-3 was the worst that was seen.
BOUND = 8e-3
#: Of decays whose logs are below -10: their own gradient is 5e-5 of the others', and what little
#: passes such a decay is a difference of what was rounded; 1.5e-2 was the worst that was seen.
FORGOTTEN = 2.5e-2


@pytest.fixture(autouse=True)
def _needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("triton")


def _inputs(
    lengths: tuple[int, ...],
    heads: tuple[int, int],
    dims: tuple[int, int],
    decay: tuple[float, float],
    dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    """q, k, v as columns of one buffer; g; beta; states."""
    torch.manual_seed(sum(lengths))
    (hk, hv), (dk, dv), tokens = heads, dims, sum(lengths)
    mixed = torch.randn(tokens, 2 * hk * dk + hv * dv, device="cuda").to(dtype)
    q, k, v = mixed.split((hk * dk, hk * dk, hv * dv), -1)
    g = torch.rand(tokens, hv, device="cuda") * (decay[1] - decay[0]) + decay[0]
    beta = torch.randn(tokens, hv, device="cuda").mul(2).sigmoid().to(dtype)
    q, k, v = q.unflatten(-1, (-1, dk)), k.unflatten(-1, (-1, dk)), v.unflatten(-1, (-1, dv))
    return [q, k, v, g, beta, torch.randn(len(lengths), hv, dk, dv, device="cuda")]


def _ends(lengths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sum(lengths[:n]) for n in range(len(lengths) + 1))


def _poison() -> None:
    held = [torch.full((1 << 25,), math.nan, device="cuda") for _ in range(8)]
    del held


def _errors(made: list[Tensor], lengths: tuple[int, ...]) -> dict[str, float]:
    from qcore_qwen35.ops.delta_rule import triton_rule

    results = []
    for rule, wide in ((triton_rule.chunked_delta_rule, False), (chunked_delta_rule, True)):
        leaves = [(x.float() if wide else x).detach().requires_grad_() for x in made]
        _poison()
        o, state = rule(*leaves[:5], _ends(lengths), leaves[5])
        torch.manual_seed(1)
        do, ds = torch.randn(o.shape, device="cuda"), torch.randn(state.shape, device="cuda")
        _poison()
        cotangents = [do.to(made[0].dtype).to(o.dtype), ds]
        results.append([o.detach(), state.detach()])
        results[-1] += torch.autograd.grad([o, state], leaves, cotangents)
    return {name: float((a.float() - b).norm() / b.norm()) for name, a, b in zip(NAMES, *results)}


@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_outputs_and_gradients(lengths: tuple[int, ...], decay: tuple[float, float]) -> None:
    found = _errors(_inputs(lengths, (2, 4), (128, 128), decay), lengths)
    of_decay = found.pop("dg")
    assert of_decay <= (FORGOTTEN if decay[1] < -5 else BOUND), of_decay
    assert max(found.values()) <= BOUND, found


@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (64, 128), (128, 64)], ids=str)
def test_groups_and_sizes_of_heads(heads: tuple[int, int], dims: tuple[int, int]) -> None:
    found = _errors(_inputs((300, 33), heads, dims, DECAYS["usual"]), (300, 33))
    # One number a token and head: of 333 of them 8.9e-3 was seen.
    assert found.pop("dg") <= 1.5 * BOUND
    assert max(found.values()) <= BOUND, found


def test_float32() -> None:
    made = _inputs((130, 3), (1, 2), (64, 64), DECAYS["usual"], torch.float32)
    found = _errors(made, (130, 3))
    assert max(found.values()) <= 2e-5, found


def test_twice_the_same_bits() -> None:
    from qcore_qwen35.ops.delta_rule import triton_rule

    made = _inputs((513, 64), (2, 4), (128, 128), DECAYS["usual"])
    layout = Chunks.of((0, 513, 577), 64, made[0].device)
    runs = []
    for _ in range(2):
        leaves = [x.detach().requires_grad_() for x in made[:5]]
        o, _ = triton_rule.chunked_delta_rule(*leaves, (0, 513, 577), layout=layout)
        runs.append([o, *torch.autograd.grad(o, leaves, torch.ones_like(o))])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_steps_of_decoding() -> None:
    from qcore_qwen35.ops.delta_rule import triton_step

    made = _inputs((1, 1, 1), (2, 4), (128, 128), DECAYS["usual"])
    start = made[5].clone()
    expected, last = recurrent_delta_rule(*(x.float() for x in made[:5]), (0, 1, 2, 3), start)
    o, state = triton_step.recurrent_delta_rule(*made[:5], (0, 1, 2, 3), made[5])
    assert state is made[5]
    assert float((o.float() - expected).norm() / expected.norm()) <= 3e-3
    assert float((state - last).norm() / last.norm()) <= 1e-5
