"""`LoraLayer`: base class of frozen layers with LoRA. `Lora`: rank, alpha, dropout and scaling.

This file decides what core may assume of a module that `BuildContext` creates, so that no verb asks
which class it is: it takes the base's values a few slices at a time, carries two LoRA matrices in
PEFT's shapes, and reports how many bytes it holds and whether these are 4-bit. `linear` and
`moe.experts` decide how they compute.

LoRA: Hu et al. 2021; scaling ``s = lora_alpha / r``; A and B are float32 and computed in the run's
dtype. DoRA (`dora`) adds a vector of magnitudes, which starts as the norms of the rows. B starts at
zero, so step 0 equals the base: bit for bit on CPUs, up to the order of sums on GPUs, where LoRA
changes the size of the product (`fused`).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .nf4 import Dequantize, dequantize


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """LoRA's numbers for one map, named as in PEFT's config; of experts, r is each one's."""

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def scaling(self) -> float:
        """``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with rank-stabilized LoRA."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class LoraLayer(nn.Module):
    """A frozen map with an optional adapter.

    Args:
        shape: of the weight.
        dtype: of the run.
        lora: the adapter's numbers; ``None``: no adapter.
        dequantize: the op ``nf4_dequantize``.

    Attributes:
        weight: the base's values; on meta until loaded; ``None`` once held in 4 bit.
        lora_A: float32, or ``None``.
        lora_B: float32, or ``None``.
        lora_magnitude_vector: DoRA's m, float32 ``[out]``, or ``None``.
        lora: the adapter's numbers; ``None`` computes the base alone.
        dequantize: what reads 4-bit values, once any are held.
        accumulates: whether a backward may add to ``lora_A.grad`` and ``lora_B.grad`` itself,
            instead of returning gradients to autograd (`qcore.nn.optim`).
        sharded: whether the base's values are whole only while their layer runs
            (`qcore.nn.sharding`).
        codes: parameters of codes that are sharded, or ``None``.
    """

    weight: nn.Parameter | None
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    lora_magnitude_vector: nn.Parameter | None

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        lora: Lora | None,
        *,
        dequantize: Dequantize = dequantize,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.lora = lora
        self.dequantize = dequantize
        self.accumulates = False
        self.sharded = False
        self.codes: nn.Module | None = None
        meta = torch.empty(shape, dtype=dtype, device="meta")
        self.weight = nn.Parameter(meta, requires_grad=False)
        self.lora_A = self.lora_B = self.lora_magnitude_vector = None
        if lora is not None:
            a, b = self.lora_shapes(lora.r)
            self.lora_A = nn.Parameter(torch.empty(a, device="meta"))
            self.lora_B = nn.Parameter(torch.empty(b, device="meta"))
            if lora.use_dora:
                self.lora_magnitude_vector = nn.Parameter(torch.empty(b[0], device="meta"))

    def lora_shapes(self, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of A and B in PEFT's layout."""
        raise NotImplementedError

    def hold(self, rows: slice, value: Tensor, *, quantize: bool, dtype: torch.dtype) -> None:
        """Take the base's ``weight[rows]`` (dim 0), quantized on arrival when asked.

        Calls come in order and tile the weight. A map that cannot be taken in slices gets the
        whole weight at once.
        """
        raise NotImplementedError

    @property
    def four_bit(self) -> bool:
        """Whether the base's values are held in 4 bit."""
        raise NotImplementedError

    @property
    def stored_bytes(self) -> int:
        """Bytes that the base's values take, scales included."""
        raise NotImplementedError

    @property
    def moved(self) -> tuple[int, int]:
        """How many of its linear maps have an adapter with an effect, and of how many."""
        raise NotImplementedError

    def touched(self, values: Tensor) -> Tensor:
        """For which of its linear maps `values` has one that is not zero: bool ``[maps]``.

        Args:
            values: of the shape of ``lora_B``.
        """
        raise NotImplementedError

    @property
    def factors(self) -> tuple[nn.Parameter, ...]:
        """The adapter's parameters: A, B and, with DoRA, m."""
        parameters = (self.lora_A, self.lora_B, self.lora_magnitude_vector)
        return tuple(parameter for parameter in parameters if parameter is not None)

    def base_norms(self) -> Tensor:
        """A new tensor of the norms of the weight's rows, float32 ``[out]``: m before step 1."""
        raise NotImplementedError

    def set_lora(
        self, a: Tensor, b: Tensor, magnitude: Tensor | None = None, *, trained: bool = False
    ) -> None:
        """Set the adapter's matrices, and DoRA's m."""
        self.lora_A = nn.Parameter(a, requires_grad=trained)
        self.lora_B = nn.Parameter(b, requires_grad=trained)
        if magnitude is not None:
            self.lora_magnitude_vector = nn.Parameter(magnitude, requires_grad=trained)

    def reset_lora(self, name: str, seed: int, device: torch.device) -> None:
        """A uniform as in PEFT, B zero, m the norms of the weight, which must be there.

        Depends on `name`, `seed` and the weight alone, not on order.
        """
        if self.lora is None:
            return
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        shape_a, shape_b = self.lora_shapes(self.lora.r)
        a = torch.empty(shape_a)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        m = self.base_norms() if self.lora.use_dora else None
        self.set_lora(a.to(device), torch.zeros(shape_b, device=device), m, trained=True)
