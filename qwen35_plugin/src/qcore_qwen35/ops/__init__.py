"""Ops of the Qwen 3.5 blocks: one folder each, with a torch reference and faster backends.

This file decides which ops have a Triton backend and where it is; importing it imports neither
torch nor Triton.
"""

from __future__ import annotations

#: Op name without the namespace ``qwen35`` -> (module of this package, function).
TRITON = {
    "rms_norm": ("norm.triton", "rms_norm"),
    "add_rms_norm": ("norm.triton", "add_rms_norm"),
    "gated_norm": ("norm.triton", "gated_norm"),
    "swiglu": ("swiglu.triton", "swiglu"),
    "delta_inputs": ("delta_inputs.triton", "delta_inputs"),
    "delta_rule": ("delta_rule.triton_rule", "chunked_delta_rule"),
    "delta_step": ("delta_step.triton", "delta_step"),
    "attention_inputs": ("attention.triton", "attention_inputs"),
    "output_gate": ("attention.triton", "output_gate"),
    "moe_router": ("moe.triton", "router"),
    "moe_weighted_up": ("moe.triton", "weighted_up"),
    "moe_shared_up": ("moe.triton", "shared_up"),
}
