"""NF4 weights whose codes are parameters, so that FSDP shards them.

This file decides how codes and scales become parameters and how readers of a 4-bit weight see them:
each property looks the parameter up, because FSDP puts a shard or the whole in its place. Rows come
first, so that a shard is whole blocks. A linear map's scales of the scales cover blocks of 16384
values, which may lie in two shards; each rank holds all of them (one float32 for 16384 values). A
stack's belong to their expert and are sharded with it.

FSDP takes parameters of bytes from torch 2.12 on. Before, the same bytes are a parameter of a
floating-point dtype, which nothing computes with.

Shapes: ``[out, in]`` a linear map, ``[E, out, in]`` a stack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..qlora.nf4 import BLOCK, BLOCK2, NF4, Dequantize, NF4Stack, functional

#: Whether FSDP needs a floating-point dtype: `fully_shard` makes a parameter that requires a
#: gradient before it takes that back.
FLOATING = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)


class StoredCodes(nn.Module):
    """Frozen parameters of bytes and of float32, which FSDP may shard along dim 0.

    Args:
        shapes: of the bytes, by name.
        floats: shapes of float32 parameters, by name.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], floats: Mapping[str, tuple[int, ...]]
    ) -> None:
        super().__init__()
        for name, shape in shapes.items():
            meta = as_parameter(torch.empty(shape, dtype=torch.uint8, device="meta"), name)
            self.register_parameter(name, nn.Parameter(meta, requires_grad=False))
        for name, wide in floats.items():
            meta = torch.empty(wide, device="meta")
            self.register_parameter(name, nn.Parameter(meta, requires_grad=False))

    def whole(self, name: str) -> Tensor:
        """A parameter of float32, while the layer is gathered."""
        parameter = cast(nn.Parameter, self._parameters[name])
        if hasattr(parameter, "placements"):
            raise RuntimeError(f"{name} of a sharded weight is read while it is not gathered")
        return parameter

    def bytes(self, name: str) -> Tensor:
        """A parameter of bytes, uint8, while the layer is gathered."""
        return self.whole(name).view(torch.uint8)


def as_parameter(codes: Tensor, name: str) -> Tensor:
    """Bytes ``[n, m]`` in a dtype that FSDP takes: the same memory, the same number of rows.

    Codes and those of scales get different dtypes, so that a layer's parameters never have one in
    common: FSDP then gathers bytes. Of one dtype it copies values, on a GPU through float32, which
    changes bytes that happen to be a NaN.

    Args:
        codes: uint8.
        name: of the parameter.
    """
    if not FLOATING:
        return codes
    if name == "absmax":
        return codes.view(torch.float8_e5m2)
    return codes.view(torch.bfloat16 if codes.shape[1] % 2 == 0 else torch.float8_e4m3fn)


class ShardedNF4(NF4):
    """One weight ``[out, in]`` in 4 bit of which each rank holds some rows.

    Args:
        shape: of the weight; rows are whole blocks.
        dtype: dtype that `dense` returns.
        read: what reads codes.

    Attributes:
        stored: the codes, and those of the scales.
    """

    __slots__ = ("_state", "stored")

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, read: Dequantize) -> None:
        out, into = shape
        assert into % BLOCK == 0, "a shard is whole blocks"
        self.shape, self.read = shape, read
        self.stored = StoredCodes({"packed": (out, into // 2), "absmax": (out, into // BLOCK)}, {})
        self._state = functional().QuantState(absmax=None, dtype=dtype, quant_type="nf4")

    def hold_scales(self, state: Any) -> None:
        """Take what every rank holds of bitsandbytes' state: all but the codes of the scales."""
        self._state = state
        state.absmax = None

    @property
    def packed(self) -> Tensor:  # type: ignore[override]
        """Two codes a byte, ``[size / 2, 1]``."""
        return self.stored.bytes("packed").view(-1, 1)

    @property
    def state(self) -> Any:
        """The state of bitsandbytes, with the codes of the scales as they lie now."""
        self._state.absmax = self.stored.bytes("absmax").view(-1)
        return self._state

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._state.dtype
        return dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the whole weight, over all ranks."""
        size = math.prod(self.shape)
        return size // 2 + size // BLOCK + 4 * math.ceil(size / BLOCK / BLOCK2)


class ShardedNF4Stack(NF4Stack):
    """A stack ``[E, out, in]`` of which each rank holds some slices.

    Args:
        shape: of the stack.
        dtype: dtype that `dense` and `dense_slice` return.
        read: what reads codes.

    Attributes:
        stored: the codes and both levels of scales.
    """

    __slots__ = ("stored",)

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, read: Dequantize) -> None:
        self.shape, self.dtype, self.read = shape, dtype, read
        experts, size = shape[0], shape[1] * shape[2]
        blocks = math.ceil(size / BLOCK)
        self.stored = StoredCodes(
            {"packed": (experts, math.ceil(size / 2)), "absmax": (experts, blocks)},
            {"absmax2": (experts, math.ceil(blocks / BLOCK2)), "offset": (experts,)},
        )
        self.code2 = None

    @property
    def packed(self) -> Tensor:  # type: ignore[override]
        """Two codes a byte, ``[E, ceil(out * in / 2)]``."""
        return self.stored.bytes("packed")

    @property
    def absmax(self) -> Tensor:  # type: ignore[override]
        """The scales' own codes, ``[E, blocks]``."""
        return self.stored.bytes("absmax")

    @property
    def absmax2(self) -> Tensor:  # type: ignore[override]
        """Scales of the scales, float32 ``[E, ceil(blocks / 256)]``."""
        return self.stored.whole("absmax2")

    @property
    def offset(self) -> Tensor:  # type: ignore[override]
        """Mean of the scales of a slice, float32 ``[E]``."""
        return self.stored.whole("offset")

    def put(self, rows: slice, value: Tensor) -> None:
        raise TypeError("a sharded stack is filled by the rank's own slices")

    @property
    def nbytes(self) -> int:
        """Bytes of the whole stack, over all ranks."""
        return sum(p.numel() * p.element_size() for p in self.stored.parameters())
