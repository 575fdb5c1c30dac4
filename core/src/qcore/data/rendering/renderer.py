"""Rendering of rows: from the rows of sources to tokenized samples, with what there is to say.

This file decides the way of one row: its media are read, its trained turns are chosen, the template
renders the prefixes that they need in one request, samples are made of the renderings, tokenized,
masked and made to fit. `qcore.data.dataset` collects the samples.

Codes: ``QC-DATA-046`` rows that ``long_rows`` changed, ``-047`` rows that ``bad_rows`` left out,
``-048`` rows that became several samples, ``-049`` a variable of a row that the template does not
read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...api.media import RowError
from ...api.records import ChatFormat
from ...errors import InputError, nearest
from ..findings import NOTE, WARNING, DataFinding, Findings
from ..formats import IGNORED, load_formats
from ..media.files import Finder
from ..policies import Policies
from ..reading import RowReader, read_rows
from ..rejects import CUT, LONG, template_refusal
from ..repairs.repair import repair_context
from ..rows import ChatRow, RowCheck
from ..source_counts import SourceCount
from ..sources.row_bytes import row_bytes
from .chat_record import ChatRecord, TrainedTurns, chat_record
from .fitting import fitted
from .losses import Losses
from .masking import Encoded, Example, encode_sample
from .pieces import PieceEncoder
from .row_plan import RowPlan, plan_row
from .samples import drafts
from .template_check import prove_mask, prove_media
from .template_kwargs import check_variables
from .tokenizer_check import special_texts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ...api.media import MediaReader
    from ...checkpoint.chat_template import Template
    from ..rejects import Rejects
    from ..sources.source import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a run asks of its rows.

    Attributes:
        policies: which turns are trained and what may be left out.
        max_length: maximum tokens of a sample.
        variables: inputs of the template that the user set.
        special: special tokens by name, as templates read them.
        reader: reads media; without it rows must be text only.
        unread: why there is no reader.
        explain: whether samples keep the reason of each token, and rows the references of media.
        seed: chooses rows of sources with a weight or count.
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
    only: frozenset[int] = frozenset()
    advance: Callable[[int], None] | None = None


class Renderer:
    """Turns the rows of sources into samples and counts what happens to them.

    Args:
        template: of the checkpoint; the caller closes it.
        chat_format: the format of rendered conversations.
        tokenizer: from `load_tokenizer`.
        options: what the run asks of its rows.
        rejects: collects refused rows.

    Attributes:
        rows: rows so far, refused ones included.
        counts: what came from each source.
        findings: what there is to say of the rows.
        dropped: rows that ``long_rows`` left out.
        truncated: rows that ``long_rows`` cut.
        asked: by number of a row: reader options that its parts set themselves.
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
        self.rejects = rejects
        self.findings = Findings()
        self.counts: list[SourceCount] = []
        self.dropped = self.truncated = 0
        self.asked: dict[int, frozenset[tuple[str, str]]] = {}
        self._alike: dict[frozenset[tuple[str, str]], frozenset[tuple[str, str]]] = {}
        self._given = {**options.special, **options.variables}
        self._switch = ""
        self._names: tuple[str, ...] = ()
        self._media_proved = False
        self._finders: dict[tuple[Path, Path | None], Finder] = {}
        self._pieces = PieceEncoder(tokenizer, chat_format.turn_start)
        self._losses = Losses(chat_format, tokenizer, self.findings)
        self._formats = load_formats()
        self._samples = self._rendered = self._tokens = 0
        self._split = 0

    @property
    def rows(self) -> int:
        """Rows so far, refused ones included."""
        return sum(count.rows for count in self.counts)

    @property
    def switch(self) -> str:
        """Variable that turns thinking on and off; empty: the template has none."""
        return self._switch

    def prove(self) -> None:
        """Check variables, template and chat format against each other.

        Raises:
            UsageError: as `check_variables`.
            InputError: as `prove_mask`.
        """
        check_variables(self.template, self.options.variables)
        prove_mask(self.template, self.format, self.tokenizer, variables=self._given)
        self._names = tuple(sorted(self.template.switches()))
        if self.format.thinking_switch in self._names:
            self._switch = self.format.thinking_switch

    def examples(self, sources: Sequence[Source]) -> Iterator[Example]:
        """Yield the samples of some sources, all samples of a row together.

        Raises:
            InputError: as `read_rows` and `Template.render_prefixes`.
        """
        for _, encoded in self.encoded(sources):
            for one in encoded:
                yield one.example

    def encoded(self, sources: Sequence[Source]) -> Iterator[tuple[RowPlan, list[Encoded]]]:
        """Yield each row that is left with its samples.

        Raises:
            InputError: as `examples`.
        """
        if not sources:
            return
        control = special_texts(self.tokenizer)
        reader = RowReader(
            formats=self._formats,
            check=RowCheck(self.format, control, self.options.reader, self.options.unread),
            context=repair_context(
                self.template,
                self.format,
                self._given,
                kinds=self._formats.kinds,
                refused=self.options.policies.refuse_findings,
            ),
            findings=self.findings,
        )
        rows = read_rows(
            sources, reader, self.rejects, self.counts,
            first=self.rows + 1, seed=self.options.seed,
            only=self.options.only, advance=self.options.advance,
        )  # fmt: skip
        plans = self._planned(self._seen(rows))
        asked = ((plan, plan.prefixes()) for plan in plans)
        for plan, texts in self.template.render_prefixes(asked, **self._given):
            made = self._made(plan, texts)
            if made:
                yield plan, made

    def _planned(self, rows: Iterable[ChatRow]) -> Iterator[RowPlan]:
        fixed = self._switch in self.options.variables
        # A loop variable would keep the last row's bytes alive while the next line is parsed.
        plans = (self._plan(row, fixed) for row in rows)
        return (plan for plan in plans if plan is not None)

    def _plan(self, row: ChatRow, fixed: bool) -> RowPlan | None:
        policies = self.options.policies.over(row.source)
        try:
            self._check_variables(row)
            return plan_row(row, policies, self.format, self._switch, fixed)
        except RowError as bad:
            self.rejects.add(row, bad)
            return None

    def _check_variables(self, row: ChatRow) -> None:
        for name in row.variables:
            if name not in self._names:
                near = nearest(name, self._names)
                raise RowError(
                    "QC-DATA-049",
                    "is not read by the chat template",
                    at=f"chat_template_kwargs.{name}",
                    expected=" or ".join(self._names) or "none: this template has no variables",
                    fix=f"did you mean {near}?" if near else "leave it out",
                )

    def _seen(self, rows: Iterable[ChatRow]) -> Iterator[ChatRow]:
        """Read the media of each row and drop the references, which may be data URLs.

        The first row with media triggers the check that the template renders media, so text-only
        files do not need it.
        """
        reader = self.options.reader
        if reader is None:
            return iter(rows)
        # A loop variable would keep the last row's bytes alive while the next line is parsed.
        read = (self._with_media(row, reader) for row in rows)
        return (row for row in read if row is not None)

    def _with_media(self, row: ChatRow, reader: MediaReader) -> ChatRow | None:
        if row.media and not self._media_proved:
            with self.template.reopen() as apart:  # the template is busy with the rows
                prove_media(apart, self.format, self.tokenizer, reader, variables=self._given)
            self._media_proved = True
        assert row.path is not None, "rows are read from files"
        root = None if row.source is None else row.source.media_root
        finder = self.finder(row.path.parent, root)
        origin = row_bytes(row.path, row.line) if row.media else None
        try:
            read = [finder.read_payload(part, reader, origin) for part in row.media]
        except RowError as bad:
            self.rejects.add(row, bad)
            return None
        if keys := frozenset((part.kind, key) for part in row.media for key in part.options):
            self.asked[row.row] = self._alike.setdefault(keys, keys)
        kept = row.media if self.options.explain else ()
        if not read:
            return row
        seen, payloads = zip(*read, strict=True)
        return replace(row, media=kept, seen=seen, payloads=payloads)

    def finder(self, folder: Path, media_root: Path | None) -> Finder:
        """What finds the media of the data files in a folder."""
        key = folder, media_root
        return self._finders.get(key) or self._finders.setdefault(key, Finder(*key))

    def _made(self, plan: RowPlan, texts: Sequence[str | InputError]) -> list[Encoded]:
        """The samples of a row; none if it is refused or left out."""
        row, policy = plan.row, plan.policies.long_rows
        self._pieces.forget()
        try:
            found = drafts(plan, texts, self.format, self._pieces)
        except InputError as error:  # of the template; any other one is not the row's
            self.rejects.add(row, template_refusal(row, error))
            return []
        except RowError as bad:
            self.rejects.add(row, bad)
            return []
        try:
            encoded = [
                encode_sample(
                    draft, plan, self.tokenizer, self.format,
                    reader=self.options.reader, explain=self.options.explain, pieces=self._pieces,
                )
                for draft in found
            ]  # fmt: skip
        except RowError as bad:
            self.rejects.add(row, bad)
            return []
        try:
            kept = fitted(
                encoded, self.options.max_length, policy, self.tokenizer, self.options.reader
            )
        except RowError as bad:
            longest = max(len(one.example.ids) for one in encoded)
            self.rejects.add_too_long(row, longest, bad)
            return []
        for draft in found if kept else ():
            self._losses.look(plan, draft)
        self._count(row, encoded, kept)
        return kept

    def _count(self, row: ChatRow, encoded: Sequence[Encoded], kept: Sequence[Encoded]) -> None:
        cut = len(kept) < len(encoded) or any(
            len(a.example.ids) != len(b.example.ids) for a, b in zip(encoded, kept, strict=True)
        )
        if cut:
            longest = max(len(one.example.ids) for one in encoded)
            self.rejects.add_long(row, longest, self.options.max_length, cut=bool(kept))
        if not kept:
            self.dropped += 1
            return
        self.truncated += cut
        lengths = [len(one.example.ids) for one in kept]
        self._split += len(kept) > 1
        self._samples += len(kept)
        self._tokens += sum(lengths)
        self._rendered += max(lengths)

    def close(self) -> None:
        """Make the findings on all rows; after the last row, while the template is open."""
        if self._losses.lost:
            self._losses.advice = self._keep_reasoning()
        self._losses.close()
        for key, message in self._formats.notes():
            self.findings.add(
                DataFinding(code=IGNORED, severity=NOTE, row=0, field=key, message=message)
            )
        if self._split:
            left = self.rows - self.rejects.count - self.dropped
            self._add(
                "QC-DATA-048",
                NOTE,
                f"{left} rows became {self._samples} samples with "
                f"{self._tokens / self._rendered:.2f} times the tokens, because the template "
                "renders earlier turns of a conversation unlike it served them "
                "(history=as_served; as_rendered trains each row in one rendering)",
            )
        self._report_losses()

    def _report_losses(self) -> None:
        rejects, rows = self.rejects, self.rows
        listed = f"; {rejects.listing} lists them" if rejects.listing else ""
        for (action, policy), count in sorted(rejects.long.items()):
            what = "cut" if action == CUT else "left out"
            self._add(
                LONG,
                WARNING,
                f"{count} of {rows} rows are longer than max_length={self.options.max_length} "
                f"and were {what} (long_rows={policy}){listed}",
            )
        if rejects.skipped:
            self._add(
                "QC-DATA-047",
                WARNING,
                f"{rejects.skipped} of {rows} rows are bad and were left out "
                f"(bad_rows=skip){listed}",
            )

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
        for name in self._names:
            try:
                text = self.template.render(probe, None, False, **{**self._given, name: True})
            except InputError:
                continue
            if word in text:
                keeps.append(f"chat_template_kwargs.{name}=true")
        return " or ".join(["set history=as_served", *keeps])

    def _add(self, code: str, severity: str, message: str) -> None:
        self.findings.add(
            DataFinding(code=code, severity=severity, row=0, field="", message=message)
        )

    def chat(self, examples: Iterable[Example]) -> ChatRecord:
        """How the turns of some samples were rendered; adds what there is to say of it.

        Args:
            examples: the training samples.
        """
        trained = TrainedTurns()
        for example in examples:
            trained.add(example)
        return self.record(trained)

    def record(self, trained: TrainedTurns) -> ChatRecord:
        """As `chat`, from the trained turns."""
        record = chat_record(self.template.sha256, self.options.variables, self._switch, trained)
        self.findings.extend(record.findings())
        return record
