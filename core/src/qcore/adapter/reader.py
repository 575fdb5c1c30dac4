"""Reads an adapter folder and checks it against its base: every tensor used, every target hit.

This file decides in which order the files are read and checked, and that an adapter without a
fingerprint of its base needs consent. `qcore.adapter.peft_config` decides which config fields are
supported, `qcore.adapter.named_base` whether the base is the one that the adapter names,
`qcore.adapter.matching` which tensor belongs to which weight, `qcore.adapter.declared_targets`
whether every declared target has tensors, `qcore.adapter.expert_layout` how experts are laid out.
This file reads headers, not values, and imports no torch.

Codes: ``QC-ADAPTER-003`` not an adapter folder, ``-004`` a config field is missing or unsupported,
``-005`` a tensor matches no weight, ``-006`` a declared target has no tensors, ``-007`` a shape or
dtype is wrong, ``-008`` the folder differs from its manifest, ``-010`` several plugins claim the
layout, or a claim names a weight that does not exist, ``-011`` a later version wrote the layout,
``-012`` the base lacks a part that has pairs, ``-013`` the number of pairs of a part differs from
training, ``-014`` the layout of experts is not certain, ``-017`` two tensors have one name without
their wrappers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..api.adapter_claims import AdapterClaim
from ..checkpoint.checkpoint import Header, read_json, safe_file
from ..checkpoint.grown import grown, rows_of_vocabulary
from ..checkpoint.layout import Layout
from ..errors import QcoreError, raise_all
from .added_rows import check_added_rows, larger_vocabulary
from .base_check import check_complete
from .changes import Change
from .claimed_layout import translated
from .expert_layout import NEWER, Statement, statements
from .findings import Findings
from .locate import locate_adapter
from .manifest_check import read_recorded
from .matching import Matcher
from .named_base import Base, check_consent, check_generation
from .peft_config import check_config
from .peft_names import CONFIG, Adapter, trunk_part
from .tied_head import settle_tie
from .weight_files import adapter_headers, weights_place
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
    grow: bool = False,
    problems: list[QcoreError] | None = None,
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
            takes every saved weight as changed.
        same: whether two changes of the folder have the same effect; ``None``: no two have.
        grow: accept values for rows of embedding and head that the base lacks.
        problems: receives the errors of tensors and targets; ``None`` raises them.

    Raises:
        InputError: as `locate_adapter`, or one of the codes of this module.
        TrustError: ``QC-ADAPTER-009`` no fingerprint of its base, without `trust_base`; ``-015`` it
            names a base of another generation, without `trust_generation`.
    """
    located = locate_adapter(path)
    folder = located.path
    config = read_json(safe_file(folder, CONFIG))
    meta, notes = _recorded(folder, config, base, trust_base, trust_generation)
    headers, claim, renamed = _headers(folder, layout, claims)
    vocabulary = larger_vocabulary(config, headers, layout) if grow else None
    before = rows_of_vocabulary(layout) if vocabulary else 0
    layout = grown(layout, vocabulary) if vocabulary else layout
    said = [Statement("the manifest", NEWER)] if meta else statements(folder, config)
    findings = Findings(weights_place(folder))
    matcher = Matcher(findings, config, headers, layout, claim, said, _within(equal, folder))
    settled = settle_tie(matcher.changes(), layout, _within(same, folder), findings)
    check_complete(folder, meta, settled.changes, layout)
    if vocabulary:
        check_added_rows(settled, layout, before, findings)
    findings.report(problems)
    return Adapter(
        path=folder, source=located.source, revision=located.revision, changes=settled.changes,
        namespace=matcher.namespace, meta=meta, layout=claim.layout if claim else "peft",
        trunk=trunk_part(layout.table).name, notes=(*notes, *renamed, *findings.notes),
        untied=settled.untied, vocabulary=vocabulary,
    )  # fmt: skip


def _recorded(
    folder: Path,
    config: Mapping[str, Any],
    base: Base | None,
    trust_base: bool,
    trust_generation: bool,
) -> tuple[Mapping[str, Any], list[str]]:
    """Return what training recorded of an adapter that may be used on the base, and notes."""
    meta, notes = read_recorded(folder)
    if not meta:
        check_consent(folder, config, base, trust_base)
    raise_all(check_config(folder / CONFIG, config))
    if base and not meta:
        notes = [*notes, *check_generation(folder, config, base, trust_generation)]
    return meta, notes


def _within(compare: Callable[..., bool] | None, folder: Path) -> Callable[..., bool] | None:
    """Return a comparison of tensors of a folder."""
    return None if compare is None else partial(compare, folder)


def _headers(
    folder: Path, layout: Layout, claims: Claims | None
) -> tuple[dict[str, Header], AdapterClaim | None, list[str]]:
    """Return the headers by PEFT's names, a plugin's claim, and notes."""
    where = weights_place(folder)
    headers = {header.name: header for header in adapter_headers(folder)}
    plain, notes = without_wrappers(where, headers, layout)
    recognized = claims({name: h.shape for name, h in plain.items()}) if claims else []
    if not recognized:
        return plain, None, notes
    return translated(where, plain, recognized, layout), recognized[0], notes
