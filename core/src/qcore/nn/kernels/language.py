"""Triton and its language, or stand-ins where Triton is not installed.

This file decides that a module with Triton kernels can be imported without Triton: a plan runs such
modules on the meta device, where no kernel is launched, so its figures must not depend on what is
installed. Kernels import both names from here (plugins from `qcore.ops`). A stand-in launches
nothing; a run does not take such a backend, because its record requires Triton.
"""

# mypy: disable-error-code="import-untyped"
from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

__all__ = ["tl", "triton"]


def _jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Return the kernel as written; the name of it is all that a plan reads."""
    return (lambda kernel: kernel) if function is None else function


def _constexpr(value: Any) -> Any:
    return value


if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        triton = SimpleNamespace(jit=_jit)
        tl = SimpleNamespace(constexpr=_constexpr)
