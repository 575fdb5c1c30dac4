"""Whether a run loads the vision tower, and whether it can read images and videos.

This file decides that a tower is loaded if rows have media or its weights are trained, which note a
text-only run prints, and the message if media cannot be read. It loads nothing itself and imports
no torch.

Codes: ``QC-TRAIN-008`` a group of the tower is trained, but no row has media.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from ..checkpoint.identity import versions_of
from ..checkpoint.unowned import unclaimed_sections
from ..errors import UsageError
from ..plugins.manager import owner_of
from .media_reader import ContainedReader

if TYPE_CHECKING:
    from ..plugins.resolve_model import Identified
    from ..reporting import Reporter


def reader_of(found: Identified, tell: Reporter) -> ContainedReader | None:
    """The media reader of this model; ``None`` if it has none (see `unread`)."""
    modality = found.modality
    if modality is None:
        return None
    reader = modality.reader(found.checkpoint, tell.note)
    return ContainedReader(reader, owner_of(modality.reader))


def unread(found: Identified) -> str:
    """Why this model has no media reader, for the error of a row with media."""
    layout = found.layout
    lost = [one.name for one in found.decision.modalities if one.name in layout.absent]
    if lost:
        return f"the checkpoint has no tensor of its part '{lost[0]}'"
    sections = unclaimed_sections(found.checkpoint.config, layout.table)
    if sections and layout.carried:
        package = found.decision.architecture.media_plugin
        absent = package and versions_of([package])[package] is None
        install = f" (pip install {package})" if absent else ""
        return f"no installed plugin reads what {sections[0]} describes{install}"
    return "this is a text-only checkpoint"


def with_tower(
    found: Identified,
    groups: Sequence[str],
    kinds: Collection[str],
    *,
    quantized: Sequence[str] = (),
    reached: Callable[[], bool] = lambda: True,
    fix: str = "remove the group, or train on rows with media",
) -> tuple[Identified, list[str]]:
    """Load the tower if the run needs it.

    Args:
        found: the model, with its tower not loaded.
        groups: LoRA groups to train.
        kinds: kinds of media in all rows, including held-out ones.
        quantized: groups to store in 4 bit.
        reached: whether a training step has a row with media; called only if it matters.
        fix: the fix for training the tower without media.

    Returns:
        The model as the run needs it, and notes for the user.

    Raises:
        UsageError: ``QC-TRAIN-008``; ``QC-LORA-004`` a group in 4 bit that is not loaded.
    """
    modality = found.modality
    if modality is None:
        return found, []
    part = found.layout.table.part(modality.name)
    asked = [group for group in groups if group in part.groups]
    if kinds and (not asked or reached()):
        told = f"rows have media ({', '.join(sorted(kinds))}): part '{part.name}' is loaded"
        return found.using(modality), [f"{told} and {'trained' if asked else 'stays as it is'}"]
    if asked:
        raise UsageError(
            "QC-TRAIN-008",
            "trains the vision tower, but no training row contains an image or video",
            field="target_groups",
            found=asked[0],
            expected=f"rows with {' or '.join(modality.kinds)} parts",
            fix=fix,
        )
    for group in quantized:
        if group in part.groups:
            raise UsageError(
                "QC-LORA-004",
                "is a group of the tower, which a text-only run does not load",
                field="quantize_groups",
                found=group,
                fix="remove it",
            )
    tensors = sum(one.tensor.part is part for one in found.layout.located.values())
    return found, [
        f"rows are text alone: {tensors} tensors of part '{part.name}' are not loaded and stay "
        "as they are"
    ]
