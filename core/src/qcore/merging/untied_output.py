"""The files of a merge in which the head of a tied base gets values of its own.

This file decides that the head is written next to the embedding, in the same file, and that
config.json says so: ``tie_word_embeddings`` is false in each section that has it. Without that,
loaders would use the embedding as head, and the merge would not compute what the adapter computes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..checkpoint.checkpoint import INDEX, Checkpoint
from ..checkpoint.layout import Layout
from ..io.atomic import reading
from .plan import CONFIG, MergePlan, index_text, laid_out, metadata_of

FIELD = "tie_word_embeddings"


def untie_output(plan: MergePlan, checkpoint: Checkpoint, layout: Layout) -> MergePlan:
    """Add the heads that get values of their own, and untie the configuration.

    Args:
        plan: the merge as it is planned for the tied base.
        checkpoint: the base.
        layout: its layout (`qcore.checkpoint.untied`).
    """
    if not layout.untied:
        return plan
    shards = dict(plan.shards)
    present = {patch.written.name for patch in plan.patches()}
    for name in sorted(layout.untied):
        item = layout.located[name]
        disk = layout.namespaces[item.tensor.part.name].spell(name)
        if disk in present:
            continue  # the base has it, with the values of the embedding
        source = item.places[0].header
        shard = shards[source.file]
        own = next(patch for patch in shard.patches if patch.source.name == source.name)
        head = replace(own, written=replace(own.written, name=disk))
        shards[source.file] = laid_out(metadata_of(shard.head), (*shard.patches, head))
    texts = {**plan.texts, CONFIG: _untied_config(plan, checkpoint)}
    if checkpoint.index is not None:
        texts[INDEX] = index_text(checkpoint.index, shards)
    copied = tuple(name for name in plan.copied if name not in texts)
    return replace(plan, shards=shards, texts=texts, copied=copied)


def untied_lines(layout: Layout) -> Iterator[str]:
    """Yield a line for the report if the head of a tied base gets values of its own."""
    for name in sorted(layout.untied):
        yield (
            f"the adapter changes embedding and head of a tied base in different ways: {name} is "
            f"written with values of its own, and {FIELD} is false in config.json"
        )


def _untied_config(plan: MergePlan, checkpoint: Checkpoint) -> str:
    """Return config.json of the output, which ties no weights."""
    path = checkpoint.file(CONFIG)
    with reading(path):
        text = plan.texts.get(CONFIG) or path.read_text(encoding="utf-8")
    config = json.loads(text)
    _untie(config)
    config[FIELD] = False
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _untie(section: dict[str, Any]) -> None:
    if FIELD in section:
        section[FIELD] = False
    for value in section.values():
        if isinstance(value, dict):
            _untie(value)
