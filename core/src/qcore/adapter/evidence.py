"""Reads an adapter for the base of a run, and what its folder says as lines for the report.

This file decides which evidence of an adapter is reported when it is merged, generated with or
trained further: every verb reads an adapter by `read_for` and reports `evidence_lines`.
`qcore.adapter.reader` refuses what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..plugins.resolve_model import Identified
from .named_base import Base
from .peft_names import Adapter
from .reader import read_adapter


def read_for(
    base: Identified,
    folder: str | Path,
    *,
    trust_base: bool = False,
    trust_generation: bool = False,
) -> Adapter:
    """Read an adapter folder for the base of a run.

    Args:
        base: the base.
        folder: the adapter folder.
        trust_base: accept an adapter without a fingerprint of its base.
        trust_generation: accept such an adapter if it names a base of another generation.

    Raises:
        QcoreError: as `read_adapter`.
    """
    return read_adapter(
        folder,
        base.layout,
        trust_base=trust_base,
        trust_generation=trust_generation,
        base=Base(
            generation=base.decision.generation.name,
            source=str(base.checkpoint.source),
        ),
        claims=base.adapter_claims,
    )


def evidence_lines(base: Identified, adapter: Adapter) -> Iterator[str]:
    """Yield what the user must know of an adapter on a base; warnings begin with ``warning:``.

    Args:
        base: the base of the run.
        adapter: the adapter, read for that base.
    """
    yield from adapter.notes
