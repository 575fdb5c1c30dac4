"""Modules of an adapter for a part of a weight: which weight, rows and expert each belongs to.

PEFT has one module for each weight. Other trainers have one for a part of it (``q``, ``k`` and
``v`` of a fused projection), for one expert of a stack, or for several weights. This file decides
how such modules are matched: a module for each expert by the names that the parameter table has for
the weight on disk (`Row.also`), any other by the claim of a plugin (`AdapterClaim.pieces`); and
that they cover what they must: no row twice, no expert left out, every row of B used.
`qcore.adapter.matching` checks shapes and ranks. It imports no torch.

Codes: ``QC-ADAPTER-005`` a row of a weight is changed twice, or a row of B is not used, ``-006`` an
expert is missing, ``-010`` a claim names a weight, a module or rows that do not exist.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from ..api.adapter_claims import AdapterPiece
from ..api.parameters import Kind, Namespace
from ..api.parameters import Tensor as TableTensor
from ..checkpoint.checkpoint import Header
from .findings import Findings
from .peft_names import namespace_of

_PREFIX = "base_model.model."
_EXPORT = "train or export again"

#: The pieces of each weight, by its canonical name.
Pieces = Mapping[str, Sequence[AdapterPiece]]


def modules_of(headers: Iterable[str]) -> set[str]:
    """Return the modules that have a matrix of LoRA."""
    return {
        name[: -len(".lora_A.weight")]
        for name in headers
        if name.endswith((".lora_A.weight", ".lora_B.weight"))
    }


def expert_modules(
    tensor: TableTensor, namespace: Namespace, modules: Collection[str]
) -> Iterator[AdapterPiece]:
    """Yield the modules of an adapter that hold one expert of a stack, as the table names them.

    Args:
        tensor: a stack of experts.
        namespace: the class that the adapter is written for.
        modules: the modules of the adapter.
    """
    own = namespace_of(tensor.part, namespace.name)
    if tensor.row.also is None or own is None:
        return
    _, *others = tensor.spellings()
    for piece in others[0]:
        module = _PREFIX + own.spell(piece.name).removesuffix(".weight")
        expert, rows, columns = piece.region
        one = expert.stop - expert.start == 1
        if module in modules and one and columns.stop - columns.start == tensor.shape[2]:
            yield AdapterPiece(
                module=module, weight=tensor.name, rows=(rows.start, rows.stop), expert=expert.start
            )


def part_shapes(
    tensor: TableTensor, piece: AdapterPiece, r: int, a: Header, b: Header
) -> dict[str, tuple[int, ...]]:
    """Return the shapes that sides ``A`` and ``B`` of a module must have.

    Args:
        tensor: the weight.
        piece: the module.
        r: rank.
        a: the matrix A; its experts may be one.
        b: the matrix B, likewise. `check_pieces` checks the rows of one that has several weights.
    """
    *stack, out, into = tensor.shape
    start, stop = piece.rows or (0, out)
    rows = stop - start if piece.source is None else (b.shape[-2:-1] or (0,))[0]
    if not stack or piece.expert is not None:
        return {"A": (r, into), "B": (rows, r)}
    first = {
        side: 1 if len(header.shape) == 3 and header.shape[0] == 1 else stack[0]
        for side, header in (("A", a), ("B", b))
    }
    return {"A": (first["A"], r, into), "B": (first["B"], rows, r)}


def check_pieces(
    pieces: Pieces,
    tensors: Mapping[str, TableTensor],
    headers: Mapping[str, Header],
    findings: Findings,
) -> None:
    """Check what the pieces of an adapter cover.

    Args:
        pieces: all pieces.
        tensors: the weights that can have LoRA, by canonical name.
        headers: the adapter's tensors by PEFT's names.
        findings: receives the problems.
    """
    sources: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for weight, own in pieces.items():
        _check_rows(tensors[weight], own, findings)
        _check_experts(tensors[weight], own, findings)
        for piece in own:
            if piece.source is not None:
                sources[piece.module].append(piece.source)
    for module, parts in sources.items():
        header = headers.get(f"{module}.lora_B.weight")
        end = 0
        for start, stop in sorted(parts):
            end = stop if start == end else -1
        if header is not None and header.shape[-2:-1] != (end,):
            findings.problem(
                "QC-ADAPTER-007", "has the wrong shape", header.name,
                found=list(header.shape), expected=f"{max(stop for _, stop in parts)} rows",
                fix="name the base that the adapter was trained on",
            )  # fmt: skip


def _check_rows(tensor: TableTensor, pieces: Iterable[AdapterPiece], findings: Findings) -> None:
    """Refuse two pieces that change one row."""
    ends: dict[int | None, list[tuple[int, int, str]]] = defaultdict(list)
    for piece in pieces:
        start, stop = piece.rows or (0, tensor.shape[-2])
        ends[piece.expert].append((start, stop, piece.module))
    every = ends.pop(None, [])
    for own in list(ends.values()) or [[]]:
        ordered = sorted([*every, *own])
        for (_, stop, first), (start, _, second) in pairwise(ordered):
            if start < stop:
                findings.problem(
                    "QC-ADAPTER-005", "changes rows that another module changes too", second,
                    found=f"{first} and this, both in {tensor.name}",
                    expected="one module for each row of a weight",
                    fix="save the adapter in one layout",
                )  # fmt: skip
                return


def _check_experts(tensor: TableTensor, pieces: Iterable[AdapterPiece], findings: Findings) -> None:
    """Refuse modules of some experts if those of others are missing."""
    if tensor.row.kind is not Kind.EXPERTS:
        return
    by_rows: dict[tuple[int, int] | None, dict[int, str]] = defaultdict(dict)
    for piece in pieces:
        if piece.expert is not None:
            by_rows[piece.rows][piece.expert] = piece.module
    for found in by_rows.values():
        missing = sorted({*range(tensor.shape[0])} - found.keys())
        if missing:
            number, module = next(iter(found.items()))
            name = module.replace(f".{number}.", f".{missing[0]}.")
            findings.problem(
                "QC-ADAPTER-006",
                f"is missing, and {len(found)} of {tensor.shape[0]} experts have it",
                f"{name}.lora_A.weight", fix=_EXPORT,
            )  # fmt: skip
