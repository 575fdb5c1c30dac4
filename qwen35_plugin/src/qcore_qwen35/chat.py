"""Chat format of Qwen 3.5: turns, thinking, and what inference puts in the prompt.

This file decides what is a turn in the rendered text and what is never trained: ``<think>``
and its newline are in the prompt at inference, and so is a whole empty think block when
thinking is off. Everything after that, up to ``<|im_end|>`` and with it, is the model's.

Code: ``QC-QWEN35-020`` a switch of the template that is neither true nor false.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qcore.api import ChatFormat, Finding, PreflightRequest, Severity

#: Tokens that the tokenizer marks special: text that holds one would become a control token.
#: Those of media are their reader's to name, and any that is marked special is refused with them.
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
)

#: Variables that the template compares with ``is true`` or ``is false``.
SWITCHES = ("enable_thinking",)


def findings(request: PreflightRequest) -> Iterator[Finding]:
    """What 3.5's chat rules have to say of a run."""
    yield from switch_findings(request, SWITCHES, "QC-QWEN35-020")


def switch_findings(
    request: PreflightRequest, switches: Sequence[str], code: str
) -> Iterator[Finding]:
    """A switch that is a text or a number: the template would take it for not set."""
    variables = request.template_kwargs
    for name in switches:
        if not isinstance(variables.get(name, True), bool):
            yield Finding(
                code=code,
                severity=Severity.ERROR,
                what="has no effect: the chat template asks whether it is true or is false",
                field=f"chat_template_kwargs.{name}",
                found=repr(variables[name]),
                expected="true or false, without quotes",
            )
