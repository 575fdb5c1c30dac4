"""The mix file: a YAML list of sources with their shares and policies.

This file decides which keys a mix has and what they may say:

    seed: 0
    sources:
      - path: chat.jsonl            # or a folder; relative to the mix file
        weight: 0.5
      - hub: ORG/NAME
        revision: main
        config: default
        split: train
        count: 1000
        ignore_columns: [source]

`qcore.data.sources.read` turns entries into sources. Codes: ``QC-DATA-035`` and ``QC-YAML-*``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from ...config.expect import Contract, Expect
from ...config.settings import SPECS
from ...config.yaml import MappingNode, Node, ScalarNode, SequenceNode
from ...errors import UsageError, nearest
from ..policies import POLICY_KEYS
from .hub_files import ID, REVISION

SUFFIXES: Final = (".yaml", ".yml")
_CONTRACT: Final = Contract("QC-DATA-035", "is not a valid mix file")
_TOP: Final = ("sources", "seed")
_HUB: Final = ("revision", "config", "split")
_CHOICES: Final = {key: SPECS[key].choices for key in POLICY_KEYS}
_KEYS: Final = (
    "path", "hub", *_HUB, "format", "weight", "count", "fields", "ignore_columns", "media_root",
    *_CHOICES, "bad_rows_limit", "train", "seed",
)  # fmt: skip
_EXAMPLES: Final = {
    "path": "rows.jsonl", "hub": "ORG/NAME", "revision": "main", "config": "default",
    "split": "train", "format": "sharegpt", "weight": "0.5", "count": "1000",
    "fields": "{messages: conversations}", "ignore_columns": "[source, score]",
    "media_root": "media", **{key: choices[0] for key, choices in _CHOICES.items()},
    "bad_rows_limit": "0.1", "train": "false", "seed": "0", "messages": "conversations",
}  # fmt: skip
_MAX_SOURCES: Final = 1000
_MAX_SEED: Final = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One source of a mix.

    Attributes:
        place: where in the file, for errors: ``line 3, sources.0``.
        path: file or folder; ``None`` for a hub dataset.
        hub: ``ORG/NAME``; empty for a path.
        revision: branch, tag or commit of `hub`; empty for the default branch.
        config: configuration of `hub`; empty for the default one.
        split: split of `hub`; empty for ``train``.
        options: the fields of `qcore.data.sources.source.Source` that the entry sets.
    """

    place: str
    path: Path | None = None
    hub: str = ""
    revision: str = ""
    config: str = ""
    split: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


def read_mix(path: Path) -> tuple[Entry, ...]:
    """Read a mix file.

    Args:
        path: the file.

    Raises:
        UsageError: ``QC-YAML-*`` not YAML; ``QC-DATA-035`` not a mix.
    """
    try:
        return _read(path)
    except UsageError as error:
        key = (error.field or "").replace(" ", ".").rpartition(".")[2]
        if error.code != _CONTRACT.code or error.fix or key not in _EXAMPLES:
            raise
        raise error.replace(fix=f"write it as in `{key}: {_EXAMPLES[key]}`") from None


def _read(path: Path) -> tuple[Entry, ...]:
    whole = Expect.of_file(path, _CONTRACT)
    top = _mapping(whole, _TOP, "a mapping with the key sources")
    if not isinstance(top.get("sources", whole).node, SequenceNode) or not top["sources"].items():
        raise _breach(top.get("sources", whole), "no sources", "a list of sources", _EXAMPLE)
    sources = top["sources"].items()
    if len(sources) > _MAX_SOURCES:
        raise _breach(
            top["sources"], f"{len(sources)} sources", f"at most {_MAX_SOURCES}", "name a folder"
        )
    entries = [_entry(source, path.parent) for source in sources]
    if "seed" in top:
        seed = _integer(top["seed"], 0, _MAX_SEED)
        entries = [replace(each, options={"seed": seed, **each.options}) for each in entries]
    return tuple(entries)


_EXAMPLE: Final = "write `sources:` and below it `  - path: rows.jsonl`"


def _entry(source: Expect, folder: Path) -> Entry:
    keys = _mapping(source, _KEYS, "a mapping with the key path or hub")
    if ("path" in keys) == ("hub" in keys):
        found = "both" if "path" in keys else "neither"
        raise _breach(source, f"{found} of path and hub", "one of them", "write `path: rows.jsonl`")
    if "weight" in keys and "count" in keys:
        raise _breach(keys["count"], "weight and count", "one of them", "remove one of them")
    for key in _HUB:
        if key in keys and "hub" not in keys:
            raise _breach(keys[key], f"{key} of a path", "hub: ORG/NAME", f"remove {key}")
    place, made = _place(source), _options(keys, folder)
    if "path" in keys:
        return Entry(place=place, path=_path(keys["path"], folder), options=made)
    name = _text(keys["hub"])
    if not ID.fullmatch(name):
        fix = "write the part after @ as revision" if "@" in name else None
        raise _breach(keys["hub"], repr(name[:100]), "ORG/NAME", fix)
    words: dict[str, Any] = {key: _text(keys[key]) for key in _HUB if key in keys}
    if "revision" in words and not REVISION.fullmatch(words["revision"]):
        raise _breach(keys["revision"], repr(words["revision"][:100]), "a branch, tag or commit")
    if "[" in words.get("split", ""):
        raise _breach(keys["split"], "a slice", "the name of a split", "use count or weight")
    return Entry(place=place, hub=name, options=made, **words)


