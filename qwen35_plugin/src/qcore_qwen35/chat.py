"""Chat format of Qwen 3.5: turns, thinking, and what inference puts in the prompt.

This file decides what is a turn in the rendered text and what is never trained: ``<think>``
and its newline are in the prompt at inference, and so is a whole empty think block when
thinking is off. Everything after that, up to ``<|im_end|>`` and with it, is the model's.
"""

from __future__ import annotations

from qcore.records import ChatFormat

#: Tokens that the tokenizer marks special: text that holds one would become a control token.
CONTROL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
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
