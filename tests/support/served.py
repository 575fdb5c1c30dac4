"""A slow oracle of what serving shows and produces, and conversations to compare it with.

The oracle renders each assistant turn by itself with transformers' ``apply_chat_template``: the
prompt that serving gives it and the conversation through it. It shares no code with core.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

END = "<|im_end|>"
_TEXTS = (
    "Where is Oslo?", "In Norway.", "  indented\n", "naïve e\u0301tude 👍🏽", "हिन्दी में उत्तर",
    "مُحَمَّد كتب", "line one\n\nline two", "x", "`code`\n    return 1\n", "7", "<b>bold</b>",
)  # fmt: skip
#: Without null: repairs drop a null argument that no schema declares, as Arrow's padding.
_VALUES: tuple[Any, ...] = (
    "Paris",
    "two\nlines",
    3,
    2.5,
    True,
    {"a": [1, "b"]},
    ["x", {"y": 1}],
    "",
    "हिन्दी",
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "description": "Finds <things>",
            # Of any type: a null of a property that a function does not have is padding.
            "parameters": {"type": "object", "properties": {"key_0": {}, "key_1": {}}},
        },
    },
    {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}},
]


def conversation(rng: random.Random) -> dict[str, Any]:
    """A random row; together they reach every branch of the Qwen templates without media."""
    messages: list[dict[str, Any]] = []
    tools = rng.random() < 0.5
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": _content(rng)})
    for _ in range(rng.randrange(1, 5)):
        messages.append({"role": "user", "content": _content(rng)})
        for _ in range(rng.randrange(0, 3) if tools else 0):
            calls = rng.randrange(1, 4)  # each of them has a result
            messages.append(_assistant(rng, calls=calls))
            messages += [{"role": "tool", "content": _content(rng)} for _ in range(calls)]
        messages.append(_assistant(rng))
    if rng.random() < 0.2:
        rng.choice([m for m in messages if m["role"] == "assistant"][:-1] or [{}])["train"] = False
    row: dict[str, Any] = {"messages": messages}
    if tools or rng.random() < 0.1:
        row["tools"] = TOOLS
    return row


def _content(rng: random.Random) -> Any:
    text = rng.choice(_TEXTS)
    if rng.random() < 0.2:
        return [{"type": "text", "text": text}, {"type": "text", "text": rng.choice(_TEXTS)}]
    return text


def _assistant(rng: random.Random, calls: int = 0) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": rng.choice(_TEXTS)}
    kind = rng.random()
    if kind < 0.4:
        message["reasoning_content"] = rng.choice(("Because.", "Step 1.\n\nStep 2.", "हिन्दी"))
    elif kind < 0.5:
        message["reasoning_content"] = rng.choice(("", " \n"))
    elif kind < 0.6:
        message["content"] = f"<think>\nInline.\n</think>\n\n{message['content']}"
    if calls:
        if rng.random() < 0.4:
            message["content"] = rng.choice(("", None)) if kind < 0.5 or kind >= 0.6 else (
                "<think>\nInline.\n</think>\n\n"
            )  # fmt: skip
        message["tool_calls"] = [
            {"type": "function", "function": {"name": "find", "arguments": {
                f"key_{n}": rng.choice(_VALUES) for n in range(rng.randrange(0, 3))
            }}}
            for _ in range(calls)
        ]  # fmt: skip
    return message


@dataclass(frozen=True)
class Served:
    """A turn as serving has it: the prompt's ids, and those that the model has to produce."""

    index: int
    thinking: bool
    prompt: tuple[int, ...]
    reply: tuple[int, ...]


class Oracle:
    """Renders with transformers, one turn at a time."""

    def __init__(self, tokenizer: Path, template: str) -> None:
        from transformers import PreTrainedTokenizerFast

        self._tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
        self._template = template

    def text(self, messages: Any, tools: Any, **variables: Any) -> str:
        """The rendering, in the composed form that the tokenizer reads."""
        made: str = self._tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=self._template, tokenize=False, **variables
        )
        return unicodedata.normalize("NFC", made)

    def ids(self, text: str) -> tuple[int, ...]:
        """Ids as ``apply_chat_template(tokenize=True)`` gives them of a rendering."""
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def template_ids(self, row: dict[str, Any], count: int, **variables: Any) -> tuple[int, ...]:
        """Ids of the first messages of a row."""
        clean = [{k: v for k, v in m.items() if k != "train"} for m in row["messages"][:count]]
        made = self._tokenizer.apply_chat_template(
            clean, tools=row.get("tools"), chat_template=self._template, tokenize=True,
            return_dict=False, **variables,
        )  # fmt: skip
        return tuple(made)

    def rendered(self, row: dict[str, Any], **variables: Any) -> Iterator[tuple[int, str, str]]:
        """Index, prompt and rendering of every assistant turn that is not marked."""
        tools = row.get("tools")
        # Serving gets no marks of training.
        clean = [{k: v for k, v in m.items() if k != "train"} for m in row["messages"]]
        for index, message in enumerate(row["messages"]):
            if message["role"] != "assistant" or message.get("train") is False:
                continue
            given = {"enable_thinking": reasoned(message), **variables}
            prompt = self.text(clean[:index], tools, add_generation_prompt=True, **given)
            yield index, prompt, self.text(clean[: index + 1], tools, **given)

    def unserved(self, row: dict[str, Any], **variables: Any) -> int | None:
        """The first turn whose rendering does not begin with the prompt that serving shows."""
        turns = self.rendered(row, **variables)
        return next((n for n, prompt, whole in turns if not whole.startswith(prompt)), None)

    def turns(self, row: dict[str, Any], **variables: Any) -> list[Served]:
        """What serving shows and produces for every assistant turn that is not marked.

        The model reads the tokens of the prompt and then produces its own, so that no token is
        half prompt and half reply.
        """
        made = []
        for index, prompt, whole in self.rendered(row, **variables):
            assert whole.startswith(prompt), "the template itself is not consistent"
            end = whole.rindex(END) + len(END)
            reply = self.ids(whole[len(prompt) : end])
            thinking = reasoned(row["messages"][index])
            made.append(Served(index, thinking, self.ids(prompt), reply))
        return made


def reasoned(message: dict[str, Any]) -> bool:
    """Whether a message has reasoning, as a key or inline."""
    return bool((message.get("reasoning_content") or "").strip()) or (
        "</think>" in (message["content"] or "")
    )
