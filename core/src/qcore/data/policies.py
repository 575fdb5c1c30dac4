"""Policies of a run's rows: which turns are trained, under which history, and what may be left out.

This file decides which policies exist and that a source's own value goes before the run's setting.
`qcore.data.rendering.samples` applies those on turns, `qcore.data.rendering.fitting` those on
length and `qcore.data.rejects` those on bad rows. The settings have the same names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from ..config.settings import SPECS

if TYPE_CHECKING:
    from ..config.settings import Settings
    from .sources.source import Source

#: Policies with a choice of values, which a source may set itself.
POLICY_KEYS: Final = ("turns", "reasoning", "history", "long_rows", "bad_rows")
# The settings list the choices; a new one must get a name here.
ALL, LAST = SPECS["turns"].choices
TRAIN, MASK, DROP_REASONING = SPECS["reasoning"].choices
AS_SERVED, AS_RENDERED = SPECS["history"].choices
REFUSE, DROP_ROWS, TRUNCATE_TURNS, TRUNCATE_TOKENS = SPECS["long_rows"].choices
_, SKIP = SPECS["bad_rows"].choices


@dataclass(frozen=True, slots=True, kw_only=True)
class Policies:
    """The policies in force for a row.

    Attributes:
        turns: ``all`` assistant turns are trained, or the ``last`` one.
        reasoning: ``train`` it, ``mask`` it or ``drop`` it from the row.
        history: ``as_served``: a turn is trained in the context that serving gives it;
            ``as_rendered``: in one rendering of the row.
        long_rows: ``refuse``, ``drop``, ``truncate_turns`` or ``truncate_tokens``.
        bad_rows: ``refuse`` or ``skip``.
        bad_rows_limit: the largest fraction of the rows of a source that may be skipped.
        train: whether turns without a mark of their own are trained.
        refuse_findings: codes of warnings that refuse a row instead.
    """

    turns: str = ALL
    reasoning: str = TRAIN
    history: str = AS_SERVED
    long_rows: str = REFUSE
    bad_rows: str = REFUSE
    bad_rows_limit: float = 0.1
    train: bool = True
    refuse_findings: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: Settings) -> Policies:
        """The policies that the settings of a run name."""
        return cls(
            turns=settings.turns,
            reasoning=settings.reasoning,
            history=settings.history,
            long_rows=settings.long_rows,
            bad_rows=settings.bad_rows,
            bad_rows_limit=settings.bad_rows_limit,
            refuse_findings=settings.refuse_findings,
        )

    def over(self, source: Source | None) -> Policies:
        """The policies for the rows of a source."""
        if source is None:
            return self
        return replace(
            self,
            turns=source.turns or self.turns,
            reasoning=source.reasoning or self.reasoning,
            history=source.history or self.history,
            long_rows=source.long_rows or self.long_rows,
            bad_rows=source.bad_rows or self.bad_rows,
            bad_rows_limit=self.bad_rows_limit
            if source.bad_rows_limit is None
            else source.bad_rows_limit,
            train=source.train,
        )
