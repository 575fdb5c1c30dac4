"""Checks and reports before a weight is read: `inspect`, `plan`, and the preflight of a run."""
