"""Resolves ``--model``: finds the checkpoint, detects its architecture, locates every tensor.

This file decides the order (folder, headers, plugins, detection, table, location, ties) and
nothing else. It reads no weight, except one that config.json ties and the files hold nevertheless,
and imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..api.adapter_claims import AdapterClaim
from ..api.parameters import Table
from ..api.records import ChatFormat, Modality
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.grown import grown
from ..checkpoint.hub import resolve_model
from ..checkpoint.layout import Layout, survey
from ..checkpoint.layout_faults import faults
from ..checkpoint.quantization_formats import Quantization, detect_quantization
from ..checkpoint.ties import tie_problems
from ..checkpoint.untied import untied
from ..errors import InputError, PluginError, QcoreError, raise_all
from ..io.entry_points import check_disabled
from ..skus.registry import refuse_hosted
from .detect import Decision
from .manager import Plugins
from .recorded_generation import decide


@dataclass(frozen=True, slots=True, kw_only=True)
class Identified:
    """A model that qcore knows.

    Attributes:
        checkpoint: the folder and its headers.
        plugins: the plugins of its model type, loaded.
        decision: architecture, generation, and the evidence.
        layout: every tensor explained, or as many as could be.
        problems: what could not be explained; empty unless asked to tolerate it.
        quantization: how the weights were quantized already; ``None`` where they are plain.
        refused: why that format cannot be used; then it is the only problem.
    """

    checkpoint: Checkpoint
    plugins: Plugins
    decision: Decision
    layout: Layout
    problems: tuple[QcoreError, ...] = ()
    quantization: Quantization | None = None
    refused: QcoreError | None = None

    @property
    def modalities(self) -> list[Modality]:
        """Those whose tower the checkpoint has; of a section that describes none there is none."""
        parts = {part.name for part in self.layout.table.parts} - {*self.layout.absent}
        return [one for one in self.decision.modalities if one.name in parts]

    @property
    def modality(self) -> Modality | None:
        """What reads media for this checkpoint; ``None`` where it is text alone.

        Raises:
            PluginError: ``QC-MEDIA-007`` two do: their positions would contradict.
        """
        found = self.modalities
        if len(found) > 1:
            raise PluginError(
                "QC-MEDIA-007",
                "two plugins read media for it",
                file=self.checkpoint.source,
                found=" and ".join(one.name for one in found),
                expected="one",
                fix="uninstall one of them",
            )
        return found[0] if found else None

    def using(self, modality: Modality) -> Identified:
        """The same for a run that loads the modality's tower."""
        return replace(self, layout=self.layout.using(modality.name))

    def quantizing(self, groups: Collection[str]) -> Identified:
        """The same for a run that holds these groups in 4 bit too."""
        return replace(self, layout=replace(self.layout, in_nf4=frozenset(groups)))

    def untying(self) -> Identified:
        """The same for a run in which a tied head gets values of its own."""
        return replace(self, layout=untied(self.layout))

    def growing(self, rows: int | None) -> Identified:
        """The same for a run with `rows` rows in embedding and head; ``None``: as many as now."""
        return self if rows is None else replace(self, layout=grown(self.layout, rows))

    def using_parts(self, parts: Collection[str]) -> Identified:
        """The same for a run that loads the towers among `parts`."""
        found = self
        for one in self.decision.modalities:
            if one.name in parts:
                found = found.using(one)
        return found

    def chat_format(self) -> ChatFormat:
        """The generation's chat format. Raises ``QC-CHAT-001`` unless exactly one is given."""
        answers = self.plugins.ask(
            "qcore_chat_format",
            generation=self.decision.generation.name,
            checkpoint=self.checkpoint,
        )
        if len(answers) != 1:
            names = ", ".join(info.name for info, _ in answers) or "none"
            raise PluginError(
                "QC-CHAT-001",
                f"not one plugin describes the chat format of {self.decision.generation.name}",
                found=names,
                expected="one",
                fix="uninstall the plugin that does not belong, or upgrade the one that does",
            )
        chat: ChatFormat = answers[0][1]
        return chat

    def adapter_claims(self, shapes: Mapping[str, tuple[int, ...]]) -> list[AdapterClaim]:
        """What plugins say of an adapter's tensors; nothing for PEFT's own layout."""
        answers = self.plugins.ask(
            "qcore_adapter_layouts", adapter=shapes, checkpoint=self.checkpoint
        )
        return [claim for _, claim in answers]

    def provenance(self) -> dict[str, Any]:
        """What manifests record of the model."""
        decision, checkpoint = self.decision, self.checkpoint
        template = checkpoint.template
        return {
            "source": checkpoint.source,
            "revision": checkpoint.revision,
            "architecture": decision.architecture.name,
            "generation": decision.generation.name,
            "generation_forced": decision.forced,
            "evidence": list(decision.evidence),
            "classes": classes_of(checkpoint.config),
            "template_sha256": template.sha256 if template is not None else None,
            "quantization": self.quantization.as_json() if self.quantization else None,
            "plugins": {
                info.distribution: info.version
                for info in self.plugins.infos
                if info.status.value == "loaded"
            },
        }


