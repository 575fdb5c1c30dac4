"""Loading the rows of a run: they are read, checked, rendered, tokenized, masked, fitted and split.

This file decides the order of the steps. It makes one pass and reports all bad rows together. The
steps are `qcore.data.reading`, `qcore.data.media.files`, `qcore.data.rendering.samples` with
`qcore.checkpoint.chat_template`, `qcore.data.rendering.masking` and `qcore.data.rendering.fitting`,
after `qcore.data.rendering.template_check`. The bytes of media are held for one row at a time.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..api.records import ChatFormat
from ..checkpoint.checkpoint import required_template
from ..checkpoint.tokenizer import load_tokenizer
from ..errors import InputError
from .findings import Findings
from .policies import Policies
from .reading import SourceCount
from .rejects import Rejects
from .rendering.chat_record import ChatRecord
from .rendering.masking import Example
from .rendering.renderer import Options, Renderer
from .rendering.template_kwargs import special_tokens
from .sources.source import Source

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..api.media import MediaReader, Medium
    from ..checkpoint.checkpoint import Checkpoint

__all__ = ["Dataset", "dataset", "special_tokens", "split"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """The samples of a run, split into training and evaluation.

    All samples of a row are on one side, one after the other.

    Attributes:
        train: in the order of the rows.
        eval: held out, in the order of the rows; empty without evaluation.
        path: the file with the rows; with several the first one.
        sha256: hex digest of the file; with several of the digests of all training sources.
        samples_sha256: hex digest of the tokens and labels of the training samples, in order, and
            of the number of samples of each row.
        rows: rows with samples.
        samples: samples of all rows.
        tokens: tokens of all samples.
        rendered: tokens of all rows if each was rendered once.
        supervised: positions with a loss, of all samples.
        turns: trained turns of all rows.
        longest: tokens of the longest sample.
        chat: how the turns were rendered.
        sources: what came from where.
        eval_sources: what came from where, of the rows that are only evaluated.
        eval_sha256: as `sha256`, of `eval_sources`; empty without them.
        eval_samples_sha256: as `samples_sha256`, of `eval`; empty without evaluation.
        findings: what the readers have to say.
        rejects: rows that were refused.
        dropped: rows that ``long_rows`` left out.
        truncated: rows that ``long_rows`` cut.
        asked: by kind of media: reader options that parts in `train` set themselves.
    """

    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    path: Path
    sha256: str
    samples_sha256: str
    rows: int
    samples: int
    tokens: int
    rendered: int
    supervised: int
    turns: int
    longest: int
    chat: ChatRecord
    sources: tuple[SourceCount, ...]
    eval_sources: tuple[SourceCount, ...] = ()
    eval_sha256: str = ""
    eval_samples_sha256: str = ""
    findings: Findings = field(default_factory=Findings, compare=False)
    rejects: Rejects = field(default_factory=Rejects, compare=False)
    dropped: int = 0
    truncated: int = 0
    asked: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of media in the rows, sorted; empty for a text-only file."""
        return tuple(self._media().get("media", ()))

    @property
    def train_sizes(self) -> tuple[int, ...]:
        """Samples of each training row."""
        return sizes_of(self.train)

    @property
    def factor(self) -> float:
        """Tokens of all samples over tokens of the rows if each was rendered once."""
        return self.tokens / self.rendered

    def place(self, examples: Iterable[Example]) -> tuple[Path | None, str]:
        """The file and the lines of some samples; with several files the numbers of rows."""
        one = len(self.sources) == 1 and len(self.sources[0].source.files) == 1
        one = one and not self.eval_sources
        numbers = sorted({e.line if one else e.row for e in examples})
        shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        return self.path if one else None, f"{'lines' if one else 'rows'} {shown}"

    def rows_with_media(self) -> list[Example]:
        """For each row with media the sample with all of them, in the order of the rows."""
        rows = sorted((*self.train, *self.eval), key=lambda e: (e.row, len(e.media)))
        last = [list(samples)[-1] for _, samples in groupby(rows, key=lambda e: e.row)]
        return [example for example in last if example.media]

    def _media(self) -> dict[str, Any]:
        """Counts of media for the summary; empty for a text-only file."""
        rows = self.rows_with_media()
        if not rows:
            return {}
        media = [medium for example in rows for medium in example.media]
        trained = {example.row for example in self.train}
        digest = hashlib.sha256()
        for medium in media:
            digest.update(f"{medium.kind}:{medium.digest}\n".encode())
        return {
            "media": _counted(media),
            "train_media": _counted([m for row in rows if row.row in trained for m in row.media]),
            "media_rows": len(rows),
            "media_tokens": sum(medium.tokens for medium in media),
            "media_sha256": digest.hexdigest(),
            "media_keys": {kind: sorted(keys) for kind, keys in sorted(self.asked.items())},
        }

    def lines(self) -> Iterator[str]:
        """What the report says of the rows before the first step."""
        yield (
            f"{self.rows} rows, {self.tokens} tokens, {self.supervised} of them supervised "
            f"({100 * self.supervised / self.tokens:.0f} %), longest row {self.longest} tokens"
        )
        if len(self.sources) > 1 or self.eval_sources:
            for count in self.sources:
                yield f"{count.source.name}: {count.rows} rows"
            for count in self.eval_sources:
                yield f"{count.source.name}: {count.rows} rows, evaluated only"
        for count in (*self.sources, *self.eval_sources):
            yield from (f"{count.source.name}: {note}" for note in count.source.notes)
        yield from self.findings.lines()

    def summary(self) -> dict[str, Any]:
        """The summary for a manifest; media keys only if there are media.

        ``sha256`` does not cover the files that rows refer to; ``media_sha256`` does: it covers
        the digests of all media in the order of the rows.
        """
        return {
            "file": self.path.name,
            "sha256": self.sha256,
            **({"eval_sha256": self.eval_sha256} if self.eval_sha256 else {}),
            "samples_sha256": self.samples_sha256,
            **({"eval_samples_sha256": self.eval_samples_sha256} if self.eval else {}),
            "rows": self.rows,
            "train_rows": len(self.train_sizes),
            "eval_rows": len(sizes_of(self.eval)),
            "samples": self.samples,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "assistant_turns": self.turns,
            "longest_row": self.longest,
            "rejected_rows": self.rejects.count,
            "dropped_rows": self.dropped,
            "truncated_rows": self.truncated,
            "sources": [count.summary() for count in self.sources],
            "eval_sources": [count.summary() for count in self.eval_sources],
            "findings": self.findings.summary(),
            **self._media(),
        }


