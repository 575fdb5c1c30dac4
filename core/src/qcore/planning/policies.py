"""The activation checkpointing policy of a run that was not planned.

This file decides what the settings mean where no plan chooses a policy for each layer: on the
CPU, or where memory has no known limit.
"""

from __future__ import annotations

from ..config.settings import Settings


def unplanned(settings: Settings) -> str:
    """The policy of every layer, by the settings alone; ``auto`` is ``full``."""
    if not settings.gradient_checkpointing:
        return "none"
    return "full" if settings.recompute == "auto" else settings.recompute
