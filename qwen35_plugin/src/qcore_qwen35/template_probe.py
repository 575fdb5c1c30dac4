"""Renders a probe conversation with a chat template to detect the Qwen generation.

Generations differ in the template and in little else, so the template is examined by what it
renders: one small conversation (`PROBE`) is rendered under each switch, in core's bounded worker,
and `probe_template` returns the result. This file decides what is rendered; each generation decides
what the result means (`qcore_qwen35.detect`, and the plugins of later generations).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qcore.errors import InputError

from .data import published
from .table import text_config

if TYPE_CHECKING:
    from qcore.api import TemplateView

#: Variables of the published 3.5 templates; later generations add more.
TEMPLATE_INPUTS = published("template_inputs")

EARLIER, LATER = "reasoning-of-an-earlier-turn", "reasoning-of-the-last-turn"
PROBE: list[dict[str, Any]] = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "reasoning_content": EARLIER, "content": "two"},
    {"role": "user", "content": "three"},
    {
        "role": "assistant",
        "reasoning_content": LATER,
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
HEADER = "<|im_start|>assistant\n"
THINK, NO_THINK = "<think>\n", "<think>\n\n</think>\n\n"

ENDOFTEXT = 248044
# Trainers of transformers before 5.23 copy the tokenizer's ids into the config: bos becomes null
# for every model, and eos 248046. A null bos is evidence only if eos is still as published.
_SHAPE_KEYS = ("linear_conv_kernel_dim", "linear_num_key_heads", "linear_num_value_heads")
_LATER_KEYS = ("output_gate_type", "language_model_only")


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateBehavior:
    """The probe rendered with a generation prompt under each template switch.

    Attributes:
        plain: no switch set.
        thinking_on: ``enable_thinking`` true; `None` if the template refuses the probe.
        thinking_off: ``enable_thinking`` false.
        preserve_on: ``preserve_thinking`` true.
        preserve_off: ``preserve_thinking`` false.
        inputs: variables that the template reads, except standard ones.
    """

    plain: str
    thinking_on: str | None
    thinking_off: str | None
    preserve_on: str | None
    preserve_off: str | None
    inputs: frozenset[str]

    @property
    def opt_in(self) -> bool:
        """Whether earlier reasoning is kept if ``preserve_thinking`` is true."""
        return self.plain != self.preserve_on

    @property
    def opt_out(self) -> bool:
        """Whether earlier reasoning is kept unless ``preserve_thinking`` is false."""
        return self.plain != self.preserve_off

    @property
    def arguments(self) -> str | None:
        """``Python`` or ``JSON`` for the form of scalar tool arguments; ``None`` for others."""
        for style, flag, nothing in (("Python", "True", "None"), ("JSON", "true", "null")):
            if all(
                f"<parameter={name}>\n{value}\n</parameter>" in self.plain
                for name, value in (("flag", flag), ("nothing", nothing))
            ):
                return style
        return None

    @property
    def thinking(self) -> bool:
        """Whether thinking is rendered as in the published templates.

        ``enable_thinking`` switches between the two prompt tails; reasoning is stripped before the
        last user query and kept after it.
        """
        last = f"{HEADER}<think>\n{LATER}\n</think>\n\n"
        if EARLIER in self.plain or last not in self.plain:
            return False
        tails = [
            text and text.rpartition(HEADER)[2] for text in (self.thinking_on, self.thinking_off)
        ]
        return tails == [THINK, NO_THINK] and self.plain in (self.thinking_on, self.thinking_off)


def probe_template(template: TemplateView) -> TemplateBehavior | None:
    """Render the probe under each switch; ``None`` if the template refuses the probe.

    Raises:
        InputError: the template does not parse.
    """
    plain = render(template)
    if plain is None:
        return None
    inputs = template.inputs()

    def under(name: str, value: bool) -> str | None:
        # A variable that the template does not read has no effect.
        return render(template, **{name: value}) if name in inputs else plain

    return TemplateBehavior(
        plain=plain,
        thinking_on=under("enable_thinking", True),
        thinking_off=under("enable_thinking", False),
        preserve_on=under("preserve_thinking", True),
        preserve_off=under("preserve_thinking", False),
        inputs=template.switches(),
    )


def render(template: TemplateView, **variables: Any) -> str | None:
    """The rendered probe, or ``None`` if the template refuses it."""
    try:
        return template.render(PROBE, add_generation_prompt=True, **variables)
    except InputError:
        return None


def bos_of(config: Mapping[str, Any]) -> tuple[str, object]:
    """The config key of the begin-of-text id, and the id."""
    text = text_config(config)
    where = "bos_token_id" if text is config else "text_config.bos_token_id"
    return where, text.get("bos_token_id")


def as_published_without_bos(config: Mapping[str, Any]) -> bool:
    """Whether a config has no begin-of-text id and otherwise matches a published 3.5 config.

    False if the config lost its token ids or shape keys or has keys of a later generation: then a
    missing id is not evidence.
    """
    text = text_config(config)
    return (
        text.get("bos_token_id") is None
        and text.get("eos_token_id") == ENDOFTEXT
        and all(key in text for key in _SHAPE_KEYS)
        and not any(key in section for key in _LATER_KEYS for section in (text, config))
    )
