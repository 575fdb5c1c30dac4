"""Which sizes of a model the Triton kernels of the delta net have no code for.

This file decides it once, without torch. The registry asks before a run, by the config
(`Kernel.refuse_model`), and takes the reference. An op asks by its arguments, for who calls it
without the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qcore.errors import UsageError

from ..table import text_config

#: Heads of the chunked rule: tiles of its products.
HEADS = (16, 32, 64, 128)
TAPS = 4


def rule_heads(*sizes: int) -> str | None:
    """Why the chunked rule cannot be computed for heads of these sizes."""
    wrong = [size for size in sizes if size not in HEADS]
    known = ", ".join(map(str, HEADS))
    return f"it has no kernel for heads of {wrong[0]}, only of {known}" if wrong else None


def step_heads(*sizes: int) -> str | None:
    """Why a token cannot be computed for heads of these sizes."""
    wrong = [size for size in sizes if size & (size - 1)]
    return f"it has no kernel for heads of {wrong[0]}, only of powers of two" if wrong else None


def taps(count: int) -> str | None:
    """Why a convolution of so many taps cannot be computed."""
    return None if count == TAPS else f"it has no kernel for {count} taps, only for {TAPS}"


def check(op: str, reason: str | None) -> None:
    """Refuse in an op itself.

    Raises:
        UsageError: ``QC-KERNEL-003`` where there is a reason.
    """
    if reason is not None:
        raise UsageError(
            "QC-KERNEL-003",
            f"cannot run here: {reason}",
            field=f"kernels.{op}",
            found="triton",
            fix=f"ask for {op}=reference",
        )


def _heads(config: Mapping[str, Any]) -> tuple[int, int]:
    text = text_config(config)
    return text["linear_key_head_dim"], text["linear_value_head_dim"]


#: Op, without its namespace -> why a model of this config cannot be computed.
OF_MODEL: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    "delta_rule": lambda config: rule_heads(*_heads(config)),
    "delta_step": lambda config: step_heads(*_heads(config)),
    "delta_inputs": lambda config: taps(text_config(config)["linear_conv_kernel_dim"]),
}
