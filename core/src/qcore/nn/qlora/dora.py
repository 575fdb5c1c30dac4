"""DoRA: the outputs of linear layers with LoRA, each scaled to a trained magnitude.

This file decides how ``y = m / ||W + s B A|| * (x W^T + s x A^T B^T)`` follows from the output of
plain LoRA, for one layer or several with the same input, and when the norms of the rows are
computed again: once after each update of A or B. Norms are constants in backward, as in PEFT
(Liu et al. 2024, section 4.3). `linear` and `fused` compute plain LoRA.

A fused product (`fused`) adds ``s B A`` to the weights that it has just read, and takes the norms:
two launches for all its layers. A layer alone needs no such sum: its norms are ``||W||^2 +
2 s <W A^T, B> + s^2 <B A A^T, B>`` by rows, with the first term computed once. The output is scaled
in place and saved for the gradient of m, ``sum_t dy y / m``; layers that follow mostly save it too.

Shapes: T rows of x, N outputs of all layers, ``W [out, in]``, ``A [r, in]``, ``B [out, r]``,
``m [out]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels.launch import on_gpu, record_work
from ..storage import storage_id
from .lora_layer import Lora

_CHUNK = 2**25  #: elements of a product ``dy y`` that exist at a time
_BLOCK = 2**20  #: elements of a weight that a CPU converts to float32 at a time


class DoraLayer(Protocol):
    """A linear layer as `Magnitudes` sees it (`linear.Linear`)."""

    shape: tuple[int, ...]
    lora: Lora | None
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    lora_magnitude_vector: nn.Parameter | None
    accumulates: bool

    def dense(self) -> Tensor:
        """The weight ``[out, in]`` in the run's dtype."""
        ...

    def kept_norms(self) -> Tensor:
        """Norms of the rows of the weight, float32 ``[out]``, computed once."""
        ...


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

    The factors are kept until m, A or B changes. An update shows in their tensor versions; as in
    `fused_factors`, factors whose gradients autograd holds count as updated whenever a forward
    follows a backward.

    Args:
        layers: the layers, in the order of their outputs.

    Attributes:
        asked: whether the factors were read since this was last set to false.
    """

    def __init__(self, layers: Sequence[DoraLayer]) -> None:
        self._layers = tuple(layers)
        self.asked = False
        self._known: Factors | None = None
        self._of: list[Any] = []
        self._stale = False

    def parameters(self) -> list[nn.Parameter]:
        """The m of each layer with DoRA."""
        found = (layer.lora_magnitude_vector for layer in self._layers if has_dora(layer))
        return [magnitude for magnitude in found if magnitude is not None]

    @torch.inference_mode(False)
    @torch.no_grad()
    def factors(self, like: Tensor, norms: Callable[[], Tensor] | None = None) -> Factors | None:
        """The factors; ``None`` without DoRA.

        Args:
            like: a tensor on the device.
            norms: computes ``||W + s B A||`` of all layers ``[N]``; by default layer by layer.
        """
        self.asked = True
        if not any(has_dora(layer) for layer in self._layers):
            return None
        marks: list[Any] = []
        for layer in self._layers:
            if has_dora(layer):
                assert layer.lora is not None
                marks.append(layer.lora.scaling)
                for tensor in (layer.lora_magnitude_vector, layer.lora_A, layer.lora_B):
                    assert tensor is not None
                    marks += [tensor, tensor._version]
        if self._known is None or self._stale or not _same(self._of, marks):
            m = self._together(like)
            found = self._norms(like) if norms is None else norms()
            self._known = Factors(
                self._ones(m / found), m.reciprocal().nan_to_num_(posinf=0.0, neginf=0.0)
            )
            self._of, self._stale = marks, False
        return self._known

    def _together(self, like: Tensor) -> Tensor:
        """The m of all layers, ``[N]``; ones for a layer without DoRA."""
        ms = self.parameters()
        if len(ms) == len(self._layers) and (whole := _end_to_end(ms)) is not None:
            return whole
        waiting = iter(ms)
        return torch.cat(
            [
                next(waiting).detach()
                if has_dora(layer)
                else like.new_ones(layer.shape[0], dtype=torch.float32)
                for layer in self._layers
            ]
        )

    def _norms(self, like: Tensor) -> Tensor:
        """The norms of all layers, each for itself."""
        return torch.cat(
            [
                changed_norms(layer)
                if has_dora(layer)
                else like.new_ones(layer.shape[0], dtype=torch.float32)
                for layer in self._layers
            ]
        )

    def _ones(self, scale: Tensor) -> Tensor:
        """Set the scale of layers without DoRA to one."""
        at = 0
        for layer in self._layers:
            rows = slice(at, at := at + layer.shape[0])
            if not has_dora(layer):
                scale[rows] = 1.0
        return scale

    def gradients(self, dots: Tensor, factors: Factors) -> list[Tensor | None]:
        """The gradient of each m; ``None`` where it was added in place.

        Args:
            dots: ``sum_t dy y`` of the scaled outputs, ``[N]`` (`scale_gradient`).
            factors: those of the forward.
        """
        trained = [layer for layer in self._layers if has_dora(layer)]
        self._stale = not all(layer.accumulates for layer in trained)
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
        dy, dots = scale_gradient(_rows(grad), y, ctx.factors.scale)
        (gradient,) = ctx.magnitudes.gradients(dots, ctx.factors)
        return dy.view(grad.shape), gradient, None


def scale_gradient(dy: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the outputs before they are scaled, and what those of m follow from.

    Args:
        dy: the gradient of the scaled outputs, ``[T, N]``.
        y: the scaled outputs.
        scale: `Factors.scale`.

    Returns:
        ``dy * scale``, a new tensor ``[T, N]``, and ``sum_t dy y``, ``[N]``.
    """
    return torch.mul(dy, scale, out=torch.empty_like(dy)), _column_dots(dy, y)


