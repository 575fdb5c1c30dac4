"""The generation that a merge recorded in the manifest of its output.

This file decides when that record decides the generation of a checkpoint whose files neither prove
nor contradict one: the folder is an artifact of qcore, and config.json is the file that was
published. A merge that takes the adapter's chat template is such a checkpoint.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from ..errors import InputError, QcoreError
from ..io.atomic import reading
from ..io.manifest import MANIFEST, read_manifest
from .detect import Decision, detect

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint
    from .manager import Plugins

_CONFIG = "config.json"


def decide(checkpoint: Checkpoint, plugins: Plugins, generation: str) -> Decision:
    """Decide what a checkpoint is, by its evidence, else by what its merge recorded.

    Args:
        checkpoint: the checkpoint.
        plugins: the plugins of its model type.
        generation: the user's choice; accepted only where evidence is missing.

    Raises:
        QcoreError: as `detect`.
    """
    try:
        return detect(checkpoint, plugins, generation=generation or None)
    except InputError as error:
        recorded = "" if generation else recorded_generation(checkpoint)
        if error.code != "QC-DETECT-003" or not recorded:
            raise
        try:
            words = f"recorded by the merge in {MANIFEST}"
            return detect(checkpoint, plugins, generation=recorded, named_by=words)
        except QcoreError:
            raise error from None


def recorded_generation(checkpoint: Checkpoint) -> str:
    """Return the generation that the merge of a checkpoint recorded; empty without a record."""
    if MANIFEST not in checkpoint.sidecars:
        return ""
    try:
        manifest = read_manifest(checkpoint.path)
        path = checkpoint.file(_CONFIG)
        with reading(path):
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except QcoreError:
        return ""  # `qcore verify` reports it
    entry, model = manifest.files.get(_CONFIG), manifest.meta.get("model")
    if entry is None or entry.sha256 != sha256 or not isinstance(model, dict):
        return ""
    generation = model.get("generation")
    return generation if isinstance(generation, str) else ""
