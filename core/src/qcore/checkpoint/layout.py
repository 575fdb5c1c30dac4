"""The table met with a checkpoint's headers: where every canonical tensor lies.

This file decides totality, both ways: every tensor of the table is on disk in one of its
spellings, or is tied, or belongs to an optional part that is absent as a whole; every tensor
on disk belongs to the table or is carried untouched (`qcore.checkpoint.unowned`). Anything else
is an error that names the tensor. All problems are collected before one is raised.

Each tensor picks its own spelling, so mixed layouts need no mode. The namespace is picked
per part, by the most names that match.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..api.parameters import Namespace, Part, Region, Row, Store, Table
from ..api.parameters import Tensor as TableTensor
from ..errors import InputError, QcoreError, nearest, one_of_each, raise_all
from .block_scales import BadBlockError, block_size, is_fp8, scale_name, scale_problem
from .checkpoint import Checkpoint, Header
from .safetensors_header import without_gc
from .unowned import carried_and_strays

_SUGGESTED = 3
#: What an unknown tensor beside it explains: a tensor, a piece or the rest of a part is absent.
_ABSENT = ("QC-KEY-001", "QC-KEY-004", "QC-KEY-005")


class Place(NamedTuple):
    """One tensor on disk and the region of the canonical tensor that it is.

    Attributes:
        header: the tensor on disk.
        region: ``canonical[region]``.
        scale: its block scales, when it lies in FP8.
        block: rows and columns that share a scale.
    """

    header: Header
    region: Region
    scale: Header | None = None
    block: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Located:
    """A canonical tensor and where it lies.

    Attributes:
        tensor: the canonical tensor.
        places: the tensors on disk that tile it; empty when `tied`.
        tied: the tensor that stands in for it, when it is absent on disk.
    """

    tensor: TableTensor
    places: tuple[Place, ...]
    tied: str | None = None

    @property
    def dtype(self) -> str:
        """Safetensors name of the dtype that its values have; of block FP8, once decoded."""
        return "BF16" if self.places[0].scale is not None else self.places[0].header.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A checkpoint explained by a table.

    Attributes:
        table: the table.
        located: by canonical name; absent optional parts are not in it.
        by_disk: name on disk -> (canonical tensor, region).
        namespaces: the namespace found, by part.
        absent: optional parts of which the checkpoint has no tensor.
        carried: tensors that no part owns and that are carried untouched, with their subtree.
        ties: tied tensors that are on disk all the same; loading proves them equal.
        scales: block scales on disk, with the tensor on disk that each belongs to.
        idle: parts that this run does not load, though it might: towers that nothing uses.
        in_nf4: groups whose linear maps this run holds in 4 bit, beside those of the table.
    """

    table: Table
    located: Mapping[str, Located]
    by_disk: Mapping[str, tuple[TableTensor, Region]]
    namespaces: Mapping[str, Namespace]
    absent: tuple[str, ...] = ()
    carried: Mapping[Header, str] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    scales: Mapping[str, str] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()
    in_nf4: frozenset[str] = frozenset()

    def store(self, row: Row) -> Store:
        """How this run holds a row in training."""
        return Store.NF4 if row.kind is not None and row.group in self.in_nf4 else row.store

    def loads(self, part: Part) -> bool:
        """Whether this run holds the part's tensors in memory."""
        return part.loaded and part.name not in self.idle and part.name not in self.absent

    def using(self, part: str) -> Layout:
        """The same for a run that loads `part` too."""
        return replace(self, idle=self.idle - {part})

    @property
    def parameters(self) -> int:
        """Parameters on disk, carried ones included; a tied tensor counts once."""
        places = itertools.chain.from_iterable(item.places for item in self.located.values())
        owned = sum([math.prod(place.header.shape) for place in places])
        return owned + sum(header.numel for header in self.carried)

    def carried_roots(self) -> dict[str, int]:
        """Number of carried tensors by subtree."""
        return dict(Counter(self.carried.values()))

    def groups(self) -> dict[str, tuple[int, int]]:
        """(tensors, parameters) by group, over what is on disk."""
        totals: dict[str, tuple[int, int]] = {}
        for item in self.located.values():
            if item.tied is None:
                tensors, numel = totals.get(item.tensor.row.group, (0, 0))
                totals[item.tensor.row.group] = tensors + 1, numel + item.tensor.numel
        return totals


def survey(
    table: Table, checkpoint: Checkpoint, *, suggest: bool = True
) -> tuple[Layout, list[QcoreError]]:
    """Explain what `table` can of `checkpoint`, and everything that is wrong with the rest.

    Args:
        table: the table.
        checkpoint: config and headers are looked at.
        suggest: name the nearest spelling of the first few names; it takes seconds where tens
            of thousands are unknown.

    The problems are ``QC-KEY-001`` a missing tensor, ``-002`` an extra one, ``-003`` a wrong
    shape, ``-004`` pieces of a stack missing, ``-005`` an optional part that is partly there,
    ``-006`` pieces of unlike dtypes, ``-007`` FP8 without block scales that fit; each an
    `InputError`.
    """
    finder = _Finder(table, checkpoint, _SUGGESTED if suggest else 0)
    with without_gc():
        for part in table.parts:
            finder.part(part)
        carried = finder.rest()
    layout = Layout(
        table=table,
        located=finder.located,
        by_disk=finder.by_disk,
        namespaces=finder.namespaces,
        absent=tuple(finder.absent),
        carried=carried,
        ties=finder.ties,
        scales=finder.scales,
    )
    return layout, finder.problems


