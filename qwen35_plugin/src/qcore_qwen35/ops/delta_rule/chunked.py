"""The gated delta rule in chunks, in torch: cost linear in T, forward and backward, any device.

This file decides the chunked form and its derivative. Within a chunk of C tokens, with
``G = cumsum(g)``, ``L_ij = exp(G_i - G_j)`` for i >= j, q and k normalized (`reference`)::

    A  = inverse(I + strictly_lower(beta_i k_i.k_j L_ij))
    Vn = A (beta V - Kb S),   Kb = beta exp(G) K      what is written, S: prior state
    o  = Qg S + P Vn,         Qg = exp(G) Q,  P = lower(q_i.k_j L_ij)
    S' = exp(G_C) S + Kd^T Vn,                Kd = exp(G_C - G) K

Only ``Vn``, ``o`` and ``S'`` depend on the previous chunk; everything else is computed for many
chunks and heads at once. Their number is bounded: a tile is some consecutive steps of the scan by
some heads, sized so that its tensors fit in a CPU's cache (on a GPU a tile is usually everything).
The function saves its inputs and the states between segments; the backward iterates over the tiles
from the end, repeats the forward scan of each and then scans backward. Autograd over the same
operations would save about twenty tensors of the size of V, and slicing them per chunk would make
its backward quadratic in T.

`Chunks` decides the order of chunks, `reference` the rule itself.

Shapes: M chunks of C tokens and Hk, Hv heads of a tile, B = M * Hv; a tensor written
``[B, C, d]`` is ``[M, Hv, C, d]`` flattened. N documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qcore.ops import device_type

from . import reference
from .layout import Chunks, Segment

CHUNK = 64

#: Chunks times value heads of a tile. On CPU one ``[B, C, d]`` of float32 is then about a
#: megabyte; on GPU the bound is on memory (a quarter of a gigabyte each), not on speed.
TILE = {"cpu": 32}
TILE_ELSEWHERE = 8192
#: Value heads that a CPU tile aims at: enough to feed the cores within one step of the scan.
HEADS = 8


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
    """Arguments and results of `reference.recurrent_delta_rule`, in chunks.

    Args:
        q: ``[T, Hk, dk]``, not yet normalized.
        k: ``[T, Hk, dk]``, not yet normalized.
        v: ``[T, Hv, dv]``.
        g: ``[T, Hv]`` log decay, at most 0.
        beta: ``[T, Hv]`` write strength.
        cu_seqlens: ``N + 1`` cumulative lengths.
        initial_state: ``[N, Hv, dk, dv]``, or zeros.
        layout: `Chunks` of `cu_seqlens`, if the caller has them.

    Returns:
        o ``[T, Hv, dv]`` in the dtype of v, and the state after each document
        ``[N, Hv, dk, dv]`` in float32.
    """
    if layout is None:
        layout = Chunks.of(cu_seqlens, CHUNK, q.device)
    o, state = _DeltaRule.apply(q, k, v, g, beta, initial_state, layout)  # type: ignore[no-untyped-call]
    return o, state


class _Prepared:
    """Everything that does not depend on the scan, for all chunks of a tile at once.

    Attributes:
        q, k: ``[M, Hk, C, dk]`` normalized, q scaled.
        q_norm, k_norm: ``[M, Hk, C, 1]`` the factors that normalized them.
        v: ``[M, Hv, C, dv]``.
        beta: ``[M, Hv, C]``.
        grow: ``[M, Hv, C]`` exp(G); left: exp(G_C - G); end: ``[B, 1, 1]`` exp(G_C).
        lower: ``[M, Hv, C, C]`` L, zero above the diagonal.
        kk, qk: ``[M, Hk, 1, C, C]`` products of keys with keys, queries with keys.
        inverse: ``[B, C, C]`` A; scores: ``[B, C, C]`` P.
        read: ``[B, 2C, dk]`` Qg above Kb: one product with S serves both.
        kept: ``[B, C, dk]`` Kd.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> None:
        """From copies ``[M, heads, C, ...]`` of a tile; changes q and k in place."""
        self.q_norm, self.k_norm = reference.inverse_norm(q), reference.inverse_norm(k)
        self.q = q.mul_(self.q_norm * reference.query_scale(q.shape[-1]))
        self.k = k.mul_(self.k_norm)
        self.v, self.beta = v, beta
        total = g.cumsum(-1)
        self.grow = total.exp()
        self.left = (total[..., -1:] - total).exp()
        self.end = self.grow[..., -1].reshape(-1, 1, 1)
        self.lower = _pairwise_decay(total)
        transposed = self.k.transpose(-1, -2)
        self.kk, self.qk = (self.k @ transposed).unsqueeze(2), (self.q @ transposed).unsqueeze(2)
        self.scores = (self.grouped(self.lower) * self.qk).flatten(0, 2)
        self.inverse = self._inverse()
        self.read, self.kept = self._reads()

    @property
    def repeat(self) -> int:
        """Number of value heads per key head."""
        return self.v.shape[1] // self.k.shape[1]

    def grouped(self, x: Tensor) -> Tensor:
        """``[M, Hv, ...] -> [M, Hk, Hv / Hk, ...]``."""
        return torch.unflatten(x, 1, (self.k.shape[1], self.repeat))

    def per_key_head(self, x: Tensor) -> Tensor:
        """``[B, ...] -> [M, Hk, ...]``: summed over the value heads of a key head."""
        x = x.unflatten(0, (self.k.shape[0], self.k.shape[1], self.repeat))
        return x.squeeze(2) if self.repeat == 1 else x.sum(2)

    def _inverse(self) -> Tensor:
        system = self.grouped(self.lower) * self.kk
        system.mul_(self.grouped(self.beta).unsqueeze(-1))
        eye = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
        system = system.flatten(0, 2)
        # unitriangular: the diagonal counts as one, whatever is stored there.
        inverse: Tensor = torch.linalg.solve_triangular(
            system, eye.expand_as(system), upper=False, unitriangular=True
        )
        return inverse

    def _reads(self) -> tuple[Tensor, Tensor]:
        chunks, heads, size, dk = self.k.shape
        read = self.k.new_empty(chunks, heads, self.repeat, 2 * size, dk)
        q, k = self.q.unsqueeze(2), self.k.unsqueeze(2)
        grow = self.grouped(self.grow).unsqueeze(-1)
        torch.mul(q, grow, out=read[..., :size, :])
        torch.mul(k, grow * self.grouped(self.beta).unsqueeze(-1), out=read[..., size:, :])
        kept = k * self.grouped(self.left).unsqueeze(-1)
        return read.flatten(0, 2), kept.flatten(0, 2)


