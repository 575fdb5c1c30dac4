"""Finds each tensor of the parameter table in a checkpoint's headers; checks shapes and dtypes.

This file decides totality, in both directions. Every tensor of the parameter table is on disk in
one of its spellings, is tied, or belongs to an optional part that is entirely absent; it may be
packed in a format that qcore does not decode (`qcore.checkpoint.packed`). Every tensor
on disk belongs to the table or is carried untouched (`qcore.checkpoint.unowned`). Anything else is
an error that names the tensor. All problems are collected before any is raised.

Each tensor selects its own spelling, so a checkpoint may mix layouts. The namespace is selected
per part: the one that matches the most names.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..api.parameters import Namespace, Part, Piece, Region, Row, Store, Table
from ..api.parameters import Tensor as TableTensor
from ..errors import InputError, QcoreError, nearest, raise_all
from .block_scales import BadBlockError, block_size, is_fp8, scale_name, scale_problem
from .checkpoint import Checkpoint, Header
from .layout_faults import faults
from .packed import cache_scales, packed_weights, shape_problem
from .safetensors_header import without_gc
from .tensor_hash import numel
from .unowned import carried_and_strays

_SUGGESTED = 3


class Place(NamedTuple):
    """A tensor on disk and the region of the canonical tensor that it holds.

    Attributes:
        header: the tensor on disk.
        region: slices such that the tensor on disk is ``canonical[region]``.
        scale: its block scales, if it is stored in FP8.
        block: (rows, columns) that share a scale, if it is stored in FP8.
        packed: the format, if it is stored in one that qcore does not decode.
    """

    header: Header
    region: Region
    scale: Header | None = None
    block: tuple[int, int] | None = None
    packed: str | None = None


@dataclass(frozen=True, slots=True)
class Located:
    """A canonical tensor and the tensors on disk that hold it.

    Attributes:
        tensor: the canonical tensor.
        places: the tensors on disk that tile it; empty if it is `tied`.
        tied: name of the canonical tensor whose values it shares, if it is not on disk.
    """

    tensor: TableTensor
    places: tuple[Place, ...]
    tied: str | None = None

    @property
    def dtype(self) -> str:
        """Safetensors name of the dtype of its values; for block FP8, after decoding."""
        return "BF16" if self.places[0].scale is not None else self.places[0].header.dtype

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
        scales: name on disk of a block scale -> name on disk of its weight.
        packed: names on disk of tensors that a merge copies as they are: weights in a format that
            qcore does not decode, their scales, and scales of a key-value cache.
        idle: names of loadable parts that this run does not need, such as an unused tower.
        in_nf4: groups whose linear weights this run stores in NF4, in addition to the table's.
        untied: heads that config.json ties and that get values of their own
            (`qcore.checkpoint.untied`).
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

    def store(self, row: Row) -> Store:
        """Return how this run stores a row's weights in training."""
        return Store.NF4 if row.kind is not None and row.group in self.in_nf4 else row.store

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


def survey(
    table: Table, checkpoint: Checkpoint, *, suggest: bool = True
) -> tuple[Layout, list[QcoreError]]:
    """Match `table` with the tensors of `checkpoint` and collect all problems.

    Args:
        table: the parameter table.
        checkpoint: only its config and headers are read.
        suggest: suggest the nearest name for the first few unknown names, which takes seconds if
            there are tens of thousands.

    Returns:
        The layout of all tensors that match, and the problems, each an `InputError`:
        ``QC-KEY-001`` a missing tensor, ``-002`` an extra tensor, ``-003`` a wrong shape,
        ``-004`` missing pieces of a stack, ``-005`` an incomplete optional part, ``-006`` pieces
        of different dtypes, ``-007`` FP8 without matching block scales.
    """
    state = _Survey(table, checkpoint, _SUGGESTED if suggest else 0)
    with without_gc():
        for part in table.parts:
            state.add_part(part)
        carried = state.carry_unowned()
    layout = Layout(
        table=table,
        located=state.located,
        by_disk=state.by_disk,
        namespaces=state.namespaces,
        absent=tuple(state.absent),
        carried=carried,
        ties=state.ties,
        scales=state.scales,
        packed=frozenset(state.copied),
    )
    return layout, state.problems


