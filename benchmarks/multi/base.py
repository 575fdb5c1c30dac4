"""A base of random weights for models of any size: NF4 codes made in place, block by block.

The values of a weight depend on its name, the block of rows and the seed alone, so that ranks which
hold different rows hold parts of one model, and no process ever has a 16-bit copy of a large
weight. 4-bit weights are slices of one pool of normal values that was quantized once: their codes
and scales are true NF4 with double quantization of ``N(0, 0.02)``, and taking a slice is a copy,
so that 200 GB take seconds. Where a block starts in the pool depends on its name and number.
Everything else is drawn as `peers.qcore_side.fill` draws it.

Shapes: a weight ``[out, in]``, a stack of experts ``[E, out, in]``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qcore.api.parameters import Kind, Store
from qcore.checkpoint.layout import Layout
from qcore.checkpoint.layout import Located as Item
from qcore.nn.four_bit import StoredCodes, nf4_state
from qcore.nn.load import place
from qcore.nn.model import Model
from qcore.nn.moe.experts import Experts
from qcore.nn.qlora.linear import Linear
from qcore.nn.qlora.nf4 import BLOCK, BLOCK2, Codes, NF4Stack, functional, of_weights
from qcore.nn.sharding.base import ShardedBase

UNIT = BLOCK * BLOCK2  #: values that share a scale of scales; the pool is cut at multiples of it
STD = 0.02
ROWS = 4096  #: rows of a 16-bit weight that are drawn at a time
#: Values of the pool: on a GPU eight times the largest expert of the published models.
POOL = {"cuda": 2**27, "cpu": 2**19}


def seed_of(name: str, block: int) -> int:
    """The seed of a block of a weight."""
    digest = hashlib.sha256(f"{name}:{block}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class RandomBase:
    """Random values of every weight of a model, by name and rows.

    Args:
        device: where they are made.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        generator = torch.Generator(device).manual_seed(0)
        self._size = POOL[device.type]
        values = torch.empty(1, self._size // 64, 64, device=device, dtype=torch.bfloat16)
        values.normal_(0, STD, generator=generator)
        self._pool = of_weights(values)

    @property
    def nbytes(self) -> int:
        """Bytes of the pool."""
        return sum(part.nbytes for part in self._pool)

    def codes(self, name: str, size: int, slices: slice) -> Codes:
        """NF4 codes of `slices` of a stack whose slices have `size` values each.

        A linear map is a stack of one slice.
        """
        count, blocks = slices.stop - slices.start, math.ceil(size / BLOCK)
        pool = self._pool
        packed = torch.empty(count, math.ceil(size / 2), dtype=torch.uint8, device=self.device)
        absmax = torch.empty(count, blocks, dtype=torch.uint8, device=self.device)
        absmax2 = torch.empty(count, math.ceil(blocks / BLOCK2), device=self.device)
        for number in range(count):
            for block, at, values in _blocks(size, self._size // 2):
                start = self._place(f"{name}:{slices.start + number}", block, values)
                _copy(packed[number], at // 2, pool.packed[0], start // 2, math.ceil(values / 2))
                scales = math.ceil(values / BLOCK)
                _copy(absmax[number], at // BLOCK, pool.absmax[0], start // BLOCK, scales)
                _copy(
                    absmax2[number], at // UNIT, pool.absmax2[0], start // UNIT,
                    math.ceil(scales / BLOCK2),
                )  # fmt: skip
        return Codes(packed, absmax, absmax2, pool.code2, pool.offset.expand(count).clone())

    def _place(self, name: str, block: int, values: int) -> int:
        """Where in the pool a block starts."""
        places = (self._size - values) // UNIT + 1
        return seed_of(name, block) % places * UNIT

    def values(self, name: str, shape: tuple[int, ...], rows: slice) -> Tensor:
        """``[rows]`` of a weight that is not quantized, bfloat16."""
        out = self._empty(rows.stop - rows.start, *shape[1:])
        for block in range(rows.start // ROWS, math.ceil(rows.stop / ROWS)):
            here = slice(block * ROWS, min(shape[0], (block + 1) * ROWS))
            part = self._empty(here.stop - here.start, *shape[1:])
            generator = torch.Generator(self.device).manual_seed(seed_of(name, block))
            _draw(name, part, len(shape), generator)
            start, stop = max(here.start, rows.start), min(here.stop, rows.stop)
            out[start - rows.start : stop - rows.start] = part[
                start - here.start : stop - here.start
            ]
        return out

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.device, dtype=torch.bfloat16)

    def fill(self, layout: Layout, model: Model) -> None:
        """Give every module of a model on meta its weight, in the storage that a run has."""
        modules = dict(model.named_modules())
        for item in layout.located.values():
            name, shape = item.tensor.name, item.tensor.shape
            holder = model.lora_layers.get(name)
            in_nf4 = holder is not None and layout.held(name) is Store.NF4
            own = None if model.sharded is None else model.sharded.rows(name)
            if own is not None:
                assert model.sharded is not None
                self._put(model.sharded, item, own, in_nf4=in_nf4)
            elif in_nf4:
                self._hold(holder, item, model.dtype)
            else:
                rows = slice(0, shape[0])
                place(model, modules, item, rows, self.values(name, shape, rows), quantize=False)

    def _put(self, base: ShardedBase, item: Item, own: slice, *, in_nf4: bool) -> None:
        """Give a sharded tensor this rank's rows."""
        name, shape = item.tensor.name, item.tensor.shape
        if not in_nf4:
            base.put(name, own, self.values(name, shape, own))
        elif item.tensor.row.kind is Kind.EXPERTS:
            base.put_stack(name, self.codes(name, shape[1] * shape[2], own))
        else:
            stored = self._stored(name, shape)
            packed = stored.packed.view(shape[0], -1)[own].reshape(-1, 1)
            base.put_codes(name, stored._replace(packed=packed))

    def _hold(self, holder: Any, item: Item, dtype: torch.dtype) -> None:
        """Give a map its codes."""
        name, shape = item.tensor.name, item.tensor.shape
        if item.tensor.row.kind is Kind.EXPERTS:
            assert isinstance(holder, Experts)
            stack = NF4Stack(_three(shape), dtype, torch.device("meta"), holder.dequantize)
            codes = self.codes(name, shape[1] * shape[2], slice(0, shape[0]))
            stack.packed, stack.absmax, stack.absmax2, stack.code2, stack.offset = codes
            holder.nf4, holder.weight, holder._taken = stack, None, shape[0]
            return
        assert isinstance(holder, Linear)
        stored = self._stored(name, shape)
        holder.hold_codes(stored.packed, nf4_state(stored, dtype))

    def _stored(self, name: str, shape: Sequence[int]) -> StoredCodes:
        """Codes of a linear map as a checkpoint in 4 bits has them."""
        packed, absmax, absmax2, code2, offset = self.codes(name, math.prod(shape), slice(0, 1))
        return StoredCodes(
            packed=packed.view(-1, 1), absmax=absmax[0], nested_absmax=absmax2[0],
            nested_quant_map=code2, offset=offset[0],
            quant_map=functional().get_4bit_type("nf4", device=self.device),
        )  # fmt: skip


def _three(shape: Sequence[int]) -> tuple[int, int, int]:
    experts, out, into = shape
    return experts, out, into


def _draw(name: str, value: Tensor, dims: int, generator: torch.Generator) -> None:
    """Values of a weight that is not quantized, as `peers.qcore_side.fill` draws them."""
    if name.endswith("A_log"):
        value.uniform_(0.1, 16, generator=generator).log_()
    elif name.endswith(("dt_bias", "linear_attn.norm.weight")):
        value.fill_(1)
    elif dims == 1:
        value.zero_()  # norms hold what is added to 1
    else:
        value.normal_(0, STD, generator=generator)


def _blocks(size: int, most: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, length) of the blocks of a flat weight; each starts at a multiple of UNIT."""
    step = min(most, 2**24) // UNIT * UNIT
    for number, at in enumerate(range(0, size, step)):
        yield number, at, min(step, size - at)


def _copy(out: Tensor, at: int, source: Tensor, start: int, count: int) -> None:
    out[at : at + count].copy_(source[start : start + count])
