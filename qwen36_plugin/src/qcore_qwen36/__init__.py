"""Qwen 3.6 for qcore; `plugin` is what qcore loads."""