def _pairwise_decay(total: Tensor) -> Tensor:
    """``[..., C] -> [..., C, C]``: exp(G_i - G_j) on and below the diagonal, else zero."""
    # Zeroed before exp: above the diagonal the difference is positive and would overflow
    # (minus infinity would do as well, but exp of it is slow).
    difference = total.unsqueeze(-1) - total.unsqueeze(-2)
    return difference.tril_().exp_().tril_()


def _scan(
    steps: Sequence[tuple[int, int]], p: _Prepared, state: Tensor, *, outputs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan: carry the states through the chunks of a tile.

    Args:
        steps: (first chunk, number of chunks) of each step.
        p: what does not depend on the scan.
        state: ``[N * Hv, dk, dv]``, longest document first; updated in place to the end.
        outputs: return o; otherwise return the states before each chunk.

    Returns:
        Vn ``[B, C, dv]``; o ``[B, C, dv]`` or empty; S ``[B, dk, dv]`` or empty.
    """
    heads, size = p.v.shape[1:3]
    written = (p.v * p.beta.unsqueeze(-1)).flatten(0, 1)
    o = torch.empty_like(written) if outputs else written.new_empty(0)
    before = written.new_empty(0 if outputs else len(written), *state.shape[1:])
    for first, count in steps:
        here = slice(first * heads, (first + count) * heads)
        s = state[: count * heads]
        read = p.read[here]
        if outputs:
            both = read @ s
            residue = written[here] - both[:, size:]
        else:
            before[here] = s
            residue = torch.baddbmm(written[here], read[:, size:], s, alpha=-1)
        new = torch.bmm(p.inverse[here], residue)
        written[here] = new
        if outputs:
            torch.baddbmm(both[:, :size], p.scores[here], new, out=o[here])
        s.mul_(p.end[here])
        s.baddbmm_(p.kept[here].transpose(1, 2), new)
    return written, o, before


class _Tile:
    """Consecutive steps of the scan by some key heads and their value heads."""

    def __init__(self, segment: Segment, first: int, last: int, repeat: int) -> None:
        self.segment = segment
        self.key_heads = slice(first, last)
        self.value_heads = slice(first * repeat, last * repeat)

    def prepare(self, spread: Sequence[Tensor], dtype: torch.dtype) -> _Prepared:
        """Prepare from the results of `Chunks.spread` for q, k, v, g and beta."""
        q, k, v, g, beta = spread
        key, value = self.key_heads, self.value_heads
        return _Prepared(
            self.take(q, key, dtype), self.take(k, key, dtype), self.take(v, value, dtype),
            self.take(g, value, dtype), self.take(beta, value, dtype),
        )  # fmt: skip

    def take(self, x: Tensor, heads: slice, dtype: torch.dtype) -> Tensor:
        """A copy ``[M, heads, C, ...]`` out of ``[all chunks, C, all heads, ...]``."""
        part = x[self.segment.chunks, :, heads].transpose(1, 2)
        return torch.empty(part.shape, dtype=dtype, device=x.device).copy_(part)

    def put(self, x: Tensor, heads: slice, value: Tensor) -> None:
        """The inverse of `take`."""
        x[self.segment.chunks, :, heads].transpose(1, 2).copy_(value)

    def state(self, states: Tensor) -> Tensor:
        """A copy ``[running * heads, dk, dv]`` out of ``[N, all heads, dk, dv]``."""
        part = states[: self.segment.running, self.value_heads]
        return (
            torch.empty(part.shape, dtype=part.dtype, device=part.device).copy_(part).flatten(0, 1)
        )

    def put_state(self, states: Tensor, value: Tensor) -> None:
        """The inverse of `state`."""
        part = states[: self.segment.running, self.value_heads]
        part.copy_(value.view_as(part))


def _segments(layout: Chunks, device: torch.device) -> list[Segment]:
    limit = TILE.get(device_type(device), TILE_ELSEWHERE)
    return list(layout.segments(max(1, limit // HEADS)))


def _tiles(segment: Segment, k_heads: int, v_heads: int, device: torch.device) -> Iterator[_Tile]:
    repeat = v_heads // k_heads
    chunks = segment.chunks.stop - segment.chunks.start
    width = max(1, TILE.get(device_type(device), TILE_ELSEWHERE) // (chunks * repeat))
    for first in range(0, k_heads, width):
        yield _Tile(segment, first, min(first + width, k_heads), repeat)


class _DeltaRule(torch.autograd.Function):
    """The whole operation; saves its inputs and the states between segments."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        initial: Tensor | None,
        layout: Chunks,
    ) -> tuple[Tensor, Tensor]:
        dtype = reference.computing(v.dtype)
        if initial is None:
            states = v.new_zeros(len(layout.order), v.shape[1], k.shape[2], v.shape[2], dtype=dtype)
        else:
            states = layout.by_length(initial.to(dtype))
        spread = [layout.spread(x) for x in (q, k, v, g, beta)]
        o = torch.empty_like(spread[2], memory_format=torch.contiguous_format)
        between = []
        for segment in _segments(layout, v.device):
            if any(ctx.needs_input_grad):
                between.append(states[: segment.running].clone())
            for tile in _tiles(segment, k.shape[1], v.shape[1], v.device):
                p = tile.prepare(spread, dtype)
                state = tile.state(states)
                _, out, _ = _scan(segment.steps, p, state, outputs=True)
                tile.put(o, tile.value_heads, out.view_as(p.v))
                tile.put_state(states, state)
        ctx.save_for_backward(q, k, v, g, beta, *between)
        ctx.layout = layout
        ctx.initial = None if initial is None else initial.dtype
        return layout.gather(o), layout.by_document(states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, *between = ctx.saved_tensors
        layout: Chunks = ctx.layout
        dtype = reference.computing(v.dtype)
        dstates = layout.by_length(dfinal.to(dtype))
        spread = [layout.spread(x) for x in (q, k, v, g, beta)]
        do = layout.spread(do)
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in spread]
        segments = _segments(layout, v.device)
        for segment, states in zip(reversed(segments), reversed(between)):
            for tile in _tiles(segment, k.shape[1], v.shape[1], v.device):
                p = tile.prepare(spread, dtype)
                new, _, before = _scan(segment.steps, p, tile.state(states), outputs=False)
                dstate = tile.state(dstates)
                dout = tile.take(do, tile.value_heads, dtype)
                made = _scan_back(segment.steps, p, dout, new, before, dstate)
                tile.put_state(dstates, dstate)
                for number, (grad, value) in enumerate(zip(grads, made)):
                    tile.put(grad, tile.key_heads if number < 2 else tile.value_heads, value)
        dinitial = None
        if ctx.initial is not None:
            dinitial = layout.by_document(dstates).to(ctx.initial)
        return (*(layout.gather(grad) for grad in grads), dinitial, None)


