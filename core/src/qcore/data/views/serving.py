"""Parity of all trained turns of a data set with serving, as a report.

This file decides what is counted and how media are expanded in a served prompt. What is compared is
decided by `qcore.data.views.parity`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .parity import Difference, parity

if TYPE_CHECKING:
    from ...api.media import MediaReader
    from ..rendering.renderer import Renderer
    from ..rows import ChatRow
    from ..sources.source import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """The result of `compare_with_serving`.

    Attributes:
        rows: rows of all sources, refused ones included.
        turns: trained turns.
        differing: trained turns with a difference.
        differences: number of the row, and the difference.
    """

    rows: int
    turns: int
    differing: int
    differences: tuple[tuple[int, Difference], ...]

    def as_json(self) -> dict[str, Any]:
        """The payload of ``qcore data parity --json``."""
        return {
            "rows": self.rows,
            "turns": self.turns,
            "differing": self.differing,
            "differences": [{"row": row, **asdict(found)} for row, found in self.differences],
        }


def compare_with_serving(renderer: Renderer, sources: Sequence[Source]) -> ParityReport:
    """Compare every trained turn of some sources with the prompt that serving shows.

    Args:
        renderer: of the model; its `Rejects` collects the refused rows.
        sources: where the rows come from.

    Raises:
        InputError: as `Renderer.examples` and `parity`.
    """
    turns = differing = 0
    found: list[tuple[int, Difference]] = []
    options = renderer.options
    for plan, encoded in renderer.encoded(sources):
        row = plan.row
        turns += sum(len(one.sample.turns) for one in encoded)
        made = parity(
            plan.messages,
            plan.tools,
            [one.sample for one in encoded],
            renderer.format,
            renderer.template,
            tokenizer=renderer.tokenizer,
            variables={**options.special, **options.variables, **row.variables},
            expand=None if options.reader is None else partial(_expanded, options.reader, row),
        )
        differing += len({one.turn for one in made})
        found += [(row.row, one) for one in made]
    return ParityReport(
        rows=renderer.rows, turns=turns, differing=differing, differences=tuple(found)
    )


def _expanded(reader: MediaReader, row: ChatRow, text: str, count: int) -> str:
    """The text with the placeholders of the media in the first `count` messages expanded."""
    pairs = zip(row.media_at, row.seen, strict=True)
    return reader.expand(text, [medium for at, medium in pairs if at < count])
