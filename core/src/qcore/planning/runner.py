"""Runs a single segment (a layer, or the loss) on the meta device, so that only its memory counts.

This file decides how a segment is run in isolation: its input comes from an autograd node that
keeps no reference, and its output goes to one that saves nothing. `qcore.planning.measure` and
`qcore.planning.tower` decide the segments, `qcore.planning.trace` counts memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..nn.kernels.launch import PlannedDevice, planning
from ..nn.qlora.lora_layer import LoraLayer
from .segments import Segment
from .trace import Trace

META = torch.device("meta")


class Bench:
    """Runs segments on the meta device.

    Args:
        device: ``cuda`` or ``cpu``, the device that meta stands for.

    Attributes:
        trace: counts memory and work.
    """

    def __init__(self, device: str) -> None:
        self.trace = Trace("meta")
        self._planned = PlannedDevice(device=device, record=self.trace.record)

    @contextmanager
    def running(self) -> Iterator[Trace]:
        """Count memory inside the block, and record kernels instead of launching them."""
        with planning(self._planned), self.trace:
            yield self.trace

    def both(
        self,
        run: Callable[[list[Tensor]], Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        graph: bool = True,
    ) -> Segment:
        """Run a segment forward and, if its output requires a gradient, backward.

        Args:
            run: the segment; it pops its input off a list, so that no reference keeps it alive.
            shape: shape of the input.
            dtype: dtype of the input.
            graph: whether the input requires a gradient.

        Returns:
            The measured segment.
        """
        with self.running() as trace:
            x = [_source(shape, dtype) if graph else torch.empty(shape, dtype=dtype, device=META)]
            before, by_op = trace.live, trace.live_by_op.copy()
            trace.mark()
            y = run(x)
            kept, forward, forward_work = (
                trace.live - before,
                trace.peak - before,
                tuple(trace.work),
            )
            forward_by_op = _more(trace.peak_by_op, by_op)
            if not y.requires_grad:
                return Segment(
                    kept=kept,
                    forward=forward,
                    backward=0,
                    forward_work=forward_work,
                    backward_work=(),
                    forward_by_op=forward_by_op,
                )
            last = _Sink.apply(y)  # type: ignore[no-untyped-call]
            del y
            trace.mark()
            torch.autograd.backward(last)
            return Segment(
                kept=kept, forward=forward, backward=trace.peak - before, forward_work=forward_work,
                backward_work=tuple(trace.work), forward_by_op=forward_by_op,
                backward_by_op=_more(trace.peak_by_op, by_op),
            )  # fmt: skip


def signature(layer: nn.Module) -> str:
    """Return a string that is equal for layers with the same modules, shapes and numbers."""
    parts = []
    for name, module in layer.named_modules():
        tensors = [
            (name_in_module, tuple(parameter.shape), parameter.dtype, parameter.requires_grad)
            for name_in_module, parameter in module.named_parameters(recurse=False)
        ]
        numbers = [
            (key, value)
            for key, value in vars(module).items()
            if isinstance(value, int | float | tuple)
        ]
        lora = module.lora if isinstance(module, LoraLayer) else None
        parts.append((name, type(module).__qualname__, tensors, numbers, lora))
    return repr(parts)


def _source(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    anchor = torch.empty(0, device=META, requires_grad=True)
    return cast(Tensor, _Source.apply(anchor, shape, dtype))  # type: ignore[no-untyped-call]


def _more(now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {op: n - before.get(op, 0) for op, n in now.items() if op and n > before.get(op, 0)}


class _Source(torch.autograd.Function):
    """Makes the input of a segment; unlike a leaf, it is freed if the segment does not save it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        return dx.new_empty(0), None, None


class _Sink(torch.autograd.Function):
    """Takes the output of a segment; it saves nothing, and its backward makes a gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = y.shape, y.dtype
        return torch.empty((), device=META)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        return torch.empty(ctx.shape, dtype=ctx.dtype, device=META)
