"""Which runs read media, and which load the tower that computes them.

This file decides that a tower is loaded where rows have media or its maps are trained, that a run
of text alone says what it leaves aside, and what is said where media cannot be read. It loads
nothing itself and imports no torch.

Codes: ``QC-TRAIN-008`` a tower's group is to be trained and no row has media.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from ..checkpoint.unowned import unclaimed_sections
from ..errors import UsageError

if TYPE_CHECKING:
    from ..api.media import MediaReader
    from ..plugins.resolve_model import Identified
    from ..reporting import Reporter


def reader_of(found: Identified, tell: Reporter) -> MediaReader | None:
    """What reads the media of rows for this model; ``None`` where nothing does (`unread`)."""
    modality = found.modality
    return None if modality is None else modality.reader(found.checkpoint, tell.note)


def unread(found: Identified) -> str:
    """Why no media are read for this model, as what is expected of a row."""
    layout = found.layout
    lost = [one.name for one in found.decision.modalities if one.name in layout.absent]
    if lost:
        return f"the checkpoint has no tensor of its part '{lost[0]}'"
    sections = unclaimed_sections(found.checkpoint.config, layout.table)
    if sections and layout.carried:
        return f"no installed plugin reads what {sections[0]} describes"
    return "this checkpoint is of text alone"


def with_tower(
    found: Identified,
    groups: Sequence[str],
    kinds: Collection[str],
    *,
    quantized: Sequence[str] = (),
    reached: Callable[[], bool] = lambda: True,
    fix: str = "leave the group out, or train on rows that have media",
) -> tuple[Identified, list[str]]:
    """The model as a run needs it, and what the user is told of that.

    Args:
        found: the model, its tower idle.
        groups: LoRA groups that are asked for.
        kinds: kinds of media that the rows have, those held out too.
        quantized: groups that are to be in 4 bit.
        reached: whether a step of the run has a row with media; asked where it matters.
        fix: what to do about a tower that is to be trained on text alone.

    Raises:
        UsageError: ``QC-TRAIN-008``; ``QC-LORA-004`` a group is to be in 4 bit and is not loaded.
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
            "is of a tower, which no row of a training step reaches: none of them has media",
            field="target_groups",
            found=asked[0],
            expected=f"rows with {' or '.join(modality.kinds)} parts",
            fix=fix,
        )
    for group in quantized:
        if group in part.groups:
            raise UsageError(
                "QC-LORA-004",
                "is of a tower that rows of text alone do not load",
                field="quantize_groups",
                found=group,
                fix="leave it out",
            )
    tensors = sum(one.tensor.part is part for one in found.layout.located.values())
    return found, [
        f"rows are text alone: {tensors} tensors of part '{part.name}' are not loaded and stay "
        "as they are"
    ]
