"""The files of a merge in which embedding and head get rows for added tokens.

This file decides that the rows follow those of the base in the same tensor, and that
``vocab_size`` of config.json has the new number in each section that had the old one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..checkpoint.checkpoint import INDEX, Checkpoint
from ..checkpoint.layout import Layout
from ..io.atomic import reading
from .plan import CONFIG, MergePlan, Shard, TensorPatch, index_text, laid_out, metadata_of

FIELD = "vocab_size"


def grow_output(plan: MergePlan, checkpoint: Checkpoint, layout: Layout) -> MergePlan:
    """Add the rows that the base does not have, and count them in the configuration.

    Args:
        plan: the merge as it is planned for the rows of the base.
        checkpoint: the base.
        layout: its layout (`qcore.checkpoint.grown`).
    """
    shards = {name: _grown(shard, layout) for name, shard in plan.shards.items()}
    if all(shards[name] is shard for name, shard in plan.shards.items()):
        return plan
    texts = {**plan.texts, CONFIG: _grown_config(plan, checkpoint, layout)}
    if checkpoint.index is not None:
        texts[INDEX] = index_text(checkpoint.index, shards)
    copied = tuple(name for name in plan.copied if name not in texts)
    return replace(plan, shards=shards, texts=texts, copied=copied)


def grown_lines(layout: Layout) -> Iterator[str]:
    """Yield a line for the report if the vocabulary of the output is larger."""
    for item in layout.located.values():
        if item.smaller is not None and item.tensor.row.group == "embed":
            before, rows = item.smaller.shape[0], item.tensor.shape[0]
            yield (
                f"the adapter adds {rows - before} rows to the vocabulary: {FIELD} is {rows} in "
                f"config.json, {before} in the base"
            )


def _grown(shard: Shard, layout: Layout) -> Shard:
    """Return a file with the larger tensors; the same file if it has none."""
    patches = tuple(_grown_patch(patch, layout) for patch in shard.patches)
    if patches == shard.patches:
        return shard
    return laid_out(metadata_of(shard.head), patches)


def _grown_patch(patch: TensorPatch, layout: Layout) -> TensorPatch:
    tensor, _ = layout.by_disk.get(patch.written.name, (None, ()))
    if tensor is None or layout.located[tensor.name].smaller is None:
        return patch
    added = tensor.shape[0] - patch.source.shape[0]
    return replace(patch, written=replace(patch.written, shape=tensor.shape), added=added)


def _grown_config(plan: MergePlan, checkpoint: Checkpoint, layout: Layout) -> str:
    """Return config.json of the output, with the new number of rows."""
    path = checkpoint.file(CONFIG)
    with reading(path):
        text = plan.texts.get(CONFIG) or path.read_text(encoding="utf-8")
    config = json.loads(text)
    sizes = {
        item.smaller.shape[0]: item.tensor.shape[0]
        for item in layout.located.values()
        if item.smaller is not None
    }
    _count(config, sizes)
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _count(section: dict[str, Any], sizes: dict[int, int]) -> None:
    if section.get(FIELD) in sizes:
        section[FIELD] = sizes[section[FIELD]]
    for value in section.values():
        if isinstance(value, dict):
            _count(value, sizes)
