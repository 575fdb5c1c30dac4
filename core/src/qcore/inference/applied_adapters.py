"""The adapters of a prompt, and the base as they need it: parts, rows, an untied head, a tokenizer.

This file decides in which order adapters are read, added and applied to the layout of the base.
`generate` loads the result.

Code: ``QC-MERGE-010`` the tokenizer of no adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..adapter.combined import combined
from ..adapter.evidence import evidence_lines
from ..adapter.peft_names import Adapter
from ..adapter.read_several import one_of, read_adapters
from ..adapter.taken_tokenizer import plan_tokenizer, taken_lines
from ..errors import UsageError
from ..plugins.resolve_model import Identified


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """A base and the sum of the adapters on it.

    Attributes:
        base: the base, with what the adapters need.
        adapter: the sum; ``None`` without adapters.
        lines: for the report.
    """

    base: Identified
    adapter: Adapter | None
    lines: tuple[str, ...]


def apply_adapters(
    base: Identified,
    wanted: str | Path | Mapping[str, float] | None,
    *,
    trust_base: bool,
    trust_generation: bool,
    take_tokenizer: bool,
) -> Applied:
    """Read the adapters of a prompt.

    Args:
        base: the base.
        wanted: one adapter, or the weight of each, by folder or hub id.
        trust_base: accept adapters without a fingerprint of their base.
        trust_generation: accept such adapters if they name a base of another generation.
        take_tokenizer: use the tokenizer and template that the adapter brings.

    Raises:
        UsageError: ``QC-MERGE-010``; as `read_adapters` and `one_of`.
        InputError: as `read_adapters`, `combined` and `plan_tokenizer`.
    """
    if not wanted:
        if take_tokenizer:
            raise UsageError(
                "QC-MERGE-010",
                "has no effect without an adapter",
                field="--take-tokenizer",
                fix="pass --adapter, or leave out --take-tokenizer",
            )
        return Applied(base=base, adapter=None, lines=())
    own = read_adapters(
        base, wanted, trust_base=trust_base, trust_generation=trust_generation, grow=take_tokenizer
    )
    adapter = combined(own)
    lines = [
        line for each in own for line in evidence_lines(base, each.adapter, taken=take_tokenizer)
    ]
    lines += _lines(adapter)
    base = base.using_parts(adapter.parts)
    base = base.untying() if adapter.untied else base
    base = base.growing(adapter.vocabulary)
    if take_tokenizer:
        taken = plan_tokenizer(base, one_of(own))
        lines += taken_lines(base, taken)
        base = taken.read_by(base)
    if len(own) > 1 and "chat" not in adapter.meta and any(e.adapter.meta.get("chat") for e in own):
        lines.append(
            "warning: the adapters do not record the same template and variables: prompts are "
            "rendered with the defaults of the template"
        )
    return Applied(base=base, adapter=adapter, lines=tuple(lines))


def _lines(adapter: Adapter) -> Iterator[str]:
    """Say which weights hold their change, so that NF4 quantizes the changed weight."""
    if adapter.folded:
        yield (
            f"the changes of {len(adapter.folded)} weights that are not plain LoRA are merged into "
            "the weights as they load"
        )
