"""Where settings come from: defaults, a preset, a YAML file, ``--set`` flags.

This file decides in which order sources win (a flag over a file over a preset over the
default). Settings that are mappings join entry by entry: a flag for one entry leaves a preset's
others, an empty mapping drops them all. It leaves how text becomes a value to
`qcore.config.convert`, what a setting may be to `qcore.config.settings`, and presets to
`qcore.config.presets`.

Codes: those of `qcore.config.convert` and `qcore.config.presets`; ``QC-YAML-*``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

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
        chosen = (presets or load_presets()).get(preset)
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
            more = convert_entries(spec, {entry: node}, replace(origin, field=f"--set {name}"))
            values[spec.name] = Entries({**(whole if isinstance(whole, Entries) else {}), **more})
        else:
            values[spec.name] = convert(spec, _flag_node(spec, text), origin)
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
        made = Entries(
            {**made, **convert_entries(spec, {name: _scalar_node(spec.entry, text)}, origin)}
        )
    return made


def _flag_node(spec: Spec, text: str) -> Node:
    """What the text after ``--set key=`` is in YAML's terms."""
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
