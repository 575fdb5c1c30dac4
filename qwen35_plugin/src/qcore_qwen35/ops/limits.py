"""Head sizes and convolution taps that the Triton kernels of the delta net support.

This file decides the limits in one place, without torch. Before a run, the registry checks the
config (`Kernel.refuse_model`) and falls back to the reference. An op checks its arguments, for
callers that do not use the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qcore.errors import UsageError

from ..table import text_config

#: Head sizes of the chunked rule: tile sizes of its products.
HEADS = (16, 32, 64, 128)
TAPS = 4


def rule_heads(*sizes: int) -> str | None:
    """The reason why the chunked rule does not support these head sizes, or ``None``."""
    wrong = [size for size in sizes if size not in HEADS]
    known = ", ".join(map(str, HEADS))
    return f"it has no kernel for heads of size {wrong[0]}, only {known}" if wrong else None


def step_heads(*sizes: int) -> str | None:
    """The reason why the decoding step does not support these head sizes, or ``None``."""
    wrong = [size for size in sizes if size & (size - 1)]
    return f"it has no kernel for heads of size {wrong[0]}, only powers of two" if wrong else None


def taps(count: int) -> str | None:
    """The reason why the kernels do not support this number of taps, or ``None``."""
    return None if count == TAPS else f"it has no kernel for {count} taps, only for {TAPS}"


def check(op: str, reason: str | None) -> None:
    """Raise if an op does not support its arguments.

    Raises:
        UsageError: ``QC-KERNEL-003`` if `reason` is not ``None``.
    """
    if reason is not None:
        raise UsageError(
            "QC-KERNEL-003",
            f"cannot run here: {reason}",
            field=f"kernels.{op}",
            found="triton",
            fix=f"use --kernels {op}=reference",
        )


def _heads(config: Mapping[str, Any]) -> tuple[int, int]:
    text = text_config(config)
    return text["linear_key_head_dim"], text["linear_value_head_dim"]


#: Op name without the namespace -> reason why it does not support a config, or ``None``.
OF_MODEL: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    "delta_rule": lambda config: rule_heads(*_heads(config)),
    "delta_step": lambda config: step_heads(*_heads(config)),
    "delta_inputs": lambda config: taps(text_config(config)["linear_conv_kernel_dim"]),
}
