"""`ShardedBase`: the weights of a model's layers, of which each rank holds some rows.

This file decides which tensors are sharded and puts a rank's rows into them. Sharded are the linear
maps and stacks of experts of the trunk's layers, and their other tensors from `LEAST` bytes up, one
FSDP group for each layer. What is trained, small tensors, the embedding, the head and a tower are
replicated: the head is used outside of a layer, and together with the embedding it is 4 GB of the
largest model of this kind, whose layers are 200 GB. `gathers` decides when the rows of all ranks
are gathered, `codes` how codes are parameters, `nn.load` what is read.

No mixed-precision policy is set: it would cast scales to 16 bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...api.parameters import Store
from ...checkpoint.layout import Layout, Located
from ...parallel.world import World
from ..four_bit import StoredCodes, nf4_state
from ..moe.experts import Experts
from ..qlora.linear import Linear
from ..qlora.lora_layer import LoraLayer
from ..qlora.nf4 import BLOCK, BLOCK2, Codes, NF4Stack, functional
from ..tensor_bytes import DTYPES
from .codes import ShardedNF4, ShardedNF4Stack, as_parameter
from .gathers import Gathers, Group
from .rows import rows_of

LEAST = 2**20  #: bytes from which a tensor beside linear maps and experts is sharded


@dataclass(frozen=True, slots=True)
class _Held:
    """A sharded tensor.

    Attributes:
        layer: number of its layer.
        rows: those of this rank.
        module: that has the parameter.
        leaf: the parameter's name in it; of codes, "weight".
        dtype: of values; ``None`` for codes.
    """

    layer: int
    rows: slice
    module: nn.Module
    leaf: str
    dtype: torch.dtype | None


class RankFailed(Exception):
    """Another rank failed while the base was loading, and has its error."""


class _LayerGroup(nn.Module):
    """Has a layer below it and is never called, so that no hook of FSDP gathers it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


