"""Evidence for and against Qwen 3.6, which shares its architectures with 3.5 and later generations.

All of them have the same ``model_type``, class and shapes. What counts:

================================================  =====================================
observation                                       counts as
================================================  =====================================
template hash of the published template           for; nothing is rendered
template renders exactly as the published one     for
under each of its switches
text ``bos_token_id`` 248044                      nothing: later generations have it too
text ``bos_token_id`` null or absent in a config  against; means 3.5
that is otherwise as published
text ``bos_token_id`` anything else               against
scalar tool arguments as Python's True and None   against; means 3.5
earlier reasoning kept unless                     against; newer than 3.6
``preserve_thinking`` is false
a variable that 3.6 does not read                 against, added by core; newer than 3.6
no template, or none of these observations        nothing
================================================  =====================================

A training template that keeps all reasoning and has no ``preserve_thinking`` shows JSON arguments
at most, which later generations have too, so it is not evidence. The generation of such a
checkpoint is unproven, and ``--generation 3.6`` is accepted for it. The layout of the prediction
layers (fused in 3.6, split by expert in 3.5) and the repository's name do not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qcore.api import Claim, Evidence
from qcore_qwen35.api import (
    EARLIER,
    ENDOFTEXT,
    HEADER,
    LATER,
    NO_THINK,
    THINK,
    TemplateBehavior,
    architecture_of,
    as_published_without_bos,
    bos_of,
    probe_template,
)
from qcore_qwen35.api import TEMPLATE_INPUTS as INPUTS_OF_3_5

if TYPE_CHECKING:
    from qcore.api import CheckpointView

GENERATION = "3.6"
TEMPLATE_HASHES = ("e84f32a23fdda27689f868aa4a1a5621f41133e51a48d7f3efcbea2839574259",)
TEMPLATE_INPUTS = (*INPUTS_OF_3_5, "preserve_thinking")

_WHERE = "chat template"
_USER, _END = "<|im_start|>user\n", "<|im_end|>\n"


def claims(checkpoint: CheckpointView) -> Iterator[Claim]:
    """Yield the claim of Qwen 3.6 with its evidence for and against.

    Raises:
        InputError: ``QC-QWEN35-004``, ``-005`` for tensors of another model.
    """
    if architecture_of(checkpoint) is None:
        return
    evidence = [*_config_evidence(checkpoint.config)]
    template = checkpoint.template
    if template is not None and template.sha256 in TEMPLATE_HASHES:
        evidence.append(
            Evidence(supports=True, field=_WHERE, value=f"sha256 {template.sha256[:12]}, published")
        )
    elif template is not None and (behavior := probe_template(template)) is not None:
        evidence += _template_evidence(behavior)
    yield Claim(generation=GENERATION, evidence=tuple(evidence))


def _config_evidence(config: Mapping[str, Any]) -> Iterator[Evidence]:
    where, bos = bos_of(config)
    if bos is None and as_published_without_bos(config):
        yield Evidence(supports=False, field=where, value="null or absent", expected=str(ENDOFTEXT))
    elif bos is not None and bos != ENDOFTEXT:
        yield Evidence(supports=False, field=where, value=str(bos), expected=str(ENDOFTEXT))


def _template_evidence(behavior: TemplateBehavior) -> Iterator[Evidence]:
    if behavior.arguments == "Python":
        yield Evidence(
            supports=False,
            field=_WHERE,
            value="scalar tool arguments as Python's True and None",
            expected="JSON true and null",
        )
    if behavior.opt_out:
        yield Evidence(
            supports=False,
            field=_WHERE,
            value="keeps earlier reasoning unless preserve_thinking is false",
            expected="kept only if preserve_thinking is true",
        )
    if renders_as_3_6(behavior):
        yield Evidence(
            supports=True,
            field=_WHERE,
            value="renders exactly as 3.6 does under each of its switches",
        )


def renders_as_3_6(behavior: TemplateBehavior) -> bool:
    """Whether the probe is rendered exactly as by the published 3.6 template."""
    return (
        behavior.plain
        == behavior.thinking_on
        == behavior.preserve_off
        == _rendered(kept=False, tail=THINK)
        and behavior.thinking_off == _rendered(kept=False, tail=NO_THINK)
        and behavior.preserve_on == _rendered(kept=True, tail=THINK)
    )


def _rendered(*, kept: bool, tail: str) -> str:
    """The probe as the published 3.6 template renders it."""
    earlier = f"<think>\n{EARLIER}\n</think>\n\n" if kept else ""
    call = (
        "<tool_call>\n<function=probe>\n<parameter=flag>\ntrue\n</parameter>\n"
        "<parameter=nothing>\nnull\n</parameter>\n</function>\n</tool_call>"
    )
    return (
        f"{_USER}one{_END}{HEADER}{earlier}two{_END}{_USER}three{_END}"
        f"{HEADER}<think>\n{LATER}\n</think>\n\n{call}{_END}"
        f"{_USER}<tool_response>\nfour\n</tool_response>{_END}{HEADER}{tail}"
    )
