"""Digest of the Python files of a package, by which a cached result is known to be of this code.

This file decides what counts as the code of a package: the names and the content of its ``.py``
files. A package is not imported for it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path


@functools.cache
def package_digest(package: str) -> str | None:
    """Hex digest of a top-level package or module; ``None`` if its files cannot be read."""
    if package == "__main__":
        return None
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    folders = [Path(path) for path in spec.submodule_search_locations or ()]
    digest = hashlib.sha256()
    try:
        if folders:
            files = [(folder, path) for folder in folders for path in sorted(folder.rglob("*.py"))]
        else:
            path = Path(str(spec.origin))
            files = [(path.parent, path)]
        for root, path in files:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root)}\0{len(content)}\0".encode())
            digest.update(content)
    except OSError:
        return None
    return digest.hexdigest() if files else None
