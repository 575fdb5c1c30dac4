"""Rendering of the rows of sources to tokenized samples, with what there is to say of them.

This file decides what a run asks of its rows, and that variables, template and chat format fit
together before a row is read. `qcore.data.rendering.row_renderer` renders the rows,
`qcore.data.rendering.run_notes` keeps the notes on them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...api.records import ChatFormat
from ...errors import InputError
from ..formats import load_formats
from ..media.files import Finder
from ..policies import Policies
from ..reading import Chunk, chunks, read_records
from ..repairs.repair import repair_context
from .chat_record import ChatRecord, TrainedTurns, chat_record
from .masking import Encoded, Example
from .row_plan import RowPlan
from .row_pool import RowPool, packed, worker_count
from .row_renderer import RowOutcome, RowRenderer, RowSetup
from .run_notes import RunNotes
from .template_check import prove_mask
from .template_kwargs import check_variables
from .tokenizer_check import special_texts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ...api.media import MediaReader
    from ...checkpoint.chat_template import Template
    from ..rejects import Rejects
    from ..sources.source import Source
    from ..store.records import PackedExample


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a run asks of its rows.

    Attributes:
        policies: which turns are trained and what may be left out.
        max_length: maximum tokens of a sample.
        variables: inputs of the template that the user set.
        special: special tokens by name, as templates read them.
        reader: reads media; without it rows must be text only.
        unread: why rows with media cannot be read.
        explain: whether samples keep the reason of each token, and rows the references of media.
        seed: chooses rows of sources with a weight or count.
        workers: as the setting ``dataset_num_proc``; rows with media, with reasons (`explain`) or
            by number (`only`) are rendered in this process, which reads their media in threads.
        only: numbers of the rows to render; empty: all rows.
        advance: called with the number of bytes read since the last call.
    """

    policies: Policies = field(default_factory=Policies)
    max_length: int = 1 << 20
    variables: Mapping[str, Any] = field(default_factory=dict)
    special: Mapping[str, str] = field(default_factory=dict)
    reader: MediaReader | None = None
    unread: str = ""
    explain: bool = False
    seed: int = 0
    workers: int = 1
    only: frozenset[int] = frozenset()
    advance: Callable[[int], None] | None = None


