"""Prompts for a comparison with stock transformers, and how both sides render and tokenize them.

This file decides what is compared where the user names no prompts (random ordinary tokens, and a
conversation for the chat template), how a file of prompts is read, and when two chat templates
count as the same: when they give the same tokens. The template is first rendered in the bounded
worker; only then by transformers, in this process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.tokenizer_files import TokenizerFiles
from ..data.rendering.template_kwargs import special_tokens
from ..errors import InputError, NumericError, QcoreError
from ..io import strict_json
from ..io.atomic import reading
from .stock_class import quiet, refusals, refuse_code

MOST, LONGEST = 32, 512  #: prompts of a file, and tokens of each, that are compared
_LENGTHS = (33, 7, 70, 18)  # of random prompts: shorter and longer than a chunk of 64
_SPEAK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a city in Peru."},
    {"role": "assistant", "content": "Lima."},
    {"role": "user", "content": "And in Chile?  (1 word)\n"},
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt.

    Attributes:
        name: for the report.
        text: text that is tokenized as it is; ``None`` for a conversation or random tokens.
        messages: a conversation, rendered with the chat template.
        tools: its tools.
        ids: random tokens.
    """

    name: str
    text: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    ids: tuple[int, ...] = ()


def read_prompts(path: Path) -> list[Prompt]:
    """Read prompts: JSON Lines of ``messages`` or ``text``, or lines of plain text.

    Raises:
        InputError: ``QC-STOCK-003`` a line that is neither; ``QC-READ-001`` an unreadable file.
    """
    try:
        with reading(path):
            lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise _bad(path, None, "is not UTF-8") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix not in (".jsonl", ".json", ".ndjson"):
            prompts.append(Prompt(name=f"line {number}", text=line))
            continue
        try:
            row = strict_json.loads(line)
        except (ValueError, RecursionError):
            raise _bad(path, number, "is not a JSON object") from None
        prompts.append(_row(path, number, row))
    if not prompts:
        raise _bad(path, None, "has no prompt")
    return prompts


def _row(path: Path, number: int, row: Any) -> Prompt:
    name = f"line {number}"
    if isinstance(row, dict):
        messages, text, tools = row.get("messages"), row.get("text"), row.get("tools")
        if isinstance(text, str) and text:
            return Prompt(name=name, text=text)
        if isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
            return Prompt(name=name, messages=messages, tools=tools or None)
    raise _bad(path, number, "has neither messages nor text")


def _bad(path: Path, number: int | None, what: str) -> InputError:
    return InputError(
        "QC-STOCK-003",
        what,
        file=path,
        field=None if number is None else f"line {number}",
        expected='{"messages": [...]} or {"text": "..."} on each line, or plain text',
        fix="correct the file",
    )


def random_prompts(checkpoint: Checkpoint) -> list[Prompt]:
    """Random tokens, without those that stand for media or turns."""
    tokenizer = checkpoint.load_tokenizer()
    ordinary = sorted(tokenizer.get_vocab(with_added_tokens=False).values())
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for number, length in enumerate(_LENGTHS, 1):
        drawn = torch.randint(len(ordinary), (length,), generator=generator).tolist()
        ids = tuple(ordinary[index] for index in drawn)
        prompts.append(Prompt(name=f"random {number}", ids=ids))
    return prompts


