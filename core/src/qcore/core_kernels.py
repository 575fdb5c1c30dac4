"""The backends of core's own ops, as records: torch-free, what they need is imported inside.

This file decides which of them there are and their order; each is written and verified in a
file of `qcore.nn`.
"""

from __future__ import annotations

from collections.abc import Iterator

from .records import Kernel


def core_kernels() -> Iterator[Kernel]:
    """The backends of NF4, of experts and of the loss."""
    yield from ()