class ShardedBase:
    """The sharded tensors of a model on meta; filled by `put`, gathered by `gathers`.

    Args:
        model: on meta, nothing loaded; each of its trunk's layers is a module.
        layout: what is loaded.
        world: the ranks.
        device: where this rank's rows are held.
        quantize: whether tensors that can be are held in 4 bit.

    Attributes:
        world: the ranks.
        gathers: gathers the layers.
        exchanged: the weights whose scales the ranks have begun to exchange.
    """

    def __init__(
        self, model: Any, layout: Layout, world: World, device: torch.device, *, quantize: bool
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.world, self._device, self._dtype = world, device, model.dtype
        self._held: dict[str, _Held] = {}
        self._stacks: dict[str, NF4Stack] = {}
        self.exchanged: set[str] = set()
        mesh = init_device_mesh(device.type, (world.size,))
        names = {id(module): name for name, module in model.lora_layers.items()}
        paths = {id(module): name for name, module in model.named_modules()}
        groups: list[Group | None] = []
        for number, layer in enumerate(model.trunk.layers):
            sharded: set[nn.Parameter] = set()
            for module in layer.modules():
                name = names.get(id(module))
                if name is not None:
                    in_nf4 = quantize and layout.held(name) is Store.NF4
                    self._shard_map(number, name, module, in_nf4, sharded)
                elif (path := paths.get(id(module))) is not None:
                    self._shard_others(number, path, module, layout, sharded)
            if not sharded:
                groups.append(None)
                continue
            group = _LayerGroup(layer)
            ignored = {one for one in layer.parameters() if one not in sharded}
            fully_shard(group, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
            groups.append(cast(Group, group))
        self.gathers = Gathers(groups, _lowest_trained(model))

    def rows(self, name: str) -> slice | None:
        """The rows of a tensor that this rank holds; ``None`` if it is not sharded."""
        held = self._held.get(name)
        return None if held is None else held.rows

    def of_layer(self, name: str) -> int | None:
        """The layer with which a tensor is gathered; ``None`` if it is not sharded."""
        held = self._held.get(name)
        return None if held is None else held.layer

    @property
    def bytes_held(self) -> int:
        """Bytes of sharded tensors that this rank holds, without padding."""
        total = 0
        for held in self._held.values():
            for parameter in _parameters(held):
                local = cast(Any, parameter).to_local()
                total += local.numel() * local.element_size()
        return total

    @torch.no_grad()
    def put(self, name: str, rows: slice, value: Tensor) -> None:
        """Take ``tensor[rows]``, which lies within the rank's rows; calls come in order.

        Every rank calls this equally often for a 4-bit linear map, also where it has no row.

        Raises:
            RankFailed: another rank called `fail` in place of this.
        """
        held = self._held[name]
        module = held.module
        if held.dtype is not None:
            self._put_values(held, rows, value)
        elif isinstance(module, Linear):
            codes = cast(ShardedNF4, module.nf4)
            packed, absmax = _quantized(value, module.shape[1])
            scales = self._gathered_rows(name, absmax, module.shape)
            state, own = self._scales(scales, held.rows, module.shape)
            codes.hold_scales(state)
            _set_local(codes.stored, "packed", as_parameter(packed, "packed"))
            _set_local(codes.stored, "absmax", as_parameter(own, "absmax"))
        else:
            self._put_slices(name, held, rows, value)

    @torch.no_grad()
    def fail(self, name: str) -> None:
        """Tell the other ranks, which `put` this 4-bit linear map, that this one cannot."""
        shape = cast(Linear, self._held[name].module).shape
        nan = torch.full((1, shape[1] // BLOCK), torch.nan, device=self._device)
        with suppress(RankFailed):
            self._gathered_rows(name, nan, shape)

    @torch.no_grad()
    def put_codes(self, name: str, codes: StoredCodes) -> None:
        """Take a weight that is in NF4 already: the packed codes of the rank's rows, all scales."""
        held = self._held[name]
        module = held.module
        assert isinstance(module, Linear)
        sharded, out = cast(ShardedNF4, module.nf4), module.shape[0]
        sharded.hold_scales(nf4_state(codes, self._dtype))
        packed = codes.packed.view(-1, module.shape[1] // 2)
        absmax = codes.absmax.view(out, -1)[held.rows].clone()
        _set_local(sharded.stored, "packed", as_parameter(packed, "packed"))
        _set_local(sharded.stored, "absmax", as_parameter(absmax, "absmax"))

    @torch.no_grad()
    def put_stack(self, name: str, codes: Codes) -> None:
        """Take the rank's slices of a stack that is in NF4 already."""
        module = self._held[name].module
        assert isinstance(module, Experts)
        stack = cast(ShardedNF4Stack, module.nf4)
        for leaf, of_bytes in (("packed", codes.packed), ("absmax", codes.absmax)):
            _set_local(stack.stored, leaf, as_parameter(of_bytes, leaf))
        _set_local(stack.stored, "absmax2", codes.absmax2)
        _set_local(stack.stored, "offset", codes.offset)
        stack.code2, module._taken = codes.code2, module.shape[0]

    def _shard_map(
        self, number: int, name: str, module: LoraLayer, in_nf4: bool, into: set[nn.Parameter]
    ) -> None:
        """Make the weight of a linear map or a stack ready to be sharded."""
        shape = module.shape
        own = rows_of(shape[0], self.world.rank, self.world.size)
        held = _Held(number, own, module, "weight", None if in_nf4 else self._dtype)
        if not in_nf4:
            assert module.weight is not None
            into.add(module.weight)
        elif isinstance(module, Experts):
            stack = ShardedNF4Stack(
                cast(tuple[int, int, int], shape), self._dtype, module.dequantize
            )
            module.nf4, module.codes = stack, stack.stored
            into.update(stack.stored.parameters())
        elif isinstance(module, Linear) and shape[1] % BLOCK == 0:
            codes = ShardedNF4(shape, self._dtype, module.dequantize)
            module.nf4, module.codes = codes, codes.stored
            into.update(codes.stored.parameters())
        else:
            return  # a row is not whole blocks
        if in_nf4:
            module.weight = None
        module.sharded = True
        self._held[name] = held

    def _shard_others(
        self, number: int, path: str, module: nn.Module, layout: Layout, into: set[nn.Parameter]
    ) -> None:
        """Make large tensors that are no map's weight ready, in the dtype in which they load."""
        for leaf, parameter in module.named_parameters(recurse=False):
            item = layout.located.get(f"{path}.{leaf}")
            if item is None or not item.places:
                continue
            dtype = _dtype_of(item, self._dtype)
            if parameter.numel() * dtype.itemsize < LEAST:
                continue
            meta = torch.empty(parameter.shape, dtype=dtype, device="meta")
            made = nn.Parameter(meta, requires_grad=False)
            module.register_parameter(leaf, made)
            into.add(made)
            own = rows_of(len(meta), self.world.rank, self.world.size)
            self._held[item.tensor.name] = _Held(number, own, module, leaf, dtype)

    def _put_values(self, held: _Held, rows: slice, value: Tensor) -> None:
        """Take 16-bit values."""
        assert held.dtype is not None
        if rows.start == held.rows.start:
            shape = (held.rows.stop - held.rows.start, *value.shape[1:])
            local = (
                value.to(held.dtype)
                if rows == held.rows
                else value.new_empty(shape, dtype=held.dtype)
            )
            _set_local(held.module, held.leaf, local.contiguous())
        if rows != held.rows:
            local = cast(Any, held.module._parameters[held.leaf]).to_local()
            local[rows.start - held.rows.start : rows.stop - held.rows.start] = value.to(held.dtype)

    def _put_slices(self, name: str, held: _Held, rows: slice, value: Tensor) -> None:
        """Quantize slices of a stack, and put all in place with the last."""
        stack = cast(ShardedNF4Stack, cast(Experts, held.module).nf4)
        count = held.rows.stop - held.rows.start
        own = self._stacks.get(name)
        if own is None:
            shape = (count, *stack.shape[1:])
            own = self._stacks[name] = NF4Stack(shape, stack.dtype, self._device)
        own.put(slice(rows.start - held.rows.start, rows.stop - held.rows.start), value)
        if rows.stop < held.rows.stop:
            return
        del self._stacks[name]
        if own.code2 is None:
            own.code2 = _code2(self._device)
        self.put_stack(name, own.codes(slice(0, count)))

    def _scales(self, scales: Tensor, rows: slice, shape: tuple[int, ...]) -> tuple[Any, Tensor]:
        """The state of the whole weight, and the codes of this rank's scales.

        Args:
            scales: float32 scales of all rows, ``[out * in / 64]``.
            rows: this rank's.
            shape: of the weight.
        """
        bnb = functional()
        offset = scales.mean()
        codes, state2 = bnb.quantize_blockwise(scales - offset, blocksize=BLOCK2)
        state = bnb.QuantState(
            absmax=None, shape=torch.Size(shape), dtype=self._dtype, blocksize=BLOCK,
            code=bnb.get_4bit_type("nf4", device=scales.device), quant_type="nf4",
            offset=offset, state2=state2,
        )  # fmt: skip
        return state, codes.view(shape[0], -1)[rows].clone()

    def _gathered_rows(self, name: str, own: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The scales of all ranks' rows, one after another, as one vector."""
        from torch import distributed

        size, width = self.world.size, shape[1] // BLOCK
        each = -(-shape[0] // size)
        padded = own.new_zeros(each, width)
        padded[: len(own)] = own
        whole = own.new_empty(size * each, width)
        self.exchanged.add(name)
        distributed.all_gather(list(whole.chunk(size)), padded)
        if not bool(whole.isfinite().all()):  # values are checked before they are quantized
            raise RankFailed
        return whole[: shape[0]].reshape(-1)


def gathered_layers(
    base: ShardedBase | None, items: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """The items by name of a weight, each while its weight is whole; every rank takes all."""
    for name, item in items.items():
        number = None if base is None else base.of_layer(name)
        if base is None or number is None:
            yield name, item
            continue
        with base.gathers.gathered(number):
            yield name, item


def _lowest_trained(model: Any) -> int:
    """The lowest layer whose backward may run, on any rows."""
    if model.trains_tower or model.trained_rows is not None:
        return 0
    for number, layer in enumerate(model.trunk.layers):
        if any(isinstance(m, LoraLayer) and m.lora is not None for m in layer.modules()):
            return number
    return 0


def _quantized(value: Tensor, into: int) -> tuple[Tensor, Tensor]:
    """Codes ``[n, in / 2]`` and float32 scales ``[n, in / 64]`` of some rows, or of none."""
    count = len(value)
    if not count:
        packed = value.new_empty(0, into // 2, dtype=torch.uint8)
        return packed, value.new_empty(0, into // BLOCK, dtype=torch.float32)
    packed, state = functional().quantize_4bit(
        value.contiguous(), blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
    )
    return packed.view(count, -1), state.absmax.view(count, -1)


def _code2(device: torch.device) -> Tensor:
    """The value of each code of a scale, for a rank without any."""
    table: Tensor = functional().create_dynamic_map().to(device)
    return table


def _dtype_of(item: Located, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which `nn.load` holds a tensor other than the weight of a map."""
    if item.tensor.row.store is Store.FP32 or dtype == torch.float32:
        return torch.float32
    return DTYPES[item.dtype]


def _parameters(held: _Held) -> list[nn.Parameter]:
    codes = getattr(held.module, "nf4", None)
    if held.dtype is None and codes is not None:
        return list(codes.stored.parameters())
    return [cast(nn.Parameter, held.module._parameters[held.leaf])]


def _set_local(module: nn.Module, leaf: str, local: Tensor) -> None:
    """Put a rank's rows in place of those on meta."""
    from torch.distributed.tensor import DTensor

    old = cast(DTensor, module._parameters[leaf])
    value = DTensor.from_local(
        local, old.device_mesh, old.placements, run_check=False,
        shape=old.shape, stride=old.stride(),
    )  # fmt: skip
    module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