class Renderer:
    """Renders and tokenizes with the tokenizer and template of one folder, as core does.

    Args:
        checkpoint: the folder.
        variables: of the chat template.
    """

    def __init__(self, checkpoint: Checkpoint, variables: Mapping[str, Any]) -> None:
        self.checkpoint = checkpoint
        self.tokenizer = checkpoint.load_tokenizer()
        self.variables = variables

    def text(self, prompt: Prompt) -> str | None:
        """The rendered prompt; ``None`` for random tokens."""
        if prompt.messages is None:
            return prompt.text
        template = self.checkpoint.template
        if template is None:
            return None
        values = {**special_tokens(self.checkpoint.tokenizer_config), **self.variables}
        return template.render(
            prompt.messages, prompt.tools, add_generation_prompt=_opens(prompt), **values
        )

    def ids(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt; empty where it cannot be rendered."""
        if prompt.ids:
            return list(prompt.ids)
        text = self.text(prompt)
        if text is None:
            return []
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _opens(prompt: Prompt) -> bool:
    """Whether the prompt ends with the opening of the assistant's turn."""
    return bool(prompt.messages) and (prompt.messages or [])[-1].get("role") != "assistant"


def documents(
    prompts: Sequence[Prompt], renderer: Renderer, notes: list[str]
) -> list[tuple[str, Tensor]]:
    """Name and tokens of the first `MOST` prompts, each cut to `LONGEST` tokens.

    Args:
        prompts: at least one.
        renderer: ours.
        notes: receives a line for each kind of prompt that is not compared as it is.

    Raises:
        InputError: ``QC-STOCK-003`` no prompt has tokens.
    """
    every = [(prompt.name, renderer.ids(prompt)) for prompt in prompts[:MOST]]
    found = [(name, torch.tensor(ids[:LONGEST])) for name, ids in every if ids]
    if not found:
        raise InputError(
            "QC-STOCK-003",
            "has no chat template, and the prompts are conversations",
            file=renderer.checkpoint.path,
            expected="a chat template, or prompts of text",
            fix='write {"text": "..."} on each line of the file of prompts',
        )
    if (more := len(prompts) - MOST) > 0:
        notes.append(f"the first {MOST} prompts are compared, and {more} are not")
    if empty := len(every) - len(found):
        notes.append(f"{empty} conversations are not compared: the model has no chat template")
    if cut := sum(len(ids) > LONGEST for _, ids in every):
        notes.append(f"{cut} prompts are compared up to token {LONGEST}")
    return found


def template_problems(
    prompts: Sequence[Prompt],
    renderer: Renderer,
    folder: Path,
    base: Renderer | None,
) -> Iterator[QcoreError]:
    """Compare the tokens of rendered conversations and of text.

    Args:
        prompts: those of the user; a conversation of this file is added.
        renderer: ours, on the folder that is verified.
        folder: whose tokenizer and template transformers loads.
        base: ours, on the base; ``None`` without one.

    Yields:
        ``QC-STOCK-008``, once for each of the two comparisons.
    """
    import transformers

    asked = [p for p in prompts if not p.ids] + [Prompt(name="a conversation", messages=_SPEAK)]
    refuse_code(folder)
    ours = {prompt.name: renderer.ids(prompt) for prompt in asked}  # in the bounded worker
    _render_bounded(asked, folder, renderer)
    with quiet(), refusals(folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        theirs = {
            prompt.name: _stock_ids(tokenizer, prompt, renderer.variables)
            for prompt in asked
            if ours[prompt.name]
        }
    yield from _different(ours, theirs, folder, "transformers")
    if base is not None:
        of_base = {prompt.name: base.ids(prompt) for prompt in asked}
        yield from _different(ours, of_base, folder, f"the base {base.checkpoint.source}")


def _render_bounded(prompts: Sequence[Prompt], folder: Path, renderer: Renderer) -> None:
    """Render the conversations by the template of a folder that is not the renderer's.

    transformers renders in this process, without a limit: what never ends must end here.

    Raises:
        InputError: as `Template.render`.
    """
    if folder == renderer.checkpoint.path:
        return
    files = TokenizerFiles.of(folder)
    if files.template is None:
        return
    values = {**special_tokens(files.tokenizer_config), **renderer.variables}
    with files.template as template:
        for prompt in prompts:
            if prompt.messages is not None:
                template.render(
                    prompt.messages, prompt.tools, add_generation_prompt=_opens(prompt), **values
                )


def _stock_ids(tokenizer: Any, prompt: Prompt, variables: Mapping[str, Any]) -> list[int]:
    text = prompt.text
    if prompt.messages is not None:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in prompt.messages],
            tools=prompt.tools,
            add_generation_prompt=_opens(prompt),
            tokenize=False,
            **variables,
        )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _different(
    ours: Mapping[str, list[int]], others: Mapping[str, list[int]], folder: Path, whose: str
) -> Iterator[QcoreError]:
    for name, other in others.items():
        if (mine := ours[name]) == other:
            continue
        at = next((n for n, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), None)
        at = min(len(mine), len(other)) if at is None else at
        yield NumericError(
            "QC-STOCK-008",
            f"gives other tokens than {whose}, by its chat template or tokenizer",
            file=folder,
            field=name,
            found=f"{mine[at : at + 3]} at token {at} of {len(mine)}",
            expected=f"{other[at : at + 3]} of {len(other)}",
            fix="restore chat_template.jinja and the tokenizer files of the base",
        )
        return
