"""The parameter table: name, shape and possible on-disk layouts of every tensor of a model.

A `Row` is every tensor of one kind, such as ``q_proj`` of all layers; a `Part` is the rows that are
loaded or absent together, such as the text model or a vision tower; `at`, `cat` and `stack`
describe other layouts on disk.

This file decides what a table *is* and how it expands to canonical tensors and to the
pieces of them that may lie on disk. It reads no file and knows no model: plugins write
rows, `locate` meets them with headers, and loading, LoRA targets, coverage, fingerprints,
PEFT names and merges are all derived from the same expansion.

A piece is (name on disk, shape, region of the canonical tensor). Regions tile the tensor
by construction, so no inverse is written anywhere: a tensor on disk *is*
``canonical[region]``.
"""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from ..errors import InputError, PluginError

Region = tuple[slice, ...]
Index = Mapping[str, int | str]  #: index by axis, for the ``{axis}`` of a name
Axes = Mapping[str, Sequence[int]]  #: index values by axis


class Store(str, Enum):
    """How a tensor is held while training."""

    NF4 = "nf4"  #: 4-bit NormalFloat with double quantization, when quantization is on
    BASE = "base"  #: the dtype of the file, computed in the run's dtype
    FP32 = "fp32"  #: always float32: state parameters that rounding would change


NF4, BASE, FP32 = Store.NF4, Store.BASE, Store.FP32


class Kind(str, Enum):
    """What LoRA finds in a row, by what holds it in the stock class."""

    LINEAR = "linear"  #: weight ``[out, in]`` of an ``nn.Linear``
    PARAMETER = "parameter"  #: a linear map ``[out, in]`` that another module holds (a router)
    EXPERTS = "experts"  #: one linear map per expert, ``[experts, out, in]``


LINEAR, PARAMETER, EXPERTS = Kind.LINEAR, Kind.PARAMETER, Kind.EXPERTS


class Aim(str, Enum):
    """Whether LoRA hits a group: always, when named in ``target_groups``, or never."""

    ON = "on"
    ASKED = "asked"
    NEVER = "never"


class Piece(NamedTuple):
    """One tensor on disk: ``canonical[region]`` under the name `name`."""

    name: str
    shape: tuple[int, ...]
    region: Region


