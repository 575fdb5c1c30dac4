"""GPU path of QLoRA linear layers: base and LoRA of layers with one input as one product.

This file decides how ``y_i = x W_i^T + s_i (x A_i^T) B_i^T`` of all members is computed there in
few launches and without a pass over the wider side for LoRA's sake. `linear` and `stacked_linear`
decide whether it is used; on CPUs only its own tests use it.

Members' weights stand below each other in one buffer, read from 4 bit for each pass; what surrounds
the product is torch's, or that of the op ``qlora_linear`` (`fused_triton`). LoRA goes into the
product where the wider side is the result, so that it costs no pass over it; over the narrower side
it goes first, and the product adds to it:

=======  =======================================  ==================================
         forward                                  backward
=======  =======================================  ==================================
N >= K   ``y = [x | xA^T] [W | sB]^T``            ``dx = (dy sB) A``, ``dx += dy W``
N < K    ``y = (xA^T) sB^T``, ``y += x W^T``      ``dx = [dy | dy sB] [W ; A]``
=======  =======================================  ==================================

(H100, 8192 rows, 2560 -> 18432, rank 32, launches timed apart, ms: forward 1.11, against 1.45 for
``y += (xA^T) sB^T`` after the product; for x's gradient ``[dx | dy sB] = dy [W | sB]`` and what
follows took 1.32, the two products alone 1.11.)

A and B are those of all members in the run's dtype (`fused_factors`). Saved are x and ``xA^T``, and
with DoRA (`dora`) the scaled result.
16-bit weights move into a buffer that stays, and so do 4-bit ones that are `resident`.

Shapes: T rows, K in, N out of all members, R ranks of all members up to a multiple of 8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...errors import UsageError
from ..grad_buffers import as_one_buffer
from ..kernels.launch import on_gpu
from ..storage import storage_id
from .dora import Magnitudes, row_norms, scale_gradient
from .fused_factors import WorkingFactors
from .fused_grads import adapter_gradients
from .fused_tables import MemberTables
from .members import Member, Members

Compute = Callable[[Tensor, "Product"], tuple[Tensor, ...]]


class FusedKernels(Protocol):
    """Kernels for what surrounds a product, in place of torch's ops (`fused_triton`)."""

    def takes(self, product: Product, like: Tensor) -> bool:
        """Whether `fill` can read the members."""
        ...

    def fill(
        self,
        product: Product,
        buffer: Tensor,
        working: WorkingFactors | None,
        *,
        place: bool,
        fresh: bool,
    ) -> None:
        """Write all weights; with `place` LoRA too; with `fresh` also `working` from A and B."""
        ...

    def thin(
        self, x: Tensor, right: Tensor, *, beside: bool
    ) -> tuple[Tensor | None, Tensor] | None:
        """``[x | x right^T]``, if `beside`, and ``x right^T``; ``None`` if torch is faster."""
        ...

    def outer(self, product: Product, x: Tensor, xa: Tensor, dy: Tensor, dyb: Tensor) -> bool:
        """Add the gradients of A and B to where they are kept; false if it cannot."""
        ...

    def scale_gradient(self, dy: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """``dy * scale`` and ``sum_t dy y`` (`dora.scale_gradient`)."""
        ...


@dataclass(slots=True)
class _KeptBuffer:
    """A buffer that stays: which weights and which version of LoRA it holds, in how many ranks."""

    buffer: Tensor
    sources: list[Any]
    ranks: int
    version: int


class Product(Members):
    """``[..., K] -> ([..., N_i], ...)``.

    A backend that does not read `magnitudes` would compute plain LoRA: it is refused with DoRA.

    Args:
        members: maps of one K. They own their tensors; this reads them.
        compute: the op ``qlora_linear``; by default `reference`.

    Attributes:
        compute: the op that computes the product.
        tables: addresses of the members, for `FusedKernels`.
        magnitudes: those of members with DoRA, by which the rows of the result are scaled.
    """

    def __init__(self, members: Sequence[Member], compute: Compute | None = None) -> None:
        super().__init__(members)
        self.compute: Compute = compute or reference
        self.tables = MemberTables()
        self.magnitudes = Magnitudes(self.members)
        self._working = WorkingFactors(self.out, self.into)
        self._kept: _KeptBuffer | None = None

    def takes(self, x: Tensor) -> bool:
        """Whether this product computes its members for `x`: on a GPU, without dropout.

        Each member draws its own dropout, so each would read another x.
        """
        return on_gpu(x) and not any(
            member.training and member.lora is not None and member.lora.lora_dropout
            for member in self.members
        )

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        self.magnitudes.asked = False
        outputs = self.compute(x, self)
        if self.magnitudes.parameters() and not self.magnitudes.asked:
            raise UsageError(
                "QC-KERNEL-003",
                "cannot run here: it computes plain LoRA, and the adapter has DoRA",
                field="kernels.qlora_linear",
                found=getattr(self.compute, "__module__", None),
                fix="ask for qlora_linear=reference, or set use_dora=false",
            )
        return outputs

    def note_backward(self) -> None:
        """Record that a backward ran."""
        self._working.note_backward(list(self.adapters()))

    def note_forward(self) -> None:
        """Record that a forward begins."""
        self._working.note_forward()

    @torch.inference_mode(False)
    @torch.no_grad()
    def working(self, like: Tensor, kernels: FusedKernels | None = None) -> WorkingFactors | None:
        """A and B in the dtype of `like`, made again if a trained factor changed.

        With `kernels` they may be unwritten: reading the weights writes them.
        """
        adapters = list(self.adapters())
        if not adapters:
            return None
        late = kernels is not None and not self.stays and kernels.takes(self, like)
        self._working.update(adapters, like, late=late)
        return self._working

    @property
    def stays(self) -> bool:
        """Whether the buffer is kept: all weights are in 16 bit anyway, and whole."""
        return all(
            member.resident or not (member.four_bit or member.sharded) for member in self.members
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def buffer(
        self, working: WorkingFactors | None, like: Tensor, kernels: FusedKernels | None = None
    ) -> Tensor:
        """``[N, K + R]`` or ``[N + R, K]``: the weights, and LoRA in its place."""
        kept = self._kept
        if kept is None or not _fits(kept, self._sources(), working, like):
            return self._filled(working, like, kernels, place=True)
        if working is not None and kept.version != working.version:
            self._put(kept.buffer, working)
            kept.version = working.version
        return kept.buffer

    @torch.inference_mode(False)
    @torch.no_grad()
    def weights(
        self, working: WorkingFactors | None, like: Tensor, kernels: FusedKernels | None = None
    ) -> Tensor:
        """``[N, K]``: the weights alone; rows may lie apart."""
        if self.stays:
            buffer = self.buffer(working, like)
        else:
            buffer = self._filled(working, like, kernels, place=False)
        return buffer[: self.out, : self.into]

    def changed_norms(self, buffer: Tensor, working: WorkingFactors) -> Tensor:
        """Norms of the rows of the weights with LoRA added, float32 ``[N]``.

        Args:
            buffer: of `buffer` or `weights`, not read again after this unless it `stays`.
            working: of the same call.
        """
        weights = buffer[: self.out, : self.into]
        if self.stays:
            return row_norms(torch.addmm(weights, working.b, working.a))
        return row_norms(weights.addmm_(working.b, working.a))

    def _sources(self) -> list[Any]:
        return [member.nf4 or member.weight for member in self.members]

    def _filled(
        self,
        working: WorkingFactors | None,
        like: Tensor,
        kernels: FusedKernels | None,
        *,
        place: bool,
    ) -> Tensor:
        """A new buffer, with `working` in its place if asked; it stays where all weights may."""
        place = place and working is not None
        ranks = len(working.a) if place and working is not None else 0
        shape = (self.out, self.into + ranks) if self.wide else (self.out + ranks, self.into)
        buffer = like.new_empty(shape)
        if kernels is not None and not self.stays and kernels.takes(self, like):
            fresh = working is not None and not working.written
            kernels.fill(self, buffer, working, place=place, fresh=fresh)
            if working is not None:
                working.written = True
            return buffer
        if working is not None and place:
            self._put(buffer, working)
        slabs = torch.split(buffer[: self.out, : self.into], self.sizes)
        for member, slab in zip(self.members, slabs, strict=True):
            member.into(slab)
        if self.stays:
            for member, slab in zip(self.members, slabs, strict=True):
                if member.weight is not None:
                    member.weight.data = slab  # held once
            version = 0 if working is None else working.version
            self._kept = _KeptBuffer(buffer, self._sources(), ranks, version)
        return buffer

    def _put(self, buffer: Tensor, working: WorkingFactors) -> None:
        if self.wide:
            buffer[:, self.into :] = working.b
        else:
            buffer[self.out :] = working.a


def _fits(
    kept: _KeptBuffer, sources: list[Any], working: WorkingFactors | None, like: Tensor
) -> bool:
    """Whether a buffer holds these weights as they are now, in this dtype, with space for LoRA."""
    buffer = kept.buffer
    if buffer.dtype != like.dtype or buffer.device != like.device:
        return False
    if kept.ranks != (0 if working is None else len(working.a)):
        return False
    for source, now in zip(kept.sources, sources, strict=True):
        if source is not now:
            return False
        if isinstance(source, Tensor) and storage_id(source) != storage_id(buffer):
            return False
    return True


def reference(x: Tensor, product: Product) -> tuple[Tensor, ...]:
    """The members' maps of `x`, with torch's ops alone."""
    return through(None, x, product)


def through(kernels: FusedKernels | None, x: Tensor, product: Product) -> tuple[Tensor, ...]:
    """The members' maps of `x`, with `kernels` for what surrounds the product."""
    matrices = [matrix for factors in product.adapters() for matrix in (factors.a, factors.b)]
    matrices += product.magnitudes.parameters()
    y: tuple[Tensor, ...] = _Product.apply(x, product, kernels, *matrices)  # type: ignore[no-untyped-call]
    return y


class _Product(torch.autograd.Function):
    """Outputs are slices of one buffer; saves x and ``x A^T``, with DoRA the buffer too."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, product: Product, kernels: FusedKernels | None, *matrices: Tensor
    ) -> tuple[Tensor, ...]:
        flat = _rows(x)
        product.note_forward()
        working = product.working(x, kernels)
        xa = buffer = None
        if working is None:
            y = flat @ product.weights(None, x, kernels).t()
        elif product.wide:
            buffer = product.buffer(working, x, kernels)
            both, xa = _thin(kernels, flat, working.a, beside=True)
            y = both @ buffer.t()
        else:
            buffer = product.weights(working, x, kernels)
            _, xa = _thin(kernels, flat, working.a, beside=False)
            y = xa @ working.b.t()
            y.addmm_(flat, buffer.t())
        ctx.factors = product.magnitudes.factors(
            y, lambda: product.changed_norms(cast(Tensor, buffer), cast(WorkingFactors, working))
        )
        if ctx.factors is not None:
            y.mul_(ctx.factors.scale)
        ctx.save_for_backward(flat if matrices else None, xa, None if ctx.factors is None else y)
        ctx.product, ctx.shape, ctx.kernels = product, x.shape, kernels
        parts = zip(torch.split(y, product.sizes, 1), product.sizes, strict=True)
        return tuple(part.view(*x.shape[:-1], size) for part, size in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, y = ctx.saved_tensors
        product: Product = ctx.product
        dy = as_one_buffer([_rows(grad) for grad in grads])
        dm: list[Tensor | None] = []
        if y is not None:
            kernels = cast(FusedKernels | None, ctx.kernels)
            scale = scale_gradient if kernels is None else kernels.scale_gradient
            dy, dots = scale(dy, y, ctx.factors.scale)
            dm = product.magnitudes.gradients(dots, ctx.factors)
        working = product.working(dy)
        dx = dyb = None
        if ctx.needs_input_grad[0]:
            dx, dyb = _input_gradient(product, ctx.kernels, working, dy)
            dx = dx.view(ctx.shape)
        elif working is not None:
            _, dyb = _thin(ctx.kernels, dy, working.b.t(), beside=False)
        product.note_backward()
        if xa is None:
            return dx, None, None
        assert dyb is not None
        adapters = list(product.adapters())
        if ctx.kernels is not None and ctx.kernels.outer(product, x, xa, dy, dyb):
            return dx, None, None, *[None] * (2 * len(adapters)), *dm
        return dx, None, None, *adapter_gradients(adapters, x, xa, dy, dyb), *dm


def _rows(grad: Tensor) -> Tensor:
    flat = grad.reshape(-1, grad.shape[-1])
    return flat if flat.stride(1) == 1 and flat.stride(0) >= flat.shape[1] else flat.contiguous()


def _thin(
    kernels: FusedKernels | None, x: Tensor, right: Tensor, *, beside: bool
) -> tuple[Tensor, Tensor]:
    """``[x | x right^T]``, or x where it is not wanted, and ``x right^T``."""
    both = None if kernels is None else kernels.thin(x, right, beside=beside)
    if both is not None:
        return x if both[0] is None else both[0], both[1]
    small = x @ right.t()
    return torch.cat([x, small], 1) if beside else x, small


def _input_gradient(
    product: Product, kernels: FusedKernels | None, working: WorkingFactors | None, dy: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Of x, and ``dy sB``."""
    if working is None:
        return dy @ product.weights(None, dy, kernels), None
    both, dyb = _thin(kernels, dy, working.b.t(), beside=not product.wide)
    if product.wide:
        return (dyb @ working.a).addmm_(dy, product.weights(working, dy, kernels)), dyb
    return both @ product.buffer(working, dy, kernels), dyb
