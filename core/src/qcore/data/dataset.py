"""Loading a data file: rows are checked, rendered, tokenized, masked and split.

This file decides the order of the steps. It makes one pass, reports all bad rows together, and
never truncates or skips a row. The steps are `qcore.data.rows`, `qcore.data.media_files`,
`qcore.checkpoint.chat_template` and `qcore.data.masking`, after `qcore.data.template_check`. The
bytes of media are held for one row at a time.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..api.media import RowError
from ..api.records import ChatFormat
from ..checkpoint.chat_template import Template
from ..checkpoint.checkpoint import required_template
from ..checkpoint.tokenizer import load_tokenizer
from ..errors import InputError
from .jsonl import Problems
from .masking import Example, encode_text
from .media_files import Finder
from .rows import ChatRow, read_rows
from .template_check import prove_mask, prove_media
from .template_kwargs import check_variables, special_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..api.media import MediaReader, Medium
    from ..checkpoint.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """The examples of one file, split into training and evaluation.

    Attributes:
        train: in the order of the file.
        eval: held out, in the order of the file; empty without an evaluation split.
        path: the file.
        sha256: hex digest of the file.
        rows: rows in the file.
        tokens: tokens of all rows.
        supervised: positions with a loss, of all rows.
        turns: assistant turns of all rows.
        longest: tokens of the longest row.
        asked: by kind of media: reader options that parts in `train` set themselves.
    """

    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    path: Path
    sha256: str
    rows: int
    tokens: int
    supervised: int
    turns: int
    longest: int
    asked: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of media in the rows, sorted; empty for a text-only file."""
        return tuple(self._media().get("media", ()))

    def _media(self) -> dict[str, Any]:
        """Counts of media for the summary; empty for a text-only file."""
        rows = [e for e in sorted((*self.train, *self.eval), key=lambda e: e.line) if e.media]
        if not rows:
            return {}
        media = [medium for example in rows for medium in example.media]
        digest = hashlib.sha256()
        for medium in media:
            digest.update(f"{medium.kind}:{medium.digest}\n".encode())
        return {
            "media": _counted(media),
            "train_media": _counted([medium for row in self.train for medium in row.media]),
            "media_rows": len(rows),
            "media_tokens": sum(medium.tokens for medium in media),
            "media_sha256": digest.hexdigest(),
            "media_keys": {kind: sorted(keys) for kind, keys in sorted(self.asked.items())},
        }

    def summary(self) -> dict[str, Any]:
        """The summary for a manifest; media keys only if there are media.

        ``sha256`` does not cover the files that rows refer to; ``media_sha256`` does: it covers
        the digests of all media in the order of the file.
        """
        return {
            "file": self.path.name,
            "sha256": self.sha256,
            "rows": self.rows,
            "train_rows": len(self.train),
            "eval_rows": len(self.eval),
            "tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "assistant_turns": self.turns,
            "longest_row": self.longest,
            **self._media(),
        }


def dataset(
    path: str | Path,
    checkpoint: Checkpoint,
    chat_format: ChatFormat,
    max_length: int,
    eval_fraction: float = 0.0,
    seed: int = 0,
    *,
    tokenizer: Tokenizer | None = None,
    variables: Mapping[str, Any] | None = None,
    reader: MediaReader | None = None,
    unread: str = "",
) -> Dataset:
    """Load a JSON Lines file of conversations.

    Args:
        path: the file.
        checkpoint: provides the chat template and the tokenizer.
        chat_format: the format of rendered conversations.
        max_length: maximum tokens per row.
        eval_fraction: fraction of the rows to hold out, in [0, 1).
        seed: seed of the split.
        tokenizer: from `load_tokenizer`, if the caller already has it.
        variables: inputs of the template, e.g. ``preserve_thinking``.
        reader: reads media; without it rows must be text only.
        unread: why there is no reader, for the error of a row with media.

    Raises:
        UsageError: a variable that the template does not read; see `check_variables`.
        InputError: see `read_rows`, `Finder`, `encode_text`, `prove_mask` and `Template.render`;
            ``QC-PRE-001`` no chat template, ``QC-DATA-015`` too few rows to split.
    """
    path = Path(path)
    template = required_template(checkpoint).reopen()  # a process of its own, closed here
    tokenizer = tokenizer or load_tokenizer(checkpoint)
    given = {**special_tokens(checkpoint.tokenizer_config), **(variables or {})}
    digest = hashlib.sha256()
    problems = Problems(path)
    asked: dict[int, frozenset[tuple[str, str]]] = {}
    with template:
        check_variables(template, variables or {})
        prove_mask(template, chat_format, tokenizer, variables=given)
        good = read_rows(
            path, chat_format, control=_special(tokenizer), problems=problems, digest=digest,
            reader=reader, unread=unread,
        )  # fmt: skip
        if reader is not None:
            prove = partial(_prove_media, template, chat_format, tokenizer, reader, given)
            good = _seen(good, reader, path, problems, prove, asked)
        rendered = template.render_rows(good, **given)
        encode = partial(
            encode_text, tokenizer=tokenizer, chat_format=chat_format, max_length=max_length,
            reader=reader,
        )  # fmt: skip
        examples = list(_encoded(rendered, encode, problems))
    problems.stop()
    held = split(examples, eval_fraction, seed, path)
    return _whole(path, digest.hexdigest(), examples, held, asked)


