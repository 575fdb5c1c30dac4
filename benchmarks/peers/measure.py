"""Measures a training step of one implementation: seconds, peak memory, kernel launches.

The first step, cold; one more to warm up; then the timed ones, each synchronised; then one under
the profiler, of which only counts and shares are used, never its time. Memory is what torch's
allocator held at most during the timed steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .groups import group_of
from .shapes import Job

Step = Callable[[int], float]  #: runs step number n on the n-th ids, returns its loss


@dataclass(frozen=True, slots=True)
class Side:
    """A loaded model: its step, and what the report should say of it."""

    step: Step
    notes: tuple[str, ...] = ()


def measure(job: Job, make: Callable[[Job], Side]) -> dict[str, Any]:
    """Build a side's step and measure it.

    Args:
        job: what to run.
        make: the side's builder; when it returns, weights are on the device.
    """
    device = torch.device(job.device)
    began = time.perf_counter()
    side = make(job)
    step = side.step
    _wait(device)
    loaded = time.perf_counter() - began
    base = _memory(device, peak=False)
    result: dict[str, Any] = {"load_s": loaded, "base_bytes": base, "notes": side.notes}
    began = time.perf_counter()
    result["first_loss"] = step(0)
    _wait(device)
    result["first_step_s"] = time.perf_counter() - began
    step(1)
    _wait(device)
    seconds, peak, loss = [], 0, float("nan")
    for number in range(job.steps):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        loss = step(number + 2)
        _wait(device)
        seconds.append(time.perf_counter() - began)
        peak = max(peak, _memory(device, peak=True))
    median = statistics.median(seconds)
    result |= {
        "seconds": seconds, "median_s": median, "tokens_per_s": job.tokens / median,
        "peak_bytes": peak, "last_loss": loss,
    }  # fmt: skip
    if device.type == "cuda":
        result["reserved_bytes"] = torch.cuda.max_memory_reserved()
        result |= _count(lambda: step(job.steps + 2), job.profile)
    return result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _memory(device: torch.device, *, peak: bool) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _count(step: Callable[[], object], listed: bool) -> dict[str, Any]:
    """Launches, copies and GPU time of one step, by group and, when `listed`, by kernel."""
    from torch.profiler import ProfilerActivity, profile

    # With the CPU's activity too a step of a slow peer makes millions of events.
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    copies = launches = 0
    for event in profiler.events() or ():
        if event.device_type.name != "CUDA":
            continue
        if event.name.startswith(("Memcpy", "Memset")):
            copies += 1
        else:
            launches += 1
        kernels.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e3)
    if not launches:
        raise RuntimeError("the profiler saw no kernel: nothing could be counted")
    groups: dict[str, list[float]] = {}
    for name, times in kernels.items():
        held = groups.setdefault(group_of(name), [0.0, 0.0])
        held[0] += sum(times)
        held[1] += len(times)
    result: dict[str, Any] = {
        "launches": launches, "copies": copies,
        "busy_ms": sum(ms for ms, _ in groups.values()),
        "groups": {name: groups[name] for name in sorted(groups, key=lambda n: -groups[n][0])},
    }  # fmt: skip
    if listed:
        top = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:40]
        result["kernels"] = [[name, sum(ms), len(ms)] for name, ms in top]
    return result


def card() -> dict[str, Any]:
    """The card at hand: name, bf16 matrix product of 8192^3 and copy rate, on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    matmul = _median_ms(lambda: torch.mm(a, b, out=out))
    source = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = _median_ms(lambda: target.copy_(source))
    return {
        "name": torch.cuda.get_device_name(),
        "matmul_tflops": 2 * 8192**3 / matmul / 1e9,
        "copy_tb_s": 2 * source.nbytes / copy / 1e9,
    }


def _median_ms(run: Callable[[], object], times: int = 30) -> float:
    for _ in range(5):
        run()
    pairs = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(end) for start, end in pairs))
