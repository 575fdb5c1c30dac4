"""Variables of the chat template for a prompt: what training recorded, under what the user sets.

This file decides whose record is used: an adapter's in place of that of a merged base, because the
adapter was trained last. `qcore.data.rendering.template_kwargs` reads a record and checks
variables.

Code: ``QC-GENERATE-004`` a recorded variable that the chat template does not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.frozen_map import Entries, Plain
from ..data.rendering.template_kwargs import (
    check_variables,
    mixed_modes,
    other_template,
    recorded_variables,
)
from ..errors import InputError, UsageError
from ..io.artifact import MANIFEST, read_manifest

if TYPE_CHECKING:
    from ..adapter.peft_names import Adapter
    from ..checkpoint.chat_template import Template
    from ..checkpoint.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What a manifest says of the prompts that were trained.

    Attributes:
        meta: of the manifest; empty without one.
        source: the folder; ``None`` without a manifest.
        name: what was trained, for reports.
    """

    meta: Mapping[str, Any]
    source: Path | None
    name: str

    def warning(self, template: Template | None) -> str:
        """That the checkpoint has another chat template than the record names; empty if not."""
        return other_template(self.meta, template, self.name)

    def variables(
        self, template: Template | None, overrides: Mapping[str, Plain]
    ) -> tuple[Entries[Plain], list[str]]:
        """The variables to render prompts with, and lines for the report.

        Args:
            template: of the checkpoint that answers.
            overrides: variables that the user set.

        Raises:
            UsageError: as `check_variables`, for `overrides`.
            InputError: ``QC-GENERATE-004``; as `recorded_variables`.
        """
        recorded = recorded_variables(self.meta, self.source)
        if template is not None:
            check_variables(template, overrides)
            try:
                check_variables(template, recorded)
            except UsageError as error:
                raise InputError(
                    "QC-GENERATE-004",
                    "was trained with a variable that this chat template does not read",
                    file=self.source,
                    field=error.field,
                    expected=error.expected,
                    fix="name the base that it was trained on",
                ) from None
        variables = Entries({**recorded, **overrides})
        notes = []
        if variables:
            words = "--chat-template-kwargs" if overrides else f"as {self.name} was trained"
            if overrides and recorded:
                words += f", over what {self.name} was trained with"
            notes.append(f"the chat template is rendered with {variables} ({words})")
        if note := mixed_modes(self.meta):
            notes.append(f"{self.name}: {note}")
        return variables, notes


def recorded_chat(checkpoint: Checkpoint, adapter: Adapter | None) -> Recorded:
    """The record of an adapter, else of a merged checkpoint.

    Raises:
        InputError: the manifest of a merged checkpoint cannot be read.
    """
    if adapter is not None:
        return Recorded(meta=adapter.meta, source=adapter.path, name="the adapter")
    if MANIFEST not in checkpoint.sidecars:
        return Recorded(meta={}, source=None, name="the checkpoint")
    chat = read_manifest(checkpoint.path).meta.get("chat")
    meta = {} if chat is None else {"chat": chat}
    return Recorded(meta=meta, source=checkpoint.path, name="the merged checkpoint")
