"""What the chat template of this family shows when it is rendered, for any generation of it.

Generations differ in the template and hardly in anything else, so the template is read by what
it does: one small conversation (`PROBE`) is rendered under each switch, in core's bounded
worker, and `probe_template` says what was seen. This file decides what is looked at; what it
counts for is each generation's own business (`qcore_qwen35.detect`, and the plugins of later ones).
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

#: Variables of the published templates of 3.5; later generations add theirs.
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
# whatever it was, and eos 248046. So a null bos speaks only where eos is still as published.
_SHAPE_KEYS = ("linear_conv_kernel_dim", "linear_num_key_heads", "linear_num_value_heads")
_LATER_KEYS = ("output_gate_type", "language_model_only")


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateBehavior:
    """What a template shows: the probe with a generation prompt, under one switch after another.

    Attributes:
        plain: no switch set.
        thinking_on: ``enable_thinking`` true; `None` where the template then refuses the probe.
        thinking_off: ``enable_thinking`` false.
        preserve_on: ``preserve_thinking`` true.
        preserve_off: ``preserve_thinking`` false.
        inputs: variables that it reads, beyond those that any template may.
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
        """How scalar tool arguments are rendered; ``None`` for calls in another form."""
        for style, flag, nothing in (("Python", "True", "None"), ("JSON", "true", "null")):
            if all(
                f"<parameter={name}>\n{value}\n</parameter>" in self.plain
                for name, value in (("flag", flag), ("nothing", nothing))
            ):
                return style
        return None

    @property
    def thinking(self) -> bool:
        """Whether thinking is the family's.

        ``enable_thinking`` switches between the two prompt tails, reasoning before the last
        user query is stripped and after it kept.
        """
        last = f"{HEADER}<think>\n{LATER}\n</think>\n\n"
        if EARLIER in self.plain or last not in self.plain:
            return False
        tails = [
            text and text.rpartition(HEADER)[2] for text in (self.thinking_on, self.thinking_off)
        ]
        return tails == [THINK, NO_THINK] and self.plain in (self.thinking_on, self.thinking_off)


def probe_template(template: TemplateView) -> TemplateBehavior | None:
    """Render the probe under each switch; ``None`` where the template refuses it.

    Raises:
        InputError: the template does not parse.
    """
    plain = render(template)
    if plain is None:
        return None
    inputs = template.inputs()

    def under(name: str, value: bool) -> str | None:
        # A variable that is not read cannot matter.
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
    """The probe rendered, or ``None``: a template that refuses the probe shows nothing."""
    try:
        return template.render(PROBE, add_generation_prompt=True, **variables)
    except InputError:
        return None


def bos_of(config: Mapping[str, Any]) -> tuple[str, object]:
    """Where the begin-of-text id stands in a config, and the id."""
    text = text_config(config)
    where = "bos_token_id" if text is config else "text_config.bos_token_id"
    return where, text.get("bos_token_id")


def as_published_without_bos(config: Mapping[str, Any]) -> bool:
    """Whether a config has no begin-of-text id and is otherwise as 3.5 was published.

    False for one that lost its token ids or shape keys, and for one with keys of a later
    generation: there a missing id says nothing.
    """
    text = text_config(config)
    return (
        text.get("bos_token_id") is None
        and text.get("eos_token_id") == ENDOFTEXT
        and all(key in text for key in _SHAPE_KEYS)
        and not any(key in section for key in _LATER_KEYS for section in (text, config))
    )
