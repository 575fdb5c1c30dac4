"""What of a JSON result may differ between two versions: the rules of ``sentences.json``.

This file decides the meaning of a rule. The rules stand in ``sentences.json`` as
reason -> document -> paths. A document is a verb (``train``, ``presets show``), the name of a
file, or ``*`` for the results of all verbs. In a path, keys are joined by ``.``, ``[]`` stands for
every entry of a list and ``*`` for any text. A path alone excuses the value, but not its type.
`` {keys}`` after a path excuses the keys of a mapping, whose values are compared as a sorted list.
`` {order}`` after a path excuses the order of a list. `` {added}`` after a path leaves out a key
that a later version added.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SENTENCES = Path(__file__).with_name("sentences.json")
#: Why a value may differ.
REASONS = ("sentence", "op_name", "timing", "path", "environment", "added")
_KEYS, _ORDER, _ADDED = " {keys}", " {order}", " {added}"
_FILES = ("MANIFEST.json", "metrics.jsonl")


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules by document.

    Attributes:
        paths: document -> patterns of paths, as in ``sentences.json``.
    """

    paths: Mapping[str, tuple[str, ...]]

    @classmethod
    def load(cls, path: Path = SENTENCES) -> Rules:
        """Read ``sentences.json``.

        Raises:
            ValueError: a reason that is not in `REASONS`.
        """
        by_reason = json.loads(path.read_text(encoding="utf-8"))
        if unknown := set(by_reason) - set(REASONS):
            raise ValueError(f"{path}: unknown reason {min(unknown)}")
        paths: dict[str, tuple[str, ...]] = {}
        for documents in by_reason.values():
            for document, patterns in documents.items():
                paths[document] = (*paths.get(document, ()), *patterns)
        return cls(paths)

    def masked(self, value: Any, document: str, *, values: bool = True) -> Any:
        """A copy of a JSON value in which everything excused is replaced or sorted.

        Args:
            value: the result.
            document: a verb or the name of a file.
            values: whether excused values are replaced by their type; else keys and order alone
                are excused.
        """
        patterns = self.paths.get(document, ())
        if document not in _FILES:
            patterns = (*patterns, *self.paths.get("*", ()))
        plain = [p for p in patterns if values and not p.endswith((_KEYS, _ORDER, _ADDED))]
        keys = [p.removesuffix(_KEYS) for p in patterns if p.endswith(_KEYS)]
        order = [p.removesuffix(_ORDER) for p in patterns if p.endswith(_ORDER)]
        added = [p.removesuffix(_ADDED) for p in patterns if p.endswith(_ADDED)]
        return _Mask(_any(plain), _any(keys), _any(order), _any(added)).of(value, "")


@dataclass(frozen=True, slots=True)
class _Mask:
    values: re.Pattern[str]
    keys: re.Pattern[str]
    order: re.Pattern[str]
    added: re.Pattern[str]

    def of(self, value: Any, path: str) -> Any:
        if isinstance(value, dict):
            prefix = f"{path}." if path else ""
            inner = {
                key: self.of(entry, f"{prefix}{key}")
                for key, entry in value.items()
                if not self.added.fullmatch(f"{prefix}{key}")
            }
            return _sorted(inner.values()) if self.keys.fullmatch(path) else inner
        if isinstance(value, list):
            entries = [self.of(entry, f"{path}[]") for entry in value]
            return _sorted(entries) if self.order.fullmatch(path) else entries
        return f"<{type_name(value)}>" if self.values.fullmatch(path) else value


def type_name(value: Any) -> str:
    """The JSON type of a value; whole numbers and others are told apart."""
    if value is None:
        return "null"
    names = {bool: "bool", int: "int", float: "float", str: "str", list: "list", dict: "object"}
    return names[type(value)]


def _sorted(values: Any) -> list[Any]:
    return sorted(values, key=lambda value: json.dumps(value, sort_keys=True))


def _any(patterns: list[str]) -> re.Pattern[str]:
    """One expression for patterns in which ``*`` is any text."""
    parts = (re.escape(pattern).replace(r"\*", ".*") for pattern in patterns)
    return re.compile("|".join(parts) or r"(?!)")