def _options(keys: Mapping[str, Expect], folder: Path) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if "format" in keys:
        options["format"] = _text(keys["format"])
    if "weight" in keys:
        options["weight"] = _share(keys["weight"])
    if "count" in keys:
        options["count"] = _integer(keys["count"], 1, 2**53)
    if "fields" in keys:
        options["fields"] = _fields(keys["fields"])
    if "ignore_columns" in keys:
        options["ignore_columns"] = _at(keys["ignore_columns"]).texts()
    if "media_root" in keys:
        options["media_root"] = _path(keys["media_root"], folder)
    for key, choices in _CHOICES.items():
        if key in keys:
            options[key] = _choice(keys[key], choices)
    if "bad_rows_limit" in keys:
        options["bad_rows_limit"] = _fraction(keys["bad_rows_limit"])
    if "train" in keys:
        options["train"] = _choice(keys["train"], ("true", "false")) == "true"
    if "seed" in keys:
        options["seed"] = _integer(keys["seed"], 0, _MAX_SEED)
    return options


def _mapping(value: Expect, known: tuple[str, ...], expected: str) -> dict[str, Expect]:
    """The entries of a mapping with known keys."""
    if not isinstance(value.node, MappingNode):
        found = "an empty file" if value.node is None else "something else"
        raise _breach(value, found, expected, _EXAMPLE)
    entries = value.mapping()
    for key, entry in entries.items():
        if key not in known:
            near = nearest(key, known)
            fix = f"did you mean {near}?" if near else f"remove {key[:60]}"
            raise _breach(entry, f"the unknown key {key[:60]!r}", ", ".join(known), fix)
    return entries


def _fields(value: Expect) -> dict[str, Any]:
    """A mapping of canonical keys to the keys of the rows; values may be mappings again."""
    if not isinstance(value.node, MappingNode) or not value.node.entries:
        raise _breach(value, "no mapping", "lines of the form `messages: conversations`")
    return {key: _plain(entry) for key, entry in value.mapping().items()}


def _plain(value: Expect) -> Any:
    if isinstance(value.node, MappingNode):
        return {key: _plain(entry) for key, entry in value.mapping().items()}
    if isinstance(value.node, SequenceNode):
        return [_plain(item) for item in value.items()]
    return _text(value)


def _share(value: Expect) -> float:
    weight = _at(value).number()
    if not 0 < weight <= 1:
        fix = "leave the source out" if weight <= 0 else "lower the weights of the other sources"
        raise _breach(value, f"{weight:g}", "more than 0 and at most 1", fix)
    return weight


def _fraction(value: Expect) -> float:
    number = _at(value).number()
    if not 0 <= number <= 1:
        raise _breach(value, f"{number:g}", "0 to 1")
    return number


def _integer(value: Expect, low: int, high: int) -> int:
    text = _text(value)
    if len(text) > 20:
        raise _breach(value, repr(text[:40]), f"a whole number of at most {high}")
    number = _at(value).integer()
    if not low <= number <= high:
        raise _breach(value, str(number), f"{low} to {high}")
    return number


def _choice(value: Expect, choices: tuple[str, ...]) -> str:
    text = _text(value)
    if text not in choices:
        near = nearest(text, choices)
        fix = f"did you mean {near}?" if near else None
        raise _breach(value, repr(text[:60]), " or ".join(choices), fix)
    return text


def _text(value: Expect) -> str:
    return _at(value).text()


def _path(value: Expect, folder: Path) -> Path:
    text = _text(value)
    if "\0" in text:
        raise _breach(value, "a NUL character", "a path")
    return folder / Path(text).expanduser()


def _at(value: Expect) -> Expect:
    """The same value; its errors name the line."""
    return value.renamed(_place(value))


def _place(value: Expect) -> str:
    node: Node | None = value.node
    line = node.line if isinstance(node, MappingNode | SequenceNode | ScalarNode) else 1
    return f"line {line}, {value.place}".removesuffix(", ")


def _breach(value: Expect, found: str, expected: str, fix: str | None = None) -> UsageError:
    error = _at(value).breach(found, expected)
    return error if fix is None else error.replace(fix=fix)
