"""The device that a run computes on: chosen, never fallen back from, and its peak memory."""

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
