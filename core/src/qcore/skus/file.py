"""Reads SKU files (``skus/*.yaml``, facts about published models) and checks their format.

This file decides how a record is written. Facts are grouped by mark and source, so that a reader
sees how well each value is known. Groups that several SKUs share are written once, under
``shared``, and sources once, under ``sources``. A value without a mark or a source is an error,
and so is a value that occurs twice.

`qcore.skus.registry` finds the files and selects a record, `qcore.config.expect` reads values, and
`qcore.skus.compare` compares a record with a checkpoint.

Code: ``QC-SKU-004`` a file that breaks the contract.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..config.expect import INTEGER, NUMBER, Contract, Expect
from ..config.yaml import MappingNode, ScalarNode, SequenceNode
from .records import SECTIONS, Fact, Mark, Plain, Served, Sku

SCHEMA_VERSION = 1
_CONTRACT = Contract("QC-SKU-004", "breaks the contract of SKU records")
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
_LAYOUTS = ("dense", "fused", "per expert")


def _json(value: Expect) -> Plain:
    """Read a value of a JSON file by JSON's rules; a mapping counts the words of a list."""
    node = value.node
    if isinstance(node, SequenceNode):
        return tuple(_json(item) for item in value.items())
    if isinstance(node, MappingNode):
        return {key: count.integer() for key, count in value.mapping().items()}
    if not isinstance(node, ScalarNode):
        return None
    if node.quoted:
        return node.text
    words: dict[str, Plain] = {"null": None, "": None, "true": True, "false": False}
    if node.text in words:
        return words[node.text]
    if INTEGER.fullmatch(node.text):
        return int(node.text)
    return float(node.text) if NUMBER.fullmatch(node.text) else node.text


def _layout(value: Expect) -> Plain:
    return value.choice(_LAYOUTS)


_Read = Callable[[Expect], Plain]

