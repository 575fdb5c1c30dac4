"""The Triton delta rule under the interpreter: outputs, states and gradients, float64 beside it."""

from __future__ import annotations

import pytest
import torch
from support.tiers import fast
from torch import Tensor

pytest.importorskip("triton")

from qcore.errors import UsageError
from qcore_qwen35.ops.delta_rule import Chunks, recurrent_delta_rule, triton_rule, triton_step
from qcore_qwen35.ops.delta_rule.layout import Tables

CPU = torch.device("cpu")
#: (lowest g, highest g, lowest beta, highest beta)
RANGES = {
    "usual": (-0.5, 0.0, 0.1, 0.9),
    "keeps all": (-1e-6, 0.0, 0.0, 1.0),
    "forgets all": (-60.0, -20.0, 0.0, 1.0),
    "keeps or forgets": (-30.0, 0.0, 0.0, 1.0),
    "writes nothing": (-0.1, 0.0, 0.0, 1e-6),
    "writes all": (-0.1, 0.0, 1 - 1e-6, 1.0),
}


def inputs(
    tokens: int,
    heads: tuple[int, int] = (1, 2),
    dims: tuple[int, int] = (16, 16),
    values: tuple[float, float, float, float] = RANGES["usual"],
) -> list[Tensor]:
    """q, k and v as columns of one buffer, as a convolution leaves them."""
    torch.manual_seed(tokens)
    (hk, hv), (dk, dv) = heads, dims
    low, high, weak, strong = values
    mixed = torch.randn(tokens, 2 * hk * dk + hv * dv + 3)[:, :-3]
    q, k, v = mixed.split((hk * dk, hk * dk, hv * dv), -1)
    g = torch.rand(tokens, hv) * (high - low) + low
    beta = torch.rand(tokens, hv) * (strong - weak) + weak
    return [
        q.unflatten(-1, (-1, dk)),
        k.unflatten(-1, (-1, dk)),
        v.unflatten(-1, (-1, dv)),
        g,
        beta,
    ]


def cumulative(lengths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sum(lengths[:n]) for n in range(len(lengths) + 1))


def both(made: list[Tensor], lengths: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """(o, states, gradients...) of the kernels, and of the rule token by token in float64."""
    results = []
    for rule, dtype in (
        (triton_rule.chunked_delta_rule, None),
        (recurrent_delta_rule, torch.double),
    ):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in made]
        o, states = rule(*leaves[:5], cumulative(lengths), *leaves[5:])
        torch.manual_seed(1)
        do, dstates = torch.randn(o.shape), torch.randn(states.shape)
        loss = (o * do.to(made[2].dtype)).sum() + (states * dstates).sum()
        results.append([o.detach(), states.detach(), *torch.autograd.grad(loss, leaves)])
    return results[0], results[1]


def off(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) / max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("lengths", fast([(1,), (64,), (65,), (3, 100, 64, 0, 9)], (65,)), ids=str)
@pytest.mark.parametrize("given", fast([False, True], True), ids=["from-zero", "from-a-state"])
def test_outputs_states_and_gradients(lengths: tuple[int, ...], given: bool) -> None:
    made = inputs(sum(lengths))
    if given:
        made.append(torch.randn(len(lengths), 2, 16, 16))
    mine, rule = both(made, lengths)
    for a, b in zip(mine, rule, strict=True):
        assert a.shape == b.shape
        assert off(a, b) <= 2e-5


@pytest.mark.parametrize("values", fast(RANGES.values(), RANGES["keeps or forgets"]), ids=RANGES)
def test_decay_and_write_strength_at_their_ends(values: tuple[float, float, float, float]) -> None:
    mine, rule = both(inputs(75, values=values), (70, 5))
    for a, b in zip(mine, rule, strict=True):
        assert torch.isfinite(a).all()
        assert off(a, b) <= 2e-5


@pytest.mark.parametrize("heads", fast([(1, 1), (2, 2), (2, 4), (1, 3)], (1, 3)), ids=str)
@pytest.mark.parametrize("dims", fast([(16, 32), (32, 16)], (16, 32)), ids=str)
def test_groups_and_sizes_of_heads(heads: tuple[int, int], dims: tuple[int, int]) -> None:
    mine, rule = both(inputs(67, heads, dims), (67,))
    for a, b in zip(mine, rule, strict=True):
        assert off(a, b) <= 2e-5


