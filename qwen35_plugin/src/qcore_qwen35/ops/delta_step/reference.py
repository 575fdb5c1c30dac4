"""Reference of the decoding step: one token through convolution, gates and delta rule.

This file decides that the state of a document is updated in place: the same tensors are passed for
the next token, so that a captured CUDA graph may hold their addresses. `delta_inputs.reference` and
`delta_rule.reference` have the formulas.

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
    """Output of the delta rule for one token, without a backward.

    Args:
        qkv: ``[1, C]`` before the convolution.
        a: ``[1, Hv]``, input of the decay.
        b: ``[1, Hv]``, input of the write strength.
        conv_weight: ``[C, 1, K]``.
        a_log: ``[Hv]``.
        dt_bias: ``[Hv]``.
        conv: ``[K, C]`` last inputs of the convolution; updated in place.
        state: ``[1, Hv, dk, dv]`` float32; updated in place.
        heads: division of the channels into heads.

    Returns:
        ``[1, Hv, dv]``.
    """
    mixed = causal_conv_silu(qkv, conv_weight, (0, 1), conv)
    g, beta = log_decay(a, a_log, dt_bias), torch.sigmoid(b)
    o, last = recurrent_delta_rule(*heads.split(mixed), g, beta, (0, 1), state)
    conv.copy_(torch.cat([conv[1:], qkv.detach().to(conv.dtype)]))
    state.copy_(last.detach())
    return o
