"""An own small template, chat format and tokenizer: what the data tests stand on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from qcore.api import RowError
from qcore.api.records import ChatFormat
from qcore.checkpoint.chat_template import Template
from qcore.data.policies import Policies
from qcore.data.reading import read_records
from qcore.data.rejects import Rejects
from qcore.data.rendering.fitting import fitted
from qcore.data.rendering.masking import Example, encode_sample
from qcore.data.rendering.pieces import PieceEncoder
from qcore.data.rendering.row_plan import plan_row
from qcore.data.rendering.samples import drafts
from qcore.data.rows import ChatRow, RowCheck
from qcore.data.source_counts import SourceCount
from qcore.data.sources.source import Source
from qcore.errors import InputError

FORMAT = ChatFormat(
    turn_start="<|im_start|>",
    role_end="\n",
    turn_end="<|im_end|>",
    assistant="assistant",
    prompt_tails=("<think>\n\n</think>\n\n", "<think>\n"),
    control=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    roles=("system", "user", "assistant", "tool"),
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
)

TEMPLATE = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- if tools %}{{- '<|im_start|>system\\nTools: ' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last or keep_thinking is defined and keep_thinking is true %}
            {{- '<think>\\n' + (m.reasoning_content or '') | trim + '\\n</think>\\n\\n' }}
        {%- endif %}
        {%- generation %}{{- m.content | default('') | trim }}{% endgeneration %}
        {%- for call in m.tool_calls or [] %}
            {%- set f = call.function or call %}
            {{- '<tool_call>' + f.name + (f.arguments | tojson) + '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>' + m.content + '</tool_response><|im_end|>\\n' }}
    {%- elif m.role == 'system' and not loop.first %}
        {{- raise_exception('System message must be first.') }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content | trim + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{% endif %}
"""

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>"]
_CORPUS = [
    "The quick brown fox answers the user and thinks about the weather in Paris. " * 3,
    "हिन्दी भाषा में उत्तर। مُحَمَّد كتب الرسالة. 你好世界。 e\u0301tude naïve",
    'user assistant system\n\nTools: {"name": "find"}\n\n',
]


def own_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.add_tokens(_MARKS)
    return tokenizer


def own_template(text: str = TEMPLATE) -> Template:
    return Template(text, "own.jinja")


def encode_row(
    row: ChatRow,
    template: Template,
    tokenizer: Tokenizer,
    chat_format: ChatFormat,
    max_length: int,
    *,
    variables: Mapping[str, Any] | None = None,
) -> Example:
    """One row of text in one rendering to ids and labels: what `dataset` does, a row at a time."""
    try:
        plan = plan_row(row, Policies(history="as_rendered"), chat_format, "", False)
        texts: list[str | InputError] = []
        for prefix in plan.prefixes():
            shown = {**(variables or {}), **prefix.variables}
            try:
                messages = row.messages[: prefix.count]
                texts.append(template.render(messages, row.tools, prefix.prompt, **shown))
            except InputError as error:
                texts.append(error)
        pieces = PieceEncoder(tokenizer, chat_format.turn_start)
        (draft,) = drafts(plan, texts, chat_format, pieces)
        encoded = encode_sample(draft, plan, tokenizer, chat_format, pieces=pieces)
        (kept,) = fitted([encoded], max_length, "refuse", tokenizer)
    except RowError as bad:
        raise bad.error(None, row.line) from None
    return kept.example


def read_file(
    path: Path,
    rejects: Rejects | None = None,
    *,
    control: Sequence[str] = (),
    counts: list[SourceCount] | None = None,
) -> Iterator[ChatRow]:
    """The valid rows of one file; without `rejects` the bad ones are raised at the end."""
    found, counts = rejects or Rejects(), [] if counts is None else counts
    source = Source(name=str(path), files=(path,))
    check = RowCheck(FORMAT, control)

    for numbered in read_records([source], counts):
        record = numbered.record.parse()
        try:
            if isinstance(record.value, RowError):
                raise record.value
            row = check(record.line, record.value)
        except RowError as bad:
            found.add(numbered, bad)
        else:
            yield replace(row, row=numbered.row, path=path, source=source, format="openai")
    if rejects is None:
        found.stop(counts)


class FakeCheckpoint:
    """What the data code reads of a `Checkpoint`."""

    def __init__(self, path: Path, template: Template | None) -> None:
        self.path = path
        self.template = template
        self.tokenizer_config = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|pad|>"}}

    @property
    def sidecars(self) -> tuple[str, ...]:
        return tuple(sorted(entry.name for entry in self.path.iterdir()))

    def file(self, name: str) -> Path:
        return self.path / name


def write_rows(path: Path, rows: list[object]) -> Path:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def user(text: str) -> dict[str, object]:
    return {"role": "user", "content": text}


def bot(text: str | None = None, **more: object) -> dict[str, object]:
    return {"role": "assistant", "content": text, **more}


def call(name: str, arguments: object) -> dict[str, object]:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}
