"""SKU records: what is known of a published checkpoint, and how well.

This file decides what a record is. A SKU is a model as it is published: open weights on the
hub, or served by API only. Every value is a `Fact`: the value, a mark that says how well it is
known, and where it is from. How a record is written down is `qcore.skus.file`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

#: A value as JSON has it; a mapping counts the words of a list.
Plain = None | bool | int | float | str | tuple["Plain", ...] | Mapping[str, int]
#: Groups of values, in the order of the report.
SECTIONS = ("values", "shape", "config", "generation_config", "tokens", "tensors", "layout")


def spellings(name: str) -> tuple[str, str]:
    """The forms of a name that mean one record: in lower case, with and without organisation."""
    lower = name.lower()
    return lower, lower.rpartition("/")[2]


class Mark(str, Enum):
    """How well a value is known."""

    VERIFIED = "verified"  #: read in the publisher's own file or page, or a verbatim copy of it
    TESTED = "tested"  #: computed or run, and it came out so
    RECONSTRUCTED = "reconstructed"  #: from second-hand sources; agrees with everything seen
    HYPOTHESIS = "hypothesis"  #: a guess, still to be seen


@dataclass(frozen=True, slots=True)
class Fact:
    """One value, how well it is known, and where it is from."""

    value: Plain
    mark: Mark
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One provider's offer of a model.

    Attributes:
        provider: who serves it.
        id: name of the model there.
        prices: per million tokens, by kind; those of a higher tier are in `note`.
        context: window in tokens there.
        output: most tokens of an answer there.
        note: anything else, one line.
        mark: how well this is known.
        source: catalogue and date.
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
        id: hub id; of a hosted one, the provider's name for it.
        generation: as detection names it.
        architecture: as detection names it; ``None`` of a hosted one.
        facts: by section (`SECTIONS`), then key: ``values`` are those that `qcore.skus.file`
            names; ``shape`` are the keys of config.json's text section that make the sizes;
            ``config`` other keys of config.json, dotted where nested; ``generation_config``
            its keys; ``tokens`` ids by token; ``tensors`` numbers of tensors, ``total`` and by
            prefix of their names; ``layout`` how each part's experts lie.
        aliases: other names.
        instead: of a hosted one, the open models of its generation to name instead.
        served: of a hosted one, who serves it.
        origin: entry point that brought it.
        file: where it stands.
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
        """Whether it is served by API only."""
        return bool(self.served)

    def names(self) -> frozenset[str]:
        """Every name it goes by, in lower case, with and without the organisation."""
        full = {self.id, *self.aliases, *(offer.id for offer in self.served)}
        return frozenset(form for name in full for form in spellings(name))

    def value(self, key: str) -> Plain:
        """A value of the section ``values``; ``None`` where the record has none."""
        fact = self.facts["values"].get(key)
        return None if fact is None else fact.value
