"""Compares a checkpoint with the SKU record (facts about a published model) that fits it.

This file decides which record matches: one with the detected generation and architecture, and
with the ``shape`` of config.json. The name of the checkpoint does not matter; a name of another
SKU is a difference like any other. Differences are reported without a verdict: a re-save without
prediction layers, a quantized variant, a patched template and a later revision are all valid
checkpoints.

No weight is read. A difference is never an error, so this file has no error codes.
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

_NEAR = 2  # at most this many sizes may differ for a record to be reported as the nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One value that differs between a checkpoint and its record.

    Attributes:
        field: dotted name of the value.
        found: the value in the checkpoint.
        recorded: the value in the record.
        mark: how well the recorded value is known.
        source: where the recorded value comes from.
    """

    field: str
    found: Any
    recorded: Plain
    mark: Mark
    source: str

    def line(self) -> str:
        """Return one line for the terminal."""
        return (
            f"{self.field}: found {format_value(self.found)}, "
            f"recorded {format_value(self.recorded)}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The result of `compare`.

    Attributes:
        sku: the record that matches; ``None`` if there is none.
        note: one line if no record or several records match.
        differences: values that differ from the record.
    """

    sku: Sku | None
    note: str | None = None
    differences: tuple[Difference, ...] = ()


def compare(
    checkpoint: Checkpoint, architecture: str, generation: str, layout: Layout, skus: Skus
) -> Comparison:
    """Select the record that matches a checkpoint and list the differences.

    If several records match, the one with the fewest differences is selected.

    Args:
        checkpoint: only its config, template, tokenizer config and headers are read.
        architecture: name of the detected architecture.
        generation: name of the detected generation.
        layout: on-disk layout of the checkpoint.
        skus: the installed records.
    """
    records = [
        sku
        for sku in skus
        if sku.architecture == architecture and sku.generation == generation and not sku.hosted
    ]
    by_id = {sku.id: list(_config_differences(checkpoint, sku, "shape")) for sku in records}
    matches = [sku for sku in records if not by_id[sku.id]]
    if not matches:
        return Comparison(sku=None, note=_no_record(generation, by_id))
    compared = [(sku, tuple(_differences(checkpoint, layout, sku, skus))) for sku in matches]
    sku, differences = min(compared, key=lambda pair: len(pair[1]))
    others = ", ".join(other.id for other in matches if other is not sku)
    return Comparison(
        sku=sku,
        note=f"{others} has the same sizes; {sku.id} differs least" if others else None,
        differences=differences,
    )


def part_layouts(layout: Layout) -> dict[str, str]:
    """Return how the experts of each part are stored, by part name.

    The value is ``dense``, ``fused``, ``per expert``, a mixture with counts, or ``absent`` for a
    part without tensors. A stack that is made of several tensors on disk is stored per expert.
    """
    stacks: dict[str, Counter[str]] = {part.name: Counter() for part in layout.table.parts}
    is_stack: dict[str, bool] = {}
    for located in layout.located.values():
        row = located.tensor.row
        if row.name not in is_stack:
            is_stack[row.name] = _is_stack(located.tensor)
        if is_stack[row.name] and located.places:
            storage = "fused" if len(located.places) == 1 else "per expert"
            stacks[located.tensor.part.name][storage] += 1
    layouts = {}
    for part, counts in stacks.items():
        mixed = ", ".join(f"{count} {storage}" for storage, count in sorted(counts.items()))
        layouts[part] = "dense" if not counts else next(iter(counts)) if len(counts) == 1 else mixed
    return layouts | dict.fromkeys(layout.absent, "absent")


def _is_stack(tensor: TableTensor) -> bool:
    """Return whether a spelling has pieces of fewer dimensions: one tensor per expert."""
    return any(len(pieces[0].shape) < len(tensor.shape) for pieces in tensor.spellings() if pieces)


def _no_record(generation: str, by_id: Mapping[str, list[Difference]]) -> str:
    """Return the note if no record matches; `by_id` has the sizes that differ per record."""
    nearest = min(by_id, key=lambda name: len(by_id[name]), default=None)
    note = f"none of generation {generation} has these sizes"
    if nearest is not None and len(by_id[nearest]) <= _NEAR:
        lines = ", ".join(difference.line() for difference in by_id[nearest])
        note += f"; nearest is {nearest}: {lines}"
    return note


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
    """A source that contains the name of another SKU; the longest name in it counts."""
    name = Path(source.partition("@")[0]).name.lower()
    mentioned = [
        (len(known), other)
        for other in skus
        for known in other.names()
        if "/" not in known and re.search(rf"(?<![a-z0-9]){re.escape(known)}(?![a-z0-9])", name)
    ]
    if mentioned and (other := max(mentioned, key=lambda pair: pair[0])[1]) is not sku:
        fact = _fact(sku, "values", "link")
        yield Difference(
            field="name", found=f"{source}, which names {other.id}", recorded=sku.id,
            mark=fact.mark, source=fact.source,
        )  # fmt: skip


def _identity(checkpoint: Checkpoint, sku: Sku) -> Iterator[Difference]:
    """The revision, class and model types that differ from the record."""
    config = checkpoint.config
    classes = config.get("architectures")
    identity = {
        "class": classes[0] if isinstance(classes, list) and classes else None,
        "model_type": config.get("model_type"),
        "text_model_type": text_sections(config)[0].get("model_type"),
    }
    revisions = sku.facts["values"].get("revisions")
    if revisions is not None and checkpoint.revision is not None:
        yield from _unless_listed("revision", checkpoint.revision, revisions)
    for key, value in identity.items():
        if (fact := sku.facts["values"].get(key)) is not None and value != fact.value:
            yield _difference(key, value, fact)


def _config_differences(checkpoint: Checkpoint, sku: Sku, section: str) -> Iterator[Difference]:
    """Keys of config.json that differ; a missing section is one difference, not one per key."""
    missing: set[str] = set()
    for key, fact in sku.facts[section].items():
        top, dot, _ = key.partition(".")
        if dot and not isinstance(_lookup(checkpoint, top), Mapping):
            if top not in missing and fact.value is not None:
                missing.add(top)
                yield Difference(
                    field=top, found=None, recorded="a section", mark=fact.mark,
                    source=fact.source,
                )  # fmt: skip
            continue
        value = _lookup(checkpoint, key)
        if isinstance(fact.value, Mapping):
            # config.json may give an interval instead of layer_types; the table checks those.
            if value is not None and _counts(value) != fact.value:
                yield _difference(f"config.{key}", _counts(value), fact)
        elif not _same(value, fact.value):
            yield _difference(f"config.{key}", _brief(value), fact)


def _lookup(checkpoint: Checkpoint, key: str) -> Any:
    """Look up a dotted key in the text section, then at the top level of config.json."""
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
        sha256 = None if template is None else template.sha256
        yield from _unless_listed("template_sha256", sha256, fact)


def _tokens(checkpoint: Checkpoint, sku: Sku) -> Iterator[Difference]:
    """Token ids in tokenizer_config.json that differ; tokenizer.json is too large to read here."""
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
    """Numbers of parameters and tensors and layouts of experts that differ from the record."""
    fact = _fact(sku, "values", "parameters")
    if layout.parameters != fact.value:
        yield _difference("parameters", layout.parameters, fact)
    for key, fact in sku.facts["tensors"].items():
        names: Iterable[str] = checkpoint.headers
        count = sum(key == "total" or name.startswith(f"{key}.") for name in names)
        if count != fact.value:
            yield _difference(f"tensors.{key}", count, fact)
    layouts = part_layouts(layout)
    for part, fact in sku.facts["layout"].items():
        storage = layouts.get(part, "absent")
        if storage != fact.value:
            yield _difference(f"layout.{part}", storage, fact)


def _unless_listed(field: str, value: str | None, fact: Fact) -> Iterator[Difference]:
    """Yield a difference unless the record lists the value."""
    if not isinstance(fact.value, tuple) or value not in fact.value:
        yield _difference(field, value, fact)


def _difference(field: str, value: Any, fact: Fact) -> Difference:
    return Difference(
        field=field, found=value, recorded=fact.value, mark=fact.mark, source=fact.source
    )


def _fact(sku: Sku, section: str, key: str) -> Fact:
    return sku.facts[section][key]  # callers only pass keys that the file contract requires


def _same(value: Any, recorded: Plain) -> bool:
    """Compare as JSON values: a list equals a tuple, 1 equals 1.0 but not true."""
    if isinstance(value, list):
        value = tuple(value)
    return bool(value == recorded) and isinstance(value, bool) == isinstance(recorded, bool)


def _counts(value: Any) -> Any:
    """Count the words of a list such as ``layer_types``."""
    words = value if isinstance(value, list) else [value]
    return dict(Counter(map(str, words)))


def _brief(value: Any) -> Any:
    """Shorten a section to its ``quant_method``: a quantization_config would fill a screen."""
    if isinstance(value, Mapping):
        return value.get("quant_method") or "a section"
    return value


def format_value(value: Any) -> str:
    """Format a value of a record or a checkpoint for the terminal."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}" if value >= 10**7 else str(value)
    if isinstance(value, tuple | list):
        return ", ".join(map(format_value, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{number} {word}" for word, number in value.items())
    return str(value)
