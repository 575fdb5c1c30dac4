"""Backends of ops: which there are, which may run here, and how one is launched and verified."""
