"""Linear maps of one input as one product on a GPU: base, LoRA, and their gradients.

This file decides how ``y_i = x W_i^T + s_i (x A_i^T) B_i^T`` of all members is computed there
in few launches and without a pass over the wider side for LoRA's sake. Whether it is asked is
`linear`'s and `stacked`'s decision; on CPUs it never is, save by its own tests.

Members' weights stand below each other in one buffer, read from 4 bit for each pass. LoRA goes
into the product where the wider side is the result, so that it costs no pass over it; over the
narrower side it goes first, and the product adds to it:

=======  =======================================  ==================================
         forward                                  backward
=======  =======================================  ==================================
N >= K   ``y = [x | xA^T] [W | sB]^T``            ``dx = (dy sB) A``, ``dx += dy W``
N < K    ``y = (xA^T) sB^T``, ``y += x W^T``      ``dx = [dy | dy sB] [W ; A]``
=======  =======================================  ==================================

(H100, 8192 rows, 2560 -> 18432, rank 32, launches timed apart, ms: forward 1.11, against 1.45 for
``y += (xA^T) sB^T`` after the product; for x's gradient ``[dx | dy sB] = dy [W | sB]`` and what
follows took 1.32, the two products alone 1.11.)

A is ``[R, K]``, all members' below each other; B ``[N, R]`` is block-diagonal. Both are made
in the run's dtype once per update of the masters, B scaled before it is rounded. An update is
known by the masters' versions; torch's fused optimizers leave these as they are, so what is not
`Adapted.accumulates` counts as updated whenever a forward follows a backward.

Saved are x and ``xA^T``. 16-bit weights move into a buffer that stays, and so do 4-bit ones
that are `resident`.

Shapes: T rows, K in, N out of all members, R ranks of all members up to a multiple of 8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import on_gpu
from .slices import whole

if TYPE_CHECKING:
    from .linear import Linear

_MULTIPLE = 8  # 16 bytes of a 16-bit dtype: rows that the matrix units' loads can start at


@dataclass(frozen=True, slots=True)
class _Adapter:
    """One member's LoRA and where it lies: rows of B, ranks of A."""

    module: Linear
    rows: slice
    ranks: slice
    a: Tensor
    b: Tensor
    scaling: float

    @property
    def mark(self) -> tuple[Any, ...]:
        """Changes when the masters do."""
        return self.a, self.a._version, self.b, self.b._version, self.scaling


@dataclass(frozen=True, slots=True)
class _Working:
    """LoRA in the run's dtype: ``a [R, K]``, ``b [N, R]`` block-diagonal and scaled."""

    marks: list[tuple[Any, ...]]
    a: Tensor
    b: Tensor


@dataclass(slots=True)
class _Kept:
    """A buffer that stays, and whose values it holds."""

    buffer: Tensor
    sources: list[Any]
    working: _Working | None


