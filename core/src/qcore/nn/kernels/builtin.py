"""Core's own ops and their backends, as records that import no torch.

This file decides which ops and backends there are; each backend is written and verified in a
file of `qcore.nn`, which its record imports on first use. Core's ops have no namespace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ...api.records import Kernel, Op

if TYPE_CHECKING:
    import torch

#: Op -> (module of `nn`, its function, the module that verifies it), all in Triton.
TRITON = {
    "experts": ("moe.triton", "grouped", "moe.triton"),
    "expert_routing": ("moe.triton_routing", "routing_of", "moe.triton_routing"),
    "cross_entropy": ("loss_triton", "cross_entropy_sum", "loss_triton"),
    "nf4_dequantize": ("qlora.nf4_triton", "dequantize", "qlora.nf4_triton"),
    "qlora_linear": ("qlora.fused_triton", "linear", "qlora.fused_verify"),
}
#: Ops whose reference waits for the device.
WAITING = ("experts", "nf4_dequantize")


def core_ops() -> Iterator[Op]:
    """Attention, experts and their routing, the loss, NF4 and linear maps."""
    for name in ("attention", *TRITON):
        yield Op(name=name, reference_waits=name in WAITING)


def core_kernels() -> Iterator[Kernel]:
    """The backends of core's ops."""
    yield Kernel(
        op="attention",
        backend="fused",
        load=_loading("attention.cuda", "fused_attention"),
        verify=_calling("attention.cuda", "verify"),
        refuse=_calling("attention.cuda", "refuse"),
    )
    for op, (module, function, judge) in TRITON.items():
        yield Kernel(
            op=op,
            backend="triton",
            load=_loading(module, function),
            verify=_calling(judge, "verify"),
            refuse=_needs_cuda,
            requires=("triton>=3.2",),
            plan=_loading(module, function),
        )


def _of(module: str, name: str) -> Any:
    return getattr(import_module(f"qcore.nn.{module}"), name)


def _loading(module: str, name: str) -> Callable[[], Callable[..., Any]]:
    def load() -> Callable[..., Any]:
        function: Callable[..., Any] = _of(module, name)
        return function

    return load


def _calling(module: str, name: str) -> Callable[[torch.device], Any]:
    return lambda device: _of(module, name)(device)


def _needs_cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "it needs a CUDA device"
