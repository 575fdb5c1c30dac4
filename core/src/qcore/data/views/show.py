"""Samples as people look at them: tokens, which of them are trained, and why.

This file decides what is shown of a sample: its token ids, a mark for each token, and consecutive
spans of tokens with a reason. The samples are those of training (`qcore.data.rendering.renderer`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...api.media import RowError
from ..rejects import place_of
from ..rendering.masking import IGNORED

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..rendering.masking import Example
    from ..rendering.renderer import Renderer
    from ..rows import ChatRow
    from ..sources.source import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownSample:
    """A sample and the row that it comes from.

    Attributes:
        origin: the row; its `media` are references.
        example: the sample, with the reason of each token.
    """

    origin: ChatRow
    example: Example

    @property
    def source(self) -> str:
        """Name of the source, as the user wrote it."""
        row = self.origin
        return row.source.name if row.source is not None else str(row.path)

    @property
    def place(self) -> str:
        """Place of the row in its file: ``line 3``."""
        return place_of(self.origin)

    @property
    def trained(self) -> list[bool]:
        """For each token, whether it has a label."""
        return [label != IGNORED for label in self.example.labels]

    @property
    def supervised(self) -> int:
        """Number of trained tokens."""
        return len(self.example.labels) - self.example.labels.count(IGNORED)

    def as_json(self) -> dict[str, Any]:
        """The entry of ``qcore data show --json``."""
        return {
            "row": self.example.row,
            "sample": self.example.sample,
            "source": self.source,
            "format": self.origin.format,
            "token_ids": list(self.example.ids),
            "trained": self.trained,
            "spans": [
                {"start": span.start, "end": span.end, "why": span.why}
                for span in self.example.token_spans
            ],
        }

    def texts(self, tokenizer: Tokenizer) -> list[str]:
        """The text of each span."""
        ids = list(self.example.ids)
        return [
            tokenizer.decode(ids[span.start : span.end], skip_special_tokens=False)
            for span in self.example.token_spans
        ]


def previews(sample: ShownSample, renderer: Renderer, size: int) -> list[tuple[str, str]]:
    """For each medium of a sample a caption, and a data URL of a small picture or an empty string.

    Args:
        sample: the sample.
        renderer: that has rendered it.
        size: pixels of the longer side.
    """
    reader, path = renderer.options.reader, sample.origin.path
    assert path is not None, "rows are read from files"
    sources = (count.source for count in renderer.notes.counts)
    root = next((one.media_root for one in sources if path in one.files), None)
    shown: list[tuple[str, str]] = []
    for part in sample.origin.media[: len(sample.example.media)]:
        name = part.given if isinstance(part.given, str) else ""
        caption = f"{part.kind} {'' if name[:5].lower() == 'data:' else name}".strip()
        url = ""
        if reader is not None:
            try:
                payload = renderer.finder(path.parent, root).payload(part)
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
            yield ShownSample(origin=plan.row, example=one.example)
