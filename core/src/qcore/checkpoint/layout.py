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

from collections.abc import Iterable

from ..api.parameters import Namespace, Part, Piece, Region, Table
from ..api.parameters import Tensor as TableTensor
from ..errors import InputError, QcoreError, nearest, raise_all
from .block_scales import BadBlockError, block_size, is_fp8, scale_name, scale_problem
from .checkpoint import Checkpoint, Header
from .four_bit import FourBit, four_bit_weights
from .layout_faults import faults
from .layout_records import Layout, Located, Place
from .packed import cache_scales, packed_weights, shape_problem
from .safetensors_header import without_gc
from .unowned import carried_and_strays

__all__ = ["Layout", "Located", "Place", "locate", "survey"]

_SUGGESTED = 3


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
        has_four_bit=bool(state.four_bit),
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
        self.four_bit, four_bit_problems = four_bit_weights(checkpoint)
        self.copied: set[str] = set(cache_scales(self.headers) if self.packed else ())
        try:
            self.block = block_size(checkpoint.config)
        except BadBlockError:  # `detect_quantization` reports it
            self.block = block_size({})
        self.problems: list[QcoreError] = [*four_bit_problems]
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
                    header, stored = self.headers[name], self.four_bit.get(name)
                    shape = header.shape if stored is None else stored.shape or piece.shape
                    if shape != piece.shape:
                        self._wrong_shape(header, list(piece.shape))
                    places.append(self._as_place(header, piece.region, stored))
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

    def _as_place(self, header: Header, region: Region, stored: FourBit | None) -> Place:
        """Return the place of a tensor, with its block scales or its 4-bit state."""
        if stored is not None:
            self.scales |= {other.name: header.name for other in stored.companions}
            return Place(header, region, four_bit=stored)
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
            found=list(getattr(self.four_bit.get(header.name), "shape", header.shape)),
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
