"""Proof that the parity tests can fail: one rule of the blocks changed at a time.

Each change must move the logits away from the reference by at least a hundred times what the
parity tests allow; unchanged, the same comparison passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.blocks_kit import GivenWeights, Twins, documents, tiny_config, twins
from torch import Tensor

from qcore.api.blocks import Packed
from qcore_qwen35 import attention as block
from qcore_qwen35 import mlp, rope
from qcore_qwen35 import norm as norms
from qcore_qwen35.model import Trunk
from qcore_qwen35.ops.attention import reference as attention
from qcore_qwen35.ops.delta_inputs import reference as delta
from qcore_qwen35.ops.delta_rule import reference
from qcore_qwen35.ops.norm import reference as norm

ALLOWED = 1e-5
convolve = delta._convolve

MUTATIONS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "q and k norm dropped": (attention, "head_norm", lambda x, weight, eps: x),
    "norm by w, not 1 + w": (norm, "scale_of", lambda weight, dtype: weight.to(dtype)),
    "convolution reversed in time": (
        delta, "_convolve", lambda padded, weight: convolve(padded, weight.flip(-1)),
    ),
    "silu after the convolution dropped": (
        delta, "causal_conv_silu",
        lambda u, w, cu, history=None: delta._before_silu(u, w, tuple(cu)),
    ),
    "length of q and k left as it is": (
        reference, "inverse_norm", lambda x: torch.ones_like(x[..., :1]),
    ),
    "query scale dropped": (reference, "query_scale", lambda dk: 1.0),
    "decay dropped": (delta, "log_decay", lambda a, a_log, dt_bias: torch.zeros_like(a)),
    "decay without its bias": (
        delta, "log_decay",
        lambda a, a_log, dt_bias: -a_log.exp() * torch.nn.functional.softplus(a),
    ),
    "gated norm after the gate": (
        norms, "gated_norm",
        lambda o, z, w, eps: norm._inverse_rms(o * torch.nn.functional.silu(z), eps)
        * o * torch.nn.functional.silu(z) * w,
    ),
    "gated norm by 1 + w": (
        norms, "gated_norm", lambda o, z, w, eps: norm._GatedNorm.apply(o, z, 1 + w, eps),
    ),
    "rope dropped": (attention, "rotate", lambda x, cos, sin: x),
    "rope on neighbours, not halves": (
        attention, "rotate",
        lambda x, cos, sin: torch.cat(
            (
                x[..., : cos.shape[-1]] * cos
                + torch.stack((-x[..., 1 : cos.shape[-1] : 2], x[..., : cos.shape[-1] : 2]), -1)
                .flatten(-2) * sin,
                x[..., cos.shape[-1] :],
            ),
            -1,
        ),
    ),
    "gate and up exchanged": (
        mlp, "swiglu", lambda gate, up: torch.nn.functional.silu(up) * gate,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> Twins:
    return twins(tiny_config())


@pytest.fixture(scope="module")
def wanted(pair: Twins) -> Tensor:
    with torch.no_grad():
        return pair.reference(documents(67)[0])


def error(pair: Twins, wanted: Tensor) -> float:
    # Built anew: blocks take their functions when they are built.
    weights = GivenWeights(tiny_config(), pair.theirs.model.state_dict(), torch.float32)
    pair = Twins(pair.theirs, Trunk(weights))
    with torch.no_grad():
        return float((pair.logits(Packed.of(documents(67))) - wanted).abs().max())


def test_unchanged_passes(pair: Twins, wanted: Tensor) -> None:
    assert error(pair, wanted) <= ALLOWED


@pytest.mark.parametrize("name", MUTATIONS)
def test_changed_fails(
    pair: Twins, wanted: Tensor, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, attribute, change = MUTATIONS[name]
    assert hasattr(module, attribute)
    monkeypatch.setattr(module, attribute, change)
    assert error(pair, wanted) > 100 * ALLOWED


#: Other output gates; a gate is an argument of the block, so its default is replaced.
GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dropped": lambda o, gate: o,
    "by silu": lambda o, gate: o * torch.nn.functional.silu(gate),
}


@pytest.mark.parametrize("name", GATES)
def test_another_output_gate_fails(
    pair: Twins, wanted: Tensor, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = block.Attention.__init__.__kwdefaults__
    assert defaults["gate"] == block.OUTPUT_GATE
    monkeypatch.setitem(defaults, "gate", (block.OUTPUT_GATE[0], GATES[name]))
    assert error(pair, wanted) > 100 * ALLOWED


def test_axes_in_blocks_instead_of_interleaved_fail(
    pair: Twins, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ids,) = documents(40)
    positions = torch.stack([torch.arange(40), torch.arange(40) // 3, torch.arange(40) % 7])
    with torch.no_grad():
        wanted = pair.reference(ids, position_ids=positions[:, None])
        found = pair.logits(Packed(ids, (0, 40), positions))
        assert float((found - wanted).abs().max()) <= ALLOWED
        monkeypatch.setattr(rope, "interleave", in_blocks)
        found = pair.logits(Packed(ids, (0, 40), positions))
        assert float((found - wanted).abs().max()) > 100 * ALLOWED


def in_blocks(angles: Tensor, section: tuple[int, int, int]) -> Tensor:
    pieces = angles.split(section, -1)
    return torch.cat([piece[axis] for axis, piece in enumerate(pieces)], -1)
