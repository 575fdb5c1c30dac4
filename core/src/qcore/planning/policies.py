"""The activation checkpointing policy where no memory limit is known; `planner` searches others.

This file decides what the settings mean where no memory limit is known: on the CPU, and in a
training loop without a plan. A policy that fits a limit is chosen by `planner`.
"""

from __future__ import annotations

from ..config.settings import Settings


def default_policy(settings: Settings) -> str:
    """The policy of every layer; ``auto`` recomputes whole layers."""
    if not settings.gradient_checkpointing:
        return "none"
    return "full" if settings.recompute == "auto" else settings.recompute
