"""Records of where the tensors of a parameter table are in a checkpoint.

This file decides what a layout knows: the tensors on disk of each canonical tensor, how they are
stored, and what a run loads and quantizes. `qcore.checkpoint.layout` fills it in.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..api.parameters import Kind, Namespace, Part, Region, Row, Store, Table
from ..api.parameters import Tensor as TableTensor
from .checkpoint import Header
from .four_bit import FourBit
from .tensor_hash import numel


class Place(NamedTuple):
    """A tensor on disk and the region of the canonical tensor that it holds.

    Attributes:
        header: the tensor on disk.
        region: slices such that the tensor on disk is ``canonical[region]``.
        scale: its block scales, if it is stored in FP8.
        block: (rows, columns) that share a scale, if it is stored in FP8.
        packed: the format, if it is stored in one that qcore does not decode.
        four_bit: its scales and state, if it is stored in 4 bits by bitsandbytes.
    """

    header: Header
    region: Region
    scale: Header | None = None
    block: tuple[int, int] | None = None
    packed: str | None = None
    four_bit: FourBit | None = None


@dataclass(frozen=True, slots=True)
class Located:
    """A canonical tensor and the tensors on disk that hold it.

    Attributes:
        tensor: the canonical tensor.
        places: the tensors on disk that tile it; empty if it is `tied`.
        tied: name of the canonical tensor whose values it shares, if it is not on disk.
        smaller: the tensor as it is on disk, if the run adds rows to it (`qcore.checkpoint.grown`).
    """

    tensor: TableTensor
    places: tuple[Place, ...]
    tied: str | None = None
    smaller: TableTensor | None = None

    @property
    def stored(self) -> TableTensor:
        """The tensor as it is on disk, which a fingerprint covers."""
        return self.smaller or self.tensor

    @property
    def dtype(self) -> str:
        """Safetensors name of the dtype of its values; of quantized ones after decoding."""
        first = self.places[0]
        if first.four_bit is not None:
            return first.four_bit.dtype
        return "BF16" if first.scale is not None else first.header.dtype

    @property
    def four_bit(self) -> FourBit | None:
        """Scales and state of a weight that bitsandbytes stored in 4 bits, in one tensor."""
        return self.places[0].four_bit if len(self.places) == 1 else None

    @property
    def packed(self) -> Place | None:
        """The first place in a format that qcore does not decode; ``None`` without any."""
        return next((place for place in self.places if place.packed is not None), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the tensors of a parameter table are in a checkpoint.

    Attributes:
        table: the parameter table.
        located: canonical name -> tensors on disk; absent optional parts are left out.
        by_disk: name on disk -> (canonical tensor, region).
        namespaces: part name -> the namespace of its names on disk.
        absent: names of the optional parts that have no tensor in the checkpoint.
        carried: tensors that no part owns and that are carried untouched -> their subtree.
        ties: tied tensors that are on disk nevertheless -> the tensor that each is tied to;
            loading checks that both are equal.
        scales: name on disk of a block scale, or of another tensor that a quantized weight is
            decoded with -> name on disk of the weight.
        packed: names on disk of tensors that a merge copies as they are: weights in a format that
            qcore does not decode, their scales, and scales of a key-value cache.
        idle: names of loadable parts that this run does not need, such as an unused tower.
        in_nf4: groups whose linear weights this run stores in NF4, in addition to the table's.
        untied: heads that config.json ties and that get values of their own
            (`qcore.checkpoint.untied`).
        has_four_bit: whether bitsandbytes stored weights in 4 bits.
    """

    table: Table
    located: Mapping[str, Located]
    by_disk: Mapping[str, tuple[TableTensor, Region]]
    namespaces: Mapping[str, Namespace]
    absent: tuple[str, ...] = ()
    carried: Mapping[Header, str] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    scales: Mapping[str, str] = field(default_factory=dict)
    packed: frozenset[str] = frozenset()
    idle: frozenset[str] = frozenset()
    in_nf4: frozenset[str] = frozenset()
    untied: frozenset[str] = frozenset()
    has_four_bit: bool = False

    def store(self, row: Row) -> Store:
        """Return how this run stores a row's weights in training."""
        return Store.NF4 if row.kind is not None and row.group in self.in_nf4 else row.store

    def held(self, name: str) -> Store:
        """Return how this run stores a tensor in training.

        Where the checkpoint has linear weights in 4 bits, it has left out the others on purpose:
        these stay as they are, unless the run names their group.
        """
        item = self.located[name]
        row = item.tensor.row
        skipped = self.has_four_bit and row.kind is Kind.LINEAR and item.four_bit is None
        if skipped and row.group not in self.in_nf4:
            return Store.BASE if row.store is Store.NF4 else row.store
        return self.store(row)

    def requantized(self) -> list[str]:
        """Return the loaded 4-bit weights that NF4 storage would have to round again."""
        return [
            name
            for name, item in self.located.items()
            if self.loads(item.tensor.part)
            and self.store(item.tensor.row) is Store.NF4
            and any(place.four_bit is not None for place in item.places)
            and not (item.four_bit is not None and item.four_bit.is_nf4_storage)
        ]

    def loads(self, part: Part) -> bool:
        """Return whether this run loads the part's tensors into memory."""
        return part.loaded and part.name not in self.idle and part.name not in self.absent

    def using(self, part: str) -> Layout:
        """Return the layout of a run that also loads `part`."""
        return replace(self, idle=self.idle - {part})

    @property
    def parameters(self) -> int:
        """Number of parameters on disk, carried ones included; a tied tensor counts once."""
        places = itertools.chain.from_iterable(item.places for item in self.located.values())
        owned = sum([numel(place.region) for place in places])
        return owned + sum(header.numel for header in self.carried)

    def carried_roots(self) -> dict[str, int]:
        """Return the number of carried tensors by subtree."""
        return dict(Counter(self.carried.values()))

    def groups(self) -> dict[str, tuple[int, int]]:
        """Return (number of tensors, number of parameters) on disk by group."""
        totals: dict[str, tuple[int, int]] = {}
        for item in self.located.values():
            if item.tied is None:
                tensors, numel = totals.get(item.tensor.row.group, (0, 0))
                totals[item.tensor.row.group] = tensors + 1, numel + item.tensor.numel
        return totals
