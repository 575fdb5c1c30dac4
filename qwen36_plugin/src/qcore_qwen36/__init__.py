"""qcore-qwen36: Qwen 3.6 for qcore; `plugin` has the hooks."""