class Spelling:
    """How one canonical tensor is spelt on disk. Built by `at`, `cat` and `stack`."""

    def pieces(self, shape: tuple[int, ...], index: Index, axes: Axes) -> Iterator[Piece]:
        """Yield the pieces of a tensor of `shape`; regions tile it exactly."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class _At(Spelling):
    name: str

    def pieces(self, shape: tuple[int, ...], index: Index, axes: Axes) -> Iterator[Piece]:
        yield Piece(self.name.format_map(dict(index)), shape, tuple(slice(0, n) for n in shape))


@dataclass(frozen=True, slots=True)
class _Cat(Spelling):
    parts: tuple[Spelling, ...]
    dim: int

    def pieces(self, shape: tuple[int, ...], index: Index, axes: Axes) -> Iterator[Piece]:
        size, rest = divmod(shape[self.dim], len(self.parts))
        if rest:
            raise ValueError(f"{len(self.parts)} equal parts do not tile {shape} in dim {self.dim}")
        inner = (*shape[: self.dim], size, *shape[self.dim + 1 :])
        for number, part in enumerate(self.parts):
            for piece in part.pieces(inner, index, axes):
                here = piece.region[self.dim]
                moved = slice(here.start + number * size, here.stop + number * size)
                region = (*piece.region[: self.dim], moved, *piece.region[self.dim + 1 :])
                yield Piece(piece.name, piece.shape, region)


@dataclass(frozen=True, slots=True)
class _Stack(Spelling):
    axis: str
    part: Spelling

    def pieces(self, shape: tuple[int, ...], index: Index, axes: Axes) -> Iterator[Piece]:
        values = axes[self.axis]
        if len(values) != shape[0]:
            raise ValueError(f"axis {self.axis} has {len(values)} values, the stack {shape[0]}")
        # Slices differ in one number of their names: a checkpoint may have a hundred thousand.
        hole = f"{{{self.axis}}}"
        inner = [
            (piece.name.split(hole), piece.shape, piece.region)
            for piece in self.part.pieces(shape[1:], {**index, self.axis: hole}, axes)
        ]
        for slot, value in enumerate(values):
            number, here = str(value), (slice(slot, slot + 1),)
            for words, piece_shape, region in inner:
                yield Piece(number.join(words), piece_shape, here + region)


def at(name: str) -> Spelling:
    """The whole tensor under one name; ``{axis}`` stands for the value of an axis."""
    return _At(name)


def _spelling(part: Spelling | str) -> Spelling:
    return at(part) if isinstance(part, str) else part


def cat(*parts: Spelling | str, dim: int = 0) -> Spelling:
    """Equal parts side by side along `dim`."""
    return _Cat(tuple(map(_spelling, parts)), dim)


def stack(axis: str, part: Spelling | str) -> Spelling:
    """One tensor per value of `axis`, stacked along a new leading dimension."""
    return _Stack(axis, _spelling(part))


@dataclass(frozen=True, slots=True)
class Row:
    """Every tensor of one kind.

    Attributes:
        name: canonical name (the hub's), with at most one ``{axis}``.
        dims: named sizes, ``"out in"``; a size is a product of names and integers
            (``"heads*2*head_dim hidden"``); a leading extra size makes a stack.
        group: report and LoRA group. ``embed``, ``head`` and ``norm`` are core's words.
        store: how it is held in training.
        tie: canonical name that stands in when this tensor is absent on disk; when present
            both must be equal.
        also: another way to spell it on disk.
        kind: what LoRA finds in it; ``None`` where it finds nothing.
    """

    name: str
    dims: str
    group: str
    store: Store = Store.BASE
    tie: str | None = None
    also: Spelling | None = None
    kind: Kind | None = None

    @property
    def axis(self) -> str | None:
        """The index axis of the name, or ``None`` for a single tensor."""
        fields = [name for _, name, _, _ in string.Formatter().parse(self.name) if name]
        return fields[0] if fields else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """A consistent way to prefix a part's names on disk or in an adapter.

    Attributes:
        name: what ``--adapter-class`` calls it (``text``, ``vl``).
        classes: names in ``config.architectures`` whose modules carry these prefixes.
        prefixes: (canonical prefix, other prefix) pairs; first match wins, none: unchanged.
    """

    name: str
    classes: tuple[str, ...] = ()
    prefixes: tuple[tuple[str, str], ...] = ()

    def spell(self, canonical: str) -> str:
        """Canonical name to the name in this namespace."""
        for ours, theirs in self.prefixes:
            if canonical.startswith(ours):
                return theirs + canonical[len(ours) :]
        return canonical

    def spell_all(self, canonical: list[str]) -> list[str]:
        """`spell` of each."""
        return [self.spell(name) for name in canonical] if self.prefixes else canonical


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Rows that come and go together: text, mtp, a tower.

    Attributes:
        name: ``text``, ``mtp``; a tower's is its modality's.
        rows: its rows.
        dims: sizes by name.
        axes: index values by axis name, e.g. ``{"linear": (0, 1, 2, 4, ...)}``.
        namespaces: the first is the canonical one.
        groups: LoRA groups and their aim; every row with a kind is in one of them.
        section: the ``*_config`` section of config.json that this part accounts for.
        optional: all of its tensors or none may be on disk.
        loaded: whether training may load it; merge carries it either way. A tower is loaded
            by runs that use it (`LayoutView.loads`).
        owner: distribution of the plugin that yielded it. Core fills it in; a plugin leaves it out.
    """

    name: str
    rows: tuple[Row, ...]
    dims: Mapping[str, int]
    axes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    namespaces: tuple[Namespace, ...] = (Namespace(name="hub"),)
    groups: Mapping[str, Aim] = field(default_factory=dict)
    section: str | None = None
    optional: bool = False
    loaded: bool = True
    owner: str = ""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One canonical tensor: a row at one index of its axis."""

    name: str
    shape: tuple[int, ...]
    row: Row
    part: Part
    index: int | None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def spellings(self) -> Iterator[tuple[Piece, ...]]:
        """The ways this tensor may lie on disk, in canonical names; the plain one first.

        Made one by one, because a stack has hundreds of pieces and mostly the first way fits.
        """
        yield (Piece(self.name, self.shape, tuple(slice(0, n) for n in self.shape)),)
        if self.row.also is not None:
            yield tuple(self.row.also.pieces(self.shape, self._own(), self.part.axes))

    def first_names(self) -> Iterator[str]:
        """The first name of each spelling; the others are not made for it."""
        yield self.name
        if self.row.also is not None:
            yield next(self.row.also.pieces(self.shape, self._own(), self.part.axes)).name

    def _own(self) -> dict[str, int | str]:
        return {self.row.axis: self.index} if self.row.axis and self.index is not None else {}

    def units(self) -> tuple[Region, ...]:
        """The finest pieces that any spelling has: what is hashed as one, however it lies.

        Of a stack never more than a slice, because it is read a few slices at a time.
        """
        *_, finest = self.spellings()
        regions = tuple(piece.region for piece in finest)
        if self.row.kind is not Kind.EXPERTS:
            return regions
        cut = [
            (slice(number, number + 1), *region[1:])
            for region in regions
            for number in range(region[0].start, region[0].stop)
        ]
        return tuple(sorted(cut, key=lambda region: [part.start for part in region]))


class Table:
    """Parts, concatenated: iterates over every canonical tensor in the order of the rows.

    Raises:
        InputError: ``QC-TABLE-001`` a dim with two values (config sections contradict).
        PluginError: ``QC-TABLE-002`` a name twice, ``QC-TABLE-003`` a size or an axis that
            the part does not define, ``QC-TABLE-004`` a row for LoRA in no group, or a group
            with two aims.

    Attributes:
        groups: aim by LoRA group, over all parts.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self._check_dims()
        self.groups = self._union()
        self.tensors: dict[str, Tensor] = {}
        for tensor in itertools.chain.from_iterable(map(_expand, self.parts)):
            if tensor.name in self.tensors:
                raise PluginError(
                    "QC-TABLE-002",
                    "two rows have the same name",
                    field=tensor.name,
                    found=f"{self.tensors[tensor.name].part.owner} and {tensor.part.owner}",
                    fix="uninstall one of the two plugins",
                )
            self.tensors[tensor.name] = tensor

    def _check_dims(self) -> None:
        seen: dict[str, tuple[int, str]] = {}
        for part in self.parts:
            for name, value in part.dims.items():
                before = seen.setdefault(name, (value, part.name))
                if before[0] != value:
                    raise InputError(
                        "QC-TABLE-001",
                        f"dimension '{name}' has two values",
                        field=f"{before[1]} and {part.name}",
                        found=f"{before[0]} and {value}",
                        expected="one value for the whole checkpoint",
                        fix="correct config.json, or name the two dimensions apart in the plugin",
                    )

    def _union(self) -> dict[str, Aim]:
        groups: dict[str, Aim] = {}
        for part in self.parts:
            for group, aim in part.groups.items():
                if groups.setdefault(group, aim) is not aim:
                    raise _group(f"group '{group}' has two aims", group, part)
        for part in self.parts:
            for row in part.rows:
                if row.kind is not None and row.group not in groups:
                    raise _group(f"group '{row.group}' has no aim", row.name, part)
        return groups

    def part(self, name: str) -> Part:
        """The part called `name`."""
        return next(part for part in self.parts if part.name == name)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors.values())

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __len__(self) -> int:
        return len(self.tensors)


def _group(what: str, where: str, part: Part) -> PluginError:
    return PluginError(
        "QC-TABLE-004",
        what,
        field=where,
        found=f"part '{part.name}' of {part.owner}",
        expected="one aim in `Part.groups`",
        fix="report this to the plugin's author",
    )


def _expand(part: Part) -> Iterator[Tensor]:
    for row in part.rows:
        shape = tuple(_size(part, row, term) for term in row.dims.split())
        if row.axis is None:
            yield Tensor(row.name, shape, row, part, None)
            continue
        if row.axis not in part.axes:
            raise PluginError(
                "QC-TABLE-003", f"axis '{row.axis}' is not defined", field=row.name, found=part.name
            )
        for value in part.axes[row.axis]:
            name = row.name.format_map({row.axis: value})
            yield Tensor(name, shape, row, part, value)


def _size(part: Part, row: Row, term: str) -> int:
    size = 1
    for factor in term.split("*"):
        if factor.isdigit():
            size *= int(factor)
        elif factor in part.dims:
            size *= part.dims[factor]
        else:
            raise PluginError(
                "QC-TABLE-003",
                f"dimension '{factor}' is not defined",
                field=row.name,
                found=part.name,
            )
    return size
