"""`qcore adapter show`: what an adapter folder says of itself, and what of it fits a base.

This file decides what the report holds. Without a base and without norms it reads the config and
the headers alone and imports no torch. Pairs are listed by the target below the layer, or by the
group of the parameter table where a base is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.tokenizer_files import TokenizerFiles, named_templates
from ..errors import InputError, QcoreError
from ..io.artifact import MANIFEST
from .contents import Contents, FilePair, read_contents
from .manifest_check import read_recorded
from .named_base import base_name

if TYPE_CHECKING:
    from .fit import Fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The LoRA pairs of one target, or of one group of the base.

    Attributes:
        name: the target or group; empty for pairs that fit no weight of the base.
        pairs: their number.
        ranks: their ranks, ascending; a rank that needs the base is left out.
        scalings: factors of their products, ascending.
        parameters: elements of their matrices.
        dtypes: dtypes of their matrices.
        norm: Frobenius norm of all their deltas together; ``None`` if it was not computed.
        largest: the largest norm of one delta.
    """

    name: str
    pairs: int
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    parameters: int
    dtypes: tuple[str, ...]
    norm: float | None = None
    largest: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the facts for ``--json``."""
        return {
            "name": self.name,
            "pairs": self.pairs,
            "ranks": list(self.ranks),
            "scalings": list(self.scalings),
            "parameters": self.parameters,
            "dtypes": list(self.dtypes),
            "norm": self.norm,
            "largest": self.largest,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterReport:
    """The result of `show_adapter`.

    Attributes:
        contents: the folder.
        targets: its pairs by target or group.
        tokenizer: names of the tokenizer's files beside it.
        templates: name, file and SHA-256 of each chat template beside it.
        recorded: what a manifest of qcore records: the verb, the base and the parts.
        fit: the comparison with a base; ``None`` without one.
        notes: lines about the files.
    """

    contents: Contents
    targets: tuple[Targets, ...]
    tokenizer: tuple[str, ...]
    templates: tuple[Mapping[str, str], ...]
    recorded: Mapping[str, Any] | None
    fit: Fit | None
    notes: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The PEFT type, with the variants of LoRA that the config turns on."""
        config = self.contents.config
        variants = {"use_dora": "DoRA", "use_rslora": "rsLoRA"}
        on = [name for field, name in variants.items() if config.get(field) is True]
        return " + ".join([str(config.get("peft_type", "no peft_type")), *on])

    @property
    def problems(self) -> tuple[QcoreError, ...]:
        """What the verbs that use the adapter on the base would raise; empty without a base."""
        return () if self.fit is None else self.fit.problems

    def as_json(self) -> dict[str, Any]:
        """Return the payload of ``qcore adapter show --json``; ``error`` only for a problem."""
        contents, config = self.contents, self.contents.config
        facts: dict[str, Any] = {
            "adapter": contents.source,
            "revision": contents.revision,
            "kind": self.kind,
            "peft_version": config.get("peft_version"),
            "base": base_name(config) or None,
            "r": config.get("r"),
            "lora_alpha": config.get("lora_alpha"),
            "rank_pattern": config.get("rank_pattern") or {},
            "alpha_pattern": config.get("alpha_pattern") or {},
            "use_dora": config.get("use_dora") is True,
            "use_rslora": config.get("use_rslora") is True,
            "target_modules": config.get("target_modules"),
            "target_parameters": config.get("target_parameters"),
            "modules_to_save": config.get("modules_to_save"),
            "tensors": len(contents.headers),
            "parameters": sum(header.numel for header in contents.headers.values()),
            "targets": [targets.as_json() for targets in self.targets],
            "saved": {header.name: list(header.shape) for header in contents.saved},
            "token_rows": {module: header.shape[0] for module, header in contents.rows.items()},
            "tokenizer": list(self.tokenizer),
            "templates": [dict(template) for template in self.templates],
            "recorded": None if self.recorded is None else dict(self.recorded),
            "fits": None if self.fit is None else self.fit.as_json(),
            "refused": [problem.message for problem in contents.refused],
            "notes": list(self.notes),
        }
        if self.problems:
            facts["error"] = self.problems[0].as_json()
        return facts


def show_adapter(
    adapter: str | Path, *, model: str | None = None, generation: str = "", norms: bool = False
) -> AdapterReport:
    """Report what an adapter folder holds.

    Args:
        adapter: the folder, or its hub id.
        model: a base to match it with.
        generation: accepted only where the base lacks evidence of its generation.
        norms: also read the matrices, and compute the norms of their products.

    Raises:
        InputError: as `read_contents`.
        QcoreError: as `identify`, for the base.
    """
    contents = read_contents(adapter)
    fitted = None
    if model is not None:
        from ..plugins.resolve_model import identify
        from .fit import fit

        fitted = fit(contents, identify(model, generation=generation), model)
    notes: list[str] = []
    files = TokenizerFiles.of(contents.path)
    return AdapterReport(
        contents=contents,
        targets=_targets(contents, fitted, norms),
        tokenizer=tuple(sorted(name for name in files.sidecars if "template" not in name)),
        templates=tuple(_templates(files, notes)),
        recorded=_recorded(contents.path, notes),
        fit=fitted,
        notes=tuple(notes),
    )


def _templates(files: TokenizerFiles, notes: list[str]) -> list[dict[str, str]]:
    try:
        named = named_templates(files)
    except InputError as error:
        notes.append(f"warning: {error.message}")
        return []
    return [
        {"name": name, "file": template.source, "sha256": template.sha256}
        for name, template in named.items()
    ]


def _recorded(folder: Path, notes: list[str]) -> dict[str, Any] | None:
    """Return what the manifest records; a folder that differs from it gets a warning."""
    if not (folder / MANIFEST).exists():
        return None
    try:
        meta, edits = read_recorded(folder)
    except InputError as error:
        notes.append(f"warning: {error.message}")
        return None
    notes += edits
    if not meta:
        return None
    model = meta.get("model")
    return {
        "verb": meta.get("verb"),
        "model": model.get("source") if isinstance(model, dict) else None,
        "parts": sorted(meta["fingerprints"]),
    }


def _targets(contents: Contents, fitted: Fit | None, norms: bool) -> tuple[Targets, ...]:
    by_name: dict[str, list[FilePair]] = {}
    for pair in contents.pairs.values():
        if fitted is not None and fitted.matched is not None:
            name = fitted.groups.get(pair.a.name, "")
            if pair.a.name in fitted.ranks:
                r, scaling = fitted.ranks[pair.a.name]
                experts = max(1, pair.a.shape[0] // r)
                pair = replace(pair, r=r, scaling=scaling, experts=experts)
        else:
            name = pair.target
        by_name.setdefault(name, []).append(pair)
    return tuple(
        _summary(contents.path, name, pairs, norms) for name, pairs in sorted(by_name.items())
    )


def _summary(folder: Path, name: str, pairs: list[FilePair], norms: bool) -> Targets:
    values: list[float] = []
    if norms:
        from .norms import delta_norm

        values = [norm for pair in pairs if (norm := delta_norm(folder, pair)) is not None]
    known = len(values) == len(pairs)
    return Targets(
        name=name,
        pairs=len(pairs),
        ranks=tuple(sorted({pair.r for pair in pairs if pair.r is not None})),
        scalings=tuple(sorted({pair.scaling for pair in pairs if pair.scaling is not None})),
        parameters=sum(pair.parameters for pair in pairs),
        dtypes=tuple(sorted({h.dtype for pair in pairs for h in (pair.a, pair.b)})),
        norm=math.hypot(*values) if known and values else None,
        largest=max(values) if known and values else None,
    )
