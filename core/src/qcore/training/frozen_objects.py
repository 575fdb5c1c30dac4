"""Undoes `gc.freeze`, which the training loop calls, when a run ends.

This file decides what becomes of frozen objects. Why they are frozen is up to `step`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unfrozen_after() -> Iterator[None]:
    """Undo `gc.freeze` after the block.

    Objects that the caller froze are unfrozen too: Python 3.12 starts with some, and the collector
    does not say who froze an object. A model that stays frozen would never free device memory.
    """
    try:
        yield
    finally:
        gc.unfreeze()
