"""Parity of all trained turns of a data set with serving, as a report.

This file decides what is counted and how media are expanded in a served prompt. What is compared is
decided by `qcore.data.views.parity`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..policies import MASK
from ..rendering.masking import control_ids
from .parity import MESSAGE, Difference, parity

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
        differences: number of the row, and the difference, of prompts, tokens and labels.
        notes: the same of messages, whose tokens are those of serving.
    """

    rows: int
    turns: int
    differing: int
    differences: tuple[tuple[int, Difference], ...]
    notes: tuple[tuple[int, Difference], ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The payload of ``qcore data parity --json``."""
        return {
            "rows": self.rows,
            "turns": self.turns,
            "differing": self.differing,
            "differences": [{"row": row, **asdict(one)} for row, one in self.differences],
            "notes": [{"row": row, **asdict(one)} for row, one in self.notes],
        }

    def noted(self) -> list[dict[str, Any]]:
        """The notes by cause, with their number and the place of the first one."""
        causes: dict[str, list[tuple[int, Difference]]] = {}
        for note in self.notes:
            causes.setdefault(note[1].cause, []).append(note)
        return [
            {"cause": cause, "turns": len({(row, one.turn) for row, one in notes}),
             "first": f"row {notes[0][0]}, messages[{notes[0][1].turn}].{notes[0][1].field}",
             "trained": notes[0][1].trained, "row": notes[0][1].served}
            for cause, notes in causes.items()
        ]  # fmt: skip


def compare_with_serving(renderer: Renderer, sources: Sequence[Source]) -> ParityReport:
    """Compare every trained turn of some sources with the prompt that serving shows.

    Args:
        renderer: of the model; its `Rejects` collects the refused rows.
        sources: where the rows come from.

    Raises:
        InputError: as `Renderer.examples` and `parity`.
    """
    turns = differing = 0
    differences: list[tuple[int, Difference]] = []
    notes: list[tuple[int, Difference]] = []
    options, tokenizer = renderer.options, renderer.tokenizer
    reader = options.reader
    for plan, encoded in renderer.encoded(sources):
        row = plan.row
        turns += sum(one.example.turns for one in encoded)
        made = parity(
            plan.messages,
            plan.tools,
            encoded,
            renderer.format,
            renderer.template,
            tokenizer,
            variables={**options.special, **options.variables, **row.variables},
            expand=None if reader is None else partial(_expanded, reader, row),
            untrained=frozenset() if reader is None else control_ids(tokenizer, reader),
            masked_reasoning=plan.policies.reasoning == MASK,
        )
        differing += len({one.turn for one in made if one.kind != MESSAGE})
        for one in made:
            (notes if one.kind == MESSAGE else differences).append((row.row, one))
    return ParityReport(
        rows=renderer.rows, turns=turns, differing=differing, differences=tuple(differences),
        notes=tuple(notes),
    )  # fmt: skip


def _expanded(reader: MediaReader, row: ChatRow, text: str, count: int) -> str:
    """The text with the placeholders of the media in the first `count` messages expanded."""
    pairs = zip(row.media_at, row.seen, strict=True)
    return reader.expand(text, [medium for at, medium in pairs if at < count])
