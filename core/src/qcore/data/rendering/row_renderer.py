"""From records to tokenized samples, chunk by chunk: what one process does with rows.

This file decides the way of one row: it is read, its media are read, its trained turns are chosen,
the template renders the prefixes that they need, samples are made of the renderings, tokenized,
masked and made to fit. The result of each row is a `RowOutcome`, which depends on the row and the
`RowSetup` alone, so that rows can be rendered by any number of processes.
`qcore.data.rendering.run_notes` puts the outcomes together.

Codes: ``QC-DATA-049`` a variable of a row that the template does not read, ``-078`` a row with too
many turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ...api.media import RowError
from ...api.records import ChatFormat
from ...errors import InputError, QcoreError, nearest
from ..findings import DataFinding
from ..formats import Formats
from ..policies import DROP_ROWS, REFUSE, Policies
from ..reading import Chunk, Numbered, RowReader
from ..rejects import template_refusal
from ..repairs.notes import RepairContext
from ..rows import ChatRow, RowCheck
from .fitting import fitted, too_long
from .losses import LossCounts, Losses
from .masking import Encoded, Example, encode_sample
from .pieces import PieceEncoder
from .row_media import PendingRow, RowMedia
from .row_plan import RowPlan, plan_row
from .row_work import FEW, MOST_WORK, first_turns, too_many_turns, with_turns, work_of
from .samples import Draft, drafts
from .template_check import prove_media
from .text_reader import DeferredRow

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ...api.media import MediaReader
    from ...checkpoint.chat_template import Prefix, Template
    from ..store.records import PackedExample

_T = TypeVar("_T")
_REQUEST: Final = 4 << 20  # work, in characters, that the template renders in one request


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSetup:
    """How rows are rendered; it can be pickled with a `TextReader` in place of a reader of media.

    Attributes:
        chat_format: the format of rendered conversations.
        tokenizer: from `load_tokenizer`.
        policies: of the run.
        max_length: maximum tokens of a sample.
        variables: inputs of the template for all rows, special tokens included.
        switch: variable of the template that turns thinking on and off; empty: there is none.
        fixed: whether the user set `switch` for all rows.
        names: variables that rows may set.
        control: special tokens, which no text of a row may hold.
        context: what repairs know of the run.
        reader: reads media; without it rows must be text only.
        unread: why rows with media cannot be read.
        explain: whether samples keep the reason of each token, and rows the references of media.
    """

    chat_format: ChatFormat
    tokenizer: Tokenizer
    policies: Policies
    max_length: int
    variables: Mapping[str, Any]
    switch: str
    fixed: bool
    names: tuple[str, ...]
    control: tuple[str, ...]
    context: RepairContext
    reader: MediaReader | None = None
    unread: str = ""
    explain: bool = False


@dataclass(slots=True, kw_only=True)
class RowOutcome:
    """What became of one row.

    Attributes:
        format: its row format; empty if the row is refused before it is known.
        ignored: keys that its format left out.
        findings: what there is to say of it.
        losses: what the template did not render of it.
        error: why it is refused.
        tokens: of its longest sample, if that is too long.
        fatal: an error that ends the run.
        asked: reader options that its parts set themselves, by kind of media.
        deferred: whether only the parent can render it, because it has media.
        examples: its samples; empty if it is refused or left out. Another process packs them.
        samples: the same with their texts; another process does not send them.
        cut: whether ``long_rows`` cut a sample or left one out.
        plan: what was rendered of it; another process does not send it.
    """

    format: str = ""
    ignored: tuple[str, ...] = ()
    findings: list[DataFinding] = field(default_factory=list)
    losses: LossCounts = field(default_factory=LossCounts)
    error: RowError | InputError | None = None
    tokens: int = 0
    fatal: QcoreError | None = None
    asked: frozenset[tuple[str, str]] = frozenset()
    deferred: bool = False
    examples: tuple[Example | PackedExample, ...] = ()
    samples: tuple[Encoded, ...] = ()
    cut: bool = False
    plan: RowPlan | None = None


class _Refused(Exception):
    """The template refuses a row."""

    def __init__(self, error: InputError) -> None:
        super().__init__(error)
        self.error = error


@dataclass(slots=True)
class _Part:
    """Rows of a chunk that are rendered in one request; the last part completes the chunk."""

    outcomes: list[RowOutcome]
    rows: list[tuple[RowOutcome, RowPlan]] = field(default_factory=list)
    asked: list[tuple[RowPlan, Sequence[Prefix]]] = field(default_factory=list)
    last: bool = False


class RowRenderer:
    """Turns records into samples.

    Args:
        setup: how.
        template: of the checkpoint; a process of its own is started for the rows.
        formats: the row formats that are installed.
        workers: as the setting ``dataset_num_proc``, for media.

    Attributes:
        media: reads the media of rows.
    """

    def __init__(
        self, setup: RowSetup, template: Template, formats: Formats, workers: int = 1
    ) -> None:
        self._setup = setup
        self._template = template
        self._batches = template.batches(**setup.variables)
        self._probes = template.batches(**setup.variables)
        self._pieces = PieceEncoder(setup.tokenizer, setup.chat_format.turn_start)
        self._read = RowReader(
            formats=formats,
            check=RowCheck(setup.chat_format, setup.control, setup.reader, setup.unread),
            context=setup.context,
        )
        self.media = RowMedia(setup.reader, self._prove_media, workers)

    def __enter__(self) -> RowRenderer:
        return self

    def __exit__(self, *_: object) -> None:
        self.media.close()
        self._batches.close()
        self._probes.close()

    def outcomes(self, chunks: Iterable[Chunk | None]) -> Iterator[list[RowOutcome]]:
        """Yield what became of the rows of each chunk, in order.

        The template renders a chunk while the chunk before it is tokenized. ``None`` in place of a
        chunk says that there is none yet; the last one is then finished first.
        """
        last: _Part | None = None
        for part in self._parts(chunks):
            if (done := self._finished(last, part)) is not None:
                yield done
            last = part
        if (done := self._finished(last, None)) is not None:
            yield done

    def _prove_media(self, reader: MediaReader) -> None:
        setup = self._setup
        with self._template.reopen() as apart:  # the template is busy with the rows
            prove_media(
                apart, setup.chat_format, setup.tokenizer, reader, variables=setup.variables
            )

    def _parts(self, chunks: Iterable[Chunk | None]) -> Iterator[_Part | None]:
        for chunk in chunks:
            if chunk is None:
                yield None
                continue
            part, size = _Part([]), 0
            for outcome, pending in self._read_rows(chunk):
                part.outcomes.append(outcome)
                plan = self._guarded(outcome, partial(self._plan, pending, outcome))
                if outcome.fatal is not None:
                    break
                if plan is None:
                    continue
                prefixes = plan.prefixes()
                work = sum(work_of(plan, prefixes))
                if part.rows and size + work > _REQUEST:
                    yield part
                    part, size = _Part(part.outcomes), 0
                part.rows.append((outcome, plan))
                part.asked.append((plan, prefixes))
                size += work
            part.last = True
            yield part

    def _finished(self, part: _Part | None, following: _Part | None) -> list[RowOutcome] | None:
        """Start to render the following part, and finish this one: its chunk, if it is the last."""
        texts: Sequence[Sequence[str | InputError]] = ()
        fatal: InputError | None = None
        try:
            texts = self._batches.answers()
        except InputError as error:
            fatal = error
        if following is not None:
            self._batches.ask(following.asked)
        if part is None:
            return None
        if fatal is not None:
            part.rows[0][0].fatal = fatal
        elif part.rows:
            self._finish(part.rows, texts)
        return part.outcomes if part.last else None

    def _read_rows(self, chunk: Chunk) -> list[tuple[RowOutcome, PendingRow | None]]:
        """Read the rows of a chunk, whose media are then read at once; ``None``: refused."""
        rows: list[tuple[RowOutcome, PendingRow | None]] = []
        for numbered in chunk:
            outcome = RowOutcome()
            rows.append((outcome, self._guarded(outcome, partial(self._row, numbered, outcome))))
            if outcome.fatal is not None:
                break
        return rows

    def _guarded(self, outcome: RowOutcome, call: Callable[[], _T | None]) -> _T | None:
        """The result of a step; ``None`` if it refuses the row, as the outcome then says."""
        try:
            return call()
        except RowError as bad:
            outcome.error = bad
        except _Refused as refused:
            outcome.error = refused.error
        except DeferredRow:
            outcome.deferred = True
        except QcoreError as error:
            outcome.fatal = error
        return None

    def _row(self, numbered: Numbered, outcome: RowOutcome) -> PendingRow:
        """Read a row, and begin to read its media."""
        read = self._read(numbered)
        outcome.ignored = read.ignored
        outcome.findings += read.findings
        outcome.format = read.row.format
        return self.media.start(read.row)

    def _plan(self, pending: PendingRow | None, outcome: RowOutcome) -> RowPlan | None:
        """Choose the trained turns of a row; ``None`` if it is refused or left out."""
        if pending is None:
            return None
        setup = self._setup
        row = self._with_media(pending, outcome)
        self._check_variables(row)
        policies = setup.policies.over(row.source)
        plan = plan_row(row, policies, setup.chat_format, setup.switch, setup.fixed)
        return self._bounded(plan, outcome)

    def _bounded(self, plan: RowPlan, outcome: RowOutcome) -> RowPlan | None:
        """The plan, if its renderings end in time; else ``long_rows`` decides on a row too long.

        The time grows with the square of the number of turns, that of the last turn alone does not.
        """
        if len(plan.turns) <= FEW:
            return plan
        works = work_of(plan, plan.prefixes())
        if sum(works) <= MOST_WORK:
            return plan
        setup, policy = self._setup, plan.policies.long_rows
        last = with_turns(plan, plan.turns[-1:], "not rendered")
        self._probes.ask([(last, last.prefixes())])
        (texts,) = self._probes.answers()
        encoded = self._encoded(last, self._drafts(last, texts))
        longest = max(len(one.example.ids) for one in encoded)
        if longest <= setup.max_length:
            raise too_many_turns(plan)
        outcome.tokens = longest
        if policy == REFUSE:
            raise too_long(encoded, setup.max_length)
        outcome.cut = True
        if policy == DROP_ROWS:
            return None
        return with_turns(plan, first_turns(plan, works), "longer than max_length")

    def _check_variables(self, row: ChatRow) -> None:
        names = self._setup.names
        for name in row.variables:
            if name not in names:
                near = nearest(name, names)
                raise RowError(
                    "QC-DATA-049",
                    "is not read by the chat template",
                    at=f"chat_template_kwargs.{name}",
                    expected=" or ".join(names) or "none: this template has no variables",
                    fix=f"did you mean {near}?" if near else "leave it out",
                )

    def _with_media(self, pending: PendingRow, outcome: RowOutcome) -> ChatRow:
        """The row with its media and without the references, which may be data URLs."""
        row = pending.row
        if not pending.reads:
            return row
        outcome.asked = frozenset((part.kind, key) for part in row.media for key in part.options)
        seen, payloads = zip(*pending.media(), strict=True)
        kept = row.media if self._setup.explain else ()
        return replace(row, media=kept, seen=seen, payloads=payloads)

    def _finish(
        self,
        rows: Sequence[tuple[RowOutcome, RowPlan]],
        texts: Sequence[Sequence[str | InputError]],
    ) -> None:
        """Make samples of the renderings of some rows."""
        self._pieces.prepare(
            text
            for (_, plan), some in zip(rows, texts, strict=True)
            for prefix, text in zip(plan.prefixes(), some, strict=True)
            if isinstance(text, str) and not prefix.prompt
        )
        for (outcome, plan), some in zip(rows, texts, strict=True):
            self._guarded(outcome, partial(self._encode, outcome, plan, some))

    def _drafts(self, plan: RowPlan, texts: Sequence[str | InputError]) -> list[Draft]:
        """The samples of a row before they are tokenized."""
        try:
            return drafts(plan, texts, self._setup.chat_format, self._pieces)
        except InputError as error:  # of the template; any other one is not the row's
            raise _Refused(template_refusal(plan.row, error)) from None

    def _encoded(self, plan: RowPlan, found: Sequence[Draft]) -> list[Encoded]:
        """Tokenize and mask the samples of a row."""
        setup = self._setup
        return [
            encode_sample(
                draft, plan, setup.tokenizer, setup.chat_format,
                pieces=self._pieces, reader=setup.reader, explain=setup.explain,
            )
            for draft in found
        ]  # fmt: skip

    def _encode(
        self, outcome: RowOutcome, plan: RowPlan, texts: Sequence[str | InputError]
    ) -> None:
        """Make samples of the renderings of a row, tokenize and mask them, and make them fit."""
        setup = self._setup
        found = self._drafts(plan, texts)
        encoded = self._encoded(plan, found)
        try:
            kept = fitted(
                encoded, setup.max_length, plan.policies.long_rows, setup.tokenizer, setup.reader
            )
        except RowError:
            outcome.tokens = max(len(one.example.ids) for one in encoded)
            raise
        if len(kept) < len(encoded) or any(
            len(a.example.ids) != len(b.example.ids) for a, b in zip(encoded, kept, strict=True)
        ):
            outcome.cut = True
            longest = max(len(one.example.ids) for one in encoded)
            outcome.tokens = max(outcome.tokens, longest)
        if not kept:
            return
        losses = Losses(setup.chat_format, setup.tokenizer)
        for draft in found:
            losses.look(plan, draft)
        outcome.losses = losses.counts
        outcome.findings += losses.findings
        outcome.plan = plan
        outcome.samples = tuple(kept)
        outcome.examples = tuple(one.example for one in kept)
