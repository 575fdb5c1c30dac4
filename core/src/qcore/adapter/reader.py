"""Reads an adapter folder and checks it against its base: every tensor used, every target hit.

This file decides that every adapter tensor is used exactly once, that every declared target has
tensors, and that an adapter without a fingerprint of its base needs consent.
`qcore.adapter.peft_config` decides which config fields are supported, `qcore.adapter.expert_layout`
how experts are laid out, `qcore.adapter.named_base` whether the base is the one that the adapter
names. This file reads headers, not values, and imports no torch.

Codes: ``QC-ADAPTER-003`` not an adapter folder, ``-004`` a config field is missing or unsupported,
``-005`` a tensor matches no weight, ``-006`` a declared target has no tensors, ``-007`` a shape or
dtype is wrong, ``-008`` the folder differs from its manifest, ``-010`` several plugins claim the
layout, or a claim names a weight that does not exist, ``-011`` a later version wrote the layout,
``-012`` the base lacks a part that has pairs, ``-013`` the number of pairs of a part differs from
training, ``-014`` the layout of experts is not certain, ``-017`` two tensors have one name without
their wrappers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..api.parameters import Kind, Namespace
from ..api.parameters import Tensor as TableTensor
from ..api.records import AdapterClaim
from ..checkpoint.checkpoint import Header, read_headers, read_json, safe_file
from ..checkpoint.layout import Layout
from ..errors import InputError, QcoreError, one_of_each, raise_all
from .base_check import check_complete
from .changes import Change, Pair
from .claimed_layout import translated
from .expert_layout import NEWER, ExpertLayout, Stack, Statement, expert_layout, statements
from .locate import locate_adapter
from .manifest_check import read_recorded
from .named_base import Base, check_consent, check_generation
from .number_patterns import NumberPatterns
from .peft_config import check_config, layers_of
from .peft_names import (
    CONFIG,
    WEIGHTS,
    Adapter,
    namespace_of,
    peft_shapes,
    stems,
    target_name,
    trunk_part,
)
from .tied_head import Same, settle_tie
from .whole_weights import Equal, WholeWeights
from .wrapped_names import without_wrappers

#: Shapes by tensor name -> the claims of plugins that recognize the layout.
Claims = Callable[[Mapping[str, tuple[int, ...]]], Sequence[AdapterClaim]]


def read_adapter(
    path: str | Path,
    layout: Layout,
    *,
    trust_base: bool = False,
    trust_generation: bool = False,
    base: Base | None = None,
    claims: Claims | None = None,
    equal: Callable[[Path, Header, str], bool] | None = None,
    same: Callable[[Path, Change, Change], bool] | None = None,
) -> Adapter:
    """Read the headers of an adapter folder and match them with the weights of a base.

    Args:
        path: the adapter folder, or its hub id (`qcore.adapter.locate`).
        layout: the layout of the base.
        trust_base: accept an adapter without a fingerprint of its base.
        trust_generation: accept such an adapter if it names a base of another generation.
        base: generation and source of the base; ``None`` to accept any generation.
        claims: asks the plugins whether they recognize the tensors' layout; ``None`` for PEFT's
            layout alone.
        equal: whether a tensor of the folder has the values of a weight of the base; ``None``
            refuses every saved weight.

    Returns:
        The adapter; no values have been read.

    Raises:
        InputError: as `locate_adapter`; or the folder is not an adapter of this base: see the
            codes of this module.
        TrustError: ``QC-ADAPTER-009`` the adapter has no fingerprint of its base, and
            `trust_base` is not set; ``-015`` it names a base of another generation, and
            `trust_generation` is not set.
    """
    located = locate_adapter(path)
    folder = located.path
    config = read_json(safe_file(folder, CONFIG))
    meta, edits = read_recorded(folder)
    if not meta:
        check_consent(folder, config, base, trust_base)
    raise_all(check_config(folder / CONFIG, config))
    notes = check_generation(folder, config, base, trust_generation) if base and not meta else []
    headers, recognized, claimed, renamed = _headers(folder, layout, claims)
    said = [Statement("the manifest", NEWER)] if meta else statements(folder, config)
    own = None if equal is None else partial(equal, folder)
    reader = _Reader(folder / WEIGHTS, config, headers, layout, claimed, said, own)
    changes, untied = reader.changes(None if same is None else partial(same, folder))
    check_complete(folder, meta, changes, layout)
    raise_all(one_of_each(reader.problems))
    return Adapter(
        path=folder,
        source=located.source,
        revision=located.revision,
        changes=changes,
        namespace=reader.namespace,
        meta=meta,
        layout=recognized[0].layout if recognized else "peft",
        trunk=trunk_part(layout.table).name,
        notes=(*edits, *notes, *renamed, *reader.notes),
        untied=untied,
    )


def _headers(
    folder: Path, layout: Layout, claims: Claims | None
) -> tuple[dict[str, Header], Sequence[AdapterClaim], set[str], list[str]]:
    """Return the headers by PEFT's names, a plugin's claim, the weights it claims, and notes."""
    headers = {header.name: header for header in read_headers(safe_file(folder, WEIGHTS))}
    recognized = claims({name: h.shape for name, h in headers.items()}) if claims else []
    if not recognized:
        plain, notes = without_wrappers(folder / WEIGHTS, headers, layout)
        return plain, recognized, set(), notes
    claimed = {weight for weight, _ in recognized[0].names.values()}
    return translated(folder / WEIGHTS, headers, recognized, layout), recognized, claimed, []


class _Reader:
    """Matches the tensors of one adapter with the weights of a layout that can have LoRA.

    Errors are collected in `problems`, so that all of them can be reported at once.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        headers: dict[str, Header],
        layout: Layout,
        claimed: Collection[str] = (),
        said: Sequence[Statement] = (),
        equal: Equal | None = None,
    ) -> None:
        self.path = path
        self.layout, self.equal = layout, equal
        self.said = said
        self.notes: list[str] = []
        self.config = config
        self.headers = headers
        self.claimed = claimed
        self.problems: list[QcoreError] = []
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
        modules = [self._module(tensor) for tensor in (*self.maps, *self._vocabulary())]
        self.numbers = NumberPatterns(path.parent / CONFIG, config, modules)

    def _maps(self, namespace: Namespace) -> list[TableTensor]:
        """Return the weights whose part is in a class; a text class has no tower."""
        return [t for t in self.every if namespace_of(t.part, namespace.name) is not None]

    def _vocabulary(self) -> list[TableTensor]:
        """Return the embedding and the head."""
        return [t for t in self.layout.table if t.row.group in ("embed", "head")]

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
                or _named(target_name(tensor, namespace), declared)
            ),
            namespace,
        )

    def _fits(self, namespace: Namespace) -> int:
        known = self._stems(namespace).values()
        return sum(f"{stem}.lora_A.weight" in self.headers for stem in known)

    def changes(self, same: Same | None) -> tuple[dict[str, Change], bool]:
        """Return what the adapter changes, and whether a tied head gets values of its own."""
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
                self._problem("QC-ADAPTER-006", "is missing", missing, fix="train or export again")
            used.update(present)
            if len(present) == 2:
                a, b = self.headers[names["A"]], self.headers[names["B"]]
                pair = self._pair(tensor, a, b, tensor.name in older)
                pairs[tensor.name] = pair = self._with_magnitude(pair, self.stems[tensor.name])
                used.update(header.name for header in pair.headers)
        if not self.config.get("use_dora"):
            for name in [name for name in self.headers if ".lora_magnitude_vector" in name]:
                used.add(name)
                self._problem(
                    "QC-ADAPTER-005", "is a magnitude of DoRA, and use_dora is false", name,
                    fix=f"set use_dora to true in {CONFIG}",
                )  # fmt: skip
        whole = self._whole_weights(used, pairs)
        for field in ("target_modules", "target_parameters"):
            self._check_targets(field, pairs)
        self._check_saved()
        settled = settle_tie({**pairs, **whole}, self.layout, same)
        if settled.contradiction is not None:
            self._problem(
                "QC-ADAPTER-005",
                "is a saved copy of a tied head, and the embedding has trained rows",
                settled.contradiction.headers[0].name,
                fix="train again with one of the two",
            )
        if not (settled.changes or self.problems):
            self._problem(
                "QC-ADAPTER-006",
                "has no tensor for this base",
                "target_modules",
                fix="name the base that the adapter was trained on",
            )
        return dict(settled.changes), settled.untied

    def _whole_weights(
        self, used: Collection[str], pairs: Mapping[str, Pair]
    ) -> Mapping[str, Change]:
        """Return the changes by tensors that no pair uses, and refuse those that match nothing."""
        weights = WholeWeights(
            self.path, self.config, self.layout, self.namespace, self._rank_and_scaling, self.equal
        )
        rest = [header for name, header in self.headers.items() if name not in used]
        for header in weights.match(rest, pairs):
            self._problem(
                "QC-ADAPTER-005", "matches no weight of this base", header.name,
                fix="name the base that the adapter was trained on",
            )  # fmt: skip
        self.problems += weights.problems
        self.notes += weights.notes
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
        decided = expert_layout(self.path, stacks, self.said)
        if not isinstance(decided, ExpertLayout):
            raise decided  # without the layout, every further problem may be a consequence
        if decided.note:
            self.notes.append(decided.note)
        return {stack.tensor.name for stack in stacks} if decided.older else set()

    def _pair(self, tensor: TableTensor, a: Header, b: Header, older: bool) -> Pair:
        module = self._module(tensor)
        r, scaling = self._rank_and_scaling(module)
        shapes = peft_shapes(tensor, r, older=older)
        self._check_header(a, shapes["A"])
        self._check_header(b, shapes["B"])
        return Pair(tensor=tensor, a=a, b=b, r=r, scaling=scaling, older=older)

    def _rank_and_scaling(self, module: str) -> tuple[int, float]:
        r = int(self.numbers.value("rank_pattern", module, self.config["r"]))
        alpha = self.numbers.value("alpha_pattern", module, self.config["lora_alpha"])
        return r, alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)

    def _check_header(self, header: Header, shape: tuple[int, ...]) -> None:
        """Check the shape and dtype of a tensor of the adapter."""
        if header.shape != shape:
            self._problem(
                "QC-ADAPTER-007",
                "has the wrong shape",
                header.name,
                found=list(header.shape),
                expected=list(shape),
                fix="name the base that the adapter was trained on",
            )
        if header.dtype not in ("F32", "F16", "BF16", "F64"):
            self._problem(
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
            self._problem(
                "QC-ADAPTER-006", "is missing, and use_dora is true", names[0],
                fix="train or export again",
            )  # fmt: skip
            return pair
        self._check_header(header, pair.tensor.shape[:1])
        return replace(pair, magnitude=header)

    def _check_targets(self, field: str, pairs: Mapping[str, Pair]) -> None:
        """Check that exactly the targets that the config declares have tensors."""
        declared = self.config.get(field)
        linear = field == "target_modules"
        if declared is None and self.claimed:
            return  # the layout is not PEFT's, so its config declares no targets
        # An expression from a downloaded file is not evaluated: every match is accepted.
        is_list = isinstance(declared, list) or declared is None
        declared = declared if isinstance(declared, list) else []
        # PEFT applies exclude_modules to modules only.
        excluded = (self.config.get("exclude_modules") or []) if linear else []
        layers = linear and bool(layers_of(self.config))
        of_field = [tensor for tensor in self.maps if (tensor.row.kind is Kind.LINEAR) == linear]
        for tensor in of_field:
            module = self._module(tensor)
            is_excluded = _named(module, excluded) or (layers and not self._transformed(tensor))
            wanted = _named(module, declared) and isinstance(excluded, list) and not is_excluded
            if wanted and tensor.name not in pairs:
                self._problem(
                    "QC-ADAPTER-006",
                    "is a declared target without tensors",
                    self._module(tensor),
                    fix="train or export again",
                )
            if tensor.name in pairs and (is_excluded or (is_list and not _named(module, declared))):
                self._problem(
                    "QC-ADAPTER-006",
                    "has tensors and is not a declared target",
                    self._module(tensor),
                    fix=f"declare it in {field}, or export again",
                )
        for name in declared:
            hits = any(_named(self._module(tensor), [name]) for tensor in of_field)
            if hits or (linear and any(f".{name}.lora_" in key for key in self.headers)):
                continue
            own = [t for t in self._vocabulary() if linear and _named(self._module(t), [name])]
            if pairs and not self.problems and not own:
                self.notes.append(f"warning: {field}: {name} matches no weight of this base")
                continue
            self._problem(
                "QC-ADAPTER-006",
                "is a declared target without tensors" if own
                else "is a declared target that matches no weight",
                f"{field}: {name}",
                fix="train or export again" if own
                else "name the base that the adapter was trained on",
            )  # fmt: skip

    def _check_saved(self) -> None:
        """Check that what modules_to_save and trainable_token_indices name has tensors."""
        ends = [f".{name}." for name in self.config.get("modules_to_save") or []]
        if self.config.get("trainable_token_indices"):
            ends.append(".trainable_tokens_delta")
        for end in ends:
            if not any(end in header for header in self.headers):
                what = "is declared (saved modules, trainable tokens) and has no tensors"
                self._problem("QC-ADAPTER-006", what, end.strip("."), fix="train or export again")

    def _transformed(self, tensor: TableTensor) -> bool:
        """Whether PEFT's ``layers_to_transform`` and ``layers_pattern`` select the weight."""
        pattern = self.config.get("layers_pattern") or []
        words = [pattern] if isinstance(pattern, str) else pattern
        # A downloaded expression is not evaluated: every layer is accepted.
        plain = isinstance(words, list) and all(re.fullmatch(r"[\w.]+", str(w)) for w in words)
        paths = [f".{word}.{tensor.index}." for word in words] if plain else []
        if paths and not any(path in self._module(tensor) for path in paths):
            return False
        return tensor.index in layers_of(self.config)

    def _module(self, tensor: TableTensor) -> str:
        return target_name(tensor, self.namespace)

    def _problem(
        self, code: str, what: str, field: str, *, fix: str,
        found: object | None = None, expected: object | None = None,
    ) -> None:  # fmt: skip
        self.problems.append(
            InputError(
                code, what, file=self.path, field=field, found=found, expected=expected, fix=fix
            )
        )


def _named(module: str, names: object) -> bool:
    """Whether a name in the list equals the module's name or its end after a dot (PEFT's rule)."""
    return isinstance(names, list) and any(
        isinstance(name, str) and (module == name or module.endswith(f".{name}")) for name in names
    )
