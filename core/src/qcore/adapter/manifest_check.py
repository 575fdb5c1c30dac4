"""What training recorded of an adapter, and whether the files that act are still those.

This file decides that an adapter with another SHA-256 of its weights, or another value in a field
of adapter_config.json that acts, is refused, and that every other change is accepted.
`qcore.io.folder_check` compares.

Codes: ``QC-ADAPTER-008`` the folder differs from its manifest, ``-011`` a later layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..io.artifact import MANIFEST, read_manifest, verify
from ..io.folder_check import ADAPTER_FILES, Report
from .peft_names import CONFIG, LAYOUT


def read_recorded(folder: Path) -> tuple[Mapping[str, Any], list[str]]:
    """Read the manifest of an adapter and compare the files that act.

    Args:
        folder: the adapter folder.

    Returns:
        What the manifest records, which is empty without a fingerprint of the base, and a line for
        each edit of adapter_config.json that is accepted.

    Raises:
        InputError: ``QC-ADAPTER-008``, ``-011``.
    """
    if not (folder / MANIFEST).exists():
        return {}, []
    report = verify(folder, acting=ADAPTER_FILES)
    if not report.ok:
        raise _differs(folder, report)
    meta = read_manifest(folder).meta
    if meta.get("layout", LAYOUT) != LAYOUT:
        raise InputError(
            "QC-ADAPTER-011",
            "has a layout that this version does not read",
            file=folder,
            field="layout",
            found=meta["layout"],
            expected=LAYOUT,
            fix="upgrade qcore-framework",
        )
    if not meta.get("fingerprints"):
        return {}, []
    return meta, [note for note in report.notes if note.startswith(f"{CONFIG}: ")]


def _differs(folder: Path, report: Report) -> InputError:
    """Return ``QC-ADAPTER-008``: a file that acts, or a field of the config, was changed."""
    fix = "restore it from the folder that training wrote or from a copy of that"
    fault = report.faults[0] if report.faults else None
    if fault is None or fault.field is None:
        found = report.problems[0]
        return InputError(
            "QC-ADAPTER-008", "differs from its manifest", file=folder, found=found, fix=fix
        )
    return InputError(
        "QC-ADAPTER-008",
        "was changed after training",
        file=folder / fault.file,
        field=fault.field,
        found=fault.found,
        expected=fault.expected,
        fix=fix,
    )