def _same(known: Sequence[Any], now: Sequence[Any]) -> bool:
    """Whether all are the same objects in the same state; tensors compare by identity."""
    return len(known) == len(now) and all(
        one is other if isinstance(one, Tensor) else one == other
        for one, other in zip(known, now, strict=True)
    )


def _sink(layer: DoraLayer) -> Tensor | None:
    """Where the gradient of m is added; ``None`` where autograd does that."""
    m = layer.lora_magnitude_vector
    return m.grad if m is not None and layer.accumulates else None


def _end_to_end(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Vectors ``[n_i]`` as one ``[sum n]``, where all are there and lie end to end."""
    first = parts[0]
    if first is None:
        return None
    end = first.storage_offset()
    for part in parts:
        if part is None or storage_id(part) != storage_id(first) or part.storage_offset() != end:
            return None
        end += part.numel()
    return first.detach().as_strided((end - first.storage_offset(),), (1,))


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


def row_norms(weight: Tensor) -> Tensor:
    """Norms of the rows of ``[out, in]``, float32, without a float32 copy of the weight."""
    if on_gpu(weight):
        norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
        return norms
    step = max(1, _BLOCK // max(1, weight.shape[1]))
    dtype = torch.promote_types(weight.dtype, torch.float32)
    blocks = (torch.linalg.vector_norm(b.to(dtype), dim=1) for b in torch.split(weight, step))
    return torch.cat(list(blocks))


def changed_norms(layer: DoraLayer) -> Tensor:
    """``||W + s B A||`` of one layer by rows, float32, without the sum."""
    a, b, lora = layer.lora_A, layer.lora_B, layer.lora
    assert a is not None
    assert b is not None
    assert lora is not None
    cross = (_times(layer.dense(), a) * b).sum(1)
    own = ((b @ (a @ a.t())) * b).sum(1)
    squares = layer.kept_norms().square().add_(cross, alpha=2 * lora.scaling)
    return squares.add_(own, alpha=lora.scaling**2).clamp_min_(0.0).sqrt_()


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
