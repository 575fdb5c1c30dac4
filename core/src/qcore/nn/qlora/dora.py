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
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..grad_buffers import as_one_buffer
from ..kernels.launch import on_gpu, record_work
from .lora_layer import Lora

_CHUNK = 2**25  #: elements of a product ``dy y`` that exist at a time
_BLOCK = 2**20  #: elements of a weight that a CPU converts to float32 at a time


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
    """

    def __init__(self, layer: DoraLayer) -> None:
        self._layer = layer
        self.forget()

    def forget(self) -> None:
        """Forget all norms: the weight changed."""
        self._base: Tensor | None = None
        self._norms: Tensor | None = None
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
        return self._norms


def has_dora(layer: DoraLayer) -> bool:
    """Whether a layer computes DoRA."""
    return layer.lora is not None and layer.lora.use_dora


def scaled(layers: Sequence[DoraLayer], outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Scale the outputs of layers with plain LoRA, in place.

    Args:
        layers: layers with the same input; those without DoRA keep their outputs.
        outputs: ``[..., out]`` of each, of which nothing is saved for a backward.
    """
    magnitudes = [layer.lora_magnitude_vector for layer in layers if has_dora(layer)]
    y: tuple[Tensor, ...] = _Scaled.apply(tuple(layers), *outputs, *magnitudes)  # type: ignore[no-untyped-call]
    return y


class _Scaled(torch.autograd.Function):
    """``m / norm * y``; saves its result, m and norm."""

    @staticmethod
    def forward(ctx: Any, layers: tuple[DoraLayer, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs, magnitudes = tensors[: len(layers)], tensors[len(layers) :]
        sizes = [layer.shape[0] for layer in layers]
        factor = _factor(layers, outputs[0])
        buffer = as_one_buffer([_rows(output.detach()) for output in outputs])
        buffer.mul_(factor)
        ctx.save_for_backward(buffer, factor, *magnitudes)
        ctx.layers, ctx.sizes = layers, sizes
        parts = zip(torch.split(buffer, sizes, 1), outputs, strict=True)
        return tuple(part.view(output.shape) for part, output in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, factor, *magnitudes = ctx.saved_tensors
        dy = as_one_buffer([_rows(grad) for grad in grads])
        dots = torch.split(_column_dots(dy, y), ctx.sizes)
        back = torch.mul(dy, factor, out=torch.empty_like(dy))
        gradients: list[Tensor | None] = []
        waiting = iter(magnitudes)
        for layer, dot in zip(ctx.layers, dots, strict=True):
            if not has_dora(layer):
                continue
            layer.norms.note_backward()
            magnitude = next(waiting)
            # Where m is zero, so is y, and its gradient is lost.
            gradient = (dot / magnitude).masked_fill_(magnitude == 0, 0.0)
            sink = None if layer.lora_magnitude_vector is None else layer.lora_magnitude_vector.grad
            if layer.accumulates and sink is not None:
                sink.add_(gradient)
                gradients.append(None)
            else:
                gradients.append(gradient.to(magnitude.dtype))
        parts = zip(torch.split(back, ctx.sizes, 1), grads, strict=True)
        return None, *(part.view(grad.shape) for part, grad in parts), *gradients


def _factor(layers: Sequence[DoraLayer], like: Tensor) -> Tensor:
    """``m / norm`` of all layers, float32 ``[N]``; one for a layer without DoRA."""
    parts = []
    for layer in layers:
        if has_dora(layer):
            assert layer.lora_magnitude_vector is not None
            parts.append(layer.lora_magnitude_vector.detach() / layer.norms.current())
        else:
            parts.append(like.new_ones(layer.shape[0], dtype=torch.float32))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _rows(x: Tensor) -> Tensor:
    """``[..., N] -> [T, N]``."""
    return x.reshape(-1, x.shape[-1])


def _column_dots(left: Tensor, right: Tensor) -> Tensor:
    """``sum_t left_tn right_tn``, summed in float32 (or float64): ``[N]``."""
    dtype = torch.promote_types(left.dtype, torch.float32)
    step = max(1, _CHUNK // max(1, left.shape[1]))
    total = left.new_zeros(left.shape[1], dtype=dtype)
    for at in range(0, len(left), step):
        total += (left[at : at + step] * right[at : at + step]).sum(0, dtype=dtype)
    return total


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
