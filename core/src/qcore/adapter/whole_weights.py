"""Adapter tensors other than LoRA on a linear map: heads, embeddings, saved modules, token rows.

This file decides which weight of the base such a tensor changes, and how: LoRA on the embedding or
the head, saved values of a whole weight (``modules_to_save``), or of some rows
(``trainable_token_indices``). A saved weight with the values of the base changes nothing. What is
refused names the cause in the adapter and an exact way. `qcore.adapter.tied_head` decides what the
changes do to a tied head, `qcore.adapter.reader` reports the problems. It imports no torch.

Codes: ``QC-ADAPTER-004`` ``trainable_token_indices`` does not fit, ``-005`` a tensor that is not
merged, ``-006`` a tensor is missing, ``-007`` a shape or dtype is wrong.

Shapes: V vocabulary, H hidden size, n rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ..api.parameters import Namespace
from ..api.parameters import Tensor as TableTensor
from ..checkpoint.checkpoint import Header
from ..checkpoint.layout import Layout
from .changes import Change, Pair, Piece, Replacement
from .findings import Findings
from .peft_names import namespace_of, spell

#: Whether a tensor of the adapter has the values of a weight of the base, by canonical name.
Equal = Callable[[Header, str], bool]
#: Returns rank and scaling for the name of a module.
Numbers = Callable[[str], tuple[int, float]]

_PREFIX = "base_model.model."
WITH_PEFT = (
    "merge it with stock transformers and PEFT (PeftModel.from_pretrained, merge_and_unload, "
    "save_pretrained)"
)
_UNTIE = (
    "store lm_head.weight in the base as a copy of the embedding, set tie_word_embeddings to false "
    "in config.json and its text_config, and then "
)
_GROW = (
    "merge or generate with its tokenizer too (--take-tokenizer; the adapter folder must have the "
    "tokenizer.json of training), or name the resized model that training used as the base"
)
_ANOTHER = "name the base that the adapter was trained on"
#: Ends of names -> what the tensor is.
_ENDS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding A",
    ".lora_embedding_B": "embedding B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".modules_to_save.weight": "module",
    ".token_adapter.base_layer.weight": "base",
    ".token_adapter.trainable_tokens_delta": "rows",
    ".trainable_tokens_delta": "rows",
    ".base_layer.weight": "base",
}
#: Kinds whose values a tensor has for the whole weight.
_VALUES = ("copy", "module", "base")


class _Owned(NamedTuple):
    """A tensor of an adapter, and the weight that it belongs to."""

    header: Header
    tensor: TableTensor
    what: str  #: a value of `_ENDS`, or ``copy``


class WholeWeights:
    """Matches the tensors of one adapter other than LoRA on a linear map of a layer.

    Args:
        findings: receives the errors and notes.
        config: adapter_config.json.
        layout: the base.
        namespace: the class that the adapter is written for.
        numbers: rank and scaling by module name.
        equal: compares a tensor with a weight of the base; ``None``: nothing is compared.

    Attributes:
        changes: what the tensors change, by canonical name.
    """

    def __init__(
        self,
        findings: Findings,
        config: Mapping[str, Any],
        layout: Layout,
        namespace: Namespace,
        numbers: Numbers,
        equal: Equal | None,
    ) -> None:
        self._findings, self.config, self.namespace = findings, config, namespace
        self.numbers, self.equal = numbers, equal
        self.tied = any(tensor.row.tie is not None for tensor in layout.table)
        self.changes: dict[str, Change] = {}
        self._unloaded = {*layout.absent} | {p.name for p in layout.table.parts if not p.loaded}
        self._by_name = {
            spell(tensor, namespace): tensor
            for tensor in layout.table
            if namespace_of(tensor.part, namespace.name) is not None
        }

    def match(self, headers: Mapping[str, Header], pairs: Mapping[str, Pair]) -> list[Header]:
        """Match the tensors that no pair uses.

        Args:
            headers: the tensors by PEFT's names.
            pairs: LoRA pairs of linear maps, by canonical name.

        Returns:
            The tensors that belong to no weight of the base.
        """
        strays: list[Header] = []
        by_weight: dict[str, dict[str, _Owned]] = {}
        for name, header in headers.items():
            owned = self._owned(name, header)
            if owned is None:
                strays.append(header)
            else:
                self._add(by_weight.setdefault(owned.tensor.name, {}), owned)
        for weight, own in by_weight.items():
            change = self._change(next(iter(own.values())).tensor, own)
            if change is not None and weight in pairs:
                header = next(iter(change.headers))
                self._refuse(header, f"is saved for {weight}, which also has LoRA", WITH_PEFT)
            elif change is not None:
                self.changes[weight] = change
        return strays

    def _add(self, own: dict[str, _Owned], owned: _Owned) -> None:
        """Add a tensor to those of its weight; refuse a second one of its kind.

        Wrappers of PEFT spell some kinds in two ways. Which of two tensors an adapter computes
        with is unknown, unless one of them has the values of the base.
        """
        before = own.get(owned.what)
        if before is not None and owned.what in _VALUES:
            if self._is_base(owned.header, owned.tensor):
                return
            if self._is_base(before.header, before.tensor):
                before = None
        if before is not None:
            self._findings.problem(
                "QC-ADAPTER-005", f"is a second tensor of the same kind for {owned.tensor.name}",
                owned.header.name, found=f"{owned.header.name} and {before.header.name}",
                expected="one of them", fix="export the adapter again with PEFT's save_pretrained",
            )  # fmt: skip
            return
        own[owned.what] = owned

    def _owned(self, name: str, header: Header) -> _Owned | None:
        """Return the weight that a tensor belongs to; ``None`` if it fits no weight."""
        if not name.startswith(_PREFIX):
            return None
        name = name.removeprefix(_PREFIX)
        if name in self._by_name:
            return _Owned(header, self._by_name[name], "copy")
        for end, what in _ENDS.items():
            tensor = self._by_name.get(f"{name.removesuffix(end)}.weight")
            if name.endswith(end) and tensor is not None:
                return _Owned(header, tensor, what)
        return None

    def _change(self, tensor: TableTensor, own: Mapping[str, _Owned]) -> Change | None:
        """Return the change of one weight; ``None`` if nothing changes, or it is refused."""
        below = self._saved(tensor, own)
        sides = [what for what in own if what.endswith(("A", "B")) or what == "magnitude"]
        if not sides:
            return below
        if tensor.row.group not in ("embed", "head"):
            header = own[sides[0]].header
            self._refuse(header, f"is LoRA on {tensor.name}, which qcore does not merge", None)
            return None
        pair = self._pair(tensor, own)
        return pair if pair is None or below is None else replace(pair, under=below)

    def _saved(self, tensor: TableTensor, own: Mapping[str, _Owned]) -> Replacement | None:
        """Return what replaces a weight, or rows of it, if its values differ from the base."""
        # The others are what PEFT's wrapper holds beside a copy, and does not compute with.
        what = next((what for what in ("copy", "module", "base") if what in own), None)
        whole = None
        if what is not None and not self._is_base(own[what].header, tensor):
            whole = self._whole(tensor, own[what].header)
        if "rows" not in own:
            return whole
        if whole is not None and what != "base":
            header = own["rows"].header
            cause = f"holds trained rows of {tensor.name}, which is also saved whole"
            self._refuse(header, cause, WITH_PEFT)
        rows = self._rows(tensor, own["rows"].header)
        return None if rows is None else replace(rows, under=whole)

    def _is_base(self, header: Header, tensor: TableTensor) -> bool:
        same = self.equal is not None and self.equal(header, tensor.name)
        if same:
            self._findings.notes.append(f"{header.name} has the values of the base: it is ignored")
        return same

    def _whole(self, tensor: TableTensor, header: Header) -> Replacement | None:
        """Return the saved values of a whole weight."""
        added = header.shape[0] - tensor.shape[0] if header.shape else 0
        if added > 0 and header.shape[1:] == tensor.shape[1:]:
            self._more_rows(header, tensor, added)
            return None
        if tensor.part.name in self._unloaded:
            cause = f"is a saved copy of {tensor.name}, in a part that qcore does not run"
            self._refuse(header, cause, WITH_PEFT)
            return None
        fewer = added < 0 and tensor.row.group in ("embed", "head")
        fits = self._findings.check_tensor(
            header, (header.shape[0] if fewer else tensor.shape[0], *tensor.shape[1:])
        )
        if fits and fewer:
            self._findings.notes.append(
                f"{header.name} has {header.shape[0]} rows and the base {tensor.shape[0]}: the "
                "last rows of the base stay as they are"
            )
        saved = self.config.get("modules_to_save") or []
        module = f".{header.name.removeprefix(_PREFIX)}"
        shared = not any(f".{name}." in module for name in saved)
        return Replacement(tensor=tensor, values=header, shared=shared) if fits else None

    def _rows(self, tensor: TableTensor, header: Header) -> Replacement | None:
        """Return the trained rows of an embedding or a head."""
        rows = self._token_ids(tensor)
        if rows is None:
            self._findings.problem(
                "QC-ADAPTER-004", "names no rows for a tensor of trained rows",
                "trainable_token_indices", found=self.config.get("trainable_token_indices"),
                expected=f"ids for {header.name}", fix="train or export again",
            )  # fmt: skip
            return None
        if len({*rows}) != len(rows) or not all(0 <= row < tensor.shape[0] for row in rows):
            self._findings.problem(
                "QC-ADAPTER-004", f"is not a list of different rows of {tensor.name}",
                "trainable_token_indices", found=str(list(rows))[:100],
                expected=f"ids below {tensor.shape[0]}", fix=f"{_GROW}; or {_ANOTHER}",
            )  # fmt: skip
            return None
        if not self._findings.check_tensor(header, (len(rows), *tensor.shape[1:])):
            return None
        return Replacement(
            tensor=tensor, values=header, rows=rows, shared=tensor.row.group == "embed"
        )

    def _token_ids(self, tensor: TableTensor) -> tuple[int, ...] | None:
        """Return the rows of a weight in ``trainable_token_indices``; a list means the embedding.

        PEFT gives the head the rows of the embedding if it is tied to it.
        """
        declared = self.config.get("trainable_token_indices")
        if isinstance(declared, Mapping):
            module = self._module(tensor)
            hits = [ids for name, ids in declared.items() if f".{module}".endswith(f".{name}")]
            declared = hits[0] if len(hits) == 1 else None
        elif tensor.row.group != "embed" and tensor.row.tie is None:
            return None
        if not isinstance(declared, list) or not all(type(row) is int for row in declared):
            return None
        return tuple(declared)

    def _pair(self, tensor: TableTensor, own: Mapping[str, _Owned]) -> Pair | None:
        """Return LoRA on the embedding or the head."""
        embedding = any(what.startswith("embedding") for what in own)
        names = ("embedding A", "embedding B") if embedding else ("A", "B")
        missing = [what[-1] for what in names if what not in own]
        if missing:
            module = _PREFIX + self._module(tensor)
            end = f"lora_embedding_{missing[0]}" if embedding else f"lora_{missing[0]}.weight"
            fix = "train or export again"
            self._findings.problem("QC-ADAPTER-006", "is missing", f"{module}.{end}", fix=fix)
            return None
        a, b = (own[what].header for what in names)
        r, scaling = self.numbers(self._module(tensor))
        rows, width = tensor.shape
        shapes = ((r, rows), (width, r)) if embedding else ((r, width), (rows, r))
        right = [
            self._findings.check_tensor(header, shape, rank_dim=dim)
            for header, shape, dim in zip((a, b), shapes, (-2, -1), strict=True)
        ]
        if not all(right):
            return None
        piece = Piece(a=a, b=b, r=r, scaling=scaling, embedding=embedding)
        whole = self._with_magnitude(tensor, piece, own)
        return None if whole is None else Pair(tensor=tensor, pieces=(whole,))

    def _with_magnitude(
        self, tensor: TableTensor, piece: Piece, own: Mapping[str, _Owned]
    ) -> Piece | None:
        """Add DoRA's magnitude to LoRA on the head, where the config has DoRA."""
        magnitude = own.get("magnitude")
        if not self.config.get("use_dora"):
            return piece  # the reader refuses magnitudes then
        if magnitude is None:
            what, fix = "has no magnitude, and use_dora is true", "train or export again"
            self._findings.problem("QC-ADAPTER-006", what, piece.a.name, fix=fix)
            return None
        if piece.embedding or own.keys() & {"rows", "copy", "base"}:
            what = "the columns of the embedding" if piece.embedding else "saved values"
            self._refuse(magnitude.header, f"is DoRA over {what}, which qcore does not merge", None)
            return None
        if not self._findings.check_tensor(magnitude.header, tensor.shape[:1]):
            return None
        return replace(piece, magnitude=magnitude.header)

    def _more_rows(self, header: Header, tensor: TableTensor, added: int) -> None:
        """Refuse values for rows that the base lacks, in a run that does not add them."""
        self._refuse(
            header,
            f"has {added} rows that {tensor.name} of the base lacks",
            _GROW,
        )

    def _module(self, tensor: TableTensor) -> str:
        return spell(tensor, self.namespace).removesuffix(".weight")

    def _refuse(self, header: Header, cause: str, fix: str | None) -> None:
        """Record a tensor that is not merged; by default, PEFT merges it, on an untied base."""
        own = _UNTIE + WITH_PEFT if self.tied and header.shape[:1] else WITH_PEFT
        self._findings.problem("QC-ADAPTER-005", cause, header.name, fix=fix or own)
