"""Picks the device of ``--device``, reads peak memory, recognizes out-of-memory errors."""

from __future__ import annotations

import resource
import sys

import torch

from ..errors import UsageError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  #: by the setting ``dtype``


def pick_device(device: str) -> torch.device:
    """``auto`` is CUDA where there is one. Raises ``QC-DEVICE-001`` where it is asked for."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "QC-DEVICE-001",
            "CUDA was asked for and is not available",
            field="--device",
            found="no CUDA device",
            fix="pass --device cpu, or install a torch build with CUDA",
        )
    return torch.device(device)


_WORDS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "not enough memory: you tried to allocate")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: of the device, or of what libraries and drivers ask it for."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def reset_peak(device: torch.device) -> None:
    """Start a new measurement; on the CPU the peak is the process's and cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Bytes: allocated on the device since `reset_peak`, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
