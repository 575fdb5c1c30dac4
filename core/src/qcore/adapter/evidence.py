"""Reads an adapter for the base of a run, and what its folder says as lines for the report.

This file decides which evidence of an adapter is reported when it is merged, generated with or
trained further: every verb reads an adapter by `read_for` and reports `evidence_lines`.
`qcore.adapter.reader` refuses what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..checkpoint.tokenizer_files import TokenizerFiles, named_templates
from ..errors import InputError, QcoreError
from ..plugins.resolve_model import Identified
from .bound_base import refuse_other_config
from .equal_values import equal_values, same_change
from .named_base import Base
from .peft_names import Adapter
from .reader import read_adapter
from .tokenizer_evidence import compare_tokenizers


def read_for(
    base: Identified,
    folder: str | Path,
    *,
    trust_base: bool = False,
    trust_generation: bool = False,
    grow: bool = False,
    problems: list[QcoreError] | None = None,
) -> Adapter:
    """Read an adapter folder for the base of a run.

    Args:
        base: the base.
        folder: the adapter folder.
        trust_base: accept an adapter without a fingerprint of its base.
        trust_generation: accept such an adapter if it names a base of another generation.
        grow: accept values for rows of embedding and head that the base lacks; the run then uses
            ``base.growing(adapter.vocabulary)``.
        problems: receives the errors of tensors and targets instead of raising them.

    Raises:
        QcoreError: as `read_adapter`; ``QC-ADAPTER-024`` config.json of the base computes something
            else than that of the training.
    """
    adapter = read_adapter(
        folder,
        base.layout,
        trust_base=trust_base,
        trust_generation=trust_generation,
        base=Base(
            generation=base.decision.generation.name,
            source=str(base.checkpoint.source),
        ),
        claims=base.adapter_claims,
        equal=lambda path, header, name: equal_values(
            path, header, base.checkpoint, base.layout, name
        ),
        same=same_change,
        grow=grow,
        problems=problems,
    )
    refuse_other_config(base, adapter)
    return adapter


def evidence_lines(base: Identified, adapter: Adapter, *, taken: bool = False) -> Iterator[str]:
    """Yield what the user must know of an adapter on a base; warnings begin with ``warning:``.

    Args:
        base: the base of the run.
        adapter: the adapter, read for that base.
        taken: whether the run uses the adapter's tokenizer and template where it brings them.
    """
    yield from adapter.notes
    difference = compare_tokenizers(adapter.path, base.checkpoint.path)
    if difference is not None and taken:
        yield from (line.removeprefix("warning: ") for line in difference.lines())
    elif difference is not None:
        yield from difference.lines()
        if difference.tokens or difference.template:
            yield "to merge or generate with the adapter's tokenizer and template: --take-tokenizer"


def brings_template(adapter: Adapter) -> bool:
    """Whether the adapter folder has a chat template, which `evidence_lines` compares."""
    try:
        return bool(named_templates(TokenizerFiles.of(adapter.path)))
    except InputError:  # `evidence_lines` reports it
        return False
