"""Samples and findings on the terminal: colors there, plain text with marks in a pipe.

This file decides how a sample looks: trained text, context, special tokens and media in their
colors, or a line for each span with ``+`` for trained. Text of a row is made visible: a control
character never reaches the terminal as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .terminal import as_table

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..data.views.show import ShownSample

_TRAINED, _CONTEXT, _SPECIAL, _MEDIA = "bold green", "dim", "cyan", "magenta"
_LEGEND = (("trained", _TRAINED), ("context", _CONTEXT), ("special", _SPECIAL), ("media", _MEDIA))
#: Control characters but newline and tab, and those that change the direction of text.
_HIDDEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


def visible(text: str) -> str:
    """The text with escapes in place of control characters other than newline and tab."""
    return _HIDDEN.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleView:
    """Prints samples of one model.

    Attributes:
        tokenizer: of the model.
        special: special tokens.
        media: tokens that stand for media.
        console: where to print.
    """

    tokenizer: Tokenizer
    special: frozenset[str]
    media: frozenset[str]
    console: Console

    @classmethod
    def of(cls, tokenizer: Tokenizer, media: Sequence[str]) -> SampleView:
        """A view on stdout."""
        added = tokenizer.get_added_tokens_decoder().values()
        console = Console(highlight=False, markup=False, soft_wrap=True)
        return cls(
            tokenizer=tokenizer,
            special=frozenset(token.content for token in added if token.special),
            media=frozenset(media),
            console=console,
        )

    def legend(self) -> None:
        """Print what the colors mean; nothing in a pipe."""
        if self.console.is_terminal:
            self.console.print(Text(" ").join(Text(name, style) for name, style in _LEGEND))

    def print(self, sample: ShownSample) -> None:
        """Print one sample."""
        origin, example = sample.origin, sample.example
        head = (
            f"row {example.row}, sample {example.sample}: {visible(sample.source)} "
            f"{sample.place} ({origin.format}), {len(example.ids):,} tokens, "
            f"{sample.supervised:,} trained"
        )
        texts = sample.texts(self.tokenizer)
        if not self.console.is_terminal:
            self.console.print(head)
            for span, text in zip(example.token_spans, texts, strict=True):
                mark = "+" if span.trained else "-"
                said = visible(json.dumps(self.shortened(text), ensure_ascii=False))
                self.console.print(f"  {mark} {span.start}:{span.end} {span.why}: {said}")
            return
        self.console.print(head, style="bold")
        whole = Text()
        for span, text in zip(example.token_spans, texts, strict=True):
            for piece, style in self._pieces(text, _TRAINED if span.trained else _CONTEXT):
                whole.append(visible(piece), style)
        self.console.print(whole)

    def shortened(self, text: str) -> str:
        """The text with runs of one media token written as a product."""
        for token in self.media:
            run = re.compile(f"(?:{re.escape(token)}){{2,}}")
            text = run.sub(partial(_product, token), text)
        return text

    def _pieces(self, text: str, style: str) -> Iterator[tuple[str, str]]:
        """Parts of a text with their styles."""
        tokens = sorted(self.special | self.media, key=len, reverse=True)
        if not tokens:
            yield text, style
            return
        pattern = "|".join(f"(?:{re.escape(token)})+" for token in tokens)
        at = 0
        for found in re.finditer(pattern, text):
            if found.start() > at:
                yield text[at : found.start()], style
            token = next(one for one in tokens if found.group().startswith(one))
            special = f"bold {_SPECIAL}" if style == _TRAINED else _SPECIAL
            yield self.shortened(found.group()), _MEDIA if token in self.media else special
            at = found.end()
        if at < len(text):
            yield text[at:], style


def _product(token: str, run: re.Match[str]) -> str:
    return f"{token} x {len(run.group()) // len(token)}"


def print_findings(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print findings as a table: wrapped on a terminal, a line each in a pipe."""
    console = Console(highlight=False, markup=False)
    rows = [{key: visible(v) if isinstance(v, str) else v for key, v in row.items()}
            for row in rows]  # fmt: skip
    if not console.is_terminal:
        console.width = 100_000  # a pipe has no edge: one line a finding
        console.print(as_table("", rows))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("finding", "rows", "message and fix"):
        table.add_column(name, overflow="fold")
    colors = {"error": "red", "warning": "yellow"}
    for row in rows:
        color = colors.get(row["severity"], "blue")
        title = Text(f"{row['severity']}\n{row['code']}\n", color).append(f"{row['findings']:,} x")
        fix = Text(f"\n{row['fix']}", "dim") if row["fix"] else Text()
        table.add_row(title, row["rows"], Text(row["message"]).append_text(fix))
    console.print(table)


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table: folded on a terminal, a line for each row in a pipe."""
    if not rows:
        return
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 100_000
        console.print(as_table("", rows))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for key in rows[0]:
        table.add_column(key, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row.values()))
    console.print(table)
