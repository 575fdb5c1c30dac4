"""Matches the tensors of an adapter with the weights of its base, and refuses what fits none.

This file decides the class whose prefix the names have, the pair of each weight with its rank and
scaling, and that every tensor is used exactly once. `qcore.adapter.declared_targets` compares the
result with the targets of the config; `qcore.adapter.whole_weights` decides what a tensor is that
is not LoRA on a linear map. It reads headers, not values, and imports no torch.

Codes: ``QC-ADAPTER-005`` a tensor matches no weight, ``-006`` one of two matrices is missing,
``-007`` a shape or dtype is wrong, ``-014`` the layout of experts is not certain.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..api.parameters import Kind, Namespace
from ..api.parameters import Tensor as TableTensor
from ..checkpoint.checkpoint import Header
from ..checkpoint.layout import Layout
from .changes import Change, Pair
from .declared_targets import DeclaredTargets, named
from .expert_layout import ExpertLayout, Stack, Statement, expert_layout
from .findings import Findings
from .number_patterns import NumberPatterns
from .peft_names import CONFIG, namespace_of, peft_shapes, stems, target_name, trunk_part
from .whole_weights import Equal, WholeWeights


class Matcher:
    """The tensors of one adapter, and the weights of a base that can have LoRA.

    Args:
        findings: receives the errors and notes.
        config: content of adapter_config.json.
        headers: the adapter's tensors by PEFT's names.
        layout: the base.
        claimed: canonical names of the weights that a plugin's claim names.
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
        claimed: Collection[str] = (),
        said: Sequence[Statement] = (),
        equal: Equal | None = None,
    ) -> None:
        self.layout, self.equal = layout, equal
        self.said = said
        self._findings = findings
        self.config = config
        self.headers = headers
        self.claimed = claimed
        self.every = [
            tensor
            for tensor in layout.table
            if tensor.row.kind is not None
            and tensor.part.loaded
            and tensor.part.name not in layout.absent
        ]
        # All parts share the trunk's class. If several classes match equally many tensors, the
        # first is used: the prefix does not change what is merged.
        self.namespace = max(trunk_part(layout.table).namespaces, key=self._fits)
        self.maps = self._maps(self.namespace)
        self.stems = self._stems(self.namespace)
        self.modules = {target_name(tensor, self.namespace): tensor for tensor in self.maps}
        vocabulary = [t for t in layout.table if t.row.group in ("embed", "head")]
        self.vocabulary = [target_name(tensor, self.namespace) for tensor in vocabulary]
        self.numbers = NumberPatterns(
            findings.path.parent / CONFIG, config, [*self.modules, *self.vocabulary]
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
        return sum(f"{stem}.lora_A.weight" in self.headers for stem in known)

    def changes(self) -> dict[str, Change]:
        """Return what the adapter changes, by canonical name, and add to the findings."""
        pairs: dict[str, Pair] = {}
        used: set[str] = set()
        older = self._older_experts()
        for tensor in self.maps:
            if tensor.name not in self.stems:
                continue
            names = {side: f"{self.stems[tensor.name]}.lora_{side}.weight" for side in "AB"}
            present = [name for name in names.values() if name in self.headers]
            if len(present) == 1:
                missing = next(name for name in names.values() if name not in present)
                self._findings.problem(
                    "QC-ADAPTER-006", "is missing", missing, fix="train or export again"
                )
            used.update(present)
            if len(present) == 2:
                a, b = self.headers[names["A"]], self.headers[names["B"]]
                pair = self._pair(tensor, a, b, tensor.name in older)
                pairs[tensor.name] = pair = self._with_magnitude(pair, self.stems[tensor.name])
                used.update(header.name for header in pair.headers)
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
        rest = [header for name, header in self.headers.items() if name not in used]
        for header in weights.match(rest, pairs):
            self._findings.problem(
                "QC-ADAPTER-005", "matches no weight of this base", header.name,
                fix="name the base that the adapter was trained on",
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

    def _pair(self, tensor: TableTensor, a: Header, b: Header, older: bool) -> Pair:
        r, scaling = self._rank_and_scaling(target_name(tensor, self.namespace))
        shapes = peft_shapes(tensor, r, older=older)
        self._check_header(a, shapes["A"])
        self._check_header(b, shapes["B"])
        return Pair(tensor=tensor, a=a, b=b, r=r, scaling=scaling, older=older)

    def _rank_and_scaling(self, module: str) -> tuple[int, float]:
        """Return rank and factor of the product for a module."""
        r = int(self.numbers.value("rank_pattern", module, self.config["r"]))
        alpha = self.numbers.value("alpha_pattern", module, self.config["lora_alpha"])
        return r, alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)

    def _check_header(self, header: Header, shape: tuple[int, ...]) -> None:
        """Check the shape and dtype of a tensor of the adapter."""
        if header.shape != shape:
            self._findings.problem(
                "QC-ADAPTER-007",
                "has the wrong shape",
                header.name,
                found=list(header.shape),
                expected=list(shape),
                fix="name the base that the adapter was trained on",
            )
        if header.dtype not in ("F32", "F16", "BF16", "F64"):
            self._findings.problem(
                "QC-ADAPTER-007",
                "is not floating point",
                header.name,
                found=header.dtype,
                expected="F32",
                fix="export the adapter again",
            )

    def _with_magnitude(self, pair: Pair, stem: str) -> Pair:
        """Add DoRA's magnitude to a pair of a linear layer, where the config has DoRA."""
        if not self.config.get("use_dora") or pair.tensor.row.kind is not Kind.LINEAR:
            return pair
        names = (f"{stem}.lora_magnitude_vector", f"{stem}.lora_magnitude_vector.weight")
        header = next((self.headers[name] for name in names if name in self.headers), None)
        if header is None:
            self._findings.problem(
                "QC-ADAPTER-006", "is missing, and use_dora is true", names[0],
                fix="train or export again",
            )  # fmt: skip
            return pair
        self._check_header(header, pair.tensor.shape[:1])
        return replace(pair, magnitude=header)