def classes_of(config: Mapping[str, Any]) -> list[str]:
    """``config.architectures``, as far as it is a list of names."""
    classes = config.get("architectures")
    return [name for name in classes if isinstance(name, str)] if isinstance(classes, list) else []


def identify(
    model: str,
    *,
    generation: str = "",
    tolerant: bool = False,
    headers_only: bool = False,
    carry: bool = False,
) -> Identified:
    """Find, read and explain a model.

    Args:
        model: a folder or a hub id.
        generation: accepted only where evidence is missing, never against it.
        tolerant: keep unexplained tensors as `Identified.problems`, for reports.
        headers_only: leave the weights of a hub id on the hub; then no tensor can be read.
        carry: accept weights in a format that qcore does not decode, because the run copies them.

    Raises:
        QcoreError: whatever the model folder, the plugins or detection have to say.
    """
    refuse_hosted(model)
    where = resolve_model(model, headers_only=headers_only)
    checkpoint = Checkpoint.open(
        where.path, source=where.source, revision=where.revision, remote=where.remote
    )
    plugins, decision, table = _explained(checkpoint, generation)
    quantization, refused = _quantization(checkpoint)
    if carry and quantization is not None and quantization.carried:
        refused = None
    layout, problems = survey(table, checkpoint, suggest=refused is None)
    layout = replace(layout, idle=frozenset(one.name for one in decision.modalities))
    if refused is not None:
        problems = [refused]  # what the table misses and does not know is a consequence
    else:
        problems += tie_problems(layout, checkpoint)
    if not tolerant:
        raise_all(faults(problems))
    return Identified(
        checkpoint=checkpoint,
        plugins=plugins,
        decision=decision,
        layout=layout,
        problems=tuple(problems),
        quantization=quantization,
        refused=refused,
    )


def identify_files(model: str, *, generation: str = "") -> Identified:
    """Find and explain a model by its config, tokenizer and chat template alone.

    Its weights may be absent, and are not looked at: the layout locates no tensor.

    Args:
        model: a folder or a hub id; the weights of a hub id stay on the hub.
        generation: accepted only where evidence is missing, never against it.

    Raises:
        QcoreError: as `identify`, except for what concerns tensors.
    """
    refuse_hosted(model)
    where = resolve_model(model, headers_only=True)
    checkpoint = Checkpoint.open_files(where.path, source=where.source, revision=where.revision)
    plugins, decision, table = _explained(checkpoint, generation)
    layout = Layout(
        table=table,
        located={},
        by_disk={},
        namespaces={},
        idle=frozenset(one.name for one in decision.modalities),
    )
    return Identified(checkpoint=checkpoint, plugins=plugins, decision=decision, layout=layout)


def _explained(checkpoint: Checkpoint, generation: str) -> tuple[Plugins, Decision, Table]:
    """The plugins of a checkpoint, what it is, and the table of its parameters."""
    check_disabled()
    plugins = Plugins.discover().for_model_type(checkpoint.config["model_type"])
    try:
        decision = decide(checkpoint, plugins, generation)
    finally:
        checkpoint.close()  # of the process in which detection rendered the template
    answers = plugins.ask(
        "qcore_parameters",
        architecture=decision.architecture.name,
        config=checkpoint.config,
    )
    # The architecture's own parts first, whatever the plugins are called.
    own = decision.architecture_plugin.name
    answers.sort(key=lambda answer: answer[0].name != own)
    parts = [replace(part, owner=info.distribution) for info, part in answers]
    return plugins, decision, Table(parts)


def _quantization(checkpoint: Checkpoint) -> tuple[Quantization | None, QcoreError | None]:
    """How the weights were quantized, and why they cannot be used, where that is so."""
    try:
        found = detect_quantization(checkpoint)
    except InputError as error:
        return None, error
    if found is None or found.readable:
        return found, None
    return found, found.refusal(checkpoint)
