"""Kernel records of Qwen 3.5: the ops of its blocks and their backends, without importing torch.

This file decides which ops exist, all in the namespace ``qwen35``. A backend is in its op's folder
under `ops`, next to the reference; `ops.verify` decides how far a backend may deviate from the
reference, `ops.limits` which models it does not support.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qcore.api import Kernel, Op, Verdict

from .ops import TRITON, limits, optional

if TYPE_CHECKING:
    import torch


def ops() -> Iterator[Op]:
    """The ops that these blocks use."""
    for op in TRITON:
        yield Op(name=f"qwen35::{op}")


def kernels() -> Iterator[Kernel]:
    """The backends of these ops."""
    for op, (module, function) in TRITON.items():
        yield Kernel(
            op=f"qwen35::{op}",
            backend="triton",
            load=_load(module, function),
            verify=_verify(op),
            refuse=_needs_cuda,
            refuse_model=limits.OF_MODEL.get(op, _any_model),
            requires=("triton>=3.2",),
            plan=_load(module, function),
        )
    yield from optional.kernels()


def _load(module: str, function: str) -> Callable[[], Callable[..., Any]]:
    def load() -> Callable[..., Any]:
        backend: Callable[..., Any] = getattr(
            import_module(f"{__package__}.ops.{module}"), function
        )
        return backend

    return load


def _verify(op: str) -> Callable[[torch.device], Verdict]:
    def verify(device: torch.device) -> Verdict:
        from .ops.verify import verify

        return verify(op, device)

    return verify


def _any_model(config: Mapping[str, Any]) -> str | None:
    return None


def _needs_cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "it needs a CUDA device"
