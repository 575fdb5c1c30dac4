"""The contract of ``skus/*.yaml``: one file of SKU records, read and checked.

This file decides how a record is written down. Facts stand in groups of one mark and one
source, so that a person sees what is known how well; groups that several SKUs share stand
once, under ``shared``, and sources once, under ``sources``. A value without a mark or a source
is a breach, and so is one that is given twice.

It leaves finding files and choosing a record to `qcore.skus`, and the comparison with a
checkpoint to `qcore.skus.compare`. Code: ``QC-SKU-004`` a file that breaks the contract.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..config.yaml import Items, Node, Scalar, Table, read
from ..errors import UsageError
from .records import SECTIONS, Fact, Mark, Plain, Served, Sku

SCHEMA_VERSION = 1
_FILE_KEYS = ("schema_version", "generation", "sources", "shared", "skus", "hosted")
_SKU_KEYS = ("id", "architecture", "shared", "facts")
_HOSTED_KEYS = ("id", "aliases", "instead", "shared", "facts", "served")
_SERVED_KEYS = ("provider", "id", "mark", "source", "note", "context", "output", "prices")
_PRICES = ("input", "output", "reasoning", "cache_read", "cache_write")
_REQUIRED = (
    "link", "release_date", "licence", "context_native", "modalities", "class", "model_type",
    "parameters",
)  # fmt: skip
_REQUIRED_HOSTED = ("release_date", "context_native", "modalities")
_INT = re.compile(r"-?\d(_?\d)*")
_FLOAT = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class _Where:
    """A place in a file, for the error."""

    file: Path
    place: str
    sources: Mapping[str, str] = field(default_factory=dict)

    def at(self, *words: object) -> _Where:
        return _Where(self.file, ".".join(map(str, (self.place, *words))).strip("."), self.sources)

    def breach(self, found: str, expected: str) -> UsageError:
        return UsageError(
            "QC-SKU-004", "breaks the contract of SKU records",
            file=self.file, field=self.place or None, found=found, expected=expected,
        )  # fmt: skip


# -- values


def _int(node: Node, where: _Where) -> int:
    text = _text(node, where)
    if not _INT.fullmatch(text) or (isinstance(node, Scalar) and node.quoted):
        raise where.breach(repr(text), "a whole number")
    return int(text)


def _number(node: Node, where: _Where) -> float:
    text = _text(node, where)
    if not _FLOAT.fullmatch(text):
        raise where.breach(repr(text), "a number")
    return float(text)


def _text(node: Node, where: _Where) -> str:
    if not isinstance(node, Scalar) or not node.text.strip():
        raise where.breach("no text", "text")
    return " ".join(node.text.split())


def _texts(node: Node, where: _Where) -> tuple[str, ...]:
    if not isinstance(node, Items) or not node.items:
        raise where.breach("something else", "a list of texts")
    return tuple(_text(item, where) for item in node.items)


def _date(node: Node, where: _Where) -> str:
    text = _text(node, where)
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise where.breach(repr(text), "a date, YYYY-MM-DD") from None


def _bool(node: Node, where: _Where) -> bool:
    text = _text(node, where)
    if text not in ("true", "false"):
        raise where.breach(repr(text), "true or false")
    return text == "true"


def _layout(node: Node, where: _Where) -> str:
    text = _text(node, where)
    if text not in ("dense", "fused", "per expert"):
        raise where.breach(repr(text), "dense, fused or per expert")
    return text


def _json(node: Node, where: _Where) -> Plain:
    """A value of a JSON file, as JSON would read it; a mapping counts the words of a list."""
    if isinstance(node, Items):
        return tuple(_json(item, where) for item in node.items)
    if isinstance(node, Table):
        return {key: _int(value, where.at(key)) for key, value in node.entries.items()}
    if node.quoted:
        return node.text
    words: dict[str, Plain] = {"null": None, "": None, "true": True, "false": False}
    if node.text in words:
        return words[node.text]
    if _INT.fullmatch(node.text):
        return int(node.text)
    return float(node.text) if _FLOAT.fullmatch(node.text) else node.text


_Read = Callable[[Node, _Where], Plain]

#: What ``values`` may hold.
VALUES: Mapping[str, _Read] = {
    "link": _text,
    "revisions": _texts,
    "release_date": _date,
    "licence": _text,
    "context_native": _int,
    "context_extended": _int,
    "modalities": _texts,
    "class": _text,
    "model_type": _text,
    "text_model_type": _text,
    "parameters": _int,
    "template_sha256": _texts,
    "thinking_by_default": _bool,
    "variants": _texts,
}
_READERS: Mapping[str, _Read | Mapping[str, _Read]] = {
    "values": VALUES,
    "shape": _json,
    "config": _json,
    "generation_config": _json,
    "tokens": _int,
    "tensors": _int,
    "layout": _layout,
}


# -- one file


def read_skus(file: Path) -> list[Sku]:
    """All records of one file.

    The entry point that brought the file is not known here: `Sku.origin` is empty.

    Raises:
        UsageError: ``QC-SKU-004`` the first breach of the contract; ``QC-YAML-*``.
    """
    where = _Where(file, "")
    entries = _keys(read(file), _FILE_KEYS, where, optional=("shared", "skus", "hosted"))
    version = _text(entries["schema_version"], where.at("schema_version"))
    if version != str(SCHEMA_VERSION):
        raise where.at("schema_version").breach(version, str(SCHEMA_VERSION))
    generation = _text(entries["generation"], where.at("generation"))
    sources = {
        key: _text(node, where.at("sources", key))
        for key, node in _mapping(entries["sources"], where.at("sources")).items()
    }
    where = _Where(file, "", sources)
    shared = {
        name: tuple(_facts(node, where.at("shared", name)))
        for name, node in _mapping(entries.get("shared"), where.at("shared")).items()
    }
    skus = [
        _sku(node, generation, shared, where.at("skus", number))
        for number, node in enumerate(_items(entries.get("skus"), where.at("skus")))
    ]
    skus += [
        _hosted(node, generation, shared, where.at("hosted", number))
        for number, node in enumerate(_items(entries.get("hosted"), where.at("hosted")))
    ]
    seen: set[str] = set()
    for sku in skus:
        if twice := seen & sku.names():
            raise where.at(sku.id).breach(f"{sorted(twice)[0]} twice", "each name once")
        seen |= sku.names()
    return skus


_Shared = Mapping[str, tuple[tuple[str, str, Fact], ...]]


def _sku(node: Node, generation: str, shared: _Shared, where: _Where) -> Sku:
    entries, where = _named(node, _SKU_KEYS, ("shared",), where)
    facts = _gather(entries, shared, where)
    for key in _REQUIRED:
        if key not in facts["values"]:
            raise where.breach(f"no {key}", ", ".join(_REQUIRED))
    if not facts["shape"]:
        raise where.breach("no shape", "the sizes that config.json gives")
    return Sku(
        id=_text(entries["id"], where),
        generation=generation,
        architecture=_text(entries["architecture"], where.at("architecture")),
        facts=facts,
        origin="",
        file=where.file,
    )


def _hosted(node: Node, generation: str, shared: _Shared, where: _Where) -> Sku:
    entries, where = _named(node, _HOSTED_KEYS, ("aliases", "shared"), where)
    facts = _gather(entries, shared, where)
    for key in _REQUIRED_HOSTED:
        if key not in facts["values"]:
            raise where.breach(f"no {key}", ", ".join(_REQUIRED_HOSTED))
    served = tuple(
        _served(one, where.at("served", number))
        for number, one in enumerate(_items(entries["served"], where.at("served")))
    )
    if not served:
        raise where.at("served").breach("nobody", "at least one provider")
    aliases = entries.get("aliases")
    return Sku(
        id=_text(entries["id"], where),
        generation=generation,
        architecture=None,
        facts=facts,
        aliases=() if aliases is None else _texts(aliases, where.at("aliases")),
        instead=_texts(entries["instead"], where.at("instead")),
        served=served,
        origin="",
        file=where.file,
    )


def _served(node: Node, where: _Where) -> Served:
    entries = _keys(node, _SERVED_KEYS, where, optional=("note", "context", "output"))
    mark, source = _evidence(entries, where)
    prices = _mapping(entries["prices"], where.at("prices"))
    for key in prices:
        if key not in _PRICES:
            raise where.at("prices").breach(f"the key {key}", ", ".join(_PRICES))
    return Served(
        provider=_text(entries["provider"], where.at("provider")),
        id=_text(entries["id"], where.at("id")),
        prices={key: _number(value, where.at("prices", key)) for key, value in prices.items()},
        mark=mark,
        source=source,
        context=_int(entries["context"], where.at("context")) if "context" in entries else None,
        output=_int(entries["output"], where.at("output")) if "output" in entries else None,
        note=_text(entries["note"], where.at("note")) if "note" in entries else None,
    )


def _gather(
    entries: Mapping[str, Node], shared: _Shared, where: _Where
) -> dict[str, dict[str, Fact]]:
    """The facts of one SKU: the shared ones that it names, then its own."""
    gathered: dict[str, dict[str, Fact]] = {section: {} for section in SECTIONS}
    named = entries.get("shared")
    facts = list(_facts(entries["facts"], where.at("facts")))
    for name in () if named is None else _texts(named, where.at("shared")):
        facts += _borrowed(name, shared, where.at("shared"))
    for section, key, fact in facts:
        if key in gathered[section]:
            raise where.at(section, key).breach("the value twice", "each value once")
        gathered[section][key] = fact
    return gathered


def _borrowed(name: str, shared: _Shared, where: _Where) -> Iterator[tuple[str, str, Fact]]:
    """Shared facts; ``NAME as MARK`` takes them for no better known than that."""
    name, _, word = name.partition(" as ")
    if name not in shared:
        raise where.breach(name, ", ".join(shared) or "no shared facts")
    weakest = _mark(word, where) if word else Mark.VERIFIED
    order = list(Mark)
    for section, key, fact in shared[name]:
        mark = max(fact.mark, weakest, key=order.index)
        yield section, key, Fact(fact.value, mark, fact.source)


def _facts(node: Node, where: _Where) -> Iterator[tuple[str, str, Fact]]:
    for number, group in enumerate(_items(node, where)):
        here = where.at(number)
        entries = _keys(group, ("mark", "source", *SECTIONS), here, optional=SECTIONS)
        mark, source = _evidence(entries, here)
        for section, how in _READERS.items():
            for key, value in _mapping(entries.get(section), here.at(section)).items():
                reader = how if callable(how) else how.get(key)
                if reader is None:
                    raise here.at(section).breach(f"the key {key}", ", ".join(VALUES))
                yield section, key, Fact(reader(value, here.at(section, key)), mark, source)


def _evidence(entries: Mapping[str, Node], where: _Where) -> tuple[Mark, str]:
    """Mark and source of a group; a source is one key of ``sources``, or several."""
    mark = _mark(_text(entries["mark"], where.at("mark")), where.at("mark"))
    node = entries["source"]
    keys = _texts(node, where) if isinstance(node, Items) else (_text(node, where.at("source")),)
    for key in keys:
        if key not in where.sources:
            raise where.at("source").breach(key, "a key of sources")
    return mark, "; ".join(where.sources[key] for key in keys)


def _mark(text: str, where: _Where) -> Mark:
    marks = [mark.value for mark in Mark]
    if text not in marks:
        raise where.breach(text, " or ".join(marks))
    return Mark(text)


def _named(
    node: Node, keys: tuple[str, ...], optional: tuple[str, ...], where: _Where
) -> tuple[dict[str, Node], _Where]:
    """The entries of a record, and its place told by its id."""
    named = node.entries.get("id") if isinstance(node, Table) else None
    if isinstance(named, Scalar):
        where = _Where(where.file, named.text, where.sources)
    return _keys(node, keys, where, optional=optional), where


def _keys(
    node: Node | None, keys: tuple[str, ...], where: _Where, optional: tuple[str, ...] = ()
) -> dict[str, Node]:
    """The entries of a mapping that has these keys and no other."""
    if not isinstance(node, Table):
        raise where.breach("something else", f"a mapping of {', '.join(keys)}")
    for key in node.entries:
        if key not in keys:
            raise where.breach(f"the key {key}", ", ".join(keys))
    for key in keys:
        if key not in node.entries and key not in optional:
            raise where.breach(f"no {key}", ", ".join(keys))
    return node.entries


def _mapping(node: Node | None, where: _Where) -> dict[str, Node]:
    if node is None:
        return {}
    if not isinstance(node, Table):
        raise where.breach("something else", "a mapping")
    return node.entries


def _items(node: Node | None, where: _Where) -> tuple[Node, ...]:
    if node is None:
        return ()
    if not isinstance(node, Items):
        raise where.breach("something else", "a list")
    return node.items
