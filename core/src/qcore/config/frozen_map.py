"""Entries: the value of a setting that is itself a mapping, such as ``group_r``.

This file decides only what such a value is: read-only and hashable, as the frozen settings
that hold it. What its names and values may be is `qcore.config.settings`' business.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TypeVar

Plain = bool | int | float | str
V = TypeVar("V", bound=Plain, covariant=True)


class Entries(Mapping[str, V]):
    """A read-only mapping of names to plain values, in the order given.

    Equal to entries of the same names and values in any order. Unlike Python, it keeps
    ``True`` and ``1`` apart: a template does too.
    """

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, V] | None = None) -> None:
        self._items: dict[str, V] = dict(items or {})

    def __getitem__(self, name: str) -> V:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entries) and self._typed() == other._typed()

    def __hash__(self) -> int:
        return hash(self._typed())

    def __repr__(self) -> str:
        return "{" + ", ".join(f"{name}: {text(value)}" for name, value in self.items()) + "}"

    def _typed(self) -> frozenset[tuple[str, type, Plain]]:
        return frozenset((name, type(value), value) for name, value in self._items.items())


def text(value: Plain) -> str:
    """A value as YAML and ``--set`` take it; a text in quotes."""
    return json.dumps(value, ensure_ascii=False)
