"""Samples as people look at them: tokens, which of them are trained, and why.

This file decides what is shown of a sample: its token ids, a mark for each token, and consecutive
spans of tokens with a reason. The samples are those of training (`qcore.data.rendering`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .masking import IGNORED

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from .masking import Example
    from .media_files import Reference
    from .rendering import Renderer
    from .row_plan import RowPlan
    from .samples import Span
    from .source import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownSample:
    """A sample with the origin of its row.

    Attributes:
        row: number of the row over all sources, from 1.
        sample: number within the row, from 1.
        source: name of the source, as the user wrote it.
        format: row format.
        line: line of the row in its file.
        token_ids: token ids.
        trained: for each token, whether it has a label.
        spans: consecutive ranges of tokens that cover the sample.
        media: media parts of the row that the sample contains, in order.
    """

    row: int
    sample: int
    source: str
    format: str
    line: int
    token_ids: Sequence[int]
    trained: Sequence[bool]
    spans: tuple[Span, ...]
    media: tuple[Reference, ...] = ()

    @property
    def supervised(self) -> int:
        """Number of trained tokens."""
        return sum(self.trained)

    def as_json(self) -> dict[str, Any]:
        """The entry of ``qcore data show --json``."""
        return {
            "row": self.row,
            "sample": self.sample,
            "source": self.source,
            "format": self.format,
            "token_ids": list(self.token_ids),
            "trained": list(self.trained),
            "spans": [
                {"start": span.start, "end": span.end, "why": span.why} for span in self.spans
            ],
        }

    def texts(self, tokenizer: Tokenizer) -> list[str]:
        """The text of each span."""
        return [
            tokenizer.decode(list(self.token_ids[span.start : span.end]), skip_special_tokens=False)
            for span in self.spans
        ]


def shown_samples(renderer: Renderer, sources: Sequence[Source]) -> Iterator[ShownSample]:
    """Yield the samples of some sources, all samples of a row together.

    Args:
        renderer: with `Options.explain`; its `Rejects` collects the refused rows.
        sources: where the rows come from.

    Raises:
        InputError: as `Renderer.examples`.
    """
    for plan, encoded in renderer.encoded(sources):
        for one in encoded:
            yield _shown(plan, one.example)


def _shown(plan: RowPlan, example: Example) -> ShownSample:
    row = plan.row
    return ShownSample(
        row=example.row,
        sample=example.sample,
        source=row.source.name if row.source is not None else str(row.path),
        format=row.format,
        line=row.line,
        token_ids=example.ids,
        trained=[label != IGNORED for label in example.labels],
        spans=example.spans,
        media=row.media[: len(example.media)],
    )
