"""Public re-exports of `qcore.nn` for plugins' layers and kernels: attention, routing, launches.

This file decides which functions of `qcore.nn` are public; each is documented where it is
defined. Importing it imports torch, so a plugin imports it in its blocks and kernels, never in
``plugin.py``. Records and protocols are `qcore.api`'s.

============================  =====================================================================
attention                     `varlen_attention`, `cached_attention`, `step_attention`, `span_bias`
mixture of experts            `Routing`
activation checkpointing      `POLICIES`, `recompute`, `recomputable`
gradients in shared buffers   `GradBuffers`, `as_one_buffer`
Triton launches               `launch`, `record_work`, `on_gpu`, `device_type`, `cdiv`,
                              `next_power_of_2`
Triton, if installed          `triton`, `tl`: else stand-ins, so that a plan can import the module
verification of a kernel      `compare`, `worst_verdict`
============================  =====================================================================
"""

from __future__ import annotations

from ..nn.attention.varlen import cached_attention, span_bias, step_attention, varlen_attention
from ..nn.grad_buffers import GradBuffers, as_one_buffer
from ..nn.kernels.compare import compare, worst_verdict
from ..nn.kernels.language import tl, triton
from ..nn.kernels.launch import (
    cdiv,
    device_type,
    launch,
    next_power_of_2,
    on_gpu,
    record_work,
)
from ..nn.moe.routing import Routing
from ..nn.recompute import POLICIES, recomputable, recompute

__all__ = [
    "POLICIES",
    "GradBuffers",
    "Routing",
    "as_one_buffer",
    "cached_attention",
    "cdiv",
    "compare",
    "device_type",
    "launch",
    "next_power_of_2",
    "on_gpu",
    "recomputable",
    "recompute",
    "record_work",
    "span_bias",
    "step_attention",
    "tl",
    "triton",
    "varlen_attention",
    "worst_verdict",
]
