"""Launching Triton kernels, and recording instead of launching them for tensors on meta.

This file decides that nothing is launched for tensors without numbers: on the meta device a
function allocates its results and what it saves as always, and its kernels are recorded for the
planner. Nothing else is needed to know an op's memory and time before a weight is read. It also
decides which device such tensors stand for.

A backend whose kernels are not launched here, or whose torch ops have no meta form, calls
`record_work` in their place, or brings a `qcore.api.records.Kernel.plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = [
    "PlannedDevice",
    "cdiv",
    "device_type",
    "launch",
    "next_power_of_2",
    "on_gpu",
    "planning",
    "record_work",
]

Record = Callable[[str, tuple[Any, ...], float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedDevice:
    """What tensors on the meta device stand for.

    Attributes:
        device: ``cuda`` or ``cpu``.
        record: called with the name, arguments and floating-point operations of each kernel.
    """

    device: str
    record: Record


_planned: ContextVar[PlannedDevice | None] = ContextVar("qcore planned device", default=None)


@contextmanager
def planning(planned: PlannedDevice) -> Iterator[None]:
    """In this context meta tensors stand for a device."""
    token = _planned.set(planned)
    try:
        yield
    finally:
        _planned.reset(token)


def cdiv(n: int, by: int) -> int:
    """``n / by``, rounded up. Triton's own is for its kernels too and takes 4 us on the host."""
    return -(-n // by)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least `n`; of 0 it is 1."""
    return 1 << max(n - 1, 0).bit_length()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    flops: float = 0.0,
    share: float = 1.0,
    also: Sequence[Tensor] = (),
    **meta: Any,
) -> None:
    """``kernel[grid](*args, **meta)``, if the grid is not empty and the tensors are not on meta.

    Args:
        kernel: a Triton kernel.
        grid: programs along each axis.
        args: the kernel's arguments, of which the first is a tensor. A plan takes each tensor to
            be read or written once.
        flops: floating-point operations of matrix products in it, for a plan's time.
        share: the part of a large product's rate that this kernel reaches.
        also: tensors that the kernel reads by address, which a plan would not see.
        meta: the kernel's constants and options.
    """
    if 0 in grid:
        return
    first = args[0]
    if first.is_meta or isinstance(first, FakeTensor):
        record_work(getattr(kernel, "__name__", "kernel"), *args, *also, flops=flops / share)
        return
    kernel[grid](*args, **meta)


def record_work(name: str, *args: Any, flops: float = 0.0) -> None:
    """Record a kernel that is not launched, if a plan is being made.

    Args:
        name: of the kernel, for the plan's report.
        args: its arguments; each tensor among them is taken to be read or written once.
        flops: floating-point operations of matrix products in it.
    """
    planned = _planned.get()
    if planned is not None:
        planned.record(name, args, flops)


def device_type(device: torch.device) -> str:
    """The type of a device; for meta that of the device that it stands for."""
    planned = _planned.get()
    return planned.device if planned is not None and device.type == "meta" else device.type


def on_gpu(x: Tensor) -> bool:
    """Whether x is on a GPU, or stands for a tensor that would be."""
    return x.is_cuda or (x.is_meta and device_type(x.device) == "cuda")