def dataset(
    data: str | Path | Sequence[Source],
    checkpoint: Checkpoint,
    chat_format: ChatFormat,
    max_length: int,
    eval_fraction: float = 0.0,
    seed: int = 0,
    *,
    eval_data: Sequence[Source] = (),
    policies: Policies | None = None,
    tokenizer: Tokenizer | None = None,
    variables: Mapping[str, Any] | None = None,
    reader: MediaReader | None = None,
    unread: str = "",
    workers: int = 1,
    refused: Callable[[Rejects], None] | None = None,
) -> Dataset:
    """Load the rows of some sources.

    Args:
        data: the sources, or one file.
        checkpoint: provides the chat template and the tokenizer.
        chat_format: the format of rendered conversations.
        max_length: maximum tokens per sample.
        eval_fraction: fraction of the rows to hold out, in [0, 1).
        seed: seed of the split, and of the choice of rows in sources without a seed.
        eval_data: sources whose rows are only evaluated.
        policies: which turns are trained and what may be left out; by default the defaults.
        tokenizer: from `load_tokenizer`, if the caller already has it.
        variables: inputs of the template, e.g. ``preserve_thinking``.
        reader: reads media; without it rows must be text only.
        unread: why there is no reader, for the error of a row with media.
        workers: as the setting ``dataset_num_proc``.
        refused: called with the refused rows before they stop the run.

    Raises:
        UsageError: a variable that the template does not read; see `check_variables`.
        InputError: see `Rejects.stop` and `Renderer`; ``QC-PRE-001`` no chat template,
            ``QC-DATA-015`` too few rows to split.
    """
    sources = _sources(data, seed)
    policies = policies or Policies()
    options = Options(
        policies=policies,
        max_length=max_length,
        variables=dict(variables or {}),
        special=special_tokens(checkpoint.tokenizer_config),
        reader=reader,
        unread=unread,
        seed=seed,
        workers=workers,
    )
    tokenizer = tokenizer or load_tokenizer(checkpoint)
    template = required_template(checkpoint).reopen()  # a process of its own, closed here
    with template:
        renderer = Renderer(template, chat_format, tokenizer, options, Rejects(policies))
        with renderer.notes:
            train = list(renderer.examples(sources))
            evaluated = list(renderer.examples(_sources(eval_data, seed)))
    _check_rows(renderer, train, sources[0].files[0], refused)
    held = split(train, eval_fraction, seed, sources[0].files[0])
    return _whole(renderer, sources, train, evaluated, held)


