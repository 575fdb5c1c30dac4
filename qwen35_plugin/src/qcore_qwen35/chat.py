"""Chat format of Qwen 3.5: turn markers, prompt tails, thinking switches.

This file decides what delimits a turn in the rendered text and what is never supervised: at
inference ``<think>`` and its newline are part of the prompt, and so is a complete empty think block
when thinking is off. Everything after that, up to and including ``<|im_end|>``, is the model's
output.

Code: ``QC-QWEN35-020`` a template switch that is neither true nor false.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qcore.api import ChatFormat, Finding, PreflightRequest, Severity

from .reply import parse_reply

#: Special tokens of the tokenizer: text that contains them would become control tokens. A media
#: reader adds its own, and core refuses every other token that the tokenizer marks as special.
CONTROL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>",
)  # fmt: skip

QWEN35 = ChatFormat(
    turn_start="<|im_start|>",
    role_end="\n",
    turn_end="<|im_end|>",
    assistant="assistant",
    prompt_tails=("<think>\n\n</think>\n\n", "<think>\n"),
    control=CONTROL,
    roles=("system", "user", "assistant", "tool"),
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
    thinking_switch="enable_thinking",
    call_tags=("<tool_call>", "</tool_call>"),
    result_tags=("<tool_response>", "</tool_response>"),
    parse=parse_reply,
)

#: Variables that the template compares with ``is true`` or ``is false``.
SWITCHES = ("enable_thinking",)


def findings(request: PreflightRequest) -> Iterator[Finding]:
    """Findings about the template switches of Qwen 3.5."""
    yield from switch_findings(request, SWITCHES, "QC-QWEN35-020")


def switch_findings(
    request: PreflightRequest, switches: Sequence[str], code: str
) -> Iterator[Finding]:
    """Refuse a switch that is a string or number: the template would treat it as not set."""
    variables = request.template_kwargs
    for name in switches:
        if not isinstance(variables.get(name, True), bool):
            yield Finding(
                code=code,
                severity=Severity.ERROR,
                what="has no effect: the chat template only compares it with true and false",
                field=f"chat_template_kwargs.{name}",
                found=repr(variables[name]),
                expected="true or false, without quotes",
            )
