"""qcore-qwen35: Qwen 3.5 for qcore; `plugin` has the hooks. Importing it imports no torch."""
