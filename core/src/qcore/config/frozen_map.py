"""A frozen mapping: the value of settings such as ``group_r``.

This file decides that the value is read-only and hashable, like the settings that contain it.
`qcore.config.settings` decides which keys and values are allowed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TypeVar

Plain = bool | int | float | str
V = TypeVar("V", bound=Plain, covariant=True)


class Entries(Mapping[str, V]):
    """A read-only mapping of names to plain values, in insertion order.

    Equality ignores the order. Unlike in Python, ``True`` and ``1`` differ, as they do in a
    template.
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
    """Format a value for YAML and ``--set``, with text in quotes."""
    return json.dumps(value, ensure_ascii=False)
