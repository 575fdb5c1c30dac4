"""Evidence for and against Qwen 3.5, which shares its blocks with later generations.

Later generations have the same ``model_type``, class and shapes, so the evidence comes from the
files next to the weights. This file decides what counts:

================================================  =====================================
observation                                       counts as
================================================  =====================================
template hash of a published 3.5 template         for; nothing is rendered
template renders as 3.5 in every respect          for
text ``bos_token_id`` null or absent, with the    for; not if the config lost its token
family's shape keys and ``eos_token_id`` 248044   ids or has keys of a later generation
text ``bos_token_id`` set                         against; 3.6 and later have 248044
``preserve_thinking`` changes the rendered text   against
scalar tool arguments rendered as JSON            against
no template, or none of these observations        nothing
================================================  =====================================

"In every respect" means: ``True`` and ``None`` in tool arguments, ``enable_thinking`` switches
between the two prompt tails, and reasoning is stripped before the last user query and kept after
it. A training template that keeps all reasoning is therefore not evidence.

Evidence against 3.5 names the plugin that would fit, unless the template shows that the checkpoint
is newer than that plugin as well. The layout of the prediction layers and the repository's name do
not count, and neither does the text-level ``partial_rotary_factor``, which re-saves add and remove.

`mismatch` refuses a checkpoint whose tensors belong to another model than config.json describes
before any evidence is collected. `template_probe` renders the template.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qcore.api import Claim, Evidence

from . import mismatch
from .table import text_config
from .template_probe import (
    ENDOFTEXT,
    TemplateBehavior,
    as_published_without_bos,
    bos_of,
    probe_template,
)
from .template_probe import TEMPLATE_INPUTS as TEMPLATE_INPUTS

if TYPE_CHECKING:
    from qcore.api import CheckpointView

ARCHITECTURE = "qwen3_5"
MOE = "qwen3_5_moe"
#: ``model_type`` to architecture, for every generation of the family.
ARCHITECTURES = {
    "qwen3_5": ARCHITECTURE,
    "qwen3_5_text": ARCHITECTURE,
    "qwen3_5_moe": MOE,
    "qwen3_5_moe_text": MOE,
}
GENERATION = "3.5"
NEXT = "qcore-qwen36"  #: distribution to suggest for evidence of 3.6 or later

#: Hashes of the published templates: thinking by default (4B and larger), or not (0.8B, 2B).
TEMPLATE_HASHES = {
    "a4aee8afcf2e0711942cf848899be66016f8d14a889ff9ede07bca099c28f715": "thinking",
    "273d8e0e683b885071fb17e08d71e5f2a5ddfb5309756181681de4f5a1822d80": "no thinking",
}


def claims(checkpoint: CheckpointView) -> Iterator[Claim]:
    """Yield the claim of Qwen 3.5 with its evidence for and against.

    Raises:
        InputError: see `mismatch.refuse`.
    """
    if architecture_of(checkpoint) is None:
        return
    template = checkpoint.template
    published = None if template is None else TEMPLATE_HASHES.get(template.sha256)
    behavior = None if template is None or published else probe_template(template)
    # Suggest the next plugin unless the template is newer than that plugin as well.
    later = behavior is not None and (
        behavior.opt_out or bool(behavior.inputs - {*TEMPLATE_INPUTS, "preserve_thinking"})
    )
    pip = None if later else NEXT
    evidence = [*_config_evidence(checkpoint.config, pip)]
    if template is not None and published:
        value = f"sha256 {template.sha256[:12]}, published, {published}"
        evidence.append(Evidence(supports=True, field="chat template", value=value))
    elif behavior is not None:
        evidence += _template_evidence(behavior, pip)
    yield Claim(generation=GENERATION, evidence=tuple(evidence))


def architecture_of(checkpoint: CheckpointView) -> str | None:
    """The architecture of a checkpoint; ``None`` if it is not of this family.

    Raises:
        InputError: see `mismatch.refuse`.
    """
    architecture = ARCHITECTURES.get(str(checkpoint.config.get("model_type")))
    if architecture is not None:
        mismatch.refuse(checkpoint, moe=architecture == MOE)
    return architecture


def _config_evidence(config: Mapping[str, Any], pip: str | None) -> Iterator[Evidence]:
    where, bos = bos_of(config)
    if bos is not None:
        yield Evidence(
            supports=False,
            field=where,
            value=str(bos),
            expected="null or absent",
            pip=pip if bos == ENDOFTEXT else None,
        )
    elif as_published_without_bos(config):
        yield Evidence(
            supports=True,
            field=where,
            value="null" if "bos_token_id" in text_config(config) else "absent",
        )


def _template_evidence(behavior: TemplateBehavior, pip: str | None) -> Iterator[Evidence]:
    where = "chat template"
    preserving = behavior.opt_in or behavior.opt_out
    if preserving:
        yield Evidence(
            supports=False,
            field=where,
            value=f"keeps earlier reasoning {preserving_when(behavior)}",
            expected="no such switch",
            pip=pip,
        )
    if behavior.arguments == "JSON":
        yield Evidence(
            supports=False,
            field=where,
            value="scalar tool arguments as JSON true and null",
            expected="Python's True and None",
            pip=pip,
        )
    if behavior.arguments == "Python" and behavior.thinking and not preserving:
        yield Evidence(
            supports=True, field=where, value="renders tool arguments and thinking as 3.5 does"
        )


def preserving_when(behavior: TemplateBehavior) -> str:
    """The condition under which a template keeps the reasoning of earlier turns."""
    if behavior.opt_in:
        return "if preserve_thinking is true"
    return "unless preserve_thinking is false"
