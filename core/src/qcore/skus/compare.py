"""A checkpoint compared with the record of its SKU: which record fits, and what differs.

This file decides what fits: a record of the generation and the architecture that detection
decided, whose ``shape`` is that of config.json. A name never decides; one that names another
SKU is a difference like any other. Whatever else differs is told, not judged: a re-save
without prediction layers, a quantised variant, a patched template and a later revision are all
sound checkpoints, and what they are is the reader's to conclude.

No weight is read. Codes: none; nothing here is an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..api.parameters import Tensor as TableTensor
from ..checkpoint.checkpoint import text_sections
from ..checkpoint.layout import Layout
from .records import Fact, Mark, Plain, Sku

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint
    from .registry import Skus

_NEAR = 2  # sizes that may differ for a record to be named as the nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One value of the checkpoint that is not the record's.

    Attributes:
        field: what differs.
        found: in the checkpoint.
        recorded: in the record.
        mark: how well the record knows it.
        source: where the record has it from.
    """

    field: str
    found: Any
    recorded: Plain
    mark: Mark
    source: str

    def line(self) -> str:
        """For people."""
        return f"{self.field}: found {said(self.found)}, recorded {said(self.recorded)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A checkpoint beside its record.

    Attributes:
        sku: the record that fits; ``None`` where none does.
        note: one line where none does, or where several do.
        differences: values that are not the record's.
    """

    sku: Sku | None
    note: str | None = None
    differences: tuple[Difference, ...] = ()


def compare(
    checkpoint: Checkpoint, architecture: str, generation: str, layout: Layout, skus: Skus
) -> Comparison:
    """Find the record that fits a checkpoint, and what differs from it.

    Args:
        checkpoint: config, template and headers are looked at.
        architecture: name that detection decided.
        generation: name that detection decided.
        layout: the table met with the headers.
        skus: the records that are installed.
    """
    records = [
        sku
        for sku in skus
        if sku.architecture == architecture and sku.generation == generation and not sku.hosted
    ]
    wrong = {sku.id: list(_config_differences(checkpoint, sku, "shape")) for sku in records}
    fitting = [sku for sku in records if not wrong[sku.id]]
    if not fitting:
        return Comparison(sku=None, note=_no_record(generation, wrong))
    found = [(sku, tuple(_differences(checkpoint, layout, sku, skus))) for sku in fitting]
    sku, differences = min(found, key=lambda pair: len(pair[1]))
    others = ", ".join(other.id for other in fitting if other is not sku)
    return Comparison(
        sku=sku,
        note=f"{others} has the same sizes; {sku.id} differs least" if others else None,
        differences=differences,
    )


def part_layouts(layout: Layout) -> dict[str, str]:
    """How the experts of each part lie: ``dense``, ``fused``, ``per expert`` or a mixture.

    A part of which the checkpoint has no tensor is ``absent``. Told from where the tensors were
    found: a stack that lies in more than one place is stored per expert.
    """
    stacks: dict[str, Counter[str]] = {part.name: Counter() for part in layout.table.parts}
    is_stack: dict[str, bool] = {}
    for located in layout.located.values():
        row = located.tensor.row
        if row.name not in is_stack:
            is_stack[row.name] = _is_stack(located.tensor)
        if is_stack[row.name] and located.places:
            way = "fused" if len(located.places) == 1 else "per expert"
            stacks[located.tensor.part.name][way] += 1
    told = {}
    for part, ways in stacks.items():
        mixed = ", ".join(f"{number} {way}" for way, number in sorted(ways.items()))
        told[part] = "dense" if not ways else next(iter(ways)) if len(ways) == 1 else mixed
    return told | dict.fromkeys(layout.absent, "absent")


def _is_stack(tensor: TableTensor) -> bool:
    """Whether a spelling has pieces of fewer dimensions: one tensor an expert."""
    return any(len(way[0].shape) < len(tensor.shape) for way in tensor.spellings() if way)


def _no_record(generation: str, wrong: Mapping[str, list[Difference]]) -> str:
    nearest = min(wrong, key=lambda name: len(wrong[name]), default=None)
    note = f"none of generation {generation} has these sizes"
    if nearest is not None and len(wrong[nearest]) <= _NEAR:
        note += f"; nearest is {nearest}: " + ", ".join(one.line() for one in wrong[nearest])
    return note


# -- what differs


def _differences(
    checkpoint: Checkpoint, layout: Layout, sku: Sku, skus: Skus
) -> Iterator[Difference]:
    yield from _name(checkpoint.source, sku, skus)
    yield from _identity(checkpoint, sku)
    yield from _config_differences(checkpoint, sku, "config")
    yield from _generation(checkpoint, sku)
    yield from _template(checkpoint, sku)
    yield from _tokens(checkpoint, sku)
    yield from _tensors(checkpoint, layout, sku)


def _name(source: str, sku: Sku, skus: Skus) -> Iterator[Difference]:
    """A name that names another SKU; the longest that it holds counts."""
    name = Path(source.partition("@")[0]).name.lower()
    named = [
        (len(known), other)
        for other in skus
        for known in other.names()
        if "/" not in known and re.search(rf"(?<![a-z0-9]){re.escape(known)}(?![a-z0-9])", name)
    ]
    if named and (other := max(named, key=lambda pair: pair[0])[1]) is not sku:
        fact = _fact(sku, "values", "link")
        yield Difference(
            field="name", found=f"{source}, which names {other.id}", recorded=sku.id,
            mark=fact.mark, source=fact.source,
        )  # fmt: skip


def _identity(checkpoint: Checkpoint, sku: Sku) -> Iterator[Difference]:
    config = checkpoint.config
    classes = config.get("architectures")
    found = {
        "class": classes[0] if isinstance(classes, list) and classes else None,
        "model_type": config.get("model_type"),
        "text_model_type": text_sections(config)[0].get("model_type"),
    }
    revisions = sku.facts["values"].get("revisions")
    if revisions is not None and checkpoint.revision is not None:
        yield from _unless_in("revision", checkpoint.revision, revisions)
    for key, value in found.items():
        if (fact := sku.facts["values"].get(key)) is not None and value != fact.value:
            yield _difference(key, value, fact)


def _config_differences(checkpoint: Checkpoint, sku: Sku, section: str) -> Iterator[Difference]:
    """Keys of config.json; a section that is not there is one difference, not one a key."""
    gone: set[str] = set()
    for key, fact in sku.facts[section].items():
        top, dot, _ = key.partition(".")
        if dot and not isinstance(_lookup(checkpoint, top), Mapping):
            if top not in gone and fact.value is not None:
                gone.add(top)
                yield Difference(
                    field=top, found=None, recorded="a section", mark=fact.mark,
                    source=fact.source,
                )  # fmt: skip
            continue
        value = _lookup(checkpoint, key)
        if isinstance(fact.value, Mapping):
            # layer_types may be left to be derived from an interval; the table checks those.
            if value is not None and _counts(value) != fact.value:
                yield _difference(f"config.{key}", _counts(value), fact)
        elif not _same(value, fact.value):
            yield _difference(f"config.{key}", _brief(value), fact)


def _lookup(checkpoint: Checkpoint, key: str) -> Any:
    """A key of the text section, else of config.json itself; ``a.b`` goes into ``a``."""
    for section in text_sections(checkpoint.config):
        value: Any = section
        for word in key.split("."):
            value = value.get(word) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None


def _generation(checkpoint: Checkpoint, sku: Sku) -> Iterator[Difference]:
    if checkpoint.generation_config:
        for key, fact in sku.facts["generation_config"].items():
            value = checkpoint.generation_config.get(key)
            if not _same(value, fact.value):
                yield _difference(f"generation_config.{key}", value, fact)


def _template(checkpoint: Checkpoint, sku: Sku) -> Iterator[Difference]:
    fact = sku.facts["values"].get("template_sha256")
    if fact is not None:
        template = checkpoint.template
        found = None if template is None else template.sha256
        yield from _unless_in("template_sha256", found, fact)


def _tokens(checkpoint: Checkpoint, sku: Sku) -> Iterator[Difference]:
    """Ids as tokenizer_config.json lists them; tokenizer.json is too large to read for this."""
    listed = checkpoint.tokenizer_config.get("added_tokens_decoder")
    if not isinstance(listed, Mapping):
        return
    ids = {
        entry["content"]: int(key)
        for key, entry in listed.items()
        if isinstance(entry, Mapping) and isinstance(entry.get("content"), str) and key.isdigit()
    }
    for token, fact in sku.facts["tokens"].items():
        if ids.get(token) != fact.value:
            yield _difference(f"token {token}", ids.get(token), fact)


def _tensors(checkpoint: Checkpoint, layout: Layout, sku: Sku) -> Iterator[Difference]:
    fact = _fact(sku, "values", "parameters")
    if layout.parameters != fact.value:
        yield _difference("parameters", layout.parameters, fact)
    for key, fact in sku.facts["tensors"].items():
        names: Iterable[str] = checkpoint.headers
        found = sum(key == "total" or name.startswith(f"{key}.") for name in names)
        if found != fact.value:
            yield _difference(f"tensors.{key}", found, fact)
    ways = part_layouts(layout)
    for part, fact in sku.facts["layout"].items():
        way = ways.get(part, "absent")
        if way != fact.value:
            yield _difference(f"layout.{part}", way, fact)


def _unless_in(field: str, value: str | None, fact: Fact) -> Iterator[Difference]:
    """A difference unless the record lists the value."""
    if not isinstance(fact.value, tuple) or value not in fact.value:
        yield _difference(field, value, fact)


def _difference(field: str, found: Any, fact: Fact) -> Difference:
    return Difference(
        field=field, found=found, recorded=fact.value, mark=fact.mark, source=fact.source
    )


def _fact(sku: Sku, section: str, key: str) -> Fact:
    return sku.facts[section][key]  # the contract requires those that are asked for here


def _same(found: Any, recorded: Plain) -> bool:
    """Equal as JSON has it: a list is a tuple, 1 is not true, 1 is 1.0."""
    if isinstance(found, list):
        found = tuple(found)
    return bool(found == recorded) and isinstance(found, bool) == isinstance(recorded, bool)


def _counts(value: Any) -> Any:
    words = value if isinstance(value, list) else [value]
    return dict(Counter(map(str, words)))


def _brief(value: Any) -> Any:
    """A section told by its kind: all of a quantization_config would fill a screen."""
    if isinstance(value, Mapping):
        return value.get("quant_method") or "a section"
    return value


def said(value: Any) -> str:
    """A value as people read it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}" if value >= 10**7 else str(value)
    if isinstance(value, tuple | list):
        return ", ".join(map(said, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{number} {word}" for word, number in value.items())
    return str(value)
