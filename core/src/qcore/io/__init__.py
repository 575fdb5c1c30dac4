"""Files and packages: atomic result folders, manifests, locks, logs, strict JSON, entry points."""