class Product:
    """``[..., K] -> ([..., N_i], ...)``.

    Args:
        members: maps of one K. They own what they hold; this reads it.
    """

    def __init__(self, members: Sequence[Linear]) -> None:
        self.members = tuple(members)
        into = {member.shape[1] for member in members}
        if len(into) != 1:
            raise ValueError(f"maps of one input take one width, not {sorted(into)}")
        self.into = into.pop()
        self.sizes = [member.shape[0] for member in members]
        self.out = sum(self.sizes)
        self._working: _Working | None = None
        self._kept: _Kept | None = None
        self._stale = False

    def takes(self, x: Tensor) -> bool:
        """Whether it computes these members for `x`: on a GPU, without dropout.

        Dropout is drawn for each member alone, so each reads another x.
        """
        return on_gpu(x) and not any(
            member.training and member.lora is not None and member.lora.lora_dropout
            for member in self.members
        )

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        matrices = [matrix for one in self.adapters() for matrix in (one.a, one.b)]
        y: tuple[Tensor, ...] = _Product.apply(x, self, *matrices)  # type: ignore[no-untyped-call]
        return y

    @property
    def wide(self) -> bool:
        """Whether LoRA stands beside the weights, not below."""
        return self.out >= self.into

    def adapters(self) -> Iterator[_Adapter]:
        """LoRA of the members that carry it."""
        row = rank = 0
        for member, size in zip(self.members, self.sizes, strict=True):
            lora = member.lora
            if lora is not None:
                assert member.lora_A is not None
                assert member.lora_B is not None
                yield _Adapter(
                    member,
                    slice(row, row + size),
                    slice(rank, rank + lora.r),
                    member.lora_A,
                    member.lora_B,
                    lora.scaling,
                )
                rank += lora.r
            row += size

    def spent(self) -> None:
        """Say that a backward ran: an update may follow that leaves no trace."""
        self._stale = not all(one.module.accumulates for one in self.adapters())

    def renew(self) -> None:
        """Say that a forward begins."""
        if self._stale:
            self._working, self._stale = None, False

    @torch.no_grad()
    def working(self, like: Tensor) -> _Working | None:
        """A and B in the dtype of `like`, made anew where a master changed."""
        adapters = list(self.adapters())
        if not adapters:
            return None
        marks = [one.mark for one in adapters]
        known = self._working
        if known is not None and known.a.dtype == like.dtype and _same(known.marks, marks):
            return known
        ranks = adapters[-1].ranks.stop
        ranks += -ranks % _MULTIPLE
        a, b = like.new_zeros(ranks, self.into), like.new_zeros(self.out, ranks)
        for one in adapters:
            a[one.ranks] = one.a
            torch.mul(one.b, one.scaling, out=b[one.rows, one.ranks])
        self._working = _Working(marks, a, b)
        return self._working

    @torch.no_grad()
    def buffer(self, working: _Working | None, like: Tensor) -> Tensor:
        """``[N, K + R]`` or ``[N + R, K]``: the weights, and LoRA in its place."""
        kept = self._kept
        if kept is None or not _fits(kept, self._sources(), working, like):
            return self._filled(working, like)
        if working is not None and kept.working is not working:
            self._put(kept.buffer, working)
            kept.working = working
        return kept.buffer

    @torch.no_grad()
    def weights(self, working: _Working | None, like: Tensor) -> Tensor:
        """``[N, K]``: the weights alone; rows may lie apart."""
        stays = all(member.resident or not member.four_bit for member in self.members)
        buffer = self.buffer(working, like) if stays else self._filled(None, like)
        return buffer[: self.out, : self.into]

    def _sources(self) -> list[Any]:
        return [member.nf4 or member.weight for member in self.members]

    def _filled(self, working: _Working | None, like: Tensor) -> Tensor:
        """A new buffer; it stays where all members' weights may."""
        ranks = 0 if working is None else len(working.a)
        shape = (self.out, self.into + ranks) if self.wide else (self.out + ranks, self.into)
        buffer = like.new_empty(shape)
        if working is not None:
            self._put(buffer, working)
        slabs = torch.split(buffer[: self.out, : self.into], self.sizes)
        for member, slab in zip(self.members, slabs, strict=True):
            member.into(slab)
        if all(member.resident or not member.four_bit for member in self.members):
            for member, slab in zip(self.members, slabs, strict=True):
                if member.weight is not None:
                    member.weight.data = slab  # held once
            self._kept = _Kept(buffer, self._sources(), working)
        return buffer

    def _put(self, buffer: Tensor, working: _Working) -> None:
        if self.wide:
            buffer[:, self.into :] = working.b
        else:
            buffer[self.out :] = working.a


def _same(known: list[tuple[Any, ...]], marks: list[tuple[Any, ...]]) -> bool:
    """Whether all masters are the same objects in the same state; tensors compare by identity."""
    return len(known) == len(marks) and all(
        one is other if isinstance(one, Tensor) else one == other
        for before, now in zip(known, marks, strict=True)
        for one, other in zip(before, now, strict=True)
    )


def _fits(kept: _Kept, sources: list[Any], working: _Working | None, like: Tensor) -> bool:
    """Whether a buffer is of these weights as they are now, in this dtype, with room for LoRA."""
    buffer = kept.buffer
    if buffer.dtype != like.dtype or buffer.device != like.device:
        return False
    before = 0 if kept.working is None else len(kept.working.a)
    if before != (0 if working is None else len(working.a)):
        return False
    for one, other in zip(kept.sources, sources, strict=True):
        if one is not other:
            return False
        if isinstance(one, Tensor) and _storage(one) != _storage(buffer):
            return False
    return True


