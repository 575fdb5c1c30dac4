"""Files: atomic publishing, manifests, run locks, metrics logs, strict JSON, entry points."""
