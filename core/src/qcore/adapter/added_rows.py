"""Rows of embedding and head that an adapter has and its base lacks, as after tokens were added.

``resize_token_embeddings`` adds rows in training, and PEFT saves embedding and head with them.
This file decides how many rows such an adapter has, and that it must hold values for each added
row, because those that training began with are random and in no file. It imports no torch.

Code: ``QC-ADAPTER-006`` an added row has no values.

Shapes: V vocabulary, H hidden size, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from ..api.parameters import Tensor as TableTensor
from ..checkpoint.checkpoint import Header
from ..checkpoint.grown import rows_of_vocabulary
from ..checkpoint.layout import Layout
from .changes import Change, Pair
from .findings import Findings
from .peft_names import spell, trunk_part
from .tied_head import Settled

_PREFIX = "base_model.model."
#: Ends of tensor names -> the dim that has a size of V.
_ENDS: Final = {
    ".weight": 0,
    ".modules_to_save.weight": 0,
    ".base_layer.weight": 0,
    ".token_adapter.base_layer.weight": 0,
    ".lora_embedding_A": 1,
    ".lora_B.weight": 0,
}


def larger_vocabulary(
    config: Mapping[str, Any], headers: Mapping[str, Header], layout: Layout
) -> int | None:
    """Return the rows of an adapter's embedding and head; ``None`` if the base has as many.

    Args:
        config: adapter_config.json.
        headers: the tensors by PEFT's names.
        layout: the base.
    """
    sizes = [
        header.shape[dim]
        for tensor in _vocabulary(layout)
        for module in _modules(tensor, layout)
        for end, dim in _ENDS.items()
        if (header := headers.get(f"{_PREFIX}{module}{end}")) and len(header.shape) == 2
    ]
    largest = max([*sizes, *(row + 1 for row in _trained(config))], default=0)
    return largest if largest > rows_of_vocabulary(layout) else None


def _vocabulary(layout: Layout) -> Iterator[TableTensor]:
    return (tensor for tensor in layout.table if tensor.row.group in ("embed", "head"))


def _modules(tensor: TableTensor, layout: Layout) -> set[str]:
    """Return the names of a module in every class."""
    namespaces = trunk_part(layout.table).namespaces
    return {spell(tensor, namespace).removesuffix(".weight") for namespace in namespaces}


def _trained(config: Mapping[str, Any]) -> Iterator[int]:
    """Yield the ids in ``trainable_token_indices``."""
    declared = config.get("trainable_token_indices") or []
    for ids in declared.values() if isinstance(declared, Mapping) else [declared]:
        yield from (row for row in ids if type(row) is int) if isinstance(ids, list) else ()


def check_added_rows(settled: Settled, layout: Layout, before: int, findings: Findings) -> None:
    """Add an error for embedding or head if the adapter has no values for an added row.

    Args:
        settled: what the adapter changes.
        layout: the base with the added rows.
        before: rows of the base.
        findings: receives the error.
    """
    if findings.problems:
        return  # a missing row may be a consequence
    for tensor in _vocabulary(layout):
        if tensor.row.tie is not None and not settled.untied:
            continue  # the head is the embedding
        rows = range(before, tensor.shape[0])
        count, first = _lacking(settled.changes.get(tensor.name), rows)
        if count:
            findings.problem(
                "QC-ADAPTER-006",
                f"has no values for {count} of the {rows.stop - before} rows that the adapter adds",
                tensor.name,
                found=f"no value for token {first}",
                expected=f"values for tokens {rows[0]} to {rows[-1]}",
                fix="name the resized model that training used as the base, or train again with "
                f"{_module(tensor)} in modules_to_save",
            )


def _lacking(change: Change | None, rows: range) -> tuple[int, int | None]:
    """Count the rows that a change gives no values; also the first of them."""
    saved = change.under if isinstance(change, Pair) else change
    return (rows.stop - rows.start, rows.start) if saved is None else saved.lacks(rows)


def _module(tensor: TableTensor) -> str:
    return tensor.name.removesuffix(".weight").rpartition(".")[2]
