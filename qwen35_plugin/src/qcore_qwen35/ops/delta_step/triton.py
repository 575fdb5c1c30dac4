"""Triton kernels of the decoding step: convolution and gates in one launch, the rule in another.

This file decides that a program owns the channels whose inputs it shifts, so that no program reads
what another has written: one warp, which loads before it stores. Rounding matches `reference`: the
convolution rounds before SiLU. `delta_rule.triton_step` computes the rule.

Shapes: C channels in the order q, k, v; K taps.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
# Types of kernels are Triton's.
from __future__ import annotations

import torch
from torch import Tensor

from qcore.ops import tl, triton

from ..delta_inputs.reference import Heads
from ..delta_rule.triton_step import recurrent_delta_rule
from ..launch import cdiv, launch, next_power_of_2, supported

#: Channels per program.
BLOCK = 256


def delta_step(
    qkv: Tensor,
    a: Tensor,
    b: Tensor,
    conv_weight: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    conv: Tensor,
    state: Tensor,
    heads: Heads,
) -> Tensor:
    """Arguments and result of `reference.delta_step`.

    Raises:
        ValueError: a state that cannot be updated in place, or an argument that
            `recurrent_delta_rule` refuses.
    """
    supported(qkv)
    if conv.dtype != qkv.dtype or not conv.is_contiguous():
        raise ValueError(
            f"a convolution state of {conv.dtype} cannot take inputs of {qkv.dtype} in place"
        )
    if state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError(f"a state of {state.dtype} cannot be updated in place")
    channels, count = qkv.shape[1], a.shape[1]
    mixed = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    g = torch.empty(1, count, dtype=torch.float32, device=qkv.device)
    beta = torch.empty(1, count, dtype=b.dtype, device=qkv.device)
    launch(
        _advance, (cdiv(channels, BLOCK) + 1,),
        qkv, conv_weight, conv, mixed, a, b, a_log, dt_bias, g, beta, channels, count,
        TAPS=conv_weight.shape[-1], BLOCK=BLOCK, HEADS=next_power_of_2(count), num_warps=1,
    )  # fmt: skip
    o, _ = recurrent_delta_rule(*heads.split(mixed), g, beta, (0, 1), state)
    return o


@triton.jit
def _advance(
    u_ptr, w_ptr, conv_ptr, y_ptr, a_ptr, b_ptr, log_ptr, bias_ptr, g_ptr, beta_ptr,
    channels, heads, TAPS: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Each program handles some channels; the last one handles the gates."""
    if tl.program_id(0) * BLOCK < channels:
        c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = c < channels
        half = y_ptr.dtype.element_ty
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        new = tl.load(u_ptr + c, mask=inside, other=0.0)
        for tap in tl.static_range(TAPS):
            if tap < TAPS - 1:
                u = tl.load(conv_ptr + (tap + 1) * channels + c, mask=inside, other=0.0)
            else:
                u = new
            w = tl.load(w_ptr + c * TAPS + tap, mask=inside, other=0.0).to(half).to(tl.float32)
            total += w * u.to(tl.float32)
            tl.store(conv_ptr + tap * channels + c, u, mask=inside)
        total = total.to(half).to(tl.float32)
        tl.store(y_ptr + c, (total * tl.sigmoid(total)).to(half), mask=inside)
    else:
        h = tl.arange(0, HEADS)
        known = h < heads
        rate = tl.exp(tl.load(log_ptr + h, mask=known, other=0.0).to(tl.float32))
        bias = tl.load(bias_ptr + h, mask=known, other=0.0).to(tl.float32)
        a = tl.load(a_ptr + h, mask=known, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + h, mask=known, other=0.0).to(tl.float32)
        a += bias
        opened = tl.where(a > 20.0, a, tl.log(1.0 + tl.exp(tl.minimum(a, 20.0))))
        tl.store(g_ptr + h, -rate * opened, mask=known)
        tl.store(beta_ptr + h, tl.sigmoid(b).to(beta_ptr.dtype.element_ty), mask=known)
