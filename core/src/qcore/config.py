"""Where settings come from: defaults, a preset, a YAML file, ``--set`` flags.

This file decides in which order sources win (a flag over a file over a preset over the
default) and how text becomes a value. The type comes from the setting, never from the look
of the text, so YAML 1.1's guesses (``2e-4`` as text, ``no`` as false) cannot happen. It leaves
what a setting may be to `qcore.settings` and presets to `qcore.presets`.

Codes: those of `qcore.settings`; ``QC-CONFIG-006`` not a mapping of settings; ``QC-YAML-*``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UsageError
from .settings import SPECS, Origin, Settings, Spec, Value, check, spec_of
from .strict_yaml import Items, Node, Scalar, Table, parse, read

if TYPE_CHECKING:
    from .presets import Presets

__all__ = ["SPECS", "Settings", "Spec", "load_settings", "parse_sets", "settings_of"]


def load_settings(
    *,
    preset: str | None = None,
    config_file: Path | None = None,
    sets: Sequence[str] = (),
    presets: Presets | None = None,
) -> tuple[Settings, dict[str, str]]:
    """Join all sources of settings: flag over file over preset over default.

    Args:
        preset: id or alias of a preset.
        config_file: YAML mapping of settings.
        sets: ``key=value`` each, as ``--set`` takes them.
        presets: where ``preset`` is looked up; those installed where it is ``None``.

    Returns:
        The settings, and for each name where its value came from: ``default``,
        ``preset NAME``, ``file`` or ``flag``.

    Raises:
        UsageError: a source that does not hold valid settings, naming source and key.
        PluginError: the preset stands in a plugin's file that is broken.
    """
    values: dict[str, Value] = {}
    origins = dict.fromkeys(SPECS, "default")
    if preset is not None:
        if presets is None:
            from .presets import load_presets

            presets = load_presets()
        chosen = presets.get(preset)
        values.update(chosen.settings)
        origins.update(dict.fromkeys(chosen.settings, f"preset {chosen.id}"))
    if config_file is not None:
        from_file = settings_of(read(config_file, flag="--config"), config_file)
        values.update(from_file)
        origins.update(dict.fromkeys(from_file, "file"))
    from_flags = parse_sets(sets)
    values.update(from_flags)
    origins.update(dict.fromkeys(from_flags, "flag"))
    return Settings(**values), origins  # type: ignore[arg-type]  # each is checked against its own field


def settings_of(node: Node | None, source: object) -> dict[str, Value]:
    """The settings that a YAML mapping gives, checked one by one.

    Args:
        node: the mapping; ``None`` gives no settings.
        source: the file, for errors.

    Raises:
        UsageError: ``QC-CONFIG-*``.
    """
    if node is None:
        return {}
    if not isinstance(node, Table):
        raise UsageError(
            "QC-CONFIG-006",
            "does not hold settings",
            file=source,
            found=_describe(node),
            expected="lines of the form `key: value`",
        )
    values = {}
    for key, value in node.entries.items():
        origin = Origin(file=source, field=key, line=value.line)
        values[key] = _convert(spec_of(key, origin), value, origin)
    return values


def parse_sets(sets: Sequence[str]) -> dict[str, Value]:
    """The settings that ``--set key=value`` gives, by the same rules as the file.

    A list is ``a,b`` or ``[a, b]``; nothing after ``=`` is the empty name or list.

    Raises:
        UsageError: ``QC-CONFIG-*``; a key given twice is ``QC-CONFIG-005``.
    """
    values: dict[str, Value] = {}
    for item in sets:
        key, equals, text = item.partition("=")
        key, text = key.strip(), text.strip()
        origin = Origin(field=f"--set {key}")
        if not equals:
            raise origin.error("QC-CONFIG-006", "has no value", expected="--set key=value")
        spec = spec_of(key, origin)
        if key in values:
            raise origin.error("QC-CONFIG-005", "is given twice", fix="keep one of them")
        values[key] = _convert(spec, _flag_node(spec, text), origin)
    return values


def _flag_node(spec: Spec, text: str) -> Node:
    """What the text after ``--set key=`` is in YAML's terms."""
    if text[:1] in ("[", '"', "'"):
        node = parse(text, f"--set {spec.name}")
        assert node is not None  # the text is not empty
        return node
    if spec.type is tuple:
        names = [part.strip() for part in text.split(",")] if text else []
        return Items(items=tuple(Scalar(text=n, quoted=False, line=1) for n in names), line=1)
    return Scalar(text=text, quoted=spec.type is str, line=1)


_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.?(nan|inf|infinity)", re.IGNORECASE)
_YAML_11_BOOL = frozenset(("yes", "no", "on", "off", "y", "n"))
_NULL = frozenset(("", "~", "null"))


def _convert(spec: Spec, node: Node, origin: Origin) -> Value:
    """A YAML node as the type of its setting, or the error that says what it is instead."""
    if spec.type is tuple:
        if not isinstance(node, Items):
            raise _mismatch(spec, node, origin)
        return check(spec, tuple(_name(spec, item, origin) for item in node.items), origin)
    if not isinstance(node, Scalar):
        raise _mismatch(spec, node, origin)
    if spec.type is str:
        return check(spec, _word(spec, node, origin), origin)
    if node.quoted:
        fix = "remove the quotes" if node.text else None
        raise _mismatch(spec, node, origin, fix=fix)
    if spec.type is bool:
        return _bool(spec, node, origin)
    return check(spec, _number(spec, node, origin), origin)


def _bool(spec: Spec, node: Scalar, origin: Origin) -> bool:
    word = node.text.lower()
    if word in ("true", "false"):
        return word == "true"
    fix = None
    if word in _YAML_11_BOOL:
        fix = (
            f"write {'true' if word[0] == 'y' or word == 'on' else 'false'}: {word} is only a word"
        )
    raise _mismatch(spec, node, origin, fix=fix)


def _number(spec: Spec, node: Scalar, origin: Origin) -> int | float:
    text = node.text
    if _NOT_FINITE.fullmatch(text):
        raise origin.error("QC-CONFIG-003", "is not finite", found=text, expected=spec.expected)
    if spec.type is int:
        if not _INT.fullmatch(text) or len(text) > 20:
            raise _mismatch(spec, node, origin)
        return int(text)
    if not _FLOAT.fullmatch(text) or not any(c.isdigit() for c in re.split("[eE]", text)[0]):
        raise _mismatch(spec, node, origin)
    return float(text)


def _word(spec: Spec, node: Scalar, origin: Origin) -> str:
    if not node.quoted and node.text.lower() in _NULL:
        raise _mismatch(spec, node, origin)
    return node.text


def _name(spec: Spec, node: Node, origin: Origin) -> str:
    if not isinstance(node, Scalar) or (not node.quoted and node.text.lower() in _NULL):
        raise _mismatch(spec, node, origin)
    return node.text


def _mismatch(spec: Spec, node: Node, origin: Origin, *, fix: str | None = None) -> UsageError:
    return origin.error(
        "QC-CONFIG-002",
        "has the wrong type",
        found=_describe(node),
        expected=f"{spec.expected} ({spec.help})",
        fix=fix,
    )


def _describe(node: Node) -> str:
    if isinstance(node, Items):
        return "a list"
    if isinstance(node, Table):
        return "a mapping"
    if not node.quoted and node.text.lower() in _NULL:
        return "no value"
    text = node.text if len(node.text) <= 60 else f"{node.text[:57]}..."
    return f"the text {json.dumps(text)}" if node.quoted else text
