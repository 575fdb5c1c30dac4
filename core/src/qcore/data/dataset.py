"""Loading the rows of a run: they are read, checked, rendered, tokenized, masked, fitted and split.

This file decides the order of the steps. It makes one pass and reports all bad rows together. The
steps are `qcore.data.reading`, `qcore.data.media.files`, `qcore.data.rendering.samples` with
`qcore.checkpoint.chat_template`, `qcore.data.rendering.masking` and `qcore.data.rendering.fitting`,
after `qcore.data.rendering.template_check`. The samples are written to a store on disk
(`qcore.data.store`) and read from it one by one, so that memory does not grow with the rows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..api.records import ChatFormat
from ..checkpoint.checkpoint import required_template
from ..checkpoint.tokenizer import load_tokenizer
from ..errors import InputError
from .findings import Findings
from .policies import Policies
from .rejects import REJECTED, Rejects
from .rendering.chat_record import ChatRecord, TrainedTurns, chat_record
from .rendering.masking import Example
from .rendering.renderer import Options, Renderer
from .rendering.template_kwargs import special_tokens
from .source_counts import SourceCount
from .sources.file_kinds import file_kind, unit_of
from .sources.source import Source
from .split import held_out
from .store.records import StoredMedium
from .store.rendered import Rendered
from .store.samples import Samples, TokenStore
from .store.write import AnonymousStore, StoreWriter

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..api.media import MediaReader
    from ..checkpoint.checkpoint import Checkpoint

__all__ = ["Dataset", "dataset", "special_tokens"]


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
        media: counts and digest of the media for the summary; empty for a text-only file.
    """

    train: Samples
    eval: Samples
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
    media: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of media in the rows, sorted; empty for a text-only file."""
        return tuple(self.media.get("media", ()))

    @property
    def train_sizes(self) -> tuple[int, ...]:
        """Samples of each training row."""
        return self.train.sizes

    def place(self, examples: Iterable[Example]) -> tuple[Path | None, str]:
        """The file and the places of some samples; with several files the numbers of rows."""
        unit = "row"
        one = len(self.sources) == 1 and len(self.sources[0].source.files) == 1
        one = one and not self.eval_sources
        if one:
            with suppress(InputError):  # the file may be gone by now
                unit = unit_of(file_kind(self.path).container)
        numbers = sorted({e.line if one else e.row for e in examples})
        shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        return self.path if one else None, f"{unit}s {shown}"

    def rows_with_media(self) -> Iterator[tuple[int, list[StoredMedium]]]:
        """Number and media of each row with media, in the order of the rows."""
        return self.train.store.samples().with_media()

    def lines(self) -> Iterator[str]:
        """What the report says of the rows before the first step."""
        yield (
            f"{self.rows} rows, {self.tokens} tokens, {self.supervised} of them supervised "
            f"({100 * self.supervised / self.tokens:.0f} %), longest row {self.longest} tokens"
        )
        if len(self.sources) > 1 or self.eval_sources:
            for count in self.sources:
                yield count.line()
            for count in self.eval_sources:
                yield f"{count.line()}, evaluated only"
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
            "eval_rows": len(self.eval.sizes),
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
            **self.media,
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
    sources, evaluated = _sources(data, seed), _sources(eval_data, seed)
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
    store = AnonymousStore()
    rejects = Rejects(policies, listing=REJECTED)
    with template, store.writer() as out:
        renderer = Renderer(template, chat_format, tokenizer, options, rejects)
        rendered = _rendered(renderer, sources, evaluated, out, refused)
    return _whole(store.open(reader), rendered, options, eval_fraction)


def _rendered(
    renderer: Renderer,
    sources: Sequence[Source],
    eval_sources: Sequence[Source],
    out: StoreWriter,
    refused: Callable[[Rejects], None] | None,
) -> Rendered:
    """Render all rows and write their samples."""
    notes = renderer.notes
    with notes:
        out.extend(renderer.examples(sources))
        train = out.count
        out.extend(renderer.examples(eval_sources))
    try:
        notes.rejects.stop(notes.counts)
    except InputError:
        if refused is not None:
            refused(notes.rejects)
        raise
    return Rendered(
        train=train,
        counts=tuple(notes.counts[: len(sources)]),
        eval_counts=tuple(notes.counts[len(sources) :]),
        findings=notes.findings,
        rejects=notes.rejects,
        dropped=notes.dropped,
        truncated=notes.truncated,
        asked=notes.asked,
        template_sha256=renderer.template.sha256,
        switch=renderer.switch,
    )


def _sources(data: str | Path | Sequence[Source], seed: int) -> tuple[Source, ...]:
    if isinstance(data, str | Path):
        return (Source(name=str(data), files=(Path(data),)),)
    return tuple(source.seeded(seed) for source in data)


def _whole(
    store: TokenStore, rendered: Rendered, options: Options, eval_fraction: float
) -> Dataset:
    """Split the rows, and count both sides."""
    path = rendered.counts[0].source.files[0]
    every = store.samples()
    trained = np.arange(store.count) < rendered.train
    rows, turns = every.column("row"), every.column("turns")
    held = held_out(every, rendered.train, eval_fraction, options.seed, path)
    kept = trained & ~np.isin(rows, held)
    # Held-out rows come before those that are only evaluated, as they lie in the store.
    train, evaluated = Samples(store, np.flatnonzero(kept)), Samples(store, np.flatnonzero(~kept))
    chat = _chat_record(train, rendered, options)
    findings = rendered.findings
    findings.extend(chat.findings())
    lengths, starts = every.column("tokens"), every.starts()
    eval_counts = rendered.eval_counts
    return Dataset(
        train=train,
        eval=evaluated,
        path=path,
        sha256=_digest([count.sha256 for count in rendered.counts]),
        samples_sha256=train.digest(),
        rows=int(starts.sum()),
        samples=store.count,
        tokens=int(lengths.sum(dtype=np.int64)),
        rendered=int(np.maximum.reduceat(lengths, np.flatnonzero(starts)).sum(dtype=np.int64)),
        supervised=int(every.column("supervised").sum(dtype=np.int64)),
        turns=int(turns.sum(dtype=np.int64)),
        longest=int(lengths.max()),
        chat=chat,
        sources=rendered.counts,
        eval_sources=eval_counts,
        eval_sha256=_digest([count.sha256 for count in eval_counts]) if eval_counts else "",
        eval_samples_sha256=evaluated.digest() if len(evaluated) else "",
        findings=findings,
        rejects=rendered.rejects,
        dropped=rendered.dropped,
        truncated=rendered.truncated,
        media=_media(every, frozenset(rows[kept].tolist()), rendered.asked),
    )


def _chat_record(train: Samples, rendered: Rendered, options: Options) -> ChatRecord:
    """How the turns of the training samples were rendered."""
    starts, codes = train.starts(), train.column("variables")
    trained = TrainedTurns(
        turns=int(train.column("turns").sum(dtype=np.int64)),
        reasoned=int(train.column("reasoned").sum(dtype=np.int64)),
    )
    values, first, counts = np.unique(codes[starts], return_index=True, return_counts=True)
    for at in np.argsort(first).tolist():  # in the order in which the rows have them
        trained.add_rows(train.store.variables[values[at]], int(counts[at]))
    return chat_record(rendered.template_sha256, options.variables, rendered.switch, trained)


def _media(
    every: Samples, trained: frozenset[int], asked: Mapping[int, frozenset[tuple[str, str]]]
) -> dict[str, Any]:
    """Counts of media for the summary; empty for a text-only file.

    Args:
        every: all samples.
        trained: numbers of the training rows.
        asked: as `Rendered.asked`.
    """
    media, train_media = Counter[str](), Counter[str]()
    rows = tokens = 0
    digest = hashlib.sha256()
    for row, some in every.with_media():
        rows += 1
        for medium in some:
            media[medium.kind] += 1
            train_media[medium.kind] += row in trained
            tokens += medium.tokens
            digest.update(f"{medium.kind}:{medium.digest}\n".encode())
    if not rows:
        return {}
    keys: dict[str, set[str]] = {}
    for kind, key in {pair for row, pairs in asked.items() if row in trained for pair in pairs}:
        keys.setdefault(kind, set()).add(key)
    return {
        "media": dict(sorted(media.items())),
        "train_media": dict(sorted((+train_media).items())),
        "media_rows": rows,
        "media_tokens": tokens,
        "media_sha256": digest.hexdigest(),
        "media_keys": {kind: sorted(some) for kind, some in sorted(keys.items())},
    }


def _digest(digests: Sequence[str]) -> str:
    """The digest of one source, or of the digests of several."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
