"""DoRA: the outputs of linear layers with LoRA, each scaled to a trained magnitude.

This file decides how ``y = m / ||W + s B A|| * (x W^T + s x A^T B^T)`` follows from the output of
plain LoRA, for one layer or several with the same input, and when the norms of the rows are
computed again: once after each update of A or B. Norms are constants in backward, as in PEFT
(Liu et al. 2024, section 4.3). `linear` and `fused` compute plain LoRA.

The norms need no ``W + s B A``: ``||W||^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>`` by rows, with the
first term computed once. The output is scaled in place and saved for the gradient of m, which is
``sum_t dy y / m``; layers that follow mostly save it too.

Shapes: T rows of x, N outputs of all layers, ``W [out, in]``, ``A [r, in]``, ``B [out, r]``,
``m [out]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels.launch import on_gpu, record_work
from ..storage import storage_id
from .lora_layer import Lora

_CHUNK = 2**25  #: elements of a product ``dy y`` that exist at a time
_BLOCK = 2**20  #: elements of a weight that a CPU converts to float32 at a time


#: Of one layer: m (``None`` without DoRA), its version and that of the norms.
_Mark = tuple[Tensor | None, int, int]


class DoraLayer(Protocol):
    """A linear layer as its `RowNorms` see it (`linear.Linear`)."""

    shape: tuple[int, ...]
    lora: Lora | None
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    lora_magnitude_vector: nn.Parameter | None
    accumulates: bool
    norms: RowNorms

    def dense(self) -> Tensor:
        """The weight ``[out, in]`` in the run's dtype."""
        ...


class RowNorms:
    """``||W + s B A||`` of one layer by rows, kept until A or B changes.

    An update shows in the tensor versions of A and B; as in `fused_factors`, factors whose
    gradients autograd holds count as updated whenever a forward follows a backward.

    Args:
        layer: the layer.

    Attributes:
        version: increases with each change of the norms.
    """

    def __init__(self, layer: DoraLayer) -> None:
        self._layer = layer
        self.version = 0
        self.forget()

    def forget(self) -> None:
        """Forget all norms: the weight changed."""
        self._base: Tensor | None = None
        self._norms: Tensor | None = None
        self.version += 1
        self._of: tuple[Tensor, Tensor] | None = None
        self._numbers: tuple[float, ...] = ()
        self._stale = False

    def note_backward(self) -> None:
        """Record that a backward ran: an update of the factors may follow that leaves no trace."""
        self._stale = not self._layer.accumulates

    @torch.inference_mode(False)
    @torch.no_grad()
    def base(self) -> Tensor:
        """``||W||``, float32 ``[out]``: the magnitude that training starts with."""
        if self._base is None:
            self._base = _row_norms(self._layer.dense())
        return self._base

    @torch.inference_mode(False)
    @torch.no_grad()
    def current(self) -> Tensor:
        """``||W + s B A||``, float32 ``[out]``."""
        layer = self._layer
        a, b, lora = layer.lora_A, layer.lora_B, layer.lora
        assert a is not None
        assert b is not None
        assert lora is not None
        numbers = (a._version, b._version, lora.scaling)
        known = self._of is not None and self._of[0] is a and self._of[1] is b
        if self._norms is None or self._stale or not known or numbers != self._numbers:
            self._norms = _changed_norms(self.base(), layer.dense(), a, b, lora.scaling)
            self._of, self._numbers, self._stale = (a, b), numbers, False
            self.version += 1
        return self._norms


def has_dora(layer: DoraLayer) -> bool:
    """Whether a layer computes DoRA."""
    return layer.lora is not None and layer.lora.use_dora


class Factors(NamedTuple):
    """What the outputs of several layers are multiplied by, float32 ``[N]``.

    Attributes:
        scale: ``m / norm``; one for a layer without DoRA.
        inverse: ``1 / m``; zero where m is zero: y is zero there, and the gradient of m is lost.
    """

    scale: Tensor
    inverse: Tensor


