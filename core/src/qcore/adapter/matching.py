"""Matches the tensors of an adapter with the weights of its base, and refuses what fits none.

This file decides the class whose prefix the names have, the pair of each weight with its rank and
scaling, and that every tensor is used exactly once. `qcore.adapter.piece_names` decides which
modules are parts of a weight; `qcore.adapter.declared_targets` compares the result with the targets
of the config; `qcore.adapter.whole_weights` decides what a tensor is that is not LoRA on a linear
map. It reads headers, not values, and imports no torch.

Codes: ``QC-ADAPTER-005`` a tensor matches no weight, ``-006`` one of two matrices is missing,
``-007`` a shape or dtype is wrong, ``-014`` the layout of experts is not certain.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..api.adapter_claims import AdapterClaim, AdapterPiece
from ..api.parameters import Kind, Namespace
from ..api.parameters import Tensor as TableTensor
from ..checkpoint.checkpoint import Header
from ..checkpoint.layout import Layout
from .changes import Change, Pair, Piece
from .declared_targets import DeclaredTargets, named
from .expert_layout import ExpertLayout, Stack, Statement, expert_layout
from .findings import Findings
from .number_patterns import NumberPatterns
from .peft_names import CONFIG, namespace_of, peft_shapes, stems, target_name, trunk_part
from .piece_names import check_pieces, expert_modules, modules_of, part_shapes
from .whole_weights import WITH_PEFT, Equal, WholeWeights

_PREFIX = "base_model.model."
#: Beginnings of the names that NeMo Automodel gave stacks of experts before it exported them.
_NATIVE = ("lora_gate_and_up_", "lora_down_")


class Matcher:
    """The tensors of one adapter, and the weights of a base that can have LoRA.

    Args:
        findings: receives the errors and notes.
        config: content of adapter_config.json.
        headers: the adapter's tensors by PEFT's names.
        layout: the base.
        claim: what a plugin says of the tensors; ``None`` without a claim.
        said: what the files say about the layout of experts.
        equal: whether a tensor has the values of a weight of the base; ``None`` takes every saved
            weight as changed.

    Attributes:
        namespace: the class whose prefix the tensor names have.
        maps: the weights of that class that can have LoRA.
        modules: these weights by their name in PEFT's config.
        vocabulary: names of embedding and head in PEFT's config.
    """

    def __init__(
        self,
        findings: Findings,
        config: Mapping[str, Any],
        headers: dict[str, Header],
        layout: Layout,
        claim: AdapterClaim | None = None,
        said: Sequence[Statement] = (),
        equal: Equal | None = None,
    ) -> None:
        self.layout, self.equal = layout, equal
        self.said = said
        self._findings = findings
        self.config = config
        self.headers = headers
        #: The weights that the claim names, with PEFT's shapes.
        self.claimed = {weight for weight, _ in claim.names.values()} if claim else set()
        self.every = [
            tensor
            for tensor in layout.table
            if tensor.row.kind is not None
            and tensor.part.loaded
            and tensor.part.name not in layout.absent
        ]
        self._of_adapter = modules_of(headers)
        # All parts share the trunk's class. If several classes match equally many tensors, the
        # first is used: the prefix does not change what is merged.
        self.namespace = max(trunk_part(layout.table).namespaces, key=self._fits)
        self.maps = self._maps(self.namespace)
        self.stems = self._stems(self.namespace)
        self.modules = {target_name(tensor, self.namespace): tensor for tensor in self.maps}
        vocabulary = [t for t in layout.table if t.row.group in ("embed", "head")]
        self.vocabulary = [target_name(tensor, self.namespace) for tensor in vocabulary]
        self.pieces = self._pieces(claim.pieces if claim else ())
        parts = [_path(piece.module) for own in self.pieces.values() for piece in own]
        self.numbers = NumberPatterns(
            findings.path.parent / CONFIG, config, [*self.modules, *self.vocabulary, *parts]
        )
        findings.notes.extend(
            f"warning: {CONFIG}: {field}: '{key[:100]}' matches no weight of this base, so its "
            "value is not used"
            for field, key in self.numbers.unmatched
        )

    def _maps(self, namespace: Namespace) -> list[TableTensor]:
        """Return the weights whose part is in a class; a text class has no tower."""
        return [t for t in self.every if namespace_of(t.part, namespace.name) is not None]

    def _stems(self, namespace: Namespace) -> dict[str, str]:
        """Return the adapter names of the weights that this config can have LoRA on.

        The name of a stack depends on which stacks of its module have LoRA. A stack that neither
        the config declares nor a plugin claims has no name.
        """
        declared = self.config.get("target_parameters")
        return stems(
            (
                tensor
                for tensor in self._maps(namespace)
                if tensor.row.kind is not Kind.EXPERTS
                or tensor.name in self.claimed
                or named(target_name(tensor, namespace), declared)
            ),
            namespace,
        )

    def _fits(self, namespace: Namespace) -> int:
        known = self._stems(namespace).values()
        experts = (tensor for tensor in self._maps(namespace) if tensor.row.kind is Kind.EXPERTS)
        return len(self._of_adapter.intersection(known)) + sum(
            next(expert_modules(tensor, namespace, self._of_adapter), None) is not None
            for tensor in experts
        )

    def _pieces(self, claimed: Sequence[AdapterPiece]) -> dict[str, list[AdapterPiece]]:
        """Return the modules that are parts of a weight, by canonical name of the weight."""
        pieces: dict[str, list[AdapterPiece]] = {}
        for piece in claimed:
            pieces.setdefault(piece.weight, []).append(piece)
        left = self._of_adapter.difference(self.stems.values(), (p.module for p in claimed))
        for tensor in self.maps:
            if left and tensor.row.kind is Kind.EXPERTS:
                own = list(expert_modules(tensor, self.namespace, left))
                pieces |= {tensor.name: pieces.get(tensor.name, []) + own} if own else {}
        return pieces

    def changes(self) -> dict[str, Change]:
        """Return what the adapter changes, by canonical name, and add to the findings."""
        pairs: dict[str, Pair] = {}
        used: set[str] = set()
        older = self._older_experts()
        by_name = {tensor.name: tensor for tensor in self.maps}
        check_pieces(self.pieces, by_name, self.headers, self._findings)
        for tensor in self.maps:
            pieces, own = [], self.pieces.get(tensor.name, [])
            if tensor.name in self.stems:
                stem = self.stems[tensor.name]
                plain = self._piece(tensor, AdapterPiece(module=stem, weight=tensor.name), used,
                                    older=tensor.name in older)  # fmt: skip
                pieces += [] if plain is None else [plain]
            if pieces and own:
                self._twice(tensor, pieces[0], own[0])
            parts = (self._piece(tensor, piece, used, part=True) for piece in own)
            pieces += [piece for piece in parts if piece is not None]
            if pieces:
                pairs[tensor.name] = Pair(tensor=tensor, pieces=tuple(pieces))
                self._check_magnitude(pairs[tensor.name])
        if self.pieces:
            self._note_parts()
        if not self.config.get("use_dora"):
            for name in [name for name in self.headers if ".lora_magnitude_vector" in name]:
                used.add(name)
                self._findings.problem(
                    "QC-ADAPTER-005", "is a magnitude of DoRA, and use_dora is false", name,
                    fix=f"set use_dora to true in {CONFIG}",
                )  # fmt: skip
        whole = self._whole_weights(used, pairs)
        declared = DeclaredTargets(
            self.config, self.modules, self.headers, bool(self.claimed), self._findings,
            {name: [_path(piece.module) for piece in own] for name, own in self.pieces.items()},
            self.vocabulary,
        )  # fmt: skip
        declared.check(pairs)
        if not (pairs or whole or self._findings.problems):
            self._findings.problem(
                "QC-ADAPTER-006",
                "has no tensor for this base",
                "target_modules",
                fix="name the base that the adapter was trained on",
            )
        return {**pairs, **whole}

    def _whole_weights(
        self, used: Collection[str], pairs: Mapping[str, Pair]
    ) -> Mapping[str, Change]:
        """Return the changes by tensors that no pair uses, and refuse those that match nothing."""
        weights = WholeWeights(
            self._findings, self.config, self.layout, self.namespace, self._rank_and_scaling,
            self.equal,
        )  # fmt: skip
        rest = {name: header for name, header in self.headers.items() if name not in used}
        for header in weights.match(rest, pairs):
            end = header.name.rpartition(".")[2]
            native = end.removesuffix("A").removesuffix("B") in _NATIVE
            self._findings.problem(
                "QC-ADAPTER-005",
                "is a stack of experts in NeMo Automodel's own layout" if native
                else "matches no weight of this base",
                header.name,
                fix="export the adapter again with a version of Automodel that writes PEFT's layout"
                if native else "name the base that the adapter was trained on",
            )  # fmt: skip
        return weights.changes

    def _older_experts(self) -> set[str]:
        """Return the stacks whose matrices have the layout of PEFT before 0.19.1."""
        stacks = []
        for tensor in self.maps:
            stem = self.stems.get(tensor.name)
            names = [f"{stem}.lora_{side}.weight" for side in "AB"]
            if (
                tensor.row.kind is Kind.EXPERTS
                and tensor.name not in self.claimed
                and all(name in self.headers for name in names)
            ):
                a, b = (self.headers[name] for name in names)
                stacks.append(Stack(tensor, a, b))
        decided = expert_layout(self._findings.path, stacks, self.said)
        if not isinstance(decided, ExpertLayout):
            raise decided  # without the layout, every further problem may be a consequence
        if decided.note:
            self._findings.notes.append(decided.note)
        return {stack.tensor.name for stack in stacks} if decided.older else set()

    def _piece(
        self, tensor: TableTensor, piece: AdapterPiece, used: set[str], *, older: bool = False,
        part: bool = False,
    ) -> Piece | None:  # fmt: skip
        """Return the matrices of a module; ``None`` if the adapter does not have both.

        Args:
            tensor: the weight.
            piece: the module.
            used: receives the names of the tensors.
            older: for experts, the layout of PEFT before 0.19.1.
            part: whether the module is not PEFT's for the whole weight.
        """
        names = {side: f"{piece.module}.lora_{side}.weight" for side in "AB"}
        present = [name for name in names.values() if name in self.headers]
        used.update(present)
        if len(present) != 2:
            for missing in names.values() if present else ():
                if missing not in present:
                    self._findings.problem(
                        "QC-ADAPTER-006", "is missing", missing, fix="train or export again"
                    )
            return None
        a, b = self.headers[names["A"]], self.headers[names["B"]]
        path = _path(piece.module) if part else target_name(tensor, self.namespace)
        r, scaling = self._rank_and_scaling(path)
        shapes = (
            part_shapes(tensor, piece, r, a, b) if part else peft_shapes(tensor, r, older=older)
        )
        self._findings.check_tensor(a, shapes["A"], rank_dim=-2)
        self._findings.check_tensor(b, shapes["B"], rank_dim=-1)
        return Piece(
            a=a, b=b, r=r, scaling=scaling,
            rows=piece.rows and slice(*piece.rows), source=piece.source and slice(*piece.source),
            expert=piece.expert, older=older,
            magnitude=self._magnitude(tensor, piece, b, used),
        )  # fmt: skip

    def _rank_and_scaling(self, module: str) -> tuple[int, float]:
        """Return rank and factor of the product for a module."""
        r = int(self.numbers.value("rank_pattern", module, self.config["r"]))
        alpha = self.numbers.value("alpha_pattern", module, self.config["lora_alpha"])
        return r, alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)

    def _magnitude(
        self, tensor: TableTensor, piece: AdapterPiece, b: Header, used: set[str]
    ) -> Header | None:
        """Return DoRA's magnitude of a module, where the config has DoRA."""
        names = [f"{piece.module}.lora_magnitude_vector{end}" for end in ("", ".weight")]
        name = next((name for name in names if name in self.headers), None)
        if not self.config.get("use_dora") or (tensor.row.kind is not Kind.LINEAR and name is None):
            return None
        if name is None:
            self._findings.problem(
                "QC-ADAPTER-006", "is missing, and use_dora is true", names[0],
                fix="train or export again",
            )  # fmt: skip
            return None
        used.add(name)
        if tensor.row.kind is not Kind.LINEAR:
            self._findings.problem(
                "QC-ADAPTER-005", "is a magnitude of DoRA on experts, which qcore does not merge",
                name, fix=WITH_PEFT,
            )  # fmt: skip
            return None
        self._findings.check_tensor(self.headers[name], b.shape[:1])
        return self.headers[name]

    def _check_magnitude(self, pair: Pair) -> None:
        """Refuse DoRA on some rows of a weight: the other rows have no magnitude."""
        out = pair.tensor.shape[0]
        rows = sum(out if p.rows is None else p.rows.stop - p.rows.start for p in pair.pieces)
        if pair.has_magnitude and rows != out:
            self._findings.problem(
                "QC-ADAPTER-006", "has DoRA on some of its rows", pair.tensor.name,
                found=f"{rows} rows", expected=f"{out} rows", fix=WITH_PEFT,
            )  # fmt: skip

    def _twice(self, tensor: TableTensor, piece: Piece, other: AdapterPiece) -> None:
        self._findings.problem(
            "QC-ADAPTER-005", "changes rows that another module changes too", piece.a.name,
            found=f"{other.module} and this, both in {tensor.name}",
            expected="one module for each row of a weight", fix="save the adapter in one layout",
        )  # fmt: skip

    def _note_parts(self) -> None:
        """Report how modules that are parts of a weight are read."""
        count = len({piece.module for own in self.pieces.values() for piece in own})
        weight, (first, *_) = next(iter(self.pieces.items()))
        self._findings.notes.append(
            f"{count} modules of the adapter are parts of {len(self.pieces)} weights: "
            f"{first.module} of {weight}"
        )


def _path(module: str) -> str:
    """Return a module's name as the patterns and targets of the config have it."""
    return module.removeprefix(_PREFIX)
