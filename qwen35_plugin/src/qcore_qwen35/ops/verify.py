"""Verification of the backends: test inputs of every op, and allowed deviations from its reference.

This file decides sizes and bounds. Documents have odd lengths, one of them a single token; inputs
are bfloat16 and column slices of one buffer, as stacked projections produce them. A result that is
rounded once has an error of about 1.7e-3; further roundings add in quadrature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from qcore.api import Verdict
from qcore.ops import Routing, compare, worst_verdict

from ..moe import router
from . import TRITON
from .attention.reference import attention_inputs, output_gate
from .delta_inputs.reference import Documents, Heads, delta_inputs
from .delta_rule import CHUNK, Chunks, chunked_delta_rule
from .delta_step.reference import delta_step
from .moe.reference import shared_up, weighted_up
from .norm.reference import add_rms_norm, gated_norm, rms_norm
from .swiglu.reference import swiglu

LENGTHS = (65, 1, 190, 3)
ENDS = (0, 65, 66, 256, 259)
T = ENDS[-1]
EPS = 1e-6
EXPERTS = 16


def verify(op: str, device: torch.device, function: Callable[..., Any] | None = None) -> Verdict:
    """Compare a backend of `op` (Triton by default) with its reference on `device`."""
    if function is None:
        module, name = TRITON[op]
        function = getattr(import_module(f".{module}", __package__), name)
    if op == "delta_step":
        function = _with_states(function)
    output, gradient = BOUNDS.get(op, (5e-3, 5e-3))
    return worst_verdict(
        *(
            compare(
                function, reference, inputs, output=output, gradient=gradient,
                gradients_of=gradients_of,
            )
            for reference, inputs, gradients_of in CASES[op](_Draw(device))
        )
    )  # fmt: skip


class _Draw:
    """Random tensors in bfloat16."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        values = torch.randn(*shape, generator=self._generator)
        return values.to(self.device, torch.bfloat16)

    def slices(self, *widths: int) -> tuple[Tensor, ...]:
        """Tensors ``[T, width]`` that are column slices of one buffer."""
        return torch.split(self(T, sum(widths)), list(widths), 1)

    def heads(self, count: int, size: int) -> Tensor:
        return torch.unflatten(self.slices(8, count * size, 8)[1], 1, (count, size))


#: (reference, arguments, indices of the arguments whose gradients are compared)
_Cases = Iterator[tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]]


def _rms_norm(draw: _Draw) -> _Cases:
    yield rms_norm, (draw(T, 1056), draw(1056), EPS), (0,)


def _add_rms_norm(draw: _Draw) -> _Cases:
    yield add_rms_norm, (draw(T, 1056), draw(T, 1056), draw(1056), EPS), (0, 1)


def _gated_norm(draw: _Draw) -> _Cases:
    yield gated_norm, (draw(T, 6, 128), draw.heads(6, 128), draw(128), EPS), (0, 1)


def _swiglu(draw: _Draw) -> _Cases:
    yield swiglu, draw.slices(1184, 1184), (0, 1)


def _delta_inputs(draw: _Draw) -> _Cases:
    heads = Heads(2, 128, 6, 128)
    channels = 2 * 256 + 768
    frozen = (0.5 * draw(channels, 1, 4), draw(6).float() - 1, draw(6))
    documents = Documents.of(ENDS, draw.device)
    inputs = (*draw.slices(channels, 768, 6, 6), *frozen, documents, heads)
    yield delta_inputs, inputs, (0, 1, 2, 3)


def _delta_rule(draw: _Draw) -> _Cases:
    layout = Chunks.of(ENDS, CHUNK, draw.device)
    q, k = draw.heads(2, 128), draw.heads(2, 128)
    g = -draw(T, 6).float().exp() * 0.3
    inputs = (q, k, draw.heads(6, 128), g, draw(T, 6).sigmoid(), ENDS, None, layout)
    yield chunked_delta_rule, inputs, (0, 1, 2, 3, 4)


def _delta_step(draw: _Draw) -> _Cases:
    heads = Heads(2, 128, 6, 128)
    channels = 2 * 256 + 768
    qkv, a, b = (x[:1] for x in draw.slices(channels, 6, 6))
    frozen = (0.5 * draw(channels, 1, 4), draw(6).float() - 1, draw(6))
    states = (draw(4, channels), draw(1, 6, 128, 128).float())
    yield _with_states(delta_step), (qkv, a, b, *frozen, *states, heads), ()


def _with_states(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Return the output with copies of the updated states, because inputs are used twice."""

    def run(*args: Any) -> tuple[Tensor, ...]:
        *inputs, conv, state, heads = args
        conv, state = conv.clone(), state.clone()
        return function(*inputs, conv, state, heads), conv, state

    return run


def _attention_inputs(draw: _Draw) -> _Cases:
    angles = draw(T, 1, 32).float()
    cos, sin = (torch.cat((f, f), -1).bfloat16() for f in (angles.cos(), angles.sin()))
    projected = draw.slices(6 * 2 * 256, 2 * 256, 2 * 256)
    yield attention_inputs, (*projected, draw(256), draw(256), EPS, cos, sin), (0, 1, 2)


def _output_gate(draw: _Draw) -> _Cases:
    gate = draw(T, 6, 512)[..., 256:]
    yield output_gate, (draw(T, 6, 256), gate), (0, 1)


def _moe_router(draw: _Draw) -> _Cases:
    for tokens, experts, k in ((517, 256, 8), (1, 60, 4), (37, 7, 1)):
        # No two equal scores in a row, in bfloat16 either: the choice among equals is undefined.
        ranks = draw(tokens, experts).float().argsort(1).argsort(1)
        yield router, ((ranks / (64 if experts > 64 else 8)).bfloat16(), k), (0,)


def _moe_weighted_up(draw: _Draw) -> _Cases:
    for tokens, k, inner in ((T, 4, 544), (117, 8, 512), (5, 2, 24)):
        routing = Routing.of(draw(tokens, EXPERTS).topk(k, 1).indices, EXPERTS)
        weights = draw(tokens, k).softmax(1)
        yield weighted_up, (draw(tokens * k, 2 * inner), weights, routing), (0, 1)


def _moe_shared_up(draw: _Draw) -> _Cases:
    for tokens, inner in ((T, 544), (517, 512), (3, 40)):
        gate, up, _ = draw(tokens, 2 * inner + 8).split((inner, inner, 8), 1)
        yield shared_up, (gate, up, draw(tokens, 1)), (0, 1, 2)


CASES: dict[str, Callable[[_Draw], _Cases]] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "gated_norm": _gated_norm,
    "swiglu": _swiglu,
    "delta_inputs": _delta_inputs,
    "delta_rule": _delta_rule,
    "delta_step": _delta_step,
    "attention_inputs": _attention_inputs,
    "output_gate": _output_gate,
    "moe_router": _moe_router,
    "moe_weighted_up": _moe_weighted_up,
    "moe_shared_up": _moe_shared_up,
}

#: Larger allowed errors of (outputs, gradients) for ops that sum bfloat16 products or round several
#: times.
BOUNDS = {"delta_rule": (1e-2, 2e-2), "delta_step": (1e-2, 0.0), "moe_weighted_up": (1e-2, 1e-2)}