#: Keys of the section ``values`` and how each is read.
VALUES: Mapping[str, _Read] = {
    "link": Expect.text,
    "revisions": Expect.texts,
    "release_date": Expect.date,
    "licence": Expect.text,
    "context_native": Expect.integer,
    "context_extended": Expect.integer,
    "modalities": Expect.texts,
    "class": Expect.text,
    "model_type": Expect.text,
    "text_model_type": Expect.text,
    "parameters": Expect.integer,
    "template_sha256": Expect.texts,
    "thinking_by_default": Expect.boolean,
    "variants": Expect.texts,
}
_READERS: Mapping[str, _Read | Mapping[str, _Read]] = {
    "values": VALUES,
    "shape": _json,
    "config": _json,
    "generation_config": _json,
    "tokens": Expect.integer,
    "tensors": Expect.integer,
    "layout": _layout,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Context:
    """Data that all records of a file share.

    Attributes:
        generation: generation of every record.
        sources: key -> text of the source.
        shared: name of a group -> its facts, as (section, key, fact).
    """

    generation: str
    sources: Mapping[str, str]
    shared: Mapping[str, tuple[tuple[str, str, Fact], ...]]


def read_skus(file: Path) -> list[Sku]:
    """Read all records of one file.

    `Sku.origin` is empty, because the entry point of the file is not known here.

    Raises:
        UsageError: ``QC-SKU-004`` the first breach of the contract; ``QC-YAML-*`` invalid YAML.
    """
    root = Expect.of_file(file, _CONTRACT)
    entries = root.keys(_FILE_KEYS, optional=("shared", "skus", "hosted"))
    entries["schema_version"].choice((str(SCHEMA_VERSION),))
    generation = entries["generation"].text()
    sources = {key: source.text() for key, source in entries["sources"].mapping().items()}
    shared = entries["shared"].mapping() if "shared" in entries else {}
    context = _Context(
        generation=generation,
        sources=sources,
        shared={name: tuple(_facts(group, sources)) for name, group in shared.items()},
    )
    skus = [
        read(entry, context)
        for section, read in (("skus", _sku), ("hosted", _hosted))
        if section in entries
        for entry in entries[section].items()
    ]
    seen: set[str] = set()
    for sku in skus:
        if duplicates := seen & sku.names():
            raise root.renamed(sku.id).breach(f"{sorted(duplicates)[0]} twice", "each name once")
        seen |= sku.names()
    return skus


def _sku(entry: Expect, context: _Context) -> Sku:
    """Read a record of open weights."""
    entry = _renamed_to_id(entry)
    entries = entry.keys(_SKU_KEYS, optional=("shared",))
    facts = _gather(entry, entries, context, _REQUIRED)
    if not facts["shape"]:
        raise entry.breach("no shape", "the sizes in config.json")
    return Sku(
        id=entries["id"].text(),
        generation=context.generation,
        architecture=entries["architecture"].text(),
        facts=facts,
        origin="",
        file=entry.file,
    )


def _hosted(entry: Expect, context: _Context) -> Sku:
    """Read a record of a model that is served by API only."""
    entry = _renamed_to_id(entry)
    entries = entry.keys(_HOSTED_KEYS, optional=("aliases", "shared"))
    facts = _gather(entry, entries, context, _REQUIRED_HOSTED)
    served = tuple(_served(offer, context.sources) for offer in entries["served"].items())
    if not served:
        raise entries["served"].breach("an empty list", "at least one provider")
    return Sku(
        id=entries["id"].text(),
        generation=context.generation,
        architecture=None,
        facts=facts,
        aliases=entries["aliases"].texts() if "aliases" in entries else (),
        instead=entries["instead"].texts(),
        served=served,
        origin="",
        file=entry.file,
    )


def _served(entry: Expect, sources: Mapping[str, str]) -> Served:
    entries = entry.keys(_SERVED_KEYS, optional=("note", "context", "output"))
    mark, source = _mark_and_source(entries, sources)
    prices = entries["prices"].keys(_PRICES, optional=_PRICES)
    return Served(
        provider=entries["provider"].text(),
        id=entries["id"].text(),
        prices={kind: price.number() for kind, price in prices.items()},
        mark=mark,
        source=source,
        context=entries["context"].integer() if "context" in entries else None,
        output=entries["output"].integer() if "output" in entries else None,
        note=entries["note"].text() if "note" in entries else None,
    )


def _renamed_to_id(entry: Expect) -> Expect:
    """Return a record whose errors name its id instead of its index."""
    node = entry.node.entries.get("id") if isinstance(entry.node, MappingNode) else None
    return entry.renamed(node.text) if isinstance(node, ScalarNode) else entry


def _gather(
    entry: Expect, entries: Mapping[str, Expect], context: _Context, required: tuple[str, ...]
) -> dict[str, dict[str, Fact]]:
    """Return the facts of one SKU, its own and the shared ones, by section and key."""
    gathered: dict[str, dict[str, Fact]] = {section: {} for section in SECTIONS}
    facts = list(_facts(entries["facts"], context.sources))
    if "shared" in entries:
        for name in entries["shared"].texts():
            facts += _shared_facts(name, context, entries["shared"])
    for section, key, fact in facts:
        if key in gathered[section]:
            place = f"{entry.place}.{section}.{key}"
            raise entry.renamed(place).breach("the value twice", "each value once")
        gathered[section][key] = fact
    for key in required:
        if key not in gathered["values"]:
            raise entry.breach(f"no {key}", ", ".join(required))
    return gathered


def _shared_facts(name: str, context: _Context, entry: Expect) -> Iterator[tuple[str, str, Fact]]:
    """Yield a group of shared facts; ``NAME as MARK`` lowers stronger marks to MARK."""
    name, _, word = name.partition(" as ")
    if name not in context.shared:
        raise entry.breach(name, ", ".join(context.shared) or "no shared facts")
    weakest = _mark(word, entry) if word else Mark.VERIFIED
    order = list(Mark)
    for section, key, fact in context.shared[name]:
        mark = max(fact.mark, weakest, key=order.index)
        yield section, key, Fact(fact.value, mark, fact.source)


def _facts(entry: Expect, sources: Mapping[str, str]) -> Iterator[tuple[str, str, Fact]]:
    """Yield (section, key, fact) of every value in a list of groups."""
    for group in entry.items():
        entries = group.keys(("mark", "source", *SECTIONS), optional=SECTIONS)
        mark, source = _mark_and_source(entries, sources)
        for section, readers in _READERS.items():
            if section not in entries:
                continue
            for key, value in entries[section].mapping().items():
                reader = readers if callable(readers) else readers.get(key)
                if reader is None:
                    raise entries[section].breach(f"the key {key}", ", ".join(VALUES))
                yield section, key, Fact(reader(value), mark, source)


def _mark_and_source(entries: Mapping[str, Expect], sources: Mapping[str, str]) -> tuple[Mark, str]:
    """Return the mark and the source of a group; ``source`` is one or several keys."""
    mark = _mark(entries["mark"].text(), entries["mark"])
    entry = entries["source"]
    keys = entry.texts() if isinstance(entry.node, SequenceNode) else (entry.text(),)
    for key in keys:
        if key not in sources:
            raise entry.breach(key, "a key of sources")
    return mark, "; ".join(sources[key] for key in keys)


def _mark(text: str, entry: Expect) -> Mark:
    marks = [mark.value for mark in Mark]
    if text not in marks:
        raise entry.breach(text, " or ".join(marks))
    return Mark(text)
