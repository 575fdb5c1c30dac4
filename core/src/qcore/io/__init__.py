"""The one writer of results, and what keeps a folder or a file whole: locks, logs, strict JSON."""
