"""The backends of core's own ops, as records: torch-free, what they need is imported inside.

This file decides which of them there are and their order; each is written and verified in a
file of `qcore.nn`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from .records import Kernel, Verdict

if TYPE_CHECKING:
    import torch


def core_kernels() -> Iterator[Kernel]:
    """The backends of attention, NF4, experts and the loss."""
    yield Kernel(
        op="attention",
        backend="fused",
        load=lambda: _attention().fused_attention,
        verify=lambda device: _attention().verify(device),
        refuse=lambda device: _attention().refuse(device),
    )
    yield Kernel(
        op="experts",
        backend="triton",
        load=lambda: _experts().grouped,
        verify=lambda device: _experts().verify(device),
        refuse=_needs_cuda,
        requires=("triton>=3.2",),
        reference_waits=True,
    )
    yield Kernel(
        op="expert_routing",
        backend="triton",
        load=lambda: _routing().routing_of,
        verify=lambda device: _routing().verify(device),
        refuse=_needs_cuda,
        requires=("triton>=3.2",),
    )
    yield Kernel(
        op="cross_entropy",
        backend="triton",
        load=_cross_entropy,
        verify=_verify_cross_entropy,
        refuse=_needs_cuda,
        requires=("triton>=3.2",),
    )
    yield Kernel(
        op="nf4_dequantize",
        backend="triton",
        load=lambda: _nf4().dequantize,
        verify=lambda device: _nf4().verify(device),
        refuse=_needs_cuda,
        requires=("triton>=3.2",),
        reference_waits=True,
    )
    yield Kernel(
        op="qlora_linear",
        backend="triton",
        load=lambda: _product().linear,
        verify=_verify_product,
        refuse=_needs_cuda,
        requires=("triton>=3.2",),
    )


def _product() -> Any:
    from .nn import product_triton

    return product_triton


def _verify_product(device: torch.device) -> Verdict:
    from .nn.product_verify import verify

    return verify(device)


def _attention() -> Any:
    from .nn import attention_cuda

    return attention_cuda


def _nf4() -> Any:
    from .nn import nf4_triton

    return nf4_triton


def _experts() -> Any:
    from .nn import experts_triton

    return experts_triton


def _routing() -> Any:
    from .nn import experts_triton_routing

    return experts_triton_routing


def _needs_cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "it needs a CUDA device"


def _cross_entropy() -> Callable[..., Any]:
    from .nn.loss_triton import cross_entropy_sum

    return cross_entropy_sum


def _verify_cross_entropy(device: torch.device) -> Verdict:
    from .nn.loss_triton import verify

    return verify(device)
