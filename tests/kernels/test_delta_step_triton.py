"""One token of decoding in Triton under the interpreter, beside its reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from qcore_qwen35.ops.delta_inputs.reference import Heads
from qcore_qwen35.ops.delta_step import reference, triton
from qcore_qwen35.ops.verify import verify

SHAPES = {
    "one block": (Heads(1, 16, 2, 16), 4),
    "several blocks, a part of one": (Heads(2, 64, 6, 32), 4),
    "odd share of key heads, two taps": (Heads(1, 32, 3, 64), 2),
}


def _inputs(heads: Heads, taps: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """What a step reads, as columns of one buffer, and the states that it advances."""
    draw = torch.Generator().manual_seed(taps)
    k_heads, k_dim, v_heads, v_dim = heads
    channels = 2 * k_heads * k_dim + v_heads * v_dim
    values = torch.randn(1, channels + 2 * v_heads, generator=draw).to(dtype)
    qkv, a, b = values.split((channels, v_heads, v_heads), 1)
    frozen = [
        0.5 * torch.randn(channels, 1, taps, generator=draw).to(dtype),
        torch.randn(v_heads, generator=draw),
        8 * torch.randn(v_heads, generator=draw).to(dtype),
    ]
    states = [
        torch.randn(taps, channels, generator=draw).to(dtype),
        torch.randn(1, v_heads, k_dim, v_dim, generator=draw),
    ]
    return [qkv, a, b, *frozen], states


@pytest.mark.parametrize("case", SHAPES)
def test_three_tokens_advance_the_same_tensors(case: str) -> None:
    heads, taps = SHAPES[case]
    given, states = _inputs(heads, taps, torch.float32)
    theirs, ours = [x.clone() for x in states], [x.clone() for x in states]
    for _ in range(3):
        expected = reference.delta_step(*given, *theirs, heads)
        found = triton.delta_step(*given, *ours, heads)
        assert found.shape == (1, heads.v_heads, heads.v_dim)
        for one, two in zip((found, *ours), (expected, *theirs), strict=True):
            assert float((one - two).abs().max()) <= 1e-5 * float(two.abs().max())
        given[0] = given[0].flip(1)
    assert not torch.equal(ours[1], states[1])


def test_bfloat16_errs_no_more_than_the_reference_in_it() -> None:
    heads, taps = SHAPES["several blocks, a part of one"]
    given, (conv, state) = _inputs(heads, taps, torch.bfloat16)
    exact = reference.delta_step(*(x.double() for x in given), conv.double(), state.double(), heads)
    moved = conv.clone()
    found = triton.delta_step(*given, moved, state.clone(), heads)
    theirs = reference.delta_step(*given, conv.clone(), state, heads)
    assert torch.equal(moved, torch.cat([conv[1:], given[0]]))
    ours, allowed = (float((x.double() - exact).norm() / exact.norm()) for x in (found, theirs))
    assert ours <= 1.2 * allowed <= 1e-2


def test_a_state_that_would_be_copied_is_refused() -> None:
    heads, taps = SHAPES["one block"]
    given, (conv, state) = _inputs(heads, taps, torch.bfloat16)
    with pytest.raises(ValueError, match="cannot be updated in place"):
        triton.delta_step(*given, conv, state.bfloat16(), heads)
    with pytest.raises(ValueError, match="cannot take inputs of"):
        triton.delta_step(*given, conv.float(), state, heads)


def test_it_is_verified() -> None:
    verdict = verify("delta_step", torch.device("cpu"), triton.delta_step)
    assert verdict.good, verdict.text
    assert verdict.output > 0

    def forgets(*args: object) -> Tensor:
        """The right result, and a state that is not advanced."""
        *given, conv, state, heads = args
        return reference.delta_step(*given, conv.clone(), state.clone(), heads)  # type: ignore

    assert not verify("delta_step", torch.device("cpu"), forgets).good