def _encoded(
    rendered: Iterable[tuple[ChatRow, str | InputError]],
    encode: Callable[[str, ChatRow], Example],
    problems: Problems,
) -> Iterator[Example]:
    """Encode rendered rows; collect those that the template or the mask refuses."""
    for row, text in rendered:
        if isinstance(text, InputError):
            problems.add(row.line, _refused(problems.path, row, text))
            continue
        try:
            example = encode(text, row)
        except RowError as bad:
            problems.add(row.line, bad.error(problems.path, row.line))
        else:
            yield example


def _counted(media: Sequence[Medium]) -> dict[str, int]:
    """Number of media by kind."""
    return dict(sorted(Counter(medium.kind for medium in media).items()))


def _whole(
    path: Path,
    sha256: str,
    examples: list[Example],
    held: frozenset[int],
    asked: Mapping[int, frozenset[tuple[str, str]]],
) -> Dataset:
    keys: dict[str, frozenset[str]] = {}
    for kind, key in {pair for line, some in asked.items() if line not in held for pair in some}:
        keys[kind] = keys.get(kind, frozenset()) | {key}
    return Dataset(
        train=tuple(example for example in examples if example.line not in held),
        eval=tuple(example for example in examples if example.line in held),
        path=path,
        sha256=sha256,
        rows=len(examples),
        tokens=sum(len(example.ids) for example in examples),
        supervised=sum(example.supervised for example in examples),
        turns=sum(example.turns for example in examples),
        longest=max(len(example.ids) for example in examples),
        asked=keys,
    )


def split(examples: list[Example], fraction: float, seed: int, path: Path) -> frozenset[int]:
    """Choose the lines to hold out by a hash of seed and content, independent of the file's order.

    The hash covers the tokens and the digests of media.

    Raises:
        InputError: ``QC-DATA-015`` if no training row would be left.
    """
    if not fraction:
        return frozenset()
    count = max(1, round(len(examples) * fraction))
    if count >= len(examples):
        raise InputError(
            "QC-DATA-015",
            "has too few rows to hold some out",
            file=path,
            found=f"{len(examples)} rows, eval_fraction {fraction}",
            fix="set eval_fraction=0 or add rows",
        )
    ranked = sorted((_rank(example, seed), example.line) for example in examples)
    return frozenset(line for _, line in ranked[:count])


def _rank(example: Example, seed: int) -> bytes:
    content = hashlib.sha256(f"{seed}:".encode() + example.ids.tobytes())
    for medium in example.media:
        content.update(f":{medium.digest}".encode())
    return content.digest()


def _prove_media(
    template: Template,
    chat_format: ChatFormat,
    tokenizer: Tokenizer,
    reader: MediaReader,
    variables: Mapping[str, Any],
) -> None:
    """Run `prove_media` in a separate process, because `template` is busy with the rows."""
    with template.reopen() as apart:
        prove_media(apart, chat_format, tokenizer, reader, variables=variables)


def _seen(
    rows: Iterable[ChatRow],
    reader: MediaReader,
    path: Path,
    problems: Problems,
    prove: Callable[[], None],
    asked: dict[int, frozenset[tuple[str, str]]],
) -> Iterator[ChatRow]:
    """Read the media of each row and drop the references, which may be data URLs.

    Reader options that parts set themselves are recorded in `asked`, by line. The first row with
    media triggers the check that the template renders media, so text-only files do not need it.
    """
    finder, proved = Finder(path.parent), False
    alike: dict[frozenset[tuple[str, str]], frozenset[tuple[str, str]]] = {}

    def read(row: ChatRow) -> ChatRow | None:
        nonlocal proved
        if row.media and not proved:
            prove()
            proved = True
        try:
            seen = tuple(finder.read(part, reader) for part in row.media)
        except RowError as bad:
            problems.add(row.line, bad.error(path, row.line))
            return None
        if keys := frozenset((part.kind, key) for part in row.media for key in part.options):
            asked[row.line] = alike.setdefault(keys, keys)
        return replace(row, media=(), seen=seen) if seen else row

    # A loop variable would keep the last row's bytes alive while the next line is parsed.
    return (row for row in map(read, rows) if row is not None)


def _refused(path: Path | None, row: ChatRow, error: InputError) -> InputError:
    """Turn an error of the template into an error of the row."""
    return error.replace(
        what=f"the chat template {error.what}",
        file=path,
        field=f"line {row.line}",
        expected=None,
        fix="fix the row; the template comes with the checkpoint",
    )


def _special(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Special tokens of the tokenizer, which become control tokens in any text."""
    added = tokenizer.get_added_tokens_decoder().values()
    return tuple(token.content for token in added if token.special)
