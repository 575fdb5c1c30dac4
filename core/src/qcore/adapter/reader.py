"""An adapter folder met with a base: what it holds, what it must hold, what is refused.

This file decides that every adapter tensor is used exactly once and every declared target is hit,
that a tower's pairs are as many as training recorded, and that an adapter without a fingerprint of
its base needs consent. Which fields of its config act is `adapter_config`'s. It reads headers, not
values, and needs no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..api.parameters import Kind, Namespace
from ..api.parameters import Tensor as TableTensor
from ..api.records import AdapterClaim
from ..checkpoint.checkpoint import Header, read_headers, read_json, safe_file
from ..checkpoint.layout import Layout
from ..errors import InputError, QcoreError, TrustError, one_of_each, raise_all
from ..io.artifact import MANIFEST, read_manifest, verify
from .base_check import check_complete
from .peft_config import check_config, layers_of
from .peft_names import (
    CONFIG,
    LAYOUT,
    WEIGHTS,
    Adapter,
    Pair,
    namespace_of,
    peft_shapes,
    stems,
    target_name,
    trunk_part,
)

#: Shapes by tensor name -> what plugins claim of them.
Claims = Callable[[Mapping[str, tuple[int, ...]]], Sequence[AdapterClaim]]


def read_adapter(
    path: str | Path, layout: Layout, *, trust_base: bool = False, claims: Claims | None = None
) -> Adapter:
    """Read the headers of an adapter folder and meet them with a base.

    Args:
        path: the folder.
        layout: the base, explained.
        trust_base: accept an adapter without a fingerprint of its base.
        claims: asks plugins whether the tensors are in a layout of theirs.

    Raises:
        InputError: ``QC-ADAPTER-003`` no adapter folder, ``-004`` a config field that is
            missing or that qcore does not act on, ``-005`` a tensor that fits no weight,
            ``-006`` a declared target without tensors, ``-007`` a wrong shape,
            ``-008`` a folder that is not what its manifest says, ``-011`` one whose layout a
            later version wrote, ``-010`` a foreign layout
            that several plugins claim or that names a weight which is not there, ``-012`` pairs
            of a part that is not here, ``-013`` fewer pairs of a part than were trained.
        TrustError: ``QC-ADAPTER-009`` no base fingerprint and no consent.
    """
    folder = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(
                "QC-ADAPTER-003",
                f"has no {name}",
                file=folder,
                expected="a PEFT adapter folder",
                fix="name the folder that training wrote",
            )
    meta = _manifest(folder, trust_base)
    config = read_json(safe_file(folder, CONFIG))
    problems = check_config(folder / CONFIG, config)
    raise_all(problems)
    headers = {header.name: header for header in read_headers(safe_file(folder, WEIGHTS))}
    found = claims({name: h.shape for name, h in headers.items()}) if claims else []
    claimed: set[str] = set()
    if found:
        headers = _translated(folder / WEIGHTS, headers, found, layout)
        claimed = {weight for weight, _ in found[0].names.values()}
    reader = _Reader(folder / WEIGHTS, config, headers, layout, claimed)
    pairs = reader.pairs()
    check_complete(folder, meta, pairs, layout)
    raise_all(one_of_each(reader.problems))
    return Adapter(
        path=folder,
        pairs=pairs,
        namespace=reader.namespace,
        meta=meta,
        layout=found[0].layout if found else "peft",
        trunk=trunk_part(layout.table).name,
    )


def _translated(
    path: Path, headers: Mapping[str, Header], claims: Sequence[AdapterClaim], layout: Layout
) -> dict[str, Header]:
    """The tensors of a foreign layout under PEFT's names, by the one claim that there is."""
    names = ", ".join(claim.layout for claim in claims)
    if len(claims) > 1:
        raise InputError(
            "QC-ADAPTER-010",
            "is in a layout that several plugins claim",
            file=path,
            found=names,
            expected="one",
            fix="uninstall the plugin that does not belong",
        )
    translated, table = dict(headers), layout.table
    claimed = {weight for weight, _ in claims[0].names.values()}
    # Together: a stack's name depends on which others of its module are adapted.
    named = stems((t for t in table if t.name in claimed), trunk_part(table).namespaces[0])
    for name, (weight, side) in claims[0].names.items():
        if weight not in named or side not in ("A", "B") or name not in headers:
            raise InputError(
                "QC-ADAPTER-010",
                f"is read as layout '{names}' to a weight that is not there",
                file=path,
                field=name,
                found=f"{weight} ({side})",
                expected="a weight of this base, side A or B",
                fix="report this to the plugin's author",
            )
        translated[f"{named[weight]}.lora_{side}.weight"] = translated.pop(name)
    return translated


def _manifest(folder: Path, trust_base: bool) -> Mapping[str, Any]:
    if (folder / MANIFEST).exists():
        report = verify(folder)
        if not report.ok:
            raise InputError(
                "QC-ADAPTER-008",
                "is not what its manifest says",
                file=folder,
                found=report.problems[0],
                fix="train again, or restore the folder",
            )
        meta = read_manifest(folder).meta
        if meta.get("layout", LAYOUT) != LAYOUT:
            raise InputError(
                "QC-ADAPTER-011",
                "is laid out in a way that this version does not read",
                file=folder,
                field="layout",
                found=meta["layout"],
                expected=LAYOUT,
                fix="upgrade qcore-framework",
            )
        if meta.get("fingerprints"):
            return meta
    if not trust_base:
        raise TrustError(
            "QC-ADAPTER-009",
            "carries no fingerprint of the base that it was trained on",
            file=folder,
            fix="pass --trust-base if you know that this is its base",
        )
    return {}


