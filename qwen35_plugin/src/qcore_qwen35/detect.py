"""Signs and bars of Qwen 3.5: what tells it from its siblings with the same blocks.

Later generations carry the same ``model_type``, class and shapes, so the evidence lies beside
the weights. This file decides what counts:

================================================  =====================================
seen                                              counts as
================================================  =====================================
template hash is a published 3.5 one              sign; nothing is rendered
template renders as 3.5 does in every respect     sign
text ``bos_token_id`` null or absent beside the   sign; not in a config that lost its
family's shape keys and ``eos_token_id`` 248044   token ids or has keys of a later one
text ``bos_token_id`` set                         bar; 248044 is what 3.6 and later have
``preserve_thinking`` changes what is rendered    bar
scalar tool arguments are rendered as JSON        bar
no template, or one that shows none of this       nothing
================================================  =====================================

"In every respect" is: ``True`` and ``None`` in tool arguments, ``enable_thinking`` switching
between the two prompt tails, reasoning before the last user query stripped and after it kept.
A training template that keeps all reasoning is therefore no sign, and no bar either.

A bar names the plugin that would fit, unless the template shows that the checkpoint is newer
than that plugin too. The layout of the prediction layers and the repository's name are not
judged; neither is the text-level ``partial_rotary_factor``, which re-saves add and remove.

An MLX export is refused before anything is judged: it is no renaming. Its convolutions lie
``[C, 4, 1]`` and one is added to its zero-centred norms, so under other names it would load
and compute ``1 + (1 + w)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from qcore.errors import InputError
from qcore.records import Bar, Claim, Sign

from .table import text_config

if TYPE_CHECKING:
    from qcore.checkpoint import Checkpoint
    from qcore.data.render import Template

ARCHITECTURE = "qwen3_5"
GENERATION = "3.5"
NEXT = "qcore-qwen36"  #: distribution for what only 3.6 or later has

#: Published templates by default: thinking (4B and larger), not thinking (0.8B, 2B).
TEMPLATE_HASHES = {
    "a4aee8afcf2e0711942cf848899be66016f8d14a889ff9ede07bca099c28f715": "thinking",
    "273d8e0e683b885071fb17e08d71e5f2a5ddfb5309756181681de4f5a1822d80": "no thinking",
}
TEMPLATE_INPUTS = ("add_generation_prompt", "add_vision_id", "enable_thinking", "messages", "tools")

ENDOFTEXT = 248044
# Trainers of transformers before 5.23 copy the tokenizer's ids into the config: bos becomes null
# whatever it was, and eos 248046. So a null bos speaks only where eos is still as published.
_SHAPE_KEYS = ("linear_conv_kernel_dim", "linear_num_key_heads", "linear_num_value_heads")
_LATER_KEYS = ("output_gate_type", "language_model_only")

_EARLIER, _LATER = "reasoning-of-an-earlier-turn", "reasoning-of-the-last-turn"
_PROBE: list[dict[str, Any]] = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "reasoning_content": _EARLIER, "content": "two"},
    {"role": "user", "content": "three"},
    {
        "role": "assistant",
        "reasoning_content": _LATER,
        "content": "",
        "tool_calls": [
            {
                "type": "function",
                "function": {"name": "probe", "arguments": {"flag": True, "nothing": None}},
            }
        ],
    },
    {"role": "tool", "content": "four"},
]
_HEADER = "<|im_start|>assistant\n"
_THINK, _NO_THINK = "<think>\n", "<think>\n\n</think>\n\n"


class _Look(NamedTuple):
    """What a template shows: by its hash, or by rendering the probe."""

    published: str | None = None  #: flavour of a published 3.5 template
    opt_in: bool = False  #: earlier reasoning is kept if preserve_thinking is true
    opt_out: bool = False  #: earlier reasoning is kept unless preserve_thinking is false
    arguments: str | None = None  #: "Python" or "JSON": how scalar tool arguments are rendered
    thinking: bool = False  #: prompt tails and stripping are those of 3.5
    unknown: bool = False  #: reads variables that neither 3.5 nor 3.6 has


def claims(checkpoint: Checkpoint) -> Iterator[Claim]:
    """The claim of 3.5, with everything that speaks for it alone and against it.

    Raises:
        InputError: ``QC-QWEN35-004`` for an MLX export.
    """
    _refuse_mlx(checkpoint)
    look = _look(checkpoint.template)
    pip = None if look.opt_out or look.unknown else NEXT
    evidence = [*_of_config(checkpoint.config, pip), *_of_template(checkpoint.template, look, pip)]
    yield Claim(
        architecture=ARCHITECTURE,
        generation=GENERATION,
        signs=tuple(item for item in evidence if isinstance(item, Sign)),
        bars=tuple(item for item in evidence if isinstance(item, Bar)),
    )


def _refuse_mlx(checkpoint: Checkpoint) -> None:
    """MLX's names, or its convolutions where somebody gave the tensors the hub's names back."""
    for name, header in checkpoint.headers.items():
        turned = name.endswith(".linear_attn.conv1d.weight") and header.shape[2:] == (1,)
        if turned or name.startswith("language_model.model."):
            raise InputError(
                "QC-QWEN35-004",
                "is an MLX export: its norms are shifted and its convolutions turned",
                file=checkpoint.source,
                field=name,
                found=list(header.shape),
                expected="the names and layouts of the original checkpoint",
                fix="name the checkpoint that it was converted from",
            )


def _of_config(config: Mapping[str, Any], pip: str | None) -> Iterator[Sign | Bar]:
    text = text_config(config)
    where = "bos_token_id" if text is config else "text_config.bos_token_id"
    bos = text.get("bos_token_id")
    if bos is not None:
        yield Bar(
            field=where,
            value=str(bos),
            expected="null or absent",
            pip=pip if bos == ENDOFTEXT else None,
        )
    elif (
        text.get("eos_token_id") == ENDOFTEXT
        and all(key in text for key in _SHAPE_KEYS)
        and not any(key in section for key in _LATER_KEYS for section in (text, config))
    ):
        yield Sign(field=where, value="null" if "bos_token_id" in text else "absent")


def _of_template(template: Template | None, look: _Look, pip: str | None) -> Iterator[Sign | Bar]:
    if template is None:
        return
    where = "chat template"
    if look.published:
        yield Sign(field=where, value=f"sha256 {template.sha256[:12]}, published, {look.published}")
    if look.opt_in or look.opt_out:
        when = (
            "if preserve_thinking is true" if look.opt_in else "unless preserve_thinking is false"
        )
        yield Bar(
            field=where, value=f"keeps earlier reasoning {when}", expected="no such switch", pip=pip
        )
    if look.arguments == "JSON":
        yield Bar(
            field=where,
            value="scalar tool arguments as JSON true and null",
            expected="Python's True and None",
            pip=pip,
        )
    if look.arguments == "Python" and look.thinking and not (look.opt_in or look.opt_out):
        yield Sign(field=where, value="renders tool arguments and thinking as 3.5 does")


def _look(template: Template | None) -> _Look:
    if template is None:
        return _Look()
    if template.sha256 in TEMPLATE_HASHES:
        return _Look(published=TEMPLATE_HASHES[template.sha256])
    plain = _render(template)
    if plain is None:
        return _Look()
    # A variable that is not read cannot matter, and every render is a process.
    inputs = template.inputs()
    preserving = "preserve_thinking" in inputs
    arguments = _argument_style(plain)
    return _Look(
        opt_in=preserving and plain != _render(template, preserve_thinking=True),
        opt_out=preserving and plain != _render(template, preserve_thinking=False),
        arguments=arguments,
        thinking=arguments == "Python" and _thinks_as_3_5(template, plain),
        unknown=bool(inputs - {*TEMPLATE_INPUTS, "preserve_thinking"}),
    )


def _render(template: Template, **variables: Any) -> str | None:
    """The probe rendered, or ``None``: a template that refuses the probe shows nothing."""
    try:
        return template.render(_PROBE, add_generation_prompt=True, **variables)
    except InputError:
        return None


def _argument_style(text: str) -> str | None:
    for style, flag, nothing in (("Python", "True", "None"), ("JSON", "true", "null")):
        if all(
            f"<parameter={name}>\n{value}\n</parameter>" in text
            for name, value in (("flag", flag), ("nothing", nothing))
        ):
            return style
    return None


def _thinks_as_3_5(template: Template, plain: str) -> bool:
    if _EARLIER in plain or f"{_HEADER}<think>\n{_LATER}\n</think>\n\n" not in plain:
        return False
    on, off = (_render(template, enable_thinking=value) for value in (True, False))
    tails = [None if text is None else text.rpartition(_HEADER)[2] for text in (on, off)]
    return tails == [_THINK, _NO_THINK] and plain in (on, off)