class Magnitudes:
    """The magnitudes of layers with the same input, whose outputs are slices of one buffer.

    Args:
        layers: the layers, in the order of their outputs.
    """

    def __init__(self, layers: Sequence[DoraLayer]) -> None:
        self._layers = tuple(layers)
        self._known: Factors | None = None
        self._of: Sequence[_Mark] = ()

    def parameters(self) -> list[nn.Parameter]:
        """The m of each layer with DoRA."""
        found = (layer.lora_magnitude_vector for layer in self._layers if has_dora(layer))
        return [magnitude for magnitude in found if magnitude is not None]

    @torch.inference_mode(False)
    @torch.no_grad()
    def factors(self, like: Tensor) -> Factors | None:
        """The factors, computed again if m or a norm changed; ``None`` without DoRA.

        Args:
            like: a tensor on the device.
        """
        if not any(has_dora(layer) for layer in self._layers):
            return None
        marks = []
        for layer in self._layers:
            m = layer.lora_magnitude_vector if has_dora(layer) else None
            if m is not None:
                layer.norms.current()
            marks.append((m, 0 if m is None else m._version, layer.norms.version))
        if self._known is None or not _same(self._of, marks):
            ms, norms = self._together(like)
            self._known = Factors(ms / norms, torch.where(ms == 0, 0.0, 1 / ms))
            self._of = marks
        return self._known

    def _together(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The m and the norms of all layers, ``[N]`` each; ones for a layer without DoRA."""
        ms, norms = [], []
        for layer in self._layers:
            m = layer.lora_magnitude_vector if has_dora(layer) else None
            if m is None:
                ones = like.new_ones(layer.shape[0], dtype=torch.float32)
                ms.append(ones)
                norms.append(ones)
            else:
                ms.append(m.detach())
                norms.append(layer.norms.current())
        return torch.cat(ms), torch.cat(norms)

    def gradients(self, dy: Tensor, y: Tensor, factors: Factors) -> list[Tensor | None]:
        """The gradient of each m; ``None`` where it was added in place.

        Args:
            dy: the gradient of the scaled outputs, ``[T, N]``.
            y: the scaled outputs.
            factors: those of the forward.
        """
        dots = _column_dots(dy, y)
        trained = [layer for layer in self._layers if has_dora(layer)]
        for layer in trained:
            layer.norms.note_backward()
        sinks = [_sink(layer) for layer in trained]
        together = _end_to_end(sinks) if len(sinks) == len(self._layers) else None
        if together is not None:
            together.addcmul_(dots, factors.inverse)
            return [None] * len(sinks)
        gradients: list[Tensor | None] = []
        at = 0
        for layer in self._layers:
            rows = slice(at, at := at + layer.shape[0])
            if has_dora(layer):
                gradient, sink = dots[rows] * factors.inverse[rows], _sink(layer)
                gradients.append(gradient if sink is None else None)
                if sink is not None:
                    sink.add_(gradient)
        return gradients


def scaled(layer: DoraLayer, output: Tensor, magnitudes: Magnitudes) -> Tensor:
    """Scale the output of one layer with plain LoRA, in place.

    Args:
        layer: the layer.
        output: ``[..., out]``, of which nothing is saved for a backward.
        magnitudes: of this layer alone.
    """
    y: Tensor = _Scaled.apply(output, layer.lora_magnitude_vector, magnitudes)  # type: ignore[no-untyped-call]
    return y


class _Scaled(torch.autograd.Function):
    """``m / norm * y``; saves its result."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, m: Tensor, magnitudes: Magnitudes) -> Tensor:
        factors = magnitudes.factors(output)
        assert factors is not None
        y = _rows(output.detach())
        y.mul_(factors.scale)
        ctx.save_for_backward(y)
        ctx.magnitudes, ctx.factors = magnitudes, factors
        return y.view(output.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (y,) = ctx.saved_tensors
        dy = _rows(grad)
        (gradient,) = ctx.magnitudes.gradients(dy, y, ctx.factors)
        return times(dy, ctx.factors).view(grad.shape), gradient, None


def times(dy: Tensor, factors: Factors) -> Tensor:
    """The gradient of the outputs before they are scaled, a new tensor ``[T, N]``."""
    return torch.mul(dy, factors.scale, out=torch.empty_like(dy))


def _same(known: Sequence[_Mark], now: Sequence[_Mark]) -> bool:
    return len(known) == len(now) and all(
        one[0] is other[0] and one[1:] == other[1:] for one, other in zip(known, now, strict=True)
    )


def _sink(layer: DoraLayer) -> Tensor | None:
    """Where the gradient of m is added; ``None`` where autograd does that."""
    m = layer.lora_magnitude_vector
    return m.grad if m is not None and layer.accumulates else None


def _end_to_end(sinks: Sequence[Tensor | None]) -> Tensor | None:
    """Gradients ``[n_i]`` as one ``[sum n]``, where all are there and lie end to end."""
    first = sinks[0]
    if first is None:
        return None
    end = first.storage_offset()
    for sink in sinks:
        if sink is None or storage_id(sink) != storage_id(first) or sink.storage_offset() != end:
            return None
        end += sink.numel()
    return first.as_strided((end - first.storage_offset(),), (1,))


def _rows(x: Tensor) -> Tensor:
    """``[..., N] -> [T, N]``."""
    return x.reshape(-1, x.shape[-1])


def _column_dots(left: Tensor, right: Tensor) -> Tensor:
    """``sum_t left_tn right_tn``, summed in float32 (or float64): ``[N]``."""
    dtype = torch.promote_types(left.dtype, torch.float32)
    step = max(1, _CHUNK // max(1, left.shape[1]))
    total: Tensor | None = None
    for at in range(0, len(left), step):
        dots = (left[at : at + step] * right[at : at + step]).sum(0, dtype=dtype)
        total = dots if total is None else total.add_(dots)
    return left.new_zeros(left.shape[1], dtype=dtype) if total is None else total


def _row_norms(weight: Tensor) -> Tensor:
    """Norms of the rows of ``[out, in]``, float32, without a float32 copy of the weight."""
    if on_gpu(weight):
        norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
        return norms
    step = max(1, _BLOCK // max(1, weight.shape[1]))
    dtype = torch.promote_types(weight.dtype, torch.float32)
    blocks = (torch.linalg.vector_norm(b.to(dtype), dim=1) for b in torch.split(weight, step))
    return torch.cat(list(blocks))


def _changed_norms(base: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``||W + s B A||`` by rows.

    Args:
        base: ``||W||``.
        weight: W.
        a: A.
        b: B.
        scaling: s.
    """
    cross = (_times(weight, a) * b).sum(1)
    own = ((b @ (a @ a.t())) * b).sum(1)
    squares = base.square().add_(cross, alpha=2 * scaling).add_(own, alpha=scaling**2)
    return squares.clamp_min_(0.0).sqrt_()


def _times(weight: Tensor, a: Tensor) -> Tensor:
    """``W A^T``, float32 ``[out, r]``."""
    if weight.dtype == a.dtype:
        return weight @ a.t()
    if on_gpu(weight):
        out = weight.new_empty(len(weight), len(a), dtype=a.dtype)
        if weight.is_meta:
            # Torch has no mm into another dtype there.
            record_work("mm", weight, a, out, flops=2.0 * math.prod(weight.shape) * len(a))
            return out
        made: Tensor = torch.mm(weight, a.to(weight.dtype).t(), out_dtype=a.dtype)
        return made
    step = max(1, _BLOCK // max(1, weight.shape[1]))
    return torch.cat([block.to(a.dtype) @ a.t() for block in torch.split(weight, step)])
