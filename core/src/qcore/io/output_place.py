"""Checks where an output folder lies: not the current folder, not inside a model or an adapter.

This file decides which places are refused for an output, although they are empty or absent: the
current folder, which a rename would replace under the shell, and any place inside a model or an
adapter, whose manifest and loaders would meet files that they do not know.
`qcore.io.artifact` decides whether the folder itself can be written.

Codes: ``QC-WRITE-020`` a place that is refused.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from ..errors import WriteError
from .folder_check import ADAPTER_FILES
from .manifest import MANIFEST

_INDEX: Final = "model.safetensors.index.json"


def check_place(shown: Path, target: Path) -> None:
    """Refuse a place where no output may be written.

    Args:
        shown: the output as the user named it.
        target: the same with links resolved.

    Raises:
        WriteError: ``QC-WRITE-020``.
    """
    here = _current()
    if target == here:
        raise WriteError(
            "QC-WRITE-020",
            "is the current folder",
            file=shown,
            expected="a new folder",
            fix="name a folder inside it, such as ./out",
        )
    for folder in target.parents:
        kind = _holds(folder)
        if kind is not None:
            raise WriteError(
                "QC-WRITE-020",
                f"lies inside {folder}, which holds {kind}",
                file=shown,
                expected="a folder outside it",
                fix=f"name a folder beside it, such as {folder}-{target.name}",
            )


def _current() -> Path | None:
    try:
        return Path(os.path.realpath(os.getcwd()))
    except OSError:  # it was deleted
        return None


def _holds(folder: Path) -> str | None:
    """What a folder is, if new files do not belong there."""
    if (folder / ADAPTER_FILES[0]).is_file():
        return "an adapter"
    weights = "model.safetensors", _INDEX
    if (folder / "config.json").is_file() and any((folder / name).is_file() for name in weights):
        return "a model"
    return f"a result of qcore ({MANIFEST})" if _is_result(folder) else None


def _is_result(folder: Path) -> bool:
    """Whether the manifest of a folder is qcore's, even if damaged; others use the name too."""
    path = folder / MANIFEST
    try:
        return path.is_file() and b'"manifest_sha256"' in path.read_bytes()
    except OSError:
        return False
