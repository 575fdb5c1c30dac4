"""Qwen 3.5 for qcore. `plugin` holds the hook implementations; nothing here imports torch."""
