"""`qcore inspect`: what a model is, by which evidence, and whether every tensor is known.

This file decides what the report holds. It reads config and headers alone, raises no error about
a tensor (the report lists them), and imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..checkpoint.layout_faults import faults
from ..checkpoint.safetensors_header import without_gc
from ..errors import QcoreError, raise_all
from ..plugins.resolve_model import Identified, identify
from ..skus.compare import Difference, compare, part_layouts
from ..skus.registry import load_skus
from .uses import USES, UseFinding, findings_of

#: Codes of a tensor that is absent, or that no part owns.
_BY_NAME = ("QC-KEY-001", "QC-KEY-002", "QC-KEY-004")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSize:
    """Tensors and parameters of a group of the parameter table."""

    tensors: int
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordComparison:
    """The checkpoint beside the record of its SKU.

    Attributes:
        id: of the record that fits; ``None`` where none does.
        note: one line where none fits, or several do.
        differences: values that are not those of the record.
        unread: files of records that cannot be read, and why.
    """

    id: str | None
    note: str | None
    differences: tuple[Difference, ...]
    unread: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectReport:
    """The result of `inspect`.

    Attributes:
        model: as the user named it.
        architecture: name of the architecture.
        generation: name of the generation.
        plugin: name of the plugin that claimed the checkpoint.
        evidence: a line for each piece of evidence.
        modalities: ``text`` and the kinds of media.
        parameters: in all; ``None`` where the quantization format cannot be read.
        quantization: the format of quantized weights; ``None`` for plain ones.
        tensors: in the files.
        unaccounted: tensors that are absent, or that no part owns.
        differences: other faults of tensors, parts without tensors, ties that were not compared.
        carried: tensors outside every part, by root: merge keeps them as they are.
        namespaces: prefixes of each part on disk, by the name of their class.
        layouts: how the experts of each part are stored.
        groups: sizes by group.
        revision: commit on the hub; ``None`` for a folder.
        record: comparison with the record of the SKU.
        problems: the faults as errors; empty for a checkpoint that is whole.
        findings: what train, merge and serve would say of it; empty if there are `problems`.
        asked: the uses that the caller named; their errors are raised.
    """

    model: str
    architecture: str
    generation: str
    plugin: str
    evidence: tuple[str, ...]
    modalities: tuple[str, ...]
    parameters: int | None
    quantization: Mapping[str, Any] | None
    tensors: int
    unaccounted: tuple[str | None, ...]
    differences: tuple[str, ...]
    carried: Mapping[str, int]
    namespaces: Mapping[str, str]
    layouts: Mapping[str, str]
    groups: Mapping[str, GroupSize]
    revision: str | None
    record: RecordComparison
    problems: tuple[QcoreError, ...]
    findings: tuple[UseFinding, ...] = ()
    asked: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The payload of ``qcore inspect --json``; ``error`` only where there is a problem."""
        facts: dict[str, Any] = {
            "architecture": self.architecture,
            "generation": self.generation,
            "plugin": self.plugin,
            "evidence": list(self.evidence),
            "modalities": list(self.modalities),
            "parameters": self.parameters,
            # The spelling of the first version, which scripts read.
            "quantisation": None if self.quantization is None else dict(self.quantization),
            "tensors": self.tensors,
            "unaccounted": list(self.unaccounted),
            "differences": list(self.differences),
            "carried": dict(self.carried),
            "namespaces": dict(self.namespaces),
            "layouts": dict(self.layouts),
            "groups": {group: asdict(size) for group, size in self.groups.items()},
            "revision": self.revision,
            "record": {
                "id": self.record.id,
                "note": self.record.note,
                "differences": [asdict(difference) for difference in self.record.differences],
                "unread": list(self.record.unread),
            },
            "findings": [finding.as_json() for finding in self.findings],
        }
        if self.errors:
            facts["error"] = self.errors[0].as_json()
        return facts

    @property
    def errors(self) -> list[QcoreError]:
        """The faults of tensors and the errors of the uses that were asked for."""
        unfit = [finding.error for finding in self.findings if finding.severity == "error"]
        return [*faults(self.problems), *(unfit if self.asked else ())]

    def raise_problems(self) -> None:
        """Raise the faults, if there are any.

        Raises:
            QcoreError: one, or a `PreflightError` of all.
        """
        raise_all(self.errors)


def inspect(model: str, *, generation: str = "", uses: Sequence[str] = ()) -> InspectReport:
    """Report what a model is.

    Args:
        model: a folder or a hub id; the weights of a hub id stay on the hub.
        generation: accepted only where evidence is missing, never against it.
        uses: names among `USES`, whose errors are problems; by default all are reported only.

    Raises:
        QcoreError: the folder cannot be read, or no plugin claims it. Faults of tensors are
            not raised: see `InspectReport.raise_problems`.
    """
    with without_gc():
        identified = identify(model, generation=generation, tolerant=True, headers_only=True)
        report = _report(model, identified)
    if not report.problems:
        findings = findings_of(identified, dict.fromkeys(uses or USES))
        return replace(report, findings=findings, asked=tuple(uses))
    return report


def _report(model: str, identified: Identified) -> InspectReport:
    decision, layout = identified.decision, identified.layout
    # A refused format is no problem of a tensor: the error alone reports it.
    problems = () if identified.refused is not None else identified.problems
    absent = [
        f"part '{part}' is claimed by config.json and absent from the files"
        for part in layout.absent
    ]
    unread = [
        f"{name} is tied to {tie} and in the files too: its values are on the hub and not compared"
        for name, tie in layout.ties.items()
        if identified.checkpoint.headers_only
    ]
    kinds = (kind for modality in identified.modalities for kind in modality.kinds)
    quantized = identified.quantization
    unreadable = quantized is not None and not quantized.readable
    return InspectReport(
        model=model,
        architecture=decision.architecture.name,
        generation=decision.generation.name,
        plugin=decision.plugin.name,
        evidence=tuple(decision.evidence),
        modalities=("text", *kinds),
        parameters=None if unreadable else layout.parameters,
        quantization=quantized.as_json() | {"line": quantized.line()} if quantized else None,
        tensors=len(identified.checkpoint.headers),
        unaccounted=tuple(error.field for error in problems if error.code in _BY_NAME),
        differences=(*(e.message for e in problems if e.code not in _BY_NAME), *absent, *unread),
        carried=layout.carried_roots(),
        namespaces={part: namespace.name for part, namespace in layout.namespaces.items()},
        layouts=part_layouts(layout),
        groups={
            group: GroupSize(tensors=tensors, parameters=parameters)
            for group, (tensors, parameters) in layout.groups().items()
        },
        revision=identified.checkpoint.revision,
        record=_record(identified),
        problems=identified.problems,
    )


def _record(identified: Identified) -> RecordComparison:
    decision, skus = identified.decision, load_skus()
    comparison = compare(
        identified.checkpoint,
        decision.architecture.name,
        decision.generation.name,
        identified.layout,
        skus,
    )
    return RecordComparison(
        id=comparison.sku.id if comparison.sku else None,
        note=comparison.note,
        differences=comparison.differences,
        unread=tuple(f"{bad.origin}: {bad.reason}" for bad in skus.broken),
    )
