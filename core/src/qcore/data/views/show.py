"""Samples as people look at them: tokens, which of them are trained, and why.

This file decides what is shown of a sample: its token ids, a mark for each token, and consecutive
spans of tokens with a reason. The samples are those of training (`qcore.data.rendering.renderer`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...api.media import RowError
from ..rejects import place_of
from ..rendering.masking import IGNORED

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..media.files import Reference
    from ..rendering.masking import Example
    from ..rendering.renderer import Renderer
    from ..rendering.row_plan import RowPlan
    from ..rendering.samples import Span
    from ..sources.source import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownSample:
    """A sample with the origin of its row.

    Attributes:
        row: number of the row over all sources, from 1.
        sample: number within the row, from 1.
        source: name of the source, as the user wrote it.
        format: row format.
        path: the file of the row.
        place: place of the row in its file: ``line 3``.
        token_ids: token ids.
        trained: for each token, whether it has a label.
        spans: consecutive ranges of tokens that cover the sample.
        media: media parts of the row that the sample contains, in order.
    """

    row: int
    sample: int
    source: str
    format: str
    path: Path
    place: str
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


def previews(sample: ShownSample, renderer: Renderer, size: int) -> list[tuple[str, str]]:
    """For each medium of a sample a caption, and a data URL of a small picture or an empty string.

    Args:
        sample: the sample.
        renderer: that has rendered it.
        size: pixels of the longer side.
    """
    reader = renderer.options.reader
    sources = (count.source for count in renderer.notes.counts)
    root = next((one.media_root for one in sources if sample.path in one.files), None)
    shown: list[tuple[str, str]] = []
    for part in sample.media:
        name = part.given if isinstance(part.given, str) else ""
        caption = f"{part.kind} {'' if name[:5].lower() == 'data:' else name}".strip()
        url = ""
        if reader is not None:
            try:
                payload = renderer.finder(sample.path.parent, root).payload(part)
            except RowError:  # the file has changed since it was read
                payload = None
            url = "" if payload is None else reader.preview(payload, size)
        shown.append((caption[:200], url))
    return shown


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
    assert row.path is not None, "rows are read from files"
    return ShownSample(
        row=example.row,
        sample=example.sample,
        source=row.source.name if row.source is not None else str(row.path),
        format=row.format,
        path=row.path,
        place=place_of(row),
        token_ids=example.ids,
        trained=[label != IGNORED for label in example.labels],
        spans=example.token_spans,
        media=row.media[: len(example.media)],
    )
