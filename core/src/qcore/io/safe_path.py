"""Checks relative paths from untrusted files: absolute paths, ``..`` and links out of the folder.

This file decides which relative names are safe, and whether a path stays in its folder after links
are followed. The caller decides the error for an unsafe name, and which links are allowed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

LONGEST: Final = 255  #: bytes of one path component
_UNNAMEABLE: Final = re.compile("[\0-\x1f\x7f\ud800-\udfff]")


def name_problem(name: str, *, depth: int = 1) -> str | None:
    """Return why a relative name is unsafe, in words for an error; ``None`` if it is safe.

    Args:
        name: the name, with ``/`` between folder and file.
        depth: the most path components allowed.
    """
    components = name.split("/")
    if name.startswith("/") or "\\" in name or ":" in name:
        return "an absolute or foreign path"
    if any(component in ("", ".", "..") for component in components):
        return "a path that is not plain"
    if len(components) > depth:
        return "a path" if depth == 1 else f"more than {depth - 1} folder deep"
    if unnameable(name):
        return "control characters, or characters that are not Unicode"
    if any(len(component.encode("utf-8")) > LONGEST for component in components):
        return f"a name of more than {LONGEST} bytes"
    return None


def unnameable(name: str) -> bool:
    """Whether a name has control characters or surrogates, which no file name may have."""
    return _UNNAMEABLE.search(name) is not None


def inside(folder: str | Path, name: str) -> Path | None:
    """Resolve a relative path, including all links.

    A path whose spelling leaves the folder is rejected without touching the disk, so the result
    reveals nothing about files outside.

    Args:
        folder: the folder; links that lead to it are followed too.
        name: a relative path.

    Returns:
        The resolved path; ``None`` if it is outside the folder.
    """
    if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == "..":
        return None
    root = os.path.realpath(folder)
    real = os.path.realpath(os.path.join(root, name))
    return Path(real) if os.path.commonpath([root, real]) == root else None


def cache_blobs(folder: str | Path) -> Path | None:
    """Return the ``blobs`` folder of the hub cache entry that a folder belongs to, if any.

    The hub's cache keeps ``snapshots/<commit>/[<folder>/]<file>`` as links into ``blobs``.
    """
    for parent in Path(os.path.realpath(folder)).parents:
        if parent.name == "snapshots":
            return parent.parent / "blobs"
    return None


def stored_file(folder: str | Path, name: str) -> Path | None:
    """Resolve a file of a folder that was copied, published or cached, including all links.

    Args:
        folder: the folder; links that lead to it are followed too.
        name: a relative path.

    Returns:
        The resolved path, in the folder or in the blobs of the same hub cache entry; ``None`` if
        it is outside both. The file need not exist.
    """
    real = inside(folder, name)
    if real is not None:
        return real
    if name_problem(name, depth=LONGEST) is not None:
        return None
    real = Path(os.path.realpath(os.path.join(folder, name)))
    return real if real.parent == cache_blobs(folder) else None


def dangling_target(path: str | Path) -> str | None:
    """Return where a link points that leads to no file; ``None`` for anything else."""
    if not os.path.islink(path) or os.path.exists(path):
        return None
    return os.readlink(path)
