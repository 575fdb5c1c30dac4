"""Safe paths: which names from a file that somebody else wrote may be opened.

This file decides what a plain relative name is, for every place that takes one from a model's
index, a manifest or a data file, and whether a path stays in its folder once links are followed.
What is said of an unsafe one, and which links are allowed, is left to the caller.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

LONGEST: Final = 255  #: bytes of one name
_UNNAMEABLE: Final = re.compile("[\0-\x1f\x7f\ud800-\udfff]")


def name_problem(name: str, *, depth: int = 1) -> str | None:
    """Why a relative name is unsafe, in words for an error; ``None`` where it is plain.

    Args:
        name: the name, ``/`` between folder and file.
        depth: components that it may have.
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
    """Whether a name has a character that no file is named with."""
    return _UNNAMEABLE.search(name) is not None


def inside(folder: str | Path, name: str) -> Path | None:
    """Where a relative path leads, every link followed; ``None`` outside of the folder.

    Args:
        folder: the folder; links that lead to it are followed too.
        name: a relative path. One that leaves the folder by its spelling is not looked at on
            disk, so its answer says nothing about what is there.
    """
    if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == "..":
        return None
    root = os.path.realpath(folder)
    real = os.path.realpath(os.path.join(root, name))
    return Path(real) if os.path.commonpath([root, real]) == root else None