def test_columns_of_v_in_two_programs() -> None:
    mine, rule = both(inputs(66, dims=(64, 128)), (66,))
    for a, b in zip(mine, rule, strict=True):
        assert off(a, b) <= 2e-5


def test_equal_keys_do_not_break_the_inverse() -> None:
    made = inputs(64, values=(-1e-6, 0.0, 1.0, 1.0))
    made[1] = torch.ones_like(made[1])
    mine, rule = both(made, (64,))
    assert off(mine[0], rule[0]) <= 1e-5


def test_bfloat16_is_as_close_as_its_rounding() -> None:
    made = inputs(70)
    made = [x if n == 3 else x.to(torch.bfloat16) for n, x in enumerate(made)]
    mine, rule = both(made, (70,))
    assert [x.dtype for x in mine[:6]] == [torch.bfloat16, torch.float32] + [torch.bfloat16] * 3 + [
        torch.float32
    ]
    for a, b in zip(mine, rule, strict=True):
        assert float((a.double() - b).norm() / b.norm()) <= 2e-2


def test_one_output_alone_has_gradients() -> None:
    """The rest is no zeros tensor but absent."""
    made = inputs(70)
    for part in (0, 1):
        grads = []
        for rule in (triton_rule.chunked_delta_rule, recurrent_delta_rule):
            leaves = [x.detach().requires_grad_() for x in made]
            out = rule(*leaves, (0, 70))[part]
            torch.manual_seed(2)
            grads.append(
                torch.autograd.grad(
                    (out * torch.randn(out.shape)).sum(), leaves[part:],
                )
            )  # fmt: skip
        for a, b in zip(*grads, strict=True):
            assert off(a, b) <= 2e-5


def test_a_layout_made_before_is_taken() -> None:
    made, cu = inputs(70), (0, 3, 70)
    layout = Chunks.of(cu, 64, CPU)
    assert layout.tables is None
    a, _ = triton_rule.chunked_delta_rule(*made, cu, layout=layout)
    b, _ = triton_rule.chunked_delta_rule(*made, cu)
    assert torch.equal(a, b)


def test_tables_start_the_longest_document_first() -> None:
    tables = Tables.of((0, 3, 70, 70, 200), 64, CPU)
    assert tables.documents.tolist() == [
        [70, 200, 3, 3], [3, 70, 1, 1], [0, 3, 0, 0], [70, 70, 3, 2],
    ]  # fmt: skip
    assert tables.chunks.tolist() == [
        [0, 3], [3, 70], [67, 70], [70, 200], [134, 200], [198, 200],
    ]  # fmt: skip


def test_what_it_has_no_kernel_for_is_refused() -> None:
    with pytest.raises(UsageError, match="heads of size 24"):
        triton_rule.chunked_delta_rule(*inputs(3, dims=(24, 16)), (0, 3))
    with pytest.raises(ValueError, match="float64"):
        triton_rule.chunked_delta_rule(*(x.double() for x in inputs(3)), (0, 3))


@pytest.mark.parametrize(
    "lengths", fast([(1,), (1, 1, 1), (3, 3), (2, 5, 0, 1)], (2, 5, 0, 1)), ids=str
)
@pytest.mark.parametrize("heads", fast([(1, 1), (2, 4), (1, 3)], (1, 3)), ids=str)
def test_steps_of_decoding(lengths: tuple[int, ...], heads: tuple[int, int]) -> None:
    made = inputs(sum(lengths), heads, (32, 64))
    state = torch.randn(len(lengths), heads[1], 32, 64)
    expected, last = recurrent_delta_rule(*made, cumulative(lengths), state)
    o, found = triton_step.recurrent_delta_rule(*made, cumulative(lengths), state)
    assert found is state
    assert off(o, expected) <= 1e-5
    assert off(state, last) <= 1e-5


def test_steps_from_nothing() -> None:
    made = inputs(4)
    for a, b in zip(
        triton_step.recurrent_delta_rule(*made, (0, 4)),
        recurrent_delta_rule(*made, (0, 4)),
        strict=True,
    ):
        assert off(a, b) <= 1e-5
