"""Loading the rows of a run: they are read, checked, rendered, tokenized, masked, fitted and split.

This file decides the order of the steps. It makes one pass and reports all bad rows together. The
steps are `qcore.data.reading`, `qcore.data.media.files`, `qcore.data.rendering.samples` with
`qcore.checkpoint.chat_template`, `qcore.data.rendering.masking` and `qcore.data.rendering.fitting`,
after `qcore.data.rendering.template_check`. The samples are written to a store on disk
(`qcore.data.store`) and read from it one by one, so that memory does not grow with the rows.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..api.records import ChatFormat
from ..checkpoint.checkpoint import required_template
from ..checkpoint.identity import Identity
from ..checkpoint.tokenizer import load_tokenizer
from ..errors import InputError
from ..reporting import Reporter
from .findings import Findings
from .identity import data_identity
from .policies import Policies
from .rejects import REJECTED, Rejects
from .rendering.chat_record import ChatRecord
from .rendering.masking import Example
from .rendering.renderer import Options, Renderer
from .rendering.template_kwargs import special_tokens
from .source_counts import SourceCount
from .sources.file_kinds import file_kind, unit_of
from .sources.source import Source
from .split import held_out
from .store.cache import StoreCache
from .store.entry import Loaded, Request
from .store.records import StoredMedium
from .store.rendered import Rendered
from .store.samples import Samples
from .store.stamps import Changed, Stamp, rechecked
from .store.totals import media_totals, trained_chat
from .store.write import StoreWriter

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
        files: the data and media files as they were read.
    """

    train: Samples
    eval: Samples
    path: Path
    sha256: str
    samples_sha256: str
    rows: int
    samples: int
    tokens: int
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
    files: tuple[Stamp, ...] = field(default=(), compare=False)

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
        examples, unit = [*examples], "row"
        counts = sorted((*self.sources, *self.eval_sources), key=lambda count: count.first)
        firsts = [count.first for count in counts]
        held = {bisect_right(firsts, e.row) - 1 for e in examples}
        files = {file for at in held for file in counts[at].source.files} if counts else set()
        path = next(iter(files)) if len(files) == 1 else None
        if path is not None:
            with suppress(InputError):  # the file may be gone by now
                unit = unit_of(file_kind(path).container)
        numbers = sorted({e.row if path is None else e.line for e in examples})
        shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        return path, f"{unit}s {shown}"

    def rows_with_media(self) -> Iterator[tuple[int, list[StoredMedium]]]:
        """Number and media of each row with media, in the order of the rows."""
        return self.train.store.samples().with_media()

    def check_files(self, reporter: Reporter) -> None:
        """Hash the data and media files again.

        Args:
            reporter: receives progress where that takes over a second.

        Raises:
            InputError: ``QC-DATA-081`` a file changed after its rows were read.
        """
        try:
            rechecked(self.files, reporter, content=True)
        except Changed as changed:
            raise changed.error("restore the file") from None

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
    cache: StoreCache | None = None,
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
        cache: keeps the tokens for the next run; without it they are rendered each time.

    Raises:
        UsageError: a variable that the template does not read; see `check_variables`.
        InputError: see `Rejects.stop`, `Renderer` and `StoreCache`; ``QC-PRE-001`` no chat
            template, ``QC-DATA-015`` too few rows to split.
        WriteError: ``QC-WRITE-003`` to ``-006`` the tokens cannot be written.
    """
    sources, evaluated = _sources(data, seed), _sources(eval_data, seed)
    policies = policies or Policies()
    options = Options(
        policies=policies, max_length=max_length, variables=dict(variables or {}), seed=seed,
        special=special_tokens(checkpoint.tokenizer_config), reader=reader, unread=unread,
        workers=workers,
    )  # fmt: skip
    rendering = _Rendering(
        sources=sources, eval_sources=evaluated, checkpoint=checkpoint, chat_format=chat_format,
        tokenizer=tokenizer, options=options, refused=refused,
    )  # fmt: skip
    request = Request(
        sources=sources, eval_sources=evaluated, policies=policies, reader=reader,
        render=rendering.render,
    )  # fmt: skip
    loaded = (cache or StoreCache(None, 0)).load(request, rendering.identity)
    return _whole(loaded, options, eval_fraction)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rendering:
    """The rows of a run and what renders them."""

    sources: Sequence[Source]
    eval_sources: Sequence[Source]
    checkpoint: Checkpoint
    chat_format: ChatFormat
    tokenizer: Tokenizer | None
    options: Options
    refused: Callable[[Rejects], None] | None

    def identity(self) -> Identity | None:
        """The identity of the tokens."""
        template = required_template(self.checkpoint)
        return data_identity(
            self.sources, self.eval_sources, self.checkpoint, template, self.chat_format,
            self.options,
        )  # fmt: skip

    def render(self, out: StoreWriter) -> Rendered:
        """Render all rows and write their samples."""
        words = self.tokenizer or load_tokenizer(self.checkpoint)
        rejects = Rejects(self.options.policies, listing=REJECTED)
        with required_template(self.checkpoint).reopen() as template:
            renderer = Renderer(template, self.chat_format, words, self.options, rejects)
            with renderer.notes as notes:
                out.extend(renderer.examples(self.sources))
                train = out.count
                out.extend(renderer.examples(self.eval_sources))
        try:
            rejects.stop(notes.counts)
        except InputError:
            if self.refused is not None:
                self.refused(rejects)
            raise
        return Rendered(
            train=train,
            counts=tuple(notes.counts[: len(self.sources)]),
            eval_counts=tuple(notes.counts[len(self.sources) :]),
            findings=notes.findings,
            rejects=notes.rejects,
            dropped=notes.dropped,
            truncated=notes.truncated,
            asked=notes.asked,
            template_sha256=template.sha256,
            switch=renderer.switch,
        )


def _sources(data: str | Path | Sequence[Source], seed: int) -> tuple[Source, ...]:
    if isinstance(data, str | Path):
        return (Source(name=str(data), files=(Path(data),)),)
    return tuple(source.seeded(seed) for source in data)


def _whole(loaded: Loaded, options: Options, eval_fraction: float) -> Dataset:
    """Split the rows, and count both sides."""
    store, rendered = loaded.store, loaded.rendered
    path = rendered.counts[0].source.files[0]
    every = store.samples()
    trained = np.arange(store.count) < rendered.train
    rows, turns = every.column("row"), every.column("turns")
    held = held_out(every, rendered.train, eval_fraction, options.seed, path)
    kept = trained & ~np.isin(rows, held)
    # Held-out rows come before those that are only evaluated, as they lie in the store.
    train, evaluated = Samples(store, np.flatnonzero(kept)), Samples(store, np.flatnonzero(~kept))
    chat = trained_chat(train, rendered, options.variables)
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
        files=(*loaded.files, *loaded.media),
        media=media_totals(every, frozenset(rows[kept].tolist()), rendered.asked),
    )


def _digest(digests: Sequence[str]) -> str:
    """The digest of one source, or of the digests of several."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
