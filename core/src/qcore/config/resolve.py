"""Where settings come from: defaults, a preset, a YAML file, ``--set`` flags.

This file decides in which order sources win (a flag over a file over a preset over the
default) and how text becomes a value. The type comes from the setting, never from the look
of the text, so YAML 1.1's guesses (``2e-4`` as text, ``no`` as false) cannot happen. Settings
that are mappings join entry by entry: a flag for one entry leaves a preset's others, an empty
mapping drops them all. It leaves what a setting may be to `qcore.config.settings` and presets to
`qcore.presets`.

Codes: those of `qcore.config.settings`; ``QC-CONFIG-006`` not a mapping of settings; ``QC-YAML-*``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from .frozen_map import Entries, Plain
from .settings import SPECS, Origin, Settings, Spec, Value, check, spec_of
from .yaml import Items, Node, Scalar, Table, parse, read

if TYPE_CHECKING:
    from .presets import Presets

__all__ = [
    "SPECS", "Settings", "Spec", "load_settings", "parse_entries", "parse_sets", "settings_of",
]  # fmt: skip


def load_settings(
    *,
    preset: str | None = None,
    config_file: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, tuple[str, str | int | None]] | None = None,
    presets: Presets | None = None,
) -> tuple[Settings, dict[str, str]]:
    """Join all sources of settings: flag over file over preset over default.

    Args:
        preset: id or alias of a preset.
        config_file: YAML mapping of settings.
        sets: ``key=value`` each, as ``--set`` takes them.
        flags: of a flag of its own the setting and the text, ``None`` where it was not given.
        presets: where ``preset`` is looked up; those installed where it is ``None``.

    Returns:
        The settings, and for each name where its value came from: ``default``,
        ``preset NAME``, ``file`` or ``flag``; of a mapping that several gave, all of them.

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
        _join(values, origins, chosen.settings, f"preset {chosen.id}")
    if config_file is not None:
        from_file = settings_of(read(config_file, flag="--config"), config_file)
        _join(values, origins, from_file, "file")
    _join(values, origins, parse_sets(sets, flags), "flag")
    return Settings(**values), origins  # type: ignore[arg-type]  # each is checked against its own field


def _join(
    values: dict[str, Value], origins: dict[str, str], given: Mapping[str, Value], source: str
) -> None:
    """Put a later source over the earlier ones."""
    for name, value in given.items():
        before = values.get(name)
        if isinstance(value, Entries) and isinstance(before, Entries) and value and before:
            values[name] = Entries({**before, **value})
            origins[name] = f"{origins[name]}, {source}"
        else:
            values[name], origins[name] = value, source


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


def parse_sets(
    sets: Sequence[str], flags: Mapping[str, tuple[str, str | int | None]] | None = None
) -> dict[str, Value]:
    """The settings that ``--set key=value`` gives, by the same rules as the file.

    A list is ``a,b`` or ``[a, b]``; nothing after ``=`` is the empty name, list or mapping. An
    entry of a mapping is ``key.name=value``. Flags that give a setting of their own come last, and
    errors name them.

    Raises:
        UsageError: ``QC-CONFIG-*``; a key given twice is ``QC-CONFIG-005``.
    """
    values: dict[str, Value] = {}
    given: set[str] = set()
    for flag, key, text in (*_split(sets), *_given(flags or {})):
        origin = Origin(field=flag)
        name, dot, entry = key.partition(".")
        # Only a mapping has entries; elsewhere the dot makes it a key that nobody knows.
        spec = spec_of(name if dot and name in SPECS and SPECS[name].each else key, origin)
        whole = values.get(spec.name)
        if key in given or (dot and spec.name in given) or (spec.each and not dot and whole):
            raise origin.error("QC-CONFIG-005", "is given twice", fix="keep one of them")
        given.add(key)
        if dot and spec.each:
            node = _scalar_node(spec.entry, text)
            more = _entries(spec, {entry: node}, replace(origin, field=f"--set {name}"))
            values[spec.name] = Entries({**(whole if isinstance(whole, Entries) else {}), **more})
        else:
            values[spec.name] = _convert(spec, _flag_node(spec, text), origin)
    return values


def _split(sets: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Of each ``--set``: its name in errors, the key, the text."""
    for item in sets:
        key, equals, text = (part.strip() for part in item.partition("="))
        if not equals:
            raise Origin(field=f"--set {key}").error(
                "QC-CONFIG-006", "has no value", expected="--set key=value"
            )
        yield f"--set {key}", key, text


def _given(
    flags: Mapping[str, tuple[str, str | int | None]],
) -> Iterator[tuple[str, str, str]]:
    """The same of flags that were given."""
    for flag, (key, value) in flags.items():
        if value is not None:
            yield flag, key, str(value).strip()


def parse_entries(setting: str, items: Sequence[str], *, flag: str) -> Entries[Plain]:
    """Entries of one setting that a flag of its own gives as ``name=value``, as ``--set`` would.

    Args:
        setting: a setting that is a mapping.
        items: what the flag was given, once an item.
        flag: its name, for errors.

    Raises:
        UsageError: ``QC-CONFIG-*``.
    """
    spec = SPECS[setting]
    made: Entries[Plain] = Entries()
    for item in items:
        name, equals, text = item.partition("=")
        name, text = name.strip(), text.strip()
        origin = Origin(field=flag)
        if not equals:
            raise origin.error("QC-CONFIG-006", "has no value", expected=f"{flag} name=value")
        if name in made:
            raise origin.error("QC-CONFIG-005", f"gives {name} twice", fix="keep one of them")
        made = Entries({**made, **_entries(spec, {name: _scalar_node(spec.entry, text)}, origin)})
    return made


def _flag_node(spec: Spec, text: str) -> Node:
    """What the text after ``--set key=`` is in YAML's terms."""
    if spec.each is not None and not text:
        return Table()
    if spec.type is tuple and text[:1] != "[":
        names = [part.strip() for part in text.split(",")] if text else []
        return Items(items=tuple(Scalar(text=n, quoted=False, line=1) for n in names), line=1)
    return _scalar_node(spec, text)


def _scalar_node(spec: Spec, text: str) -> Node:
    if text[:1] in ("[", '"', "'") or (text[:1] == "{" and spec.type is not str):
        node = parse(text, f"--set {spec.name}")
        assert node is not None  # the text is not empty
        return node
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
    if spec.each is not None:
        if not isinstance(node, Table):
            raise _mismatch(spec, node, origin)
        return _entries(spec, node.entries, origin)
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


def _entries(spec: Spec, nodes: Mapping[str, Node], origin: Origin) -> Entries[Plain]:
    made: dict[str, Plain] = {}
    for name, node in nodes.items():
        line = None if origin.line is None else node.line
        at = replace(origin, field=f"{origin.field}.{name[:60]}", line=line)
        value = (
            _guess(spec.entry, node, at) if spec.each is object else _convert(spec.entry, node, at)
        )
        checked = check(spec, {name: value}, replace(origin, line=line))
        assert isinstance(checked, Entries)  # the setting is a mapping
        made |= checked
    return Entries(made)


def _guess(spec: Spec, node: Node, origin: Origin) -> Plain:
    """A value whose setting leaves the type to the text.

    True, false and numbers as JSON has them; anything in quotes and any other word is a text.
    What YAML readers disagree about (``yes``, ``0x10``, ``1_000``) is refused, not guessed.
    """
    if not isinstance(node, Scalar) or (not node.quoted and node.text.lower() in _NULL):
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
        raise _mismatch(spec, node, origin, fix=f'write "{text[:20]}" if it is a text')
    return text


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
