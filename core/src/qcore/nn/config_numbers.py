"""What a model computes under a config.json: the numbers that its blocks hold once they are built.

This file decides when two configs compute the same. Blocks are built on meta for each, by the
plugin that would run them. Spelling does not matter: a re-save moves keys, adds defaults, or drops
the sections of other parts. Two configs differ if any block holds another plain value (number,
text, or a record of these) in a public attribute, or if a key that was read from both has two
values, which covers a block that keeps its numbers elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Final

import torch

from ..checkpoint.identity import same
from ..plugins.resolve_model import Identified
from .model import Model, References

_PLAIN: Final = (bool, int, float, str)
_MISSING: Final = object()


@dataclass(frozen=True, slots=True)
class Difference:
    """The first difference of two configs that the computation sees.

    Attributes:
        field: key in config.json, with dots; or a block and its attribute.
        found: value under the present config; ``None``: absent.
        expected: value under the recorded config; ``None``: absent.
    """

    field: str
    found: Any
    expected: Any


def first_difference(base: Identified, recorded: Mapping[str, Any]) -> Difference | None:
    """Compare the config of a base with a recorded one; ``None`` if both compute the same.

    Args:
        base: its layout decides which parts are built.
        recorded: another config.json.

    Raises:
        QcoreError: the blocks cannot be built under one of them.
    """
    now, now_read = _built(base, base.checkpoint.config)
    before, before_read = _built(base, recorded)
    keys = [key for key in now_read if key in before_read]
    for key in keys:
        if not same(now_read[key], before_read[key]):
            return Difference(key, now_read[key], before_read[key])
    for name in dict.fromkeys((*now, *before)):
        if not same(now.get(name, _MISSING), before.get(name, _MISSING)):
            return Difference(name, now.get(name), before.get(name))
    return None


def _built(base: Identified, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Build the blocks under a config; returns their numbers, and the values that they read."""
    read: dict[str, Any] = {}
    model = Model(
        base.decision.architecture, _Recorded(config, read), base.layout, torch.bfloat16, {},
        References(), modality=base.modality,
    )  # fmt: skip
    numbers = {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        if name
        for key, held in vars(module).items()
        if not key.startswith("_") and key != "training"
        for value in _plain(held)
    }
    return numbers, read


def _plain(value: Any) -> Iterator[Any]:
    """Yield the value as JSON would hold it, unless it is of another kind, such as a tensor."""
    if value is None or isinstance(value, _PLAIN):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        yield {f.name: one for f in fields(value) for one in _plain(getattr(value, f.name))}
    elif isinstance(value, Mapping):
        yield {str(key): one for key, held in value.items() for one in _plain(held)}
    elif isinstance(value, tuple | list):
        yield [one for held in value for one in _plain(held)]


class _Recorded(dict[str, Any]):
    """A mapping that notes the plain values that are read from it, by dotted key."""

    def __init__(self, values: Mapping[str, Any], read: dict[str, Any], prefix: str = "") -> None:
        super().__init__(
            (key, _Recorded(one, read, f"{prefix}{key}.") if isinstance(one, Mapping) else one)
            for key, one in values.items()
        )
        self._read, self._prefix = read, prefix

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if not isinstance(value, Mapping):
            self._read[f"{self._prefix}{key}"] = value
        return value

    def get(self, key: str, default: Any = None) -> Any:
        if key not in self:
            return default
        return self[key]  # notes it
