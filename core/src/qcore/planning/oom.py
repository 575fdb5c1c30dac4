"""The error when memory runs out despite the plan: the plan beside the memory in use.

This file decides which exceptions mean out of memory (those of torch, cuBLAS, Triton and of pinned
memory) and what the report contains: where the run was, allocated, reserved and free memory, and
the terms of the plan.

Codes: ``QC-PLAN-004`` the device, or the host, ran out of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self

import torch

from ..errors import InputError
from ..nn.device import is_out_of_memory
from .compare import RunPlan

_PINNED = ("pin_memory", "pinned", "cudaHostAlloc", "not enough memory: you tried to allocate")
_HOST = (
    "end other processes that use memory of this machine, or train with recompute=full, which "
    "offloads nothing"
)


class Usage(NamedTuple):
    """Memory use of a device in bytes.

    Attributes:
        allocated: allocated by torch now.
        peak: maximum of `allocated` since the step began.
        reserved: reserved by torch's allocator.
        free: free for any process.
    """

    allocated: int
    peak: int
    reserved: int
    free: int


def usage_of(device: torch.device) -> Usage | None:
    """Return the memory use of a device now; ``None`` on the CPU, where it is not counted."""
    if device.type != "cuda":
        return None
    return Usage(
        torch.cuda.memory_allocated(device),
        torch.cuda.max_memory_allocated(device),
        torch.cuda.memory_reserved(device),
        torch.cuda.mem_get_info(device)[0],
    )


class Watch:
    """A context manager that turns out-of-memory exceptions into ``QC-PLAN-004``.

    Args:
        plan: the plan of the run.
        device: the device of the run.
        usage: reads the memory use of a device.
    """

    def __init__(
        self,
        plan: RunPlan,
        device: torch.device,
        usage: Callable[[torch.device], Usage | None] = usage_of,
    ) -> None:
        self._plan = plan
        self._device = device
        self._usage = usage
        self._where = "before loading"
        self._loaded: Usage | None = None

    def at(self, where: str) -> None:
        """Set the current place in the run, for the error."""
        self._where = where

    def loaded(self) -> None:
        """Record the memory use after loading, before the first step."""
        self._loaded = self._usage(self._device)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception) and is_out_of_memory(error):
            raise self.report(error) from error

    def report(self, error: Exception) -> InputError:
        """Return the error, which compares the plan's terms with the measured memory.

        Args:
            error: the out-of-memory exception.
        """
        worst, by_size = self._plan.worst, sorted(
            self._plan.worst.memory.items(), key=lambda term: -term[1]
        )  # fmt: skip
        terms = ", ".join(f"{term} {_gb(size)}" for term, size in by_size if size >= 5e6)
        limit = f" of {_gb(worst.budget)}" if self._plan.limited else ""
        return InputError(
            "QC-PLAN-004",
            "the host ran out of memory"
            if _is_host_memory(error)
            else "the device ran out of memory",
            field=self._where,
            found=f"{self._measured()}{_first(error)}",
            expected=f"by the plan {_gb(worst.peak)}{limit} at the most, {worst.pack}, recompute "
            f"{worst.recompute}: {terms or 'nothing of size'}",
            fix=_HOST if _is_host_memory(error) else self._fix(),
        )

    def _measured(self) -> str:
        now = self._usage(self._device)
        if now is None:
            return ""
        before = "" if self._loaded is None else f", {_gb(self._loaded.allocated)} before the steps"
        return (
            f"{_gb(now.peak)} allocated at the most{before}, {_gb(now.reserved)} reserved, "
            f"{_gb(now.free)} free; "
        )

    def _fix(self) -> str:
        worst, now = self._plan.worst, self._usage(self._device)
        if not worst.fits:
            return "leave recompute at auto, or lower max_length or per_device_train_batch_size"
        if now is not None and now.free + now.reserved < worst.budget:
            return "another process took memory of this GPU: end it, or use another GPU"
        smaller = "a smaller per_device_train_batch_size"
        if self._plan.together:
            smaller = "join_micro_batches=false"
        return (
            f"start again with recompute=full or {smaller}, and report this line: the plan was "
            "wrong"
        )


def _is_host_memory(error: BaseException) -> bool:
    """Whether the host ran out of memory, pinned or not, and not the device."""
    return isinstance(error, MemoryError) or any(word in str(error) for word in _PINNED)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 5e6 else "0 GB"


def _first(error: Exception) -> str:
    """Return the first sentences of the exception; the rest is advice on the allocator."""
    text = str(error).strip().split("\n")[0]
    return ". ".join(text.split(". ")[:2]).rstrip(".") or type(error).__name__
