"""Conversion of YAML nodes to setting values, by the type of the setting.

This file decides how the text of a scalar becomes a number, a word, a list or a mapping. The type
comes from the setting and never from the text, so YAML 1.1's surprises (``2e-4`` as text, ``no`` as
false) cannot happen. `qcore.config.resolve` decides which source of settings wins,
`qcore.config.spec` checks ranges and choices.

Codes: those of `qcore.config.spec`; ``QC-CONFIG-006`` not a mapping of settings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace

from ..errors import QcoreError, UsageError, collected, raise_all
from .frozen_map import Entries, Plain
from .settings import spec_of
from .spec import Origin, Spec, Value, check
from .yaml import MappingNode, Node, ScalarNode, SequenceNode

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.?(nan|inf|infinity)", re.IGNORECASE)
_YAML_11_BOOL = frozenset(("yes", "no", "on", "off", "y", "n"))
_NULL = frozenset(("", "~", "null"))


def settings_of(node: Node | None, source: object) -> dict[str, Value]:
    """Convert a YAML mapping of settings, checking each value.

    Args:
        node: the mapping; ``None`` means no settings.
        source: the file, for errors.

    Raises:
        UsageError: ``QC-CONFIG-*``; several are one `PreflightError`.
    """
    if node is None:
        return {}
    if not isinstance(node, MappingNode):
        raise UsageError(
            "QC-CONFIG-006",
            "is not a mapping of settings",
            file=source,
            found=_describe(node),
            expected="lines of the form `key: value`",
        )
    values: dict[str, Value] = {}
    problems: list[QcoreError] = []
    for key, value in node.entries.items():
        origin = Origin(file=source, field=key, line=value.line)
        with collected(problems):
            values[key] = convert(spec_of(key, origin), value, origin)
    raise_all(problems)
    return values


def convert(spec: Spec, node: Node, origin: Origin) -> Value:
    """Convert a YAML node to the type of its setting.

    Raises:
        UsageError: ``QC-CONFIG-002`` to ``-005``.
    """
    if spec.type is tuple:
        if not isinstance(node, SequenceNode):
            raise _mismatch(spec, node, origin)
        item_of = _name if spec.items is str else _whole_number
        return check(spec, tuple(item_of(spec, item, origin) for item in node.items), origin)
    if spec.each is not None:
        if not isinstance(node, MappingNode):
            raise _mismatch(spec, node, origin)
        return convert_entries(spec, node.entries, origin)
    if not isinstance(node, ScalarNode):
        raise _mismatch(spec, node, origin)
    if spec.type is str:
        return check(spec, _word(spec, node, origin), origin)
    if node.quoted:
        fix = "remove the quotes" if node.text else None
        raise _mismatch(spec, node, origin, fix=fix)
    if spec.type is bool:
        return _bool(spec, node, origin)
    return check(spec, _number(spec, node, origin), origin)


def convert_entries(spec: Spec, nodes: Mapping[str, Node], origin: Origin) -> Entries[Plain]:
    """Convert YAML nodes by key to the value of a mapping setting; raises like `convert`."""
    made: dict[str, Plain] = {}
    for name, node in nodes.items():
        line = None if origin.line is None else node.line
        at = replace(origin, field=f"{origin.field}.{name[:60]}", line=line)
        value = (
            _guess(spec.entry, node, at) if spec.each is object else convert(spec.entry, node, at)
        )
        checked = check(spec, {name: value}, replace(origin, line=line))
        assert isinstance(checked, Entries)  # the setting is a mapping
        made |= checked
    return Entries(made)


def _guess(spec: Spec, node: Node, origin: Origin) -> Plain:
    """Convert a value of a setting that allows several types.

    True, false and numbers are read as in JSON; quoted values and other words are text. Values
    that YAML readers disagree about (``yes``, ``0x10``, ``1_000``) are refused.
    """
    if not isinstance(node, ScalarNode) or (not node.quoted and node.text.lower() in _NULL):
        raise _mismatch(spec, node, origin)
    text, word = node.text, node.text.lower()
    if node.quoted:
        return text
    if word in ("true", "false") or word in _YAML_11_BOOL:
        return _bool(replace(spec, type=bool), node, origin)
    if _INT.fullmatch(text) and len(text) <= 20:
        return int(text)
    if text[0].isdigit() or text[0] in "+-." or _NOT_FINITE.fullmatch(text):
        if text[-1].isdigit() and _FLOAT.fullmatch(text):
            return _number(replace(spec, type=float), node, origin)
        raise _mismatch(spec, node, origin, fix=f'write "{text[:20]}" for a text')
    return text


def _bool(spec: Spec, node: ScalarNode, origin: Origin) -> bool:
    word = node.text.lower()
    if word in ("true", "false"):
        return word == "true"
    fix = None
    if word in _YAML_11_BOOL:
        fix = f"write {'true' if word[0] == 'y' or word == 'on' else 'false'} instead of {word}"
    raise _mismatch(spec, node, origin, fix=fix)


def _number(spec: Spec, node: ScalarNode, origin: Origin) -> int | float:
    text = node.text
    if _NOT_FINITE.fullmatch(text):
        raise origin.error(
            "QC-CONFIG-003", "is not finite",
            found=text, expected=spec.expected, fix=spec.advice,
        )  # fmt: skip
    if spec.type is int:
        if not _INT.fullmatch(text) or len(text) > 20:
            raise _mismatch(spec, node, origin)
        return int(text)
    if not _FLOAT.fullmatch(text) or not any(c.isdigit() for c in re.split("[eE]", text)[0]):
        raise _mismatch(spec, node, origin)
    return float(text)


def _word(spec: Spec, node: ScalarNode, origin: Origin) -> str:
    if not node.quoted and node.text.lower() in _NULL:
        raise _mismatch(spec, node, origin)
    return node.text


def _name(spec: Spec, node: Node, origin: Origin) -> str:
    if not isinstance(node, ScalarNode) or (not node.quoted and node.text.lower() in _NULL):
        raise _mismatch(spec, node, origin)
    return node.text


def _whole_number(spec: Spec, node: Node, origin: Origin) -> int:
    if not isinstance(node, ScalarNode) or node.quoted or not _INT.fullmatch(node.text):
        raise _mismatch(spec, node, origin)
    return int(node.text[:20])


def _mismatch(spec: Spec, node: Node, origin: Origin, *, fix: str | None = None) -> UsageError:
    return origin.error(
        "QC-CONFIG-002",
        "has the wrong type",
        found=_describe(node),
        expected=f"{spec.expected} ({spec.help})",
        fix=fix or spec.advice,
    )


def _describe(node: Node) -> str:
    if isinstance(node, SequenceNode):
        return "a list"
    if isinstance(node, MappingNode):
        return "a mapping"
    if not node.quoted and node.text.lower() in _NULL:
        return "no value"
    text = node.text if len(node.text) <= 60 else f"{node.text[:57]}..."
    return f"the text {json.dumps(text)}" if node.quoted else text
