"""The bound of the merge proof: rounding near a norm of 0 passes, a fault in one token does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qcore.errors import NumericError
from qcore.merging.amplification import amplification
from qcore.merging.layer_judge import LayerJudge

TOKENS, WIDTH, RANK = 40, 256, 4


class Normed(nn.Module):
    """``x + rms_norm(W x) V``, with a LoRA pair on W beside the weight, or merged into it."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.w = torch.randn(8, WIDTH, generator=draw) / WIDTH**0.5
        self.v = torch.randn(8, WIDTH, generator=draw)
        self.a = torch.randn(RANK, WIDTH, generator=draw) / WIDTH**0.5
        self.b = torch.randn(8, RANK, generator=draw)
        self.merged = self.w + self.b @ self.a

    def forward(self, x: Tensor, *, merged: bool = True) -> Tensor:
        q = x @ self.merged.t() if merged else x @ self.w.t() + (x @ self.a.t()) @ self.b.t()
        return x + q * q.square().mean(1, keepdim=True).rsqrt() @ self.v


def inputs(layer: Normed, small: float) -> Tensor:
    """Inputs of which those of tokens 3 and 29 have an ``|W x|`` of about `small`."""
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    for token in (3, 29):
        q = torch.linalg.lstsq(layer.merged.double(), (layer.merged @ x[token]).double()).solution
        x[token] -= ((1 - small) * q).float()
    return x


@pytest.mark.parametrize("small", [1e-2, 1e-3, 1e-4])
def test_a_norm_near_zero_is_no_fault(small: float) -> None:
    layer = Normed()
    x = inputs(layer, small)
    adapted, merged = layer(x, merged=False), layer(x)
    judge = LayerJudge(Path("adapter"))
    if small < 1e-2:  # rounding alone is beyond the plain bound
        with pytest.raises(NumericError):
            judge.layer("layer", x, adapted, merged, None)
    judge.layer("layer", x, adapted, merged, None, lambda: amplification(layer, layer, x))
    grown = amplification(layer, layer, x)
    assert grown[[3, 29]].min() > 0.1 / small
    others = grown[[n for n in range(TOKENS) if n not in (3, 29)]]
    assert others.median() <= 1.5
    assert others.max() < 10


@pytest.mark.parametrize("times", [2.0, 9.0, 1e3])
def test_a_fault_in_one_token_is_refused(times: float) -> None:
    layer = Normed()
    x = inputs(layer, 1e-3)
    adapted = layer(x, merged=False)
    plain = 1e-5 * float((adapted - x).abs().max()) + 1e-6 * float(adapted.abs().max())
    wrong = adapted.clone()
    grown = amplification(layer, layer, x)
    token = int(grown.argmin())
    wrong[token, 5] += times * plain
    with pytest.raises(NumericError, match="computes other values"):
        LayerJudge(Path("adapter")).layer("layer", x, adapted, wrong, None, lambda: grown)


def test_the_amplified_token_itself_is_still_compared() -> None:
    layer = Normed()
    x = inputs(layer, 1e-3)
    adapted, wrong = layer(x, merged=False), layer(x)
    wrong[3] += 0.05 * (adapted[3] - x[3])  # as of a weight that is off by some percent
    with pytest.raises(NumericError, match="computes other values"):
        LayerJudge(Path("adapter")).layer(
            "layer", x, adapted, wrong, None, lambda: amplification(layer, layer, x)
        )


def test_it_is_measured_only_where_it_is_needed() -> None:
    layer = Normed()
    x = inputs(layer, 1.0)
    never: Callable[[], Tensor] = lambda: pytest.fail("measured")  # noqa: E731
    LayerJudge(Path("adapter")).layer("layer", x, layer(x, merged=False), layer(x), None, never)


def test_values_that_are_not_finite_amplify_nothing() -> None:
    layer = Normed()
    x = inputs(layer, 1.0)
    layer.merged[0, 0] = torch.nan
    grown = amplification(layer, layer, x)
    assert torch.equal(grown, torch.ones(TOKENS))
    with pytest.raises(NumericError, match="computes other values"):
        LayerJudge(Path("adapter")).layer(
            "layer", x, layer(x, merged=False), layer(x), None, lambda: grown
        )
