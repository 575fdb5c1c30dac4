"""How kernels are started, so that a step can be counted where there is no card.

This file decides that nothing is launched for tensors without numbers: on the meta device a
function allocates its results and what it saves as always, its kernels are told to whoever
plans, and that is all an op needs for memory and time to be known before a weight is read.
It also decides which device such tensors stand for.

A backend whose kernels are not its own, or whose torch ops have no meta form, tells `record_work`
in their place, or brings a `qcore.api.records.Kernel.plan`.
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

Told = Callable[[str, tuple[Any, ...], float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedDevice:
    """What tensors on the meta device stand for.

    Attributes:
        device: ``cuda`` or ``cpu``.
        told: called with the name, arguments and floating-point operations of each kernel.
    """

    device: str
    record: Told


_planned: ContextVar[PlannedDevice | None] = ContextVar("qcore planned device", default=None)


@contextmanager
def planning(planned: PlannedDevice) -> Iterator[None]:
    """Under it, meta tensors stand for a device."""
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
    """``kernel[grid](*args, **meta)``, where there is work and there are numbers.

    Args:
        kernel: a Triton kernel.
        grid: programs along each axis.
        args: the kernel's; the first is a tensor. A plan takes each tensor to be read or
            written once.
        flops: operations of matrix products in it, for a plan's time.
        share: of the rate that a large product reaches, what this kernel does.
        also: tensors that the kernel finds by addresses, which a plan would not see.
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
    """Tell a plan, where one is made, of a kernel that was not started."""
    planned = _planned.get()
    if planned is not None:
        planned.record(name, args, flops)


def device_type(device: torch.device) -> str:
    """The type of a device; of meta that of the device it stands for."""
    planned = _planned.get()
    return planned.device if planned is not None and device.type == "meta" else device.type


def on_gpu(x: Tensor) -> bool:
    """Whether x lies on a GPU, or stands for what would."""
    return x.is_cuda or (x.is_meta and device_type(x.device) == "cuda")
