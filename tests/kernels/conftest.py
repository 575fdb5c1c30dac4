"""Triton kernels run in its interpreter, on the CPU: the same code, one program after another.

The interpreter is chosen for a whole process, by tests/conftest.py, where there is no GPU. With a
GPU, set TRITON_INTERPRET=1 to run these tests; otherwise they are not collected.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*_triton.py"]


def _loops_end_at_tensors() -> None:
    """NumPy 2.4 makes no number of an array of one element; Triton 3.6's interpreter asks it to."""
    from triton.runtime import interpreter

    real = interpreter._patch_lang_tensor

    def patched(tensor, scope):  # type: ignore[no-untyped-def]
        real(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _products_of_bfloat16() -> None:
    """Triton 3.6's interpreter multiplies the bits of bfloat16 as if they were whole numbers."""
    from triton.runtime import interpreter
    from triton.runtime.interpreter import TensorHandle, _convert_float, tl

    builder = interpreter.InterpreterBuilder
    real = builder.create_dot

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
        def wide(x):  # type: ignore[no-untyped-def]
            if x.dtype.scalar != tl.bfloat16:
                return x
            data = _convert_float(x.data, tl.bfloat16, tl.float32, None).view("float32")
            return TensorHandle(data, tl.float32)

        return real(self, wide(a), wide(b), d, input_precision, max_num_imprecise_acc)

    builder.create_dot = create_dot


if INTERPRETED:
    _loops_end_at_tensors()
    _products_of_bfloat16()