def _scan_back(
    steps: Sequence[tuple[int, int]],
    p: _Prepared,
    do: Tensor,
    new: Tensor,
    before: Tensor,
    dstate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scan backward: gradients of the inputs; `dstate` becomes that of the first states.

    Args:
        steps: see `_scan`.
        p: see `_scan`.
        do: ``[M, Hv, C, dv]``.
        new: ``[B, C, dv]`` Vn.
        before: ``[B, dk, dv]`` S.
        dstate: ``[N * Hv, dk, dv]`` gradient of the last states, changed in place.
    """
    heads, size = do.shape[1:3]
    # Gradients of the products with S: of o above, of -Kb S below (filled by the scan).
    dread = do.new_empty(len(new), 2 * size, do.shape[-1])
    dread[:, :size] = do.flatten(0, 1)
    after = torch.empty_like(before)  # gradient of S'
    for first, count in reversed(steps):
        here = slice(first * heads, (first + count) * heads)
        ds = dstate[: count * heads]
        after[here] = ds
        dnew = torch.bmm(p.scores[here].transpose(1, 2), dread[here, :size])
        dnew.baddbmm_(p.kept[here], ds)
        dread[here, size:] = torch.bmm(p.inverse[here].transpose(1, 2), dnew).neg_()
        ds.mul_(p.end[here])
        ds.baddbmm_(p.read[here].transpose(1, 2), dread[here])
    return _collect(p, dread, new, before, after)


def _collect(
    p: _Prepared, dread: Tensor, new: Tensor, before: Tensor, after: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a tile's inputs from those of its scan, all chunks at once.

    The decay enters all terms as exp(G): its gradient is, per token, the sum over all exponentials
    of each factor times the gradient of its product.
    """
    size = p.v.shape[2]
    heads = p.v.shape[:2]
    dresidue = dread[:, size:]  # of -(beta V - Kb S)
    dkept = new @ after.transpose(1, 2)
    kept_g = (p.kept * dkept).sum(-1)
    end_g = p.end.flatten() * torch.linalg.vecdot(after.flatten(1), before.flatten(1))
    dqk = dread @ before.transpose(1, 2)  # of Qg above, of Kb below
    q, k = p.q.unsqueeze(2), p.k.unsqueeze(2)
    dqg, dkb = p.grouped(dqk.unflatten(0, heads)).split(size, dim=-2)
    q_g, k_g = (dqg * q).sum(-1).flatten(1, 2), (dkb * k).sum(-1).flatten(1, 2)

    pairs = dread @ new.transpose(1, 2)  # of P above, of minus the system's product below
    pairs = pairs.unflatten(0, heads).unflatten(-2, (2, size))
    dscores = pairs[..., 0, :, :] * p.lower
    dsystem = (pairs[..., 1, :, :] * p.lower).tril_(-1)
    kk = (p.grouped(dsystem) * p.kk).flatten(1, 2)
    dsystem.mul_(p.beta.unsqueeze(-1))
    carried = (p.grouped(dscores) * p.qk).flatten(1, 2).addcmul_(kk, p.beta.unsqueeze(-1))

    v_beta = (dresidue.unflatten(0, heads) * p.v).sum(-1)
    dbeta = kk.sum(-1) - v_beta + p.grow * k_g
    dv = dresidue.unflatten(0, heads) * p.beta.unsqueeze(-1).neg()

    dtotal = carried.sum(-1) - carried.sum(-2) + p.grow * (q_g + p.beta * k_g)
    dtotal -= kept_g.unflatten(0, heads)
    dtotal[..., -1] += (kept_g.sum(-1) + end_g).unflatten(0, heads)
    dg = dtotal.sum(-1, keepdim=True) - dtotal.cumsum(-1) + dtotal

    grow = p.grouped(p.grow).unsqueeze(-1)
    dkb.mul_(grow * p.grouped(p.beta).unsqueeze(-1))
    dkb.addcmul_(p.grouped(dkept.unflatten(0, heads)), p.grouped(p.left).unsqueeze(-1))
    dqg.mul_(grow)
    dscores, dsystem = p.per_key_head(dscores.flatten(0, 1)), p.per_key_head(dsystem.flatten(0, 1))
    dq = p.per_key_head(dqg.flatten(0, 2)) + dscores @ p.k
    dk = p.per_key_head(dkb.flatten(0, 2)) + dscores.transpose(-1, -2) @ p.q
    dk += (dsystem + dsystem.transpose(-1, -2)) @ p.k
    dq = _unnormalize(dq, p.q, p.q_norm, reference.query_scale(q.shape[-1]))
    return dq, _unnormalize(dk, p.k, p.k_norm, 1.0), dv, dg, dbeta


def _unnormalize(dy: Tensor, y: Tensor, norm: Tensor, scale: float) -> Tensor:
    """Gradient of x where ``y = scale * norm * x`` and norm is `reference.inverse_norm`."""
    along = (dy * y).sum(-1, keepdim=True) / scale**2
    return dy.addcmul_(y, along, value=-1).mul_(norm * scale)
