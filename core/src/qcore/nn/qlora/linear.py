"""`Linear`: frozen 16-bit or NF4 weight plus LoRA; torch on CPUs, on GPUs it calls `fused`.

This file decides how ``y = x W^T + s (dropout(x) A^T) B^T`` is computed and what is saved for its
backward: the input, never the dequantized weight, which is read again. `adapter.targets` decides
which maps carry LoRA, `load` what they hold. On a GPU the map is a fused product of one member
(`fused`). With DoRA the result is scaled by rows (`dora`).

Shapes: ``x [..., in]``, ``W [out, in]``, ``A [r, in]``, ``B [out, r]``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dora import has_dora, row_norms, scaled
from .fused import Compute, Product, reference
from .lora_layer import Lora, LoraLayer
from .nf4 import NF4, Dequantize, dequantize


class Linear(LoraLayer):
    """``[..., in] -> [..., out]``.

    Args (beside those of `LoraLayer`):
        compute: the op ``qlora_linear``.

    Attributes:
        nf4: the weight, where it is held in 4 bit.
        resident: keep a 16-bit copy of a 4-bit weight too, so that it is not read again.
        product: computes the map on a GPU.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        lora: Lora | None,
        *,
        dequantize: Dequantize = dequantize,
        compute: Compute = reference,
    ) -> None:
        super().__init__(shape, dtype, lora, dequantize=dequantize)
        self.nf4: NF4 | None = None
        self.resident = False
        self.product = Product((self,), compute)
        self._kept_norms: Tensor | None = None

    def lora_shapes(self, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """``A [r, in]``, ``B [out, r]``."""
        return (r, self.shape[1]), (self.shape[0], r)

    def hold(self, rows: slice, value: Tensor, *, quantize: bool, dtype: torch.dtype) -> None:
        """Take the whole weight: its 4-bit scales are one set."""
        if rows != slice(0, self.shape[0]):
            raise ValueError(f"a linear map is held whole, not {rows}")
        self._kept_norms = None
        if quantize:
            self.nf4, self.weight = NF4(value, dtype, self.dequantize), None
        else:
            self.weight = nn.Parameter(value.to(dtype), requires_grad=False)

    def hold_codes(self, packed: Tensor, state: Any) -> None:
        """Take a weight that is in NF4 already; see `NF4.of_codes`."""
        self._kept_norms = None
        self.nf4, self.weight = NF4.of_codes(self.shape, packed, state, self.dequantize), None

    @property
    def four_bit(self) -> bool:
        """Whether the weight is NF4."""
        return self.nf4 is not None

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales, or of the weight."""
        if self.nf4 is not None:
            return self.nf4.nbytes
        return self.dense().nbytes

    @property
    def moved(self) -> tuple[int, int]:
        """Whether B left zero: 1 of 1, or 0."""
        return int(self.lora_B is not None and bool(self.lora_B.any())), 1

    def touched(self, values: Tensor) -> Tensor:
        """Whether a value ``[out, r]`` is not zero: one map."""
        return values.any()[None]

    def dense(self) -> Tensor:
        """The weight ``[out, in]`` in the run's dtype."""
        if self.nf4 is not None:
            return self.nf4.dense()
        assert self.weight is not None
        return self.weight

    def into(self, out: Tensor) -> None:
        """Write the weight into `out` ``[out, in]``, whose rows may lie apart."""
        if self.nf4 is not None:
            self.nf4.into(out)
        else:
            out.copy_(self.dense())

    @torch.inference_mode(False)
    @torch.no_grad()
    def base_norms(self) -> Tensor:
        """A new tensor of the norms of the weight's rows, float32 ``[out]``."""
        return row_norms(self.dense())

    def kept_norms(self) -> Tensor:
        """Norms of the weight's rows, computed once: a fused product does not need them."""
        if self._kept_norms is None:
            self._kept_norms = self.base_norms()
        return self._kept_norms

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``."""
        if self.product.takes(x):
            return self.product(x)[0]
        if not has_dora(self):
            return self._plain(x)
        magnitudes = self.product.magnitudes
        if self.lora is not None and self.lora.lora_dropout and self.training:
            # As in PEFT, the magnitude scales what is computed from the input with dropout.
            dropped = F.dropout(x, self.lora.lora_dropout)
            base: Tensor = _Frozen.apply(x - dropped, self)  # type: ignore[no-untyped-call]
            return base + scaled(self, self._with_lora(dropped), magnitudes)
        return scaled(self, self._plain(x), magnitudes)

    def _plain(self, x: Tensor) -> Tensor:
        """Base and plain LoRA."""
        lora = self.lora
        if lora is None:
            if not (torch.is_grad_enabled() and x.requires_grad):
                return F.linear(x, self.dense())
            frozen: Tensor = _Frozen.apply(x, self)  # type: ignore[no-untyped-call]
            return frozen
        assert self.lora_A is not None
        assert self.lora_B is not None
        if lora.lora_dropout and self.training:
            dropped = F.dropout(x, lora.lora_dropout)
            delta = F.linear(dropped, self.lora_A.to(x.dtype))
            delta = F.linear(delta, self.lora_B.to(x.dtype)) * lora.scaling
            base: Tensor = _Frozen.apply(x, self)  # type: ignore[no-untyped-call]
            return base + delta
        return self._with_lora(x)

    def _with_lora(self, x: Tensor) -> Tensor:
        out: Tensor = _WithLora.apply(x, self.lora_A, self.lora_B, self)  # type: ignore[no-untyped-call]
        return out


class _Frozen(torch.autograd.Function):
    """``x W^T`` with nothing saved: the backward reads the weight again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Linear) -> Tensor:
        ctx.module = module
        return F.linear(x, module.dense())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.module.dense(), None


class _WithLora(torch.autograd.Function):
    """``x W^T + s (x A^T) B^T``; saves x and ``x A^T``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, module: Linear) -> Tensor:
        assert module.lora is not None
        flat = x.reshape(-1, x.shape[-1])
        a16, b16 = a.to(x.dtype), b.to(x.dtype)
        xa = flat @ a16.t()
        y = F.linear(flat, module.dense())
        y.addmm_(xa, b16.t(), alpha=module.lora.scaling)
        ctx.save_for_backward(flat, xa, a, b)
        ctx.module = module
        ctx.shape = x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, xa, a, b = ctx.saved_tensors
        module: Linear = ctx.module
        assert module.lora is not None
        s = module.lora.scaling
        dy = dy.reshape(-1, dy.shape[-1])
        dyb = (dy @ b.to(dy.dtype)).mul_(s)
        db = (dy.t() @ xa).to(b.dtype).mul_(s)
        da = (dyb.t() @ x).to(a.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ module.dense()
            dx.addmm_(dyb, a.to(dy.dtype))
            dx = dx.view(ctx.shape)
        return dx, da, db, None