def locate(table: Table, checkpoint: Checkpoint) -> Layout:
    """Match every tensor of `checkpoint` with `table`.

    Args:
        table: the parameter table.
        checkpoint: only its config and headers are read.

    Raises:
        InputError: the only problem, as in `survey`.
        PreflightError: several problems.
    """
    layout, problems = survey(table, checkpoint)
    raise_all(faults(problems))
    return layout


class _Survey:
    """The state of one `survey`: tensors located so far, and problems."""

    def __init__(self, table: Table, checkpoint: Checkpoint, suggested: int) -> None:
        self.table = table
        self.suggested = suggested
        self.checkpoint = checkpoint
        self.headers = checkpoint.headers
        self.located: dict[str, Located] = {}
        self.by_disk: dict[str, tuple[TableTensor, Region]] = {}
        self.namespaces: dict[str, Namespace] = {}
        self.absent: list[str] = []
        self.ties: dict[str, str] = {}
        self.scales: dict[str, str] = {}
        self.packed = packed_weights(checkpoint.headers)
        self.copied: set[str] = set(cache_scales(self.headers) if self.packed else ())
        try:
            self.block = block_size(checkpoint.config)
        except BadBlockError:  # `detect_quantization` reports it
            self.block = block_size({})
        self.problems: list[QcoreError] = []
        self._expected: set[str] = set()

    def add_part(self, part: Part) -> None:
        """Locate every tensor of a part, or record it as absent or as a problem."""
        tensors = [tensor for tensor in self.table if tensor.part is part]
        namespace = self._namespace(part, tensors)
        self.namespaces[part.name] = namespace
        missing = [tensor for tensor in tensors if not self._place(tensor, namespace)]
        if not missing:
            return
        if part.optional and len(missing) == len(tensors):
            self.absent.append(part.name)
        elif part.optional:
            self._problem(
                "QC-KEY-005",
                f"part '{part.name}' is incomplete",
                namespace.spell(missing[0].name),
                found=f"{len(tensors) - len(missing)} of {len(tensors)} tensors",
                expected="all of them, or none",
            )
        else:
            for tensor in missing:
                self._missing(tensor, namespace)

    def _namespace(self, part: Part, tensors: list[TableTensor]) -> Namespace:
        def score(namespace: Namespace) -> int:
            return sum(
                self._on_disk(namespace.spell(name))
                for tensor in tensors
                for name in tensor.first_names()
            )

        if len(part.namespaces) == 1:
            return part.namespaces[0]
        return max(part.namespaces, key=score)

    def _place(self, tensor: TableTensor, namespace: Namespace) -> bool:
        """Locate `tensor` on disk; return ``False`` if no piece of it is there."""
        for pieces in tensor.spellings():
            names = namespace.spell_all([piece.name for piece in pieces])
            present = [name for name in names if self._on_disk(name)]
            self._expected.update(names)
            if len(present) == len(names):
                places = []
                for name, piece in zip(names, pieces, strict=True):
                    if name in self.packed:
                        places.append(self._as_packed(name, piece))
                        continue
                    header = self.headers[name]
                    if header.shape != piece.shape:
                        self._wrong_shape(header, list(piece.shape))
                    places.append(self._as_place(header, piece.region))
                    self.by_disk[name] = (tensor, piece.region)
                self._check_dtypes(places)
                self.located[tensor.name] = Located(tensor, tuple(places))
                if tensor.row.tie is not None:
                    self.ties[tensor.name] = tensor.row.tie
                return True
            if present:
                missing = [name for name in names if not self._on_disk(name)]
                for name, piece in zip(names, pieces, strict=True):
                    if name in self.headers:
                        self.by_disk[name] = (tensor, piece.region)
                self._problem(
                    "QC-KEY-004",
                    f"{len(missing)} of {len(names)} pieces are missing",
                    missing[0],
                    expected="every piece of the stack",
                )
                return True
        if tensor.row.tie is not None:
            self.located[tensor.name] = Located(tensor, (), tied=tensor.row.tie)
            return True
        return False

    def _as_place(self, header: Header, region: Region) -> Place:
        """Return the place of a tensor, with its block scales if it is stored in FP8."""
        if not is_fp8(header):
            return Place(header, region)
        name = scale_name(header.name)
        scale = self.headers.get(name)
        problem = scale_problem(header, scale, self.block, self.checkpoint.path)
        if scale is None or problem is not None:
            self.problems += [problem] if problem is not None else []
            return Place(header, region)
        self.scales[name] = header.name
        return Place(header, region, scale, self.block)

    def _on_disk(self, name: str) -> bool:
        return name in self.headers or name in self.packed

    def _as_packed(self, name: str, piece: Piece) -> Place:
        """Return the place of a weight that is copied as it is, with all of its tensors."""
        packed = self.packed[name]
        self.copied.update((packed.header.name, *(h.name for h in packed.companions)))
        expected = shape_problem(packed, piece.shape)
        if expected is not None:
            self._wrong_shape(packed.header, expected)
        return Place(packed.header, piece.region, packed=packed.format.value)

    def _wrong_shape(self, header: Header, expected: object) -> None:
        self._problem(
            "QC-KEY-003",
            "has the wrong shape",
            header.name,
            found=list(header.shape),
            expected=expected,
            file=header.file,
            fix="use the config.json that came with the weights",
        )

    def _check_dtypes(self, places: Iterable[Place]) -> None:
        dtypes = {place.header.dtype: place.header for place in places if place.packed is None}
        if len(dtypes) > 1:
            header = next(reversed(dtypes.values()))
            self._problem(
                "QC-KEY-006",
                "has a different dtype than the other pieces of its tensor",
                header.name,
                found=header.dtype,
                expected=next(iter(dtypes)),
            )

    def _missing(self, tensor: TableTensor, namespace: Namespace) -> None:
        name = namespace.spell(tensor.name)
        unexpected = (other for other in self.headers if other not in self._expected)
        suggestion = self._nearest(name, unexpected)
        hint = f"nearest is {suggestion}" if suggestion else None
        self._problem("QC-KEY-001", "is missing", name, found=hint)

    def carry_unowned(self) -> dict[Header, str]:
        """Return the unowned tensors that are carried; record all others as problems."""
        known = {*self.by_disk, *self.scales, *self.copied}
        extra = [h for name, h in self.headers.items() if name not in known]
        carried, strays = carried_and_strays(
            extra, self.table, self.namespaces, self.checkpoint.config
        )
        missing = self._expected - self.headers.keys()
        for header in strays:
            suggestion = self._nearest(header.name, missing)
            self._problem(
                "QC-KEY-002",
                "belongs to no part of the model",
                header.name,
                found=f"nearest expected name is {suggestion}" if suggestion else None,
                file=header.file,
                fix="install the plugin that supports it, or use the original checkpoint",
            )
        return carried

    def _nearest(self, name: str, among: Iterable[str]) -> str | None:
        """Return the closest name, only for the first few problems, because it is slow."""
        if len(self.problems) >= self.suggested:
            return None
        return nearest(name, among, cutoff=0.8)

    def _problem(
        self,
        code: str,
        what: str,
        field: str,
        *,
        found: object | None = None,
        expected: object | None = None,
        file: str | None = None,
        fix: str = "download the checkpoint again, or name the checkpoint it was made from",
    ) -> None:
        path = self.checkpoint.path / file if file else self.checkpoint.path
        self.problems.append(
            InputError(code, what, file=path, field=field, found=found, expected=expected, fix=fix)
        )