def _check_rows(
    renderer: Renderer,
    train: Sequence[Example],
    path: Path,
    refused: Callable[[Rejects], None] | None,
) -> None:
    """Raise the errors of refused rows, and that no row is left."""
    try:
        renderer.rejects.stop(renderer.rows)
    except InputError:
        if refused is not None:
            refused(renderer.rejects)
        raise
    if not train:
        raise InputError(
            "QC-DATA-015",
            "has no row left to train",
            file=path,
            found=f"{renderer.rows} rows, {renderer.rejects.count} refused, "
            f"{renderer.notes.dropped} too long",
            fix="raise max_length, or add rows",
        )


def _sources(data: str | Path | Sequence[Source], seed: int) -> tuple[Source, ...]:
    if isinstance(data, str | Path):
        return (Source(name=str(data), files=(Path(data),)),)
    return tuple(source.seeded(seed) for source in data)


def sizes_of(examples: Iterable[Example]) -> tuple[int, ...]:
    """Samples of each row; a sample without the number of a row is a row of its own."""
    keys = (example.row or -at for at, example in enumerate(examples, 1))
    return tuple(sum(1 for _ in samples) for _, samples in groupby(keys))


def _counted(media: Sequence[Medium]) -> dict[str, int]:
    """Number of media by kind."""
    return dict(sorted(Counter(medium.kind for medium in media).items()))


def _whole(
    renderer: Renderer,
    sources: Sequence[Source],
    train: list[Example],
    evaluated: list[Example],
    held: frozenset[int],
) -> Dataset:
    keys: dict[str, frozenset[str]] = {}
    notes = renderer.notes
    asked = notes.asked
    every = [*train, *evaluated]
    counts, eval_counts = notes.counts[: len(sources)], notes.counts[len(sources) :]
    kept = tuple(example for example in train if example.row not in held)
    out = (*(example for example in train if example.row in held), *evaluated)
    trained = {example.row for example in kept}
    for kind, key in {pair for row, some in asked.items() if row in trained for pair in some}:
        keys[kind] = keys.get(kind, frozenset()) | {key}
    return Dataset(
        train=kept,
        eval=out,
        path=sources[0].files[0],
        sha256=_digest([count.sha256 for count in counts]),
        samples_sha256=_digest_of_samples(kept),
        rows=len(sizes_of(every)),
        samples=len(every),
        tokens=sum(len(example.ids) for example in every),
        rendered=sum(_longest(every)),
        supervised=sum(example.supervised for example in every),
        turns=sum(example.turns for example in every),
        longest=max(len(example.ids) for example in every),
        chat=renderer.chat(kept),
        sources=tuple(counts),
        eval_sources=tuple(eval_counts),
        eval_sha256=_digest([count.sha256 for count in eval_counts]) if eval_counts else "",
        eval_samples_sha256=_digest_of_samples(out) if out else "",
        findings=notes.findings,
        rejects=notes.rejects,
        dropped=notes.dropped,
        truncated=notes.truncated,
        asked=keys,
    )


def _longest(examples: Iterable[Example]) -> Iterator[int]:
    """Tokens of the longest sample of each row."""
    for _, samples in groupby(examples, lambda e: e.row):
        yield max(len(example.ids) for example in samples)


def _digest_of_samples(examples: Sequence[Example]) -> str:
    """The tokens, the labels and the grouping into rows of samples, in order.

    The digest changes with the template, the tokenizer, the format and the policies. The grouping
    is part of it because all samples of a row are trained one after the other.
    """
    digest = hashlib.sha256(" ".join(map(str, sizes_of(examples))).encode())
    for example in examples:
        digest.update(len(example.ids).to_bytes(8, "little"))
        digest.update(example.ids.tobytes())
        digest.update(example.labels.tobytes())
    return digest.hexdigest()


def _digest(digests: Sequence[str]) -> str:
    """The digest of one source, or of the digests of several."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def split(examples: Sequence[Example], fraction: float, seed: int, path: Path) -> frozenset[int]:
    """Choose the rows to hold out by a hash of seed and content, independent of the file's order.

    The hash covers the tokens and the digests of media of a row's last sample.

    Returns:
        The numbers of the rows.

    Raises:
        InputError: ``QC-DATA-015`` if no training row would be left.
    """
    if not fraction:
        return frozenset()
    last = {example.row: example for example in examples}
    count = max(1, round(len(last) * fraction))
    if count >= len(last):
        raise InputError(
            "QC-DATA-015",
            "has too few rows to hold some out",
            file=path,
            found=f"{len(last)} rows, eval_fraction {fraction}",
            fix="set eval_fraction=0 or add rows",
        )
    ranked = sorted((_rank(example, seed), row) for row, example in last.items())
    return frozenset(row for _, row in ranked[:count])


def _rank(example: Example, seed: int) -> bytes:
    content = hashlib.sha256(f"{seed}:".encode() + example.ids.tobytes())
    for medium in example.media:
        content.update(f":{medium.digest}".encode())
    return content.digest()
