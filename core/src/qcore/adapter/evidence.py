"""What an adapter folder says about itself, as lines for the report of every verb.

This file decides which evidence of an adapter is reported when it is merged, generated with or
trained further; each verb asks this one function. `qcore.adapter.reader` refuses what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..plugins.resolve_model import Identified
from .peft_names import Adapter


def evidence_lines(base: Identified, adapter: Adapter) -> Iterator[str]:
    """Yield what the user must know of an adapter on a base; warnings begin with ``warning:``.

    Args:
        base: the base of the run.
        adapter: the adapter, read for that base.
    """
    yield from adapter.notes
