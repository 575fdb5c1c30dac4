"""The gated delta rule in Triton, for training: two launches forward, three backward.

This file decides what is saved for backward: only the inputs. The backward recomputes what the scan
needs (`triton_prepare`), and the states together with their gradients (`triton_scan`);
`triton_gradients` computes the gradients of the inputs. Same signature and results as
`chunked.chunked_delta_rule`. Importing this file imports Triton.

Products of bfloat16 are accumulated in float32, the state is float32 and rounded only as
a factor of a product; with float32 inputs nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import limits
from ..launch import supported
from .layout import Chunks, Tables
from .triton_gradients import gradients
from .triton_prepare import CHUNK, prepare
from .triton_scan import outputs, states


def chunked_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Sequence[int],
    initial_state: Tensor | None = None,
    layout: Chunks | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results of `chunked.chunked_delta_rule`.

    Args:
        q: ``[T, Hk, dk]``, not yet normalized; any stride between tokens.
        k: ``[T, Hk, dk]``, likewise.
        v: ``[T, Hv, dv]``, likewise.
        g: ``[T, Hv]`` log decay, at most 0.
        beta: ``[T, Hv]`` write strength.
        cu_seqlens: ``N + 1`` cumulative lengths.
        initial_state: ``[N, Hv, dk, dv]``, or zeros.
        layout: `Chunks` of `cu_seqlens`, if the caller has them.

    Raises:
        UsageError: ``QC-KERNEL-003`` head sizes other than `limits.HEADS`.
        ValueError: an unsupported dtype.
    """
    supported(q, k, v)
    limits.check("qwen35::delta_rule", limits.rule_heads(k.shape[-1], v.shape[-1]))
    tables = layout.tables if layout is not None else None
    if tables is None:
        tables = Tables.of(cu_seqlens, CHUNK, q.device)
    made: tuple[Tensor, Tensor] = _DeltaRule.apply(q, k, v, g, beta, initial_state, tables)  # type: ignore[no-untyped-call]
    return made


class _DeltaRule(torch.autograd.Function):
    """The whole operation; saves its inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        initial: Tensor | None,
        tables: Tables,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, g, beta, initial)
        ctx.tables = tables
        q, k, v, g, beta = (_rows(x) for x in (q, k, v, g, beta))
        initial = None if initial is None else initial.contiguous()
        made = prepare(q, k, g, beta, tables, forward=True)
        return outputs(q, k, v, made, initial, tables)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, initial = ctx.saved_tensors
        tables: Tables = ctx.tables
        q, k, v, g, beta = (_rows(x) for x in inputs)
        do = None if do is None else _rows(do)
        dlast = None if dlast is None else dlast.contiguous()
        first = None if initial is None else initial.contiguous()
        made = prepare(q, k, g, beta, tables, forward=False)
        *scanned, dfirst = states(q, k, v, made, first, tables, do, dlast)
        dq, dk, dg, dbeta = gradients(q, k, g, beta, made.factors, do, scanned, tables)
        return (
            dq,
            dk,
            scanned[1],
            dg,
            dbeta,
            None if initial is None else dfirst.to(initial.dtype),
            None,
        )


def _rows(x: Tensor) -> Tensor:
    """``[T, ...]`` with contiguous rows; copies only if they are not."""
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:])):
        if size != 1 and stride != expected:
            return x.contiguous()
        expected *= size
    return x