def locate(table: Table, checkpoint: Checkpoint) -> Layout:
    """Explain every tensor of `checkpoint` by `table`.

    Raises:
        InputError: the fault that `survey` found; a `PreflightError` for several.
    """
    layout, problems = survey(table, checkpoint)
    raise_all(faults(problems))
    return layout


def faults(problems: Sequence[QcoreError]) -> list[QcoreError]:
    """Problems as people are told them: one line a kind.

    Tensors that nobody knows beside tensors that are missing are one fault: a name misspelt,
    layers swapped, another layout.
    """
    told: dict[str, QcoreError] = {}
    for error in one_of_each(problems):
        told.setdefault(error.code, error)
    missing = next((told[code] for code in _ABSENT if code in told), None)
    if missing is None or "QC-KEY-002" not in told:
        return list(told.values())
    del told["QC-KEY-002"]
    names = [error.field for error in problems if error.code == "QC-KEY-002"]
    others = f"{len(names)} that belong to no part, first {names[0]}"
    told[missing.code] = missing.replace(
        found=f"{missing.found}; {others}" if missing.found else others
    )
    return list(told.values())


class _Finder:
    """The state of one `locate`: what was found, and what is wrong."""

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
        try:
            self.block = block_size(checkpoint.config)
        except BadBlockError:  # `recognise` says so
            self.block = block_size({})
        self.problems: list[QcoreError] = []
        self._wanted: set[str] = set()

    def part(self, part: Part) -> None:
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
                f"part '{part.name}' is there only in part",
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
                namespace.spell(name) in self.headers
                for tensor in tensors
                for name in tensor.first_names()
            )

        if len(part.namespaces) == 1:
            return part.namespaces[0]
        return max(part.namespaces, key=score)

    def _place(self, tensor: TableTensor, namespace: Namespace) -> bool:
        """Find `tensor` on disk; ``False`` when nothing of it is there."""
        best: list[str] = []
        for way in tensor.spellings():
            names = namespace.spell_all([piece.name for piece in way])
            present = [name for name in names if name in self.headers]
            self._wanted.update(names)
            if len(present) == len(names):
                places = []
                for name, piece in zip(names, way, strict=True):
                    header = self.headers[name]
                    if header.shape != piece.shape:
                        self._wrong_shape(header, piece.shape)
                    places.append(self._as_place(header, piece.region))
                    self.by_disk[name] = (tensor, piece.region)
                self._check_dtypes(places)
                self.located[tensor.name] = Located(tensor, tuple(places))
                if tensor.row.tie is not None:
                    self.ties[tensor.name] = tensor.row.tie
                return True
            if present:
                best = [name for name in names if name not in self.headers]
                for name, piece in zip(names, way, strict=True):
                    if name in self.headers:
                        self.by_disk[name] = (tensor, piece.region)
                self._problem(
                    "QC-KEY-004",
                    f"{len(best)} of {len(names)} pieces are absent",
                    best[0],
                    expected="every piece of the stack",
                )
                return True
        if tensor.row.tie is not None:
            self.located[tensor.name] = Located(tensor, (), tied=tensor.row.tie)
            return True
        return False

    def _as_place(self, header: Header, region: Region) -> Place:
        """With its block scales, when it lies in FP8."""
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

    def _wrong_shape(self, header: Header, shape: tuple[int, ...]) -> None:
        self._problem(
            "QC-KEY-003",
            "has the wrong shape",
            header.name,
            found=list(header.shape),
            expected=list(shape),
            file=header.file,
            fix="use the config.json that came with the weights",
        )

    def _check_dtypes(self, places: Iterable[Place]) -> None:
        dtypes = {place.header.dtype: place.header for place in places}
        if len(dtypes) > 1:
            header = next(reversed(dtypes.values()))
            self._problem(
                "QC-KEY-006",
                "has another dtype than the other pieces of its tensor",
                header.name,
                found=header.dtype,
                expected=next(iter(dtypes)),
            )

    def _missing(self, tensor: TableTensor, namespace: Namespace) -> None:
        name = namespace.spell(tensor.name)
        near = self._nearest(name, (other for other in self.headers if other not in self._wanted))
        found = f"nearest is {near}" if near else None
        self._problem("QC-KEY-001", "is missing", name, found=found)

    def rest(self) -> dict[Header, str]:
        """What the table does not own: carried, or a problem."""
        owned, scales = self.by_disk, self.scales
        extra = [h for name, h in self.headers.items() if name not in owned and name not in scales]
        carried, strays = carried_and_strays(
            extra, self.table, self.namespaces, self.checkpoint.config
        )
        absent = self._wanted - self.headers.keys()
        for header in strays:
            near = self._nearest(header.name, absent)
            self._problem(
                "QC-KEY-002",
                "belongs to no part of the model",
                header.name,
                found=f"nearest expected name is {near}" if near else None,
                file=header.file,
                fix="remove it, or install the plugin that knows it",
            )
        return carried

    def _nearest(self, name: str, among: Iterable[str]) -> str | None:
        """The closest spelling; asked only for the first few problems, it is slow."""
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
        fix: str = "download the checkpoint again, or name the one it was made from",
    ) -> None:
        path = self.checkpoint.path / file if file else self.checkpoint.path
        self.problems.append(
            InputError(code, what, file=path, field=field, found=found, expected=expected, fix=fix)
        )