class Renderer:
    """Turns the rows of sources into samples.

    Variables, template and chat format are checked against each other first. The rows are rendered
    in the block of `notes`, which are complete at its end.

    Args:
        template: of the checkpoint; the caller closes it.
        chat_format: the format of rendered conversations.
        tokenizer: from `load_tokenizer`.
        options: what the run asks of its rows.
        rejects: collects refused rows.

    Attributes:
        notes: counts and findings.

    Raises:
        UsageError: as `check_variables`.
        InputError: as `prove_mask` and `repair_context`.
    """

    def __init__(
        self,
        template: Template,
        chat_format: ChatFormat,
        tokenizer: Tokenizer,
        options: Options,
        rejects: Rejects,
    ) -> None:
        self.template = template
        self.format = chat_format
        self.tokenizer = tokenizer
        self.options = options
        self._formats = load_formats(
            kinds=options.reader.kinds if options.reader else (), unread=options.unread
        )
        self._setup = self._prepared()
        self._rows = RowRenderer(self._setup, template, self._formats, options.workers)
        self.notes = RunNotes(rejects, self._formats, options.max_length, self._keep_reasoning)

    def _prepared(self) -> RowSetup:
        options, template, chat_format = self.options, self.template, self.format
        variables = {**options.special, **options.variables}
        check_variables(template, options.variables)
        prove_mask(template, chat_format, self.tokenizer, variables=variables)
        names = tuple(sorted(template.switches()))
        switch = chat_format.thinking_switch if chat_format.thinking_switch in names else ""
        return RowSetup(
            chat_format=chat_format,
            tokenizer=self.tokenizer,
            policies=options.policies,
            max_length=options.max_length,
            variables=variables,
            switch=switch,
            fixed=switch in options.variables,
            names=names,
            control=special_texts(self.tokenizer),
            context=repair_context(
                template,
                chat_format,
                variables,
                kinds=self._formats.kinds,
                refused=options.policies.refuse_findings,
            ),
            reader=options.reader,
            unread=options.unread,
            explain=options.explain,
        )

    @property
    def rejects(self) -> Rejects:
        """The refused rows."""
        return self.notes.rejects

    @property
    def switch(self) -> str:
        """Variable that turns thinking on and off; empty: the template has none."""
        return self._setup.switch

    @property
    def rows(self) -> int:
        """Rows so far, refused ones included."""
        return self.notes.rows

    def examples(self, sources: Sequence[Source]) -> Iterator[Example | PackedExample]:
        """Yield the samples of some sources, all samples of a row together.

        Those that another process has rendered are packed as they are stored.

        Raises:
            QcoreError: as `read_records`, `RowReader` and `PrefixBatches.answers`.
        """
        for outcome in self._outcomes(sources):
            yield from outcome.examples

    def encoded(self, sources: Sequence[Source]) -> Iterator[tuple[RowPlan, Sequence[Encoded]]]:
        """Yield each row that is left with its samples.

        Raises:
            QcoreError: as `examples`.
        """
        for outcome in self._outcomes(sources):
            if outcome.plan is not None:
                yield outcome.plan, outcome.samples

    def finder(self, folder: Path, media_root: Path | None) -> Finder:
        """What finds the media of the data files in a folder."""
        return self._rows.media.finder(folder, media_root)

    def _outcomes(self, sources: Sequence[Source]) -> Iterator[RowOutcome]:
        """Yield what became of each row, noted."""
        options = self.options
        records = read_records(
            sources, self.notes.counts,
            first=self.rows + 1, seed=options.seed, only=options.only, advance=options.advance,
        )  # fmt: skip
        count = 1
        if not (options.explain or options.only):
            count = worker_count(options.workers, sources)
        setup = packed(self._setup, self.template) if count > 1 else None
        if count > 1 and setup is None:
            self.notes.one_process = True
        read = chunks(records)
        with self._rows:
            made = self._here(read) if setup is None else self._apart(read, setup, count)
            for chunk, outcomes in made:
                # A fatal error ends a chunk early; `add` raises it.
                for numbered, outcome in zip(chunk, outcomes, strict=False):
                    self.notes.add(numbered, outcome)
                    yield outcome

    def _here(self, read: Iterable[Chunk]) -> Iterator[tuple[Chunk, list[RowOutcome]]]:
        """Yield each chunk with what became of its rows, which this process renders."""
        waiting: deque[Chunk] = deque()

        def noted() -> Iterator[Chunk]:
            for chunk in read:
                waiting.append(chunk)
                yield chunk

        for outcomes in self._rows.outcomes(noted()):
            yield waiting.popleft(), outcomes

    def _apart(
        self, read: Iterable[Chunk], setup: bytes, count: int
    ) -> Iterator[tuple[Chunk, list[RowOutcome]]]:
        """As `_here`, but other processes render the rows without media."""
        with RowPool(setup, count) as pool:
            for chunk, outcomes in pool.outcomes(read):
                pairs = zip(chunk, outcomes, strict=False)
                left = [numbered for numbered, outcome in pairs if outcome.deferred]
                if left:
                    (mine,) = self._rows.outcomes([left])
                    ours = iter(mine)
                    outcomes = [next(ours) if one.deferred else one for one in outcomes]
                yield chunk, outcomes

    def _keep_reasoning(self) -> str:
        """How to train reasoning that is lost: a variable is named if a probe keeps it."""
        said, word = {"role": self.format.assistant, "content": "birch"}, "amber"
        probe = [
            {"role": "user", "content": "cedar"},
            {**said, "reasoning_content": word},
            {"role": "user", "content": "dahlia"},
            said,
        ]
        keeps = []
        for name in self._setup.names:
            try:
                text = self.template.render(
                    probe, None, False, **{**self._setup.variables, name: True}
                )
            except InputError:
                continue
            if word in text:
                keeps.append(f"chat_template_kwargs.{name}=true")
        return " or ".join(["set history=as_served", *keeps])

    def record(self, trained: TrainedTurns) -> ChatRecord:
        """How some turns were rendered; adds what there is to say of it.

        Args:
            trained: the turns of the training samples.
        """
        setup = self._setup
        record = chat_record(self.template.sha256, self.options.variables, setup.switch, trained)
        self.notes.findings.extend(record.findings())
        return record
