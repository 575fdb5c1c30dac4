"""What a checkpoint is fit for: the errors and warnings that train, merge and serve would meet.

This file decides which uses there are and which guards belong to each. `qcore.preflight.checks`
runs the guards. It reads no weight, and tokenizer.json as JSON alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..api.records import Severity
from ..checkpoint.tokenizer_files import TOKENIZER, read_tokens
from ..errors import InputError, QcoreError, collected
from ..plugins.resolve_model import Identified
from .checks import as_error, survey
from .tokenizer_findings import normalize_of_content

#: Use -> the verb whose guards apply.
USES: Final[Mapping[str, str]] = {"train": "train", "merge": "merge", "serve": "generate"}


@dataclass(frozen=True, slots=True, kw_only=True)
class UseFinding:
    """An error or a warning, with the uses that meet it.

    Attributes:
        uses: names among `USES`.
        severity: ``error`` or ``warning``.
        error: the statement and the fix.
    """

    uses: tuple[str, ...]
    severity: str
    error: QcoreError

    def as_json(self) -> dict[str, Any]:
        """An entry of ``findings`` of ``qcore inspect --json``."""
        return {"for": list(self.uses), "severity": self.severity, **self.error.as_json()}


def findings_of(found: Identified, uses: Iterable[str]) -> tuple[UseFinding, ...]:
    """Return what the guards say of a checkpoint whose tensors are all known.

    Args:
        found: the model.
        uses: names among `USES`.
    """
    unread: list[QcoreError] = []
    ids: dict[str, int] = {}
    content: dict[str, Any] = {}
    with collected(unread):
        if TOKENIZER not in found.checkpoint.sidecars:
            raise InputError(
                "QC-TOKENIZER-001", "has no tokenizer.json", file=found.checkpoint.path,
                fix="add the tokenizer.json that came with the weights",
            )  # fmt: skip
        ids, content = read_tokens(found.checkpoint)
    met: dict[tuple[str, str, str], tuple[QcoreError, list[str]]] = {}
    for use in uses:
        errors: list[QcoreError] = [*unread] if use != "merge" else []
        warnings = []
        if not errors:
            with collected(errors):
                problems, findings = survey(
                    found, verb=USES[use], token_ids=ids, normalize=normalize_of_content(content)
                )
                errors += problems
                warnings = [as_error(f) for f in findings if f.severity is Severity.WARNING]
        for severity, group in (("error", errors), ("warning", warnings)):
            for error in group:
                key = (severity, error.code, error.message)
                met.setdefault(key, (error, []))[1].append(use)
    found.checkpoint.close()
    return tuple(
        UseFinding(uses=tuple(names), severity=severity, error=error)
        for (severity, _, _), (error, names) in met.items()
    )
