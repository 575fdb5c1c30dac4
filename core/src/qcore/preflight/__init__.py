"""Checks before a weight is read: every finding of a run at once."""
