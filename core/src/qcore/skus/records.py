"""Dataclasses of a SKU record: facts about one published model, each with certainty and source.

This file defines the records. A SKU is a model as published: open weights on the hub, or served
by API only. Every value is a `Fact`: the value, a mark for how well it is known, and its source.
`qcore.skus.file` decides how a record is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

#: A JSON value; a mapping counts the words of a list.
Plain = None | bool | int | float | str | tuple["Plain", ...] | Mapping[str, int]
#: Groups of values, in the order of the report.
SECTIONS = ("values", "shape", "config", "generation_config", "tokens", "tensors", "layout")


def spellings(name: str) -> tuple[str, str]:
    """Return the spellings of a name that match it: lower case, with and without organization."""
    lower = name.lower()
    return lower, lower.rpartition("/")[2]


class Mark(str, Enum):
    """How well a value is known."""

    VERIFIED = "verified"  #: read in the publisher's own file or page, or in a verbatim copy
    TESTED = "tested"  #: computed, or confirmed by a run
    RECONSTRUCTED = "reconstructed"  #: from second-hand sources, without a contradiction
    HYPOTHESIS = "hypothesis"  #: a guess, not yet confirmed


@dataclass(frozen=True, slots=True)
class Fact:
    """One value, how well it is known, and where it comes from."""

    value: Plain
    mark: Mark
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One provider's offer of a model.

    Attributes:
        provider: name of the provider.
        id: the provider's name for the model.
        prices: kind -> price per million tokens; prices of higher tiers are in `note`.
        mark: how well the offer is known.
        source: catalog and date.
        context: context window in tokens.
        output: maximum number of output tokens.
        note: anything else, on one line.
    """

    provider: str
    id: str
    prices: Mapping[str, float]
    mark: Mark
    source: str
    context: int | None = None
    output: int | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sku:
    """One published model.

    Attributes:
        id: hub id; for a hosted model, the provider's name for it.
        generation: name of the generation, as in detection.
        architecture: name of the architecture, as in detection; ``None`` for a hosted model.
        facts: section (`SECTIONS`) -> key -> fact. ``values`` has the keys that
            `qcore.skus.file` lists; ``shape`` the keys of config.json's text section that set
            the sizes; ``config`` other keys of config.json, dotted if nested;
            ``generation_config`` its keys; ``tokens`` the id of each token; ``tensors`` the
            number of tensors, ``total`` and by prefix; ``layout`` how each part's experts are
            stored.
        aliases: other names.
        instead: for a hosted model, the open models of its generation to use instead.
        served: for a hosted model, the offers of its providers.
        origin: entry point that provides the record.
        file: file that contains the record.
    """

    id: str
    generation: str
    architecture: str | None
    facts: Mapping[str, Mapping[str, Fact]]
    aliases: tuple[str, ...] = ()
    instead: tuple[str, ...] = ()
    served: tuple[Served, ...] = ()
    origin: str
    file: Path

    @property
    def hosted(self) -> bool:
        """Whether the model is served by API only."""
        return bool(self.served)

    def names(self) -> frozenset[str]:
        """Return all names of the model, in lower case, with and without the organization."""
        full = {self.id, *self.aliases, *(offer.id for offer in self.served)}
        return frozenset(spelling for name in full for spelling in spellings(name))

    def value(self, key: str) -> Plain:
        """Return a value of the section ``values``; ``None`` if the record has none."""
        fact = self.facts["values"].get(key)
        return None if fact is None else fact.value
