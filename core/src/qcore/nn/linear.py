"""The linear map that blocks are built from: frozen weight, 16-bit or NF4, plus LoRA.

This file decides how ``y = x W^T + s (dropout(x) A^T) B^T`` is computed and what is saved
for its backward: the input, never the dequantised weight, which is read again. Which maps
carry LoRA is `model`'s decision, what they hold is `load`'s.

LoRA: Hu et al. 2021; scaling ``s = lora_alpha / r``; A and B are float32 and computed in the
run's dtype. B starts at zero, so step 0 equals the base bit for bit.

Shapes: ``x [..., in]``, ``W [out, in]``, ``A [r, in]``, ``B [out, r]``.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .nf4 import NF4


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """LoRA's numbers for one linear map, named as in PEFT's config."""

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        """``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` under rank-stabilised LoRA."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class Linear(nn.Module):
    """A frozen linear map with an optional adapter.

    Attributes:
        weight: ``[out, in]``; on meta until loaded; ``None`` once held in 4 bit.
        lora_A: ``[r, in]`` float32, or ``None``.
        lora_B: ``[out, r]`` float32, or ``None``.
    """

    weight: nn.Parameter | None
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, lora: Lora | None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.lora = lora
        self.nf4: NF4 | None = None
        meta = torch.empty(shape, dtype=dtype, device="meta")
        self.weight = nn.Parameter(meta, requires_grad=False)
        if lora is None:
            self.lora_A = self.lora_B = None
        else:
            a = torch.empty(lora.r, self.in_features, device="meta")
            b = torch.empty(self.out_features, lora.r, device="meta")
            self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)

    def hold(self, weight: Tensor, *, quantize: bool, dtype: torch.dtype) -> None:
        """Take the loaded weight, quantised on arrival when asked."""
        if quantize:
            self.nf4, self.weight = NF4(weight, dtype), None
        else:
            self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)

    def dense(self) -> Tensor:
        """The weight ``[out, in]`` in the run's dtype."""
        if self.nf4 is not None:
            return self.nf4.dense()
        assert self.weight is not None
        return self.weight

    def reset_lora(self, name: str, seed: int, device: torch.device) -> None:
        """A uniform as in PEFT, B zero. Depends on `name` and `seed` alone, not on order."""
        if self.lora is None:
            return
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        a = torch.empty(self.lora.r, self.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, self.lora.r, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``."""
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
        out: Tensor = _Adapted.apply(x, self.lora_A, self.lora_B, self)  # type: ignore[no-untyped-call]
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


class _Adapted(torch.autograd.Function):
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
