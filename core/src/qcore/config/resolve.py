"""Merging of settings from defaults, a preset, a YAML file and ``--set`` flags.

This file decides the precedence: a flag over a file over a preset over the default. Settings that
are mappings are merged entry by entry: a flag for one entry keeps a preset's other entries, an
empty mapping removes them all. `qcore.config.convert` turns text into values,
`qcore.config.settings` lists the settings, `qcore.config.presets` reads presets.

Codes: those of `qcore.config.convert` and `qcore.config.presets`; ``QC-YAML-*``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import QcoreError, collected, raise_all
from .convert import convert, convert_entries, settings_of
from .frozen_map import Entries, Plain
from .presets import Presets, load_presets
from .settings import SPECS, Settings, spec_of
from .spec import Origin, Spec, Value
from .yaml import MappingNode, Node, ScalarNode, SequenceNode, parse, read

__all__ = ["SPECS", "Settings", "Spec", "load_settings", "parse_entries", "parse_sets"]


def load_settings(
    *,
    preset: str | None = None,
    config_file: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, tuple[str, str | int | None]] | None = None,
    presets: Presets | None = None,
) -> tuple[Settings, dict[str, str]]:
    """Merge all sources of settings: flag over file over preset over default.

    Args:
        preset: id or alias of a preset.
        config_file: YAML mapping of settings.
        sets: ``key=value`` each, as ``--set`` takes them.
        flags: for flags that set one setting: the setting and the text, ``None`` if not passed.
        presets: where ``preset`` is looked up; by default the installed ones.

    Returns:
        The settings, and the source of each: ``default``, ``preset NAME``, ``file`` or
        ``flag``; several of them for a merged mapping.

    Raises:
        UsageError: an invalid setting; the error names source and key. Several, of all sources,
            are one `PreflightError`.
        PluginError: the preset is in a broken file of a plugin.
    """
    values: dict[str, Value] = {}
    origins = dict.fromkeys(SPECS, "default")
    problems: list[QcoreError] = []
    if preset is not None:
        with collected(problems):
            chosen = (presets or load_presets()).get(preset)
            _join(values, origins, chosen.settings, f"preset {chosen.id}")
    if config_file is not None:
        with collected(problems):
            from_file = settings_of(read(config_file, flag="--config"), config_file)
            _join(values, origins, from_file, "file")
    with collected(problems):
        _join(values, origins, parse_sets(sets, flags), "flag")
    raise_all(problems)
    return Settings(**values), origins  # type: ignore[arg-type]  # each is checked against its own field


def _join(
    values: dict[str, Value], origins: dict[str, str], given: Mapping[str, Value], source: str
) -> None:
    """Merge one more source over the earlier ones."""
    for name, value in given.items():
        before = values.get(name)
        if isinstance(value, Entries) and isinstance(before, Entries) and value and before:
            values[name] = Entries({**before, **value})
            origins[name] = f"{origins[name]}, {source}"
        else:
            values[name], origins[name] = value, source


def parse_sets(
    sets: Sequence[str], flags: Mapping[str, tuple[str, str | int | None]] | None = None
) -> dict[str, Value]:
    """Parse ``--set key=value`` flags, by the same rules as the file.

    A list is ``a,b`` or ``[a, b]``; nothing after ``=`` means the empty name, list or mapping. An
    entry of a mapping is ``key.name=value``. Flags that set one setting come last, and errors
    name them.

    Raises:
        UsageError: ``QC-CONFIG-*``; a key given twice is ``QC-CONFIG-005``. Several are one
            `PreflightError`.
    """
    values: dict[str, Value] = {}
    given: set[str] = set()
    problems: list[QcoreError] = []
    split: list[tuple[str, str, str]] = []
    for item in sets:
        with collected(problems):
            split.append(_split(item))
    for flag, key, text in (*split, *_given(flags or {})):
        with collected(problems):
            _set(values, given, flag, key, text)
    raise_all(problems)
    return values


def _set(values: dict[str, Value], given: set[str], flag: str, key: str, text: str) -> None:
    """Add the value of one flag to `values`, and its key to `given`."""
    origin = Origin(field=flag)
    name, dot, entry = key.partition(".")
    # Only mappings have entries; for other settings a key with a dot is unknown.
    spec = spec_of(name if dot and name in SPECS and SPECS[name].each else key, origin)
    whole = values.get(spec.name)
    if key in given or (dot and spec.name in given) or (spec.each and not dot and whole):
        raise origin.error("QC-CONFIG-005", "is given twice", fix="keep one of them")
    given.add(key)
    if dot and spec.each:
        node = _scalar_node(spec.entry, text)
        more = convert_entries(spec, {entry: node}, replace(origin, field=f"--set {name}"))
        values[spec.name] = Entries({**(whole if isinstance(whole, Entries) else {}), **more})
    else:
        values[spec.name] = convert(spec, _flag_node(spec, text), origin)


def _split(item: str) -> tuple[str, str, str]:
    """Return of one ``--set``: its name in errors, the key, the text."""
    key, equals, text = (part.strip() for part in item.partition("="))
    if not key:
        raise Origin(field="--set").error(
            "QC-CONFIG-001", "names no setting", found=item[:60],
            expected="--set key=value", fix="write the name of a setting before the =",
        )  # fmt: skip
    if not equals:
        raise Origin(field=f"--set {key}").error(
            "QC-CONFIG-006", "has no value", expected="--set key=value"
        )
    return f"--set {key}", key, text


def _given(
    flags: Mapping[str, tuple[str, str | int | None]],
) -> Iterator[tuple[str, str, str]]:
    """Yield the same for flags that set one setting."""
    for flag, (key, value) in flags.items():
        if value is not None:
            yield flag, key, str(value).strip()


def parse_entries(setting: str, items: Sequence[str], *, flag: str) -> Entries[Plain]:
    """Parse ``name=value`` arguments of a flag that sets entries of one setting.

    Args:
        setting: a setting that is a mapping.
        items: the arguments of the flag.
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
        made = Entries(
            {**made, **convert_entries(spec, {name: _scalar_node(spec.entry, text)}, origin)}
        )
    return made


def _flag_node(spec: Spec, text: str) -> Node:
    """Convert the text after ``--set key=`` to a YAML node."""
    if spec.each is not None and not text:
        return MappingNode()
    if spec.type is tuple and text[:1] != "[":
        names = [part.strip() for part in text.split(",")] if text else []
        return SequenceNode(
            items=tuple(ScalarNode(text=n, quoted=False, line=1) for n in names), line=1
        )
    return _scalar_node(spec, text)


def _scalar_node(spec: Spec, text: str) -> Node:
    if text[:1] in ("[", '"', "'") or (text[:1] == "{" and spec.type is not str):
        node = parse(text, f"--set {spec.name}")
        assert node is not None  # the text is not empty
        return node
    return ScalarNode(text=text, quoted=spec.type is str, line=1)
