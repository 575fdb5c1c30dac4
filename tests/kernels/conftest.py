"""Triton kernels run in its interpreter, on the CPU: the same code, one program after another."""

from __future__ import annotations

import os

import pytest

# Read when a kernel is defined, so before any module with kernels is imported.
os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")


def _loops_end_at_tensors() -> None:
    """NumPy 2.4 turns no array of one element into a number; Triton 3.6's interpreter asks it to."""
    from triton.runtime import interpreter

    real = interpreter._patch_lang_tensor

    def patched(tensor, scope):  # type: ignore[no-untyped-def]
        real(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


_loops_end_at_tensors()
