"""The adapter that a run starts from: read, compared with the run, loaded into the LoRA matrices.

This file decides that an initial adapter sets the settings that describe an adapter (rank, alpha,
LoRA groups, class), that an explicit setting which contradicts it is refused, what else is compared
with its training, and that its base is the base of the run. The optimizer starts fresh.
`qcore.adapter.reader` matches the folder with the base; `qcore.training.loading` attaches LoRA.

Codes: ``QC-TRAIN-009`` the adapter does not cover whole LoRA groups, or cannot be expressed in
settings, ``-010`` it was trained on another base, ``-011`` a setting contradicts it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.base_check import refuse_parts
from ..adapter.delta import Deltas
from ..adapter.evidence import brings_template, evidence_lines, read_for
from ..adapter.media_record import joined_media
from ..adapter.peft_names import CONFIG, Adapter
from ..adapter.replaced_values import ReplacedValues
from ..adapter.weight_files import weights_digest
from ..config.settings import SPECS, Settings
from ..data.rendering.template_kwargs import recorded_template, recorded_variables
from ..errors import InputError, UsageError
from ..io.atomic import reading
from ..nn.model import Model
from ..nn.token_rows import TokenRows
from ..plugins.resolve_model import Identified
from .initial_settings import adapter_settings, trained_rows


@dataclass(frozen=True, slots=True)
class AdapterWords:
    """What a user says of the adapter to start from.

    Attributes:
        init_adapter: its folder; ``None``: the run starts from the base alone.
        trust_base: accept an adapter without a fingerprint of its base.
        trust_generation: accept such an adapter if it names a base of another generation.
        origins: source of each setting, as `qcore.config.resolve.load_settings` returns it;
            ``None``: a setting that differs from its default was set explicitly.
    """

    init_adapter: str | Path | None = None
    trust_base: bool = False
    trust_generation: bool = False
    origins: Mapping[str, str] | None = None

    def explicit(self, settings: Settings) -> frozenset[str]:
        """Names of the settings that the user set; a preset's values are not among them."""
        if self.origins is None:
            return frozenset(k for k, s in SPECS.items() if getattr(settings, k) != s.default)
        return frozenset(
            key
            for key, origin in self.origins.items()
            if any(source in ("file", "flag") for source in origin.split(", "))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialAdapter:
    """The adapter that a run starts from.

    Attributes:
        adapter: the folder, matched with the base of the run.
        source: the folder as the user named it.
        sha256: of its tensors' file.
        config_sha256: of its adapter_config.json.
    """

    adapter: Adapter
    source: str
    sha256: str
    config_sha256: str

    def as_json(self) -> dict[str, Any]:
        """``meta.init_adapter`` of a manifest."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "config_sha256": self.config_sha256,
            "trusted_without_fingerprint": not self.adapter.fingerprints,
        }

    def fingerprints(self, present: Mapping[str, str]) -> dict[str, str]:
        """Fingerprints for the manifest of the run's adapter.

        A part that the initial adapter was trained with and that this run does not load, such as
        a frozen tower, stays one that the adapter depends on.

        Args:
            present: of the parts that the run loaded.
        """
        return {**self.adapter.fingerprints, **present}

    def modalities(self, now: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Modalities for the manifest: those of this run and of the initial adapter.

        Args:
            now: of this run.
        """
        merged = {name: dict(record) for name, record in now.items()}
        for name, before in self.adapter.modalities.items():
            here = merged.setdefault(name, dict(before))
            here |= joined_media(before, here)
        return merged

    def other_variables(self, now: Mapping[str, Any]) -> Iterator[str]:
        """Warn about variables of the chat template that differ from the adapter's training.

        Args:
            now: the variables that the rows of this run are rendered with.
        """
        if not self.adapter.meta:
            return
        before = recorded_variables(self.adapter.meta, self.adapter.path)
        for name in sorted({*before, *now}):
            was, value = _word(before, name), _word(now, name)
            if was != value:
                yield (
                    "warning: the initial adapter was trained with chat_template_kwargs."
                    f"{name} {was}, and it is {value} now"
                )

    def check_base(self, model: Identified, present: Mapping[str, str]) -> None:
        """Compare the fingerprints of the loaded parts with those that training recorded.

        Raises:
            InputError: ``QC-TRAIN-010``.
        """
        for part, recorded in self.adapter.binding(model.layout).items():
            if present.get(part) != recorded:
                raise InputError(
                    "QC-TRAIN-010",
                    "is not the base that the initial adapter was trained on",
                    file=model.checkpoint.path,
                    field=f"part '{part}'",
                    found=str(present.get(part))[:12],
                    expected=recorded[:12],
                    fix=f"name {self.adapter.meta.get('model', {}).get('source', 'its base')}",
                )

    def load_into(self, model: Model, device: torch.device) -> dict[str, Tensor]:
        """Set the LoRA matrices of a model, trainable.

        Args:
            model: with LoRA on the weights that the adapter changes.
            device: of the run.

        Returns:
            B of each weight on the CPU, by canonical name: what `Loop.prove_moved` compares with.

        Raises:
            InputError: ``QC-TRAIN-009`` the model has LoRA on other weights, or with other
                numbers.
            NumericError: ``QC-MERGE-003`` the adapter contains a NaN or an infinity.
        """
        pairs, adapted = self.adapter.pairs, dict(model.adapters())
        for name in sorted(pairs.keys() ^ adapted.keys()):
            raise self._other_coverage(name, "LoRA here" if name in adapted else "no LoRA here")
        deltas, start = Deltas(self.adapter), {}
        for name, module in adapted.items():
            lora, pair = module.lora, pairs[name]
            there = (pair.r, pair.has_magnitude)
            same = lora is not None and (lora.r, lora.use_dora) == there
            if lora is None or not (same and math.isclose(lora.scaling, pair.scaling)):
                raise self._other_coverage(name, str(lora))
            a, b = deltas.sides(name)
            factors = [a, b] if not pair.has_magnitude else [a, b, deltas.magnitude(name)]
            copies = (factor.to(device, copy=True) for factor in factors if factor is not None)
            module.set_lora(*copies, trained=True)
            start[name] = b
        for group, change in trained_rows(self.adapter).items():
            rows = model.trained_rows and model.trained_rows.get_submodule(group)
            assert isinstance(rows, TokenRows)
            rows.reset(ReplacedValues(self.adapter.path, change).all().to(device))
        return start

    def _other_coverage(self, name: str, found: str) -> InputError:
        pair = self.adapter.pairs.get(name)
        return InputError(
            "QC-TRAIN-009",
            "does not have the LoRA matrices of this run",
            file=self.adapter.path,
            field=name,
            found="no LoRA" if pair is None else f"rank {pair.r}, scaling {pair.scaling:g}",
            expected=found,
            fix="leave out the settings that describe the adapter",
        )


def start_from(
    words: AdapterWords, model: Identified, settings: Settings
) -> tuple[InitialAdapter | None, Settings, list[str]]:
    """Read the initial adapter, and let it set the settings that describe an adapter.

    Args:
        words: what the user says of it.
        model: the base of the run; no weight has been read.
        settings: the settings of the run.

    Returns:
        The adapter (``None`` without one), the settings of the run, and lines for the report.

    Raises:
        UsageError: ``QC-TRAIN-011`` a setting contradicts the adapter.
        InputError: ``QC-TRAIN-009``; the folder does not fit the base (`read_adapter`), or the
            base lacks a part that it was trained with.
        TrustError: ``QC-ADAPTER-009`` it has no fingerprint, and `trust_base` is not set;
            ``-015`` it names a base of another generation.
    """
    if words.init_adapter is None:
        if words.trust_base or words.trust_generation:
            raise UsageError(
                "QC-TRAIN-011",
                "has no effect without an adapter to start from",
                field="--trust-base" if words.trust_base else "--trust-generation",
                fix="pass --init-adapter, or leave it out",
            )
        return None, settings, []
    adapter = read_for(
        model,
        words.init_adapter,
        trust_base=words.trust_base,
        trust_generation=words.trust_generation,
    )
    refuse_parts(model.layout, adapter)
    initial = InitialAdapter(
        adapter=adapter,
        source=str(words.init_adapter),
        sha256=weights_digest(adapter.path),
        config_sha256=_digest(adapter.path / CONFIG),
    )
    explicit = words.explicit(settings)
    chosen = adapter_settings(adapter, model.layout, settings, explicit)
    lines = [f"starting from the adapter {initial.source} (sha256 {initial.sha256[:12]})"]
    for key in SPECS:
        now = getattr(chosen, key)
        if now != getattr(settings, key):
            shown = ",".join(map(str, now)) if isinstance(now, tuple) else now
            lines.append(f"{key} = {shown} (from the initial adapter)")
    return initial, chosen, [*lines, *_differences(initial, model, chosen)]


def _digest(path: Path) -> str:
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _differences(initial: InitialAdapter, model: Identified, now: Settings) -> Iterator[str]:
    """Warn about what differs from the training of the adapter and does not stop the run."""
    adapter = initial.adapter
    yield from evidence_lines(model, adapter)
    what = "warning: the initial adapter was trained"
    if not adapter.fingerprints:
        yield (
            "warning: the initial adapter has no fingerprint of its base: it is trusted to be "
            f"for {model.checkpoint.source}"
        )
    if adapter.layout == "peft" and adapter.namespace.name != now.adapter_class:
        yield (
            f"warning: the initial adapter is for class '{adapter.namespace.name}', and this run "
            f"writes one for class '{now.adapter_class}'"
        )
    before, template = recorded_template(adapter.meta), model.checkpoint.template
    sha256 = template.sha256 if template else ""
    if before and before != sha256 and not brings_template(adapter):
        yield (
            f"{what} under another chat template (sha256 {before[:12]}, now {sha256[:12]}): rows "
            "render differently"
        )
    recorded = _mapping(_mapping(adapter.meta, "identity"), "settings")
    for key in ("quantization", "quantize_groups"):
        was, value = recorded.get(key), now.to_dict()[key]
        if was is not None and was != value:
            yield f"{what} with {key} {was or 'empty'}, and it is {value or 'empty'} now"


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    inner = values.get(key)
    return inner if isinstance(inner, Mapping) else {}


def _word(values: Mapping[str, Any], name: str) -> str:
    """A value as it is written in a setting."""
    if name not in values:
        return "unset"
    value = values[name]
    return str(value).lower() if isinstance(value, bool) else str(value)