class _Product(torch.autograd.Function):
    """Outputs are slices of one buffer; saves x and ``x A^T``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Product, *matrices: Tensor) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        product.renew()
        working = product.working(x)
        xa = None if working is None else flat @ working.a.t()
        if working is None or xa is None:
            y = flat @ product.weights(None, x).t()
        elif product.wide:
            y = torch.cat([flat, xa], 1) @ product.buffer(working, x).t()
        else:
            y = xa @ working.b.t()
            y.addmm_(flat, product.weights(working, x).t())
        ctx.save_for_backward(flat if matrices else None, xa)
        ctx.product, ctx.shape = product, x.shape
        return tuple(one.view(*x.shape[:-1], -1) for one in torch.split(y, product.sizes, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, xa = ctx.saved_tensors
        product: Product = ctx.product
        dy = whole([_rows(one) for one in grads])
        working = product.working(dy)
        dx = dyb = None
        if ctx.needs_input_grad[0]:
            dx, dyb = _input_gradient(product, working, dy)
            dx = dx.view(ctx.shape)
        elif working is not None:
            dyb = dy @ working.b
        product.spent()
        if xa is None:
            return dx, None
        assert dyb is not None
        return dx, None, *_adapter_gradients(list(product.adapters()), x, xa, dy, dyb)


def _rows(grad: Tensor) -> Tensor:
    flat = grad.reshape(-1, grad.shape[-1])
    return flat if flat.stride(1) == 1 and flat.stride(0) >= flat.shape[1] else flat.contiguous()


def _input_gradient(
    product: Product, working: _Working | None, dy: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Of x, and ``dy sB``."""
    if working is None:
        return dy @ product.weights(None, dy), None
    dyb = dy @ working.b
    if product.wide:
        return (dyb @ working.a).addmm_(dy, product.weights(working, dy)), dyb
    return torch.cat([dy, dyb], 1) @ product.buffer(working, dy), dyb


def _adapter_gradients(
    adapters: list[_Adapter], x: Tensor, xa: Tensor, dy: Tensor, dyb: Tensor
) -> list[Tensor | None]:
    """Of A and B of each member in float32; ``None`` where it was added to what is there."""
    sinks = [
        (one.a.grad, one.b.grad) if one.module.accumulates else (None, None) for one in adapters
    ]
    together = _neighbours([a for a, _ in sinks])
    if together is not None:
        _add_product(together, dyb[:, : len(together)].t(), x, 1.0, fresh=False)
        da = None
    else:
        da = dy.new_empty(adapters[-1].ranks.stop, x.shape[1], dtype=torch.float32)
        _add_product(da, dyb[:, : len(da)].t(), x, 1.0, fresh=True)
    out: list[Tensor | None] = []
    for one, (a, b) in zip(adapters, sinks, strict=True):
        if da is None:
            out.append(None)
        elif a is not None:
            a.add_(da[one.ranks])
            out.append(None)
        else:
            out.append(da[one.ranks].to(one.a.dtype))
        left, right = dy[:, one.rows].t(), xa[:, one.ranks]
        if b is not None:
            _add_product(b, left, right, one.scaling, fresh=False)
            out.append(None)
        else:
            db = torch.empty_like(one.b, dtype=torch.float32)
            _add_product(db, left, right, one.scaling, fresh=True)
            out.append(db.to(one.b.dtype))
    return out


def _neighbours(grads: list[Tensor | None]) -> Tensor | None:
    """Gradients ``[r_i, K]`` as one ``[sum r, K]``, where all are there and lie end to end."""
    there = [grad for grad in grads if grad is not None]
    if len(there) != len(grads):
        return None
    first, end = there[0], there[0].storage_offset()
    for grad in there:
        if _storage(grad) != _storage(first) or grad.storage_offset() != end:
            return None
        if not grad.is_contiguous():
            return None
        end += grad.numel()
    return first.as_strided((sum(map(len, there)), first.shape[1]), first.stride())


def _add_product(to: Tensor, left: Tensor, right: Tensor, by: float, *, fresh: bool) -> None:
    """``to = by left @ right``, or ``to +=``; `to` is float32, sums are not rounded before it."""
    beta = 0.0 if fresh else 1.0
    if on_gpu(left) and left.dtype != to.dtype:
        torch.addmm(to, left, right, out_dtype=to.dtype, beta=beta, alpha=by, out=to)
    else:
        torch.addmm(to, left.to(to.dtype), right.to(to.dtype), beta=beta, alpha=by, out=to)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
