"""Tensors on disk that the parameter table does not name: copied unchanged, or refused as unknown.

This file decides that a tensor outside every root of the table is carried, in at most as many
subtrees as config.json has ``*_config`` sections that no part claims. Any other unowned tensor is
a stray. Text training therefore works without the plugin of a vision tower, but a misspelled
tensor is an error. `qcore.checkpoint.layout` reports the strays.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ..api.parameters import Namespace, Table
from .block_scales import SECTION
from .safetensors_header import Header


def unclaimed_sections(config: Mapping[str, Any], table: Table) -> list[str]:
    """Return the ``*_config`` sections of config.json that no part of `table` claims."""
    claimed = {part.section for part in table.parts}
    return [
        key
        for key, value in config.items()
        if key.endswith("_config")
        and isinstance(value, dict)
        and key not in claimed
        and key != SECTION
    ]


def carried_and_strays(
    headers: Iterable[Header],
    table: Table,
    namespaces: Mapping[str, Namespace],
    config: Mapping[str, Any],
) -> tuple[dict[Header, str], list[Header]]:
    """Split tensors that the table does not own into carried ones and strays.

    Args:
        headers: the unowned tensors.
        table: the parameter table.
        namespaces: part name -> the namespace of its names on disk.
        config: content of config.json.

    Returns:
        Carried tensor -> its subtree, and the strays.
    """
    roots = _roots(table, namespaces)
    homes = {header: _subtree(header.name, roots) for header in headers}
    strays = [header for header, home in homes.items() if home is None]
    outside = {header: home for header, home in homes.items() if home is not None}
    subtrees = Counter(outside.values())
    sections = unclaimed_sections(config, table)
    if len(subtrees) > len(sections):
        # The smallest subtrees are the strays: a whole tower has many tensors.
        allowed = {name for name, _ in subtrees.most_common(len(sections))}
        strays += [header for header, home in outside.items() if home not in allowed]
        outside = {header: home for header, home in outside.items() if home in allowed}
    return outside, strays


def _roots(table: Table, namespaces: Mapping[str, Namespace]) -> set[str]:
    """Return the prefixes on disk below which every name belongs to a part."""
    roots: set[str] = set()
    for part in table.parts:
        spell = namespaces[part.name].spell
        trees: dict[str, list[list[str]]] = {}
        for row in part.rows:
            words = spell(row.name).split(".")[:-1]
            trees.setdefault(words[0], []).append(words)
        roots |= {".".join(_shared(names)) for names in trees.values()}
    return roots


def _shared(names: list[list[str]]) -> list[str]:
    """Return the leading words that all names have in common."""
    columns = itertools.takewhile(lambda words: len(set(words)) == 1, zip(*names, strict=False))
    return [words[0] for words in columns]


def _subtree(name: str, roots: set[str]) -> str | None:
    """Return the subtree of an unowned name: its shortest prefix that leads to no root.

    ``None`` if the name is below a root.
    """
    words = name.split(".")
    for count in range(1, len(words) + 1):
        prefix = ".".join(words[:count])
        if prefix in roots:
            return None
        if not any(root.startswith(prefix + ".") for root in roots):
            return prefix
    return None
