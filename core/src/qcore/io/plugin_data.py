"""Data files that plugins bring: found through an entry point, without importing the plugin.

This file decides where they lie: an entry point names a package, and the files are
``<package>/<folder>/*.yaml``. What they must hold is the business of who reads them
(`qcore.presets`, `qcore.skus`).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .entry_points import Entry, Status


def plugin_files(entry: Entry, folder: str) -> tuple[list[Path], str | None]:
    """The YAML files of a plugin's package, and why there are none.

    Args:
        entry: an entry point whose value is a package.
        folder: folder inside that package.
    """
    if entry.status is not Status.AVAILABLE:
        return [], entry.reason or entry.status.value
    top, *rest = entry.value.partition(":")[0].split(".")
    try:
        spec = importlib.util.find_spec(top)  # of a top-level name: imports nothing
    except (ImportError, ValueError) as error:
        return [], f"package {top} cannot be located: {error}"
    if spec is None or spec.submodule_search_locations is None:
        return [], f"package {top} is not installed"
    folders = [Path(place, *rest, folder) for place in spec.submodule_search_locations]
    files = [file for one in folders for file in yaml_files(one)]
    return files, None if files else f"package {entry.value} holds no {folder}/*.yaml"


def yaml_files(folder: Path) -> list[Path]:
    """``*.yaml`` of a folder, by name; nothing where there is no folder."""
    return sorted(folder.glob("*.yaml"))
