"""Evidence for and against Qwen 3.5, which shares its blocks with later generations.

Later generations carry the same ``model_type``, class and shapes, so the evidence lies beside
the weights. This file decides what counts:

================================================  =====================================
seen                                              counts as
================================================  =====================================
template hash is a published 3.5 one              for; nothing is rendered
template renders as 3.5 does in every respect     for
text ``bos_token_id`` null or absent beside the   for; not in a config that lost its
family's shape keys and ``eos_token_id`` 248044   token ids or has keys of a later one
text ``bos_token_id`` set                         against; 248044 is what 3.6 and later have
``preserve_thinking`` changes what is rendered    against
scalar tool arguments are rendered as JSON        against
no template, or one that shows none of this       nothing
================================================  =====================================

"In every respect" is: ``True`` and ``None`` in tool arguments, ``enable_thinking`` switching
between the two prompt tails, reasoning before the last user query stripped and after it kept.
A training template that keeps all reasoning is therefore no evidence.

Evidence against 3.5 names the plugin that would fit, unless the template shows that the
checkpoint is newer than that plugin too. The layout of the prediction layers and the repository's
name are not judged; neither is the text-level ``partial_rotary_factor``, which re-saves add and
remove.

What no generation has, because the tensors are of another model than config.json says, is
refused before anything is judged: in `headers`. What a template shows is found in `probe`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qcore.api import Claim, Evidence

from . import mismatch as headers
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
#: ``model_type`` to architecture; every generation of the family has these.
ARCHITECTURES = {
    "qwen3_5": ARCHITECTURE,
    "qwen3_5_text": ARCHITECTURE,
    "qwen3_5_moe": MOE,
    "qwen3_5_moe_text": MOE,
}
GENERATION = "3.5"
NEXT = "qcore-qwen36"  #: distribution for what only 3.6 or later has

#: Published templates by default: thinking (4B and larger), not thinking (0.8B, 2B).
TEMPLATE_HASHES = {
    "a4aee8afcf2e0711942cf848899be66016f8d14a889ff9ede07bca099c28f715": "thinking",
    "273d8e0e683b885071fb17e08d71e5f2a5ddfb5309756181681de4f5a1822d80": "no thinking",
}


def claims(checkpoint: CheckpointView) -> Iterator[Claim]:
    """The claim of 3.5, with everything that speaks for it alone and against it.

    Raises:
        InputError: as `headers.refuse`, for tensors of another model.
    """
    if architecture_of(checkpoint) is None:
        return
    template = checkpoint.template
    published = None if template is None else TEMPLATE_HASHES.get(template.sha256)
    behavior = None if template is None or published else probe_template(template)
    # The plugin that would fit, unless the template shows that it is newer than that one too.
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
    """The family's architecture that a checkpoint has; ``None`` where it has none of them.

    Raises:
        InputError: as `headers.refuse`, for tensors of another model.
    """
    architecture = ARCHITECTURES.get(str(checkpoint.config.get("model_type")))
    if architecture is not None:
        headers.refuse(checkpoint, moe=architecture == MOE)
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
    """When a template with the switch keeps the reasoning of earlier turns."""
    if behavior.opt_in:
        return "if preserve_thinking is true"
    return "unless preserve_thinking is false"
