"""Ranks: the processes that share a run, one per device, and what they exchange."""
