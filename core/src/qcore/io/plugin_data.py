"""Finds YAML files that plugins ship (presets, SKU records) without importing the plugin.

This file decides the location: an entry point names a package, and the files are
``<package>/<folder>/*.yaml``. `qcore.config.presets` and `qcore.skus` decide their content.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .entry_points import Entry, Status


def plugin_files(entry: Entry, folder: str) -> tuple[list[Path], str | None]:
    """Return the YAML files of a plugin's package.

    Args:
        entry: an entry point whose value is a package.
        folder: folder inside that package.

    Returns:
        The files sorted by name, and the reason if there are none (else ``None``).
    """
    if entry.status is not Status.AVAILABLE:
        return [], entry.reason or entry.status.value
    top, *rest = entry.value.partition(":")[0].split(".")
    try:
        spec = importlib.util.find_spec(top)  # for a top-level name, this imports nothing
    except (ImportError, ValueError) as error:
        return [], f"package {top} cannot be located: {error}"
    if spec is None or spec.submodule_search_locations is None:
        return [], f"package {top} is not installed"
    folders = [Path(place, *rest, folder) for place in spec.submodule_search_locations]
    files = [file for path in folders for file in yaml_files(path)]
    return files, None if files else f"package {entry.value} has no {folder}/*.yaml"


def yaml_files(folder: Path) -> list[Path]:
    """Return ``*.yaml`` of a folder, sorted by name; empty if the folder does not exist."""
    return sorted(folder.glob("*.yaml"))
