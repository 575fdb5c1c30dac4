"""One token through the gated delta net, between its projections and its norm: decoding.

This file decides that what a document leaves behind is advanced in place: the tensors given are
the tensors that the next token finds, so that a captured graph may hold their addresses. The
formulas are `delta_inputs.reference`'s and `delta_rule.reference`'s.

Shapes: Hk key heads of dk, Hv value heads of dv, C = 2 Hk dk + Hv dv channels, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..delta_inputs.reference import Heads, causal_conv_silu, log_decay
from ..delta_rule.reference import recurrent_delta_rule


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
    """What the rule gives for one token; there is no backward.

    Args:
        qkv: ``[1, C]`` before the convolution.
        a: ``[1, Hv]``, of the decay.
        b: ``[1, Hv]``, of the write strength.
        conv_weight: ``[C, 1, K]``.
        a_log: ``[Hv]``.
        dt_bias: ``[Hv]``.
        conv: ``[K, C]`` the last inputs of the convolution; advanced in place.
        state: ``[1, Hv, dk, dv]`` float32; advanced in place.
        heads: how the channels divide.

    Returns:
        ``[1, Hv, dv]``.
    """
    mixed = causal_conv_silu(qkv, conv_weight, (0, 1), conv)
    g, beta = log_decay(a, a_log, dt_bias), torch.sigmoid(b)
    o, last = recurrent_delta_rule(*heads.split(mixed), g, beta, (0, 1), state)
    conv.copy_(torch.cat([conv[1:], qkv.detach().to(conv.dtype)]))
    state.copy_(last.detach())
    return o