class _Reader:
    """One adapter's tensors met with the maps of a layout."""

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        headers: dict[str, Header],
        layout: Layout,
        claimed: Collection[str] = (),
    ) -> None:
        self.path = path
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
        # One class for all parts, the trunk's. Equal fits are told apart by class: which prefix
        # it is never changes what is merged.
        self.namespace = max(trunk_part(layout.table).namespaces, key=self._fits)
        self.maps = self._maps(self.namespace)
        self.stems = self._stems(self.namespace)

    def _maps(self, namespace: Namespace) -> list[TableTensor]:
        """The maps that are in a class: the text class has no tower."""
        return [t for t in self.every if namespace_of(t.part, namespace.name) is not None]

    def _stems(self, namespace: Namespace) -> dict[str, str]:
        """The names that weights have under this config.

        A stack's depends on which others of its module are adapted, so one that neither the
        config declares nor a plugin claims has none.
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

    def pairs(self) -> dict[str, Pair]:
        pairs, used = {}, set()
        for tensor in self.maps:
            if tensor.name not in self.stems:
                continue
            names = {side: f"{self.stems[tensor.name]}.lora_{side}.weight" for side in "AB"}
            here = [name for name in names.values() if name in self.headers]
            if len(here) == 1:
                lost = next(name for name in names.values() if name not in here)
                self._problem("QC-ADAPTER-006", "is missing", lost, fix="train or export again")
            used.update(here)
            if len(here) == 2:
                a, b = self.headers[names["A"]], self.headers[names["B"]]
                pairs[tensor.name] = self._pair(tensor, a, b)
        for name in [name for name in self.headers if name not in used]:
            self._problem(
                "QC-ADAPTER-005",
                "fits no weight of this base",
                name,
                fix="name the base that the adapter was trained on",
            )
        for field in ("target_modules", "target_parameters"):
            self._check_targets(field, pairs)
        if not (pairs or self.problems):
            self._problem(
                "QC-ADAPTER-006",
                "has no tensor for this base",
                "target_modules",
                fix="name the base that the adapter was trained on",
            )
        return pairs

    def _pair(self, tensor: TableTensor, a: Header, b: Header) -> Pair:
        module = self._module(tensor)
        r = int(self._pattern("rank_pattern", module, self.config["r"]))
        alpha = self._pattern("alpha_pattern", module, self.config["lora_alpha"])
        shapes = peft_shapes(tensor, r)
        for header, shape in ((a, shapes["A"]), (b, shapes["B"])):
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
        scaling = alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)
        return Pair(tensor=tensor, a=a, b=b, r=r, scaling=scaling)

    def _pattern(self, field: str, module: str, default: float) -> float:
        for key, value in (self.config.get(field) or {}).items():
            if module == key or module.endswith(f".{key}"):
                return float(value)
        return default

    def _check_targets(self, field: str, pairs: Mapping[str, Pair]) -> None:
        """Every target that the config declares has its two tensors, and no other has."""
        declared = self.config.get(field)
        linear = field == "target_modules"
        if declared is None and self.claimed:
            return  # not PEFT's to declare
        # An expression is a stranger's code and not evaluated: what it hits is taken as told.
        told = isinstance(declared, list) or declared is None
        declared = declared if isinstance(declared, list) else []
        # PEFT narrows down modules alone.
        excluded = (self.config.get("exclude_modules") or []) if linear else []
        layers = linear and bool(layers_of(self.config))
        mine = [tensor for tensor in self.maps if (tensor.row.kind is Kind.LINEAR) == linear]
        for tensor in mine:
            module = self._module(tensor)
            out = _named(module, excluded) or (layers and not self._transformed(tensor))
            wanted = _named(module, declared) and isinstance(excluded, list) and not out
            if wanted and tensor.name not in pairs:
                self._problem(
                    "QC-ADAPTER-006",
                    "is a declared target without tensors",
                    self._module(tensor),
                    fix="train or export again",
                )
            if tensor.name in pairs and (out or (told and not _named(module, declared))):
                self._problem(
                    "QC-ADAPTER-006",
                    "has tensors and is no declared target",
                    self._module(tensor),
                    fix=f"declare it in {field}, or export again",
                )
        for name in declared:
            if not any(_named(self._module(tensor), [name]) for tensor in mine):
                self._problem(
                    "QC-ADAPTER-006",
                    "is a declared target that hits nothing",
                    f"{field}: {name}",
                    fix="name the base that the adapter was trained on",
                )

    def _transformed(self, tensor: TableTensor) -> bool:
        """PEFT's rule for ``layers_to_transform``: the layer's number, below ``layers_pattern``."""
        given = self.config.get("layers_pattern") or []
        words = [given] if isinstance(given, str) else given
        # An expression is a stranger's code: what it hits is taken as told.
        plain = isinstance(words, list) and all(re.fullmatch(r"[\w.]+", str(w)) for w in words)
        below = [f".{word}.{tensor.index}." for word in words] if plain else []
        if below and not any(path in self._module(tensor) for path in below):
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
    """PEFT's rule for lists: the module's name, or its end at a dot."""
    return isinstance(names, list) and any(
        isinstance(name, str) and (module == name or module.endswith(f".{name}")) for name in names
    )
