"""Checks of settings against the model, shared by ``train`` and ``plan``.

This file decides which settings are checked against config, headers and template before a weight is
read: the class of the adapter, the router loss, groups in 4 bit, template
variables.
`qcore.adapter.targets` checks the LoRA groups.

Codes: ``QC-LORA-004`` a group that cannot be stored in 4 bit, ``-006`` a token without a row,
``QC-TRAIN-007`` no router; those of `qcore.adapter.peft_names` and
`qcore.data.rendering.template_kwargs`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..adapter.peft_names import trunk_part
from ..adapter.written_config import choose_class
from ..api.parameters import Kind, Store
from ..data.rendering.template_kwargs import SETTING, check_variables
from ..errors import QcoreError, UsageError
from ..plugins.resolve_model import Identified, classes_of
from .four_bit import refuse_rounding


def unsuitable(found: Identified, settings: Mapping[str, Any]) -> Iterator[QcoreError]:
    """Yield an error for each setting that does not suit the model.

    Args:
        found: the model.
        settings: the run's settings by name; absent ones are not checked.
    """
    for judge in (_adapter_class, _router, _quantized, _stored, _tokens, _variables):
        try:
            judge(found, settings)
        except QcoreError as error:
            yield error


def _adapter_class(found: Identified, settings: Mapping[str, Any]) -> None:
    """Check that the class of the adapter has all parts that are trained."""
    layout, asked = found.layout, settings.get("adapter_class", "")
    groups = set(settings.get("target_groups", ()))
    parts = [p for p in layout.table.parts if groups & p.groups.keys() and p.loaded]
    touched = {part.name for part in parts}
    choose_class(layout, touched, classes_of(found.checkpoint.config), asked)


def _router(found: Identified, settings: Mapping[str, Any]) -> None:
    """Check that a model trained with a router loss has experts."""
    coefficient = settings.get("router_aux_loss_coef", 0.0)
    routed = any(
        entry.row.kind is Kind.EXPERTS and entry.part.loaded for entry in found.layout.table
    )
    if coefficient and not routed:
        raise UsageError(
            "QC-TRAIN-007",
            "has no effect: this model has no router",
            field="router_aux_loss_coef",
            found=coefficient,
            expected="0",
            fix="remove it",
        )


def _quantized(found: Identified, settings: Mapping[str, Any]) -> None:
    """Check that each extra group in 4 bit has weights that would be in 16 bit otherwise."""
    groups = settings.get("quantize_groups", ())
    known = {
        entry.row.group: None
        for entry in found.layout.table
        if entry.row.kind is not None
        and entry.part.loaded
        and entry.part.name not in found.layout.absent
        and entry.row.store is not Store.NF4
    }
    for group in groups:
        if settings.get("quantization", "nf4") == "none" or group not in known:
            off = group in known
            raise UsageError(
                "QC-LORA-004",
                "has no effect: nothing is quantized" if off else "is not a group in 16 bit",
                field="quantize_groups",
                found=group,
                expected="quantization=nf4" if off else " or ".join(known) or "no group",
                fix="remove it",
            )


def _stored(found: Identified, settings: Mapping[str, Any]) -> None:
    """Check that a run in NF4 takes the 4-bit weights of the checkpoint as they are."""
    if settings.get("quantization", "nf4") == "nf4":
        fix = "pass --set quantization=none, which holds the decoded values in 16 bits"
        refuse_rounding(found, fix=fix)


def _tokens(found: Identified, settings: Mapping[str, Any]) -> None:
    """Check that each token whose row is trained has a row of its own in the embedding or head."""
    table = found.layout.table
    trunk = trunk_part(table)
    for group, field in (
        ("embed", "trainable_token_indices"), ("head", "trainable_head_token_indices"),
    ):  # fmt: skip
        ids = settings.get(field, ())
        weight = next((e for e in table if e.part is trunk and e.row.group == group), None)
        tied = weight is not None and weight.row.tie is not None
        rows = 0 if weight is None or tied else weight.shape[0]
        if beyond := [token for token in ids if token >= rows]:
            raise UsageError(
                "QC-LORA-006",
                "names rows of a head that is tied to the embedding"
                if tied
                else "names a token that has no row in this base",
                field=field,
                found=beyond[0],
                expected="an empty list" if tied else f"ids below {rows}",
                fix="name the tokens in trainable_token_indices, which trains both"
                if tied
                else "leave the token out, or add rows to the base with transformers first (model."
                f"resize_token_embeddings({max(ids) + 1}), save_pretrained)",
            )


def _variables(found: Identified, settings: Mapping[str, Any]) -> None:
    template = found.checkpoint.template
    if template is not None and settings.get(SETTING):
        with template.reopen() as own:
            check_variables(own, settings[SETTING])
