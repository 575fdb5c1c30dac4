"""Training checkpoints: what a run writes to resume from, and the adapter folder it publishes.

This file decides what the folder and the manifest of a trained adapter hold, and what is
restored from a checkpoint; whether it is the same run is up to `resume`. State is safetensors
and JSON, never a pickle. The order of rows, the learning rate and random numbers are functions
of the step, so a checkpoint is the step, the adapter and AdamW's moments.

The run folder lies beside the output: ``OUTPUT.run/`` holds ``metrics.jsonl`` and
``checkpoint-N/``, each a complete adapter folder with state. `run_folder` decides who uses it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ..adapter.model_card import Card, model_card
from ..adapter.peft_config import DESCRIPTIVE
from ..adapter.peft_names import CONFIG, LAYOUT, WEIGHTS, stems, target_name
from ..adapter.written_config import peft_config
from ..api.parameters import Namespace
from ..checkpoint.fingerprint import fingerprints
from ..checkpoint.hub import TOKENIZER_FILES, public_source
from ..data.rejects import REJECTED
from ..errors import InputError, NumericError
from ..io.artifact import Writer, publish, read_manifest, verify
from ..io.metrics_log import sync_rows
from ..nn.model import Model
from ..plugins.resolve_model import classes_of
from .best import Evaluated
from .finite import check_written
from .resume import compare, identity, refuse_renamed
from .rotation import checkpoint_path, rotate
from .run import Run
from .spikes import SpikeGuard

OPTIMIZER = "optimizer.safetensors"
METRICS = "metrics.jsonl"
CARD = "README.md"


def check_best(path: Path) -> None:
    """Check that the checkpoint of the best evaluation can be published.

    Raises:
        InputError: ``QC-RESUME-006``.
    """
    report = verify(path) if path.is_dir() else None
    if report is not None and report.ok:
        refuse_renamed(path, report.meta)
    else:
        raise InputError(
            "QC-RESUME-006",
            "is the checkpoint of the best evaluation, which load_best_at_end publishes",
            file=path,
            found="no such folder" if report is None else report.problems[0],
            fix="restore it, or delete the run folder to start again",
        )


def _check_same(out: Writer, checkpoint: Path) -> None:
    """Compare the tensors' file that was written with that of a checkpoint."""
    written, recorded = out.files[WEIGHTS], read_manifest(checkpoint).files[WEIGHTS]
    if written != recorded:
        raise NumericError(
            "QC-TRAIN-013",
            "does not hold the tensors of the best checkpoint",
            file=WEIGHTS,
            found=written.sha256[:12],
            expected=f"{recorded.sha256[:12]} of {checkpoint.name}",
            fix=f"use {checkpoint}, which is intact",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """Reads and writes the files of one run.

    Attributes:
        run: the run.
        model: with adapters.
        namespace: the class that the adapter is written for.
        digests: SHA-256 of the base's tensors, computed while loading.
        coverage: what is trained, by group.
    """

    run: Run
    model: Model
    namespace: Namespace
    digests: Mapping[str, str]
    coverage: Sequence[Mapping[str, Any]]

    def identity(self) -> dict[str, Any]:
        """What makes a run the same run, with the fingerprints of its base."""
        return identity(self.run, fingerprints(self.run.model.layout, self.digests))

    def save(
        self,
        folder: Path,
        step: int,
        optimizer: torch.optim.Optimizer,
        best: Evaluated | None = None,
        pending: Mapping[str, Any] | None = None,
        *,
        guard: SpikeGuard | None = None,
        keep: Collection[int] = (),
    ) -> Path:
        """Publish ``checkpoint-STEP``, then delete the oldest beyond ``save_total_limit``.

        The rows of metrics up to the step are durable before the checkpoint that claims them.

        Args:
            folder: the run folder.
            step: optimizer steps that are done.
            optimizer: AdamW.
            best: the best evaluation so far, whose checkpoint is kept.
            pending: the last step's row of metrics, if it is evaluated after the checkpoint.
            guard: its state is a part of the checkpoint.
            keep: steps of further checkpoints that are kept.

        Raises:
            NumericError: ``QC-TRAIN-015`` a parameter or a moment is not finite; nothing is
                written or deleted.
        """
        path = checkpoint_path(folder, step)
        sync_rows(folder / METRICS)
        with publish(path, kind="checkpoint", overwrite=True) as out:
            self._adapter(out)
            moments: dict[str, Tensor] = {}
            for name, parameter in self.model.trainable():
                for key, value in optimizer.state[parameter].items():
                    moment = torch.as_tensor(value).detach().cpu().contiguous()
                    # A flat optimizer has one counter, and no file may hold a tensor twice.
                    moments[f"{name}:{key}"] = moment if moment.ndim else moment.clone()
            check_written(moments.items(), "checkpoint")
            out.write_bytes(OPTIMIZER, save(moments))
            out.meta["step"] = step
            out.meta["best_evaluation"] = None if best is None else best.as_json()
            out.meta["spike_guard"] = None if guard is None else guard.as_json()
            if pending is not None:
                out.meta["pending"] = dict(pending)
        # Only now is the new one durable.
        kept = {*keep} if best is None else {*keep, best.step}
        rotate(folder, step, self.run.settings.save_total_limit, kept)
        return path

    def restore(self, path: Path, optimizer: torch.optim.Optimizer) -> Mapping[str, Any]:
        """Restore the adapter and the moments of a checkpoint; returns its ``meta``.

        Raises:
            InputError: ``QC-RESUME-002`` naming the first thing that changed.
        """
        compare(path, self.identity())
        self._load_weights(path)
        moments = load_file(path / OPTIMIZER)
        for name, parameter in self.model.trainable():
            state = optimizer.state[parameter]
            for key in ("exp_avg", "exp_avg_sq", "step"):
                # AdamW keeps its step counter on the CPU unless it is fused.
                on_device = key != "step" or optimizer.defaults.get("fused")
                state[key] = moments[f"{name}:{key}"].to(parameter.device if on_device else "cpu")

        return read_manifest(path).meta

    def load_best(self, folder: Path, step: int) -> Path:
        """Restore the adapter of the best evaluation; returns its checkpoint.

        Raises:
            InputError: ``QC-RESUME-006`` the checkpoint is missing or damaged.
        """
        path = checkpoint_path(folder, step)
        check_best(path)
        self._load_weights(path)
        return path

    def _load_weights(self, path: Path) -> None:
        weights, names = load_file(path / WEIGHTS), self._names()
        with torch.no_grad():
            for name, parameter in self.model.trainable():
                parameter.copy_(weights[names[name]])

    def publish(
        self, target: Path, metrics: Path, result: Mapping[str, Any], same: Path | None = None
    ) -> None:
        """The adapter folder: PEFT's two files, a card, tokenizer, metrics, the manifest.

        Args:
            target: the folder.
            metrics: the log of the run.
            result: for the manifest.
            same: checkpoint whose tensors are published.

        Raises:
            NumericError: ``QC-TRAIN-013`` the tensors are not those of `same`, byte for byte.
        """
        with publish(target, kind="adapter") as out:
            config = self._adapter(out)
            if same is not None:
                _check_same(out, same)
            out.write_text(CARD, self._card(config))
            for name in self._tokenizer_files():
                out.copy(name, self.run.model.checkpoint.file(name))
            out.copy(METRICS, metrics)
            if self.run.data.rejects.listed:
                out.copy(REJECTED, metrics.with_name(REJECTED))
            out.meta["result"] = dict(result)

    def _modalities(self) -> dict[str, dict[str, Any]]:
        """Kinds of media in trained rows, and what changed in a tower; empty for text alone."""
        now, initial = self._modality_now(), self.run.initial
        return now if initial is None else initial.modalities(now)

    def _modality_now(self) -> dict[str, dict[str, Any]]:
        modality, layout = self.run.model.modality, self.run.model.layout
        if modality is None or self.model.tower is None:
            return {}
        part = layout.table.part(modality.name)
        maps = [m for name, m in self.model.adapters() if layout.table[name].part is part]
        seen = self.run.summary.get("train_media") or {}
        return {
            modality.name: {
                "kinds": [kind for kind in modality.kinds if seen.get(kind)],
                "keys": dict(self.run.summary.get("media_keys") or {}),
                "tower_changed": any(module.moved[0] for module in maps),
                "pairs": len(maps),
                "plugin": part.owner,
            }
        }

    def _names(self) -> dict[str, str]:
        """The adapter file's name of each trainable parameter."""
        table = self.run.model.layout.table
        adapted = dict(self.model.adapters())
        by_name = stems((tensor for tensor in table if tensor.name in adapted), self.namespace)
        names: dict[str, str] = {}
        for name, stem in by_name.items():
            own = name.removesuffix(".weight")
            names |= {f"{own}.lora_{side}": f"{stem}.lora_{side}.weight" for side in "AB"}
            names[f"{own}.lora_magnitude_vector"] = f"{stem}.lora_magnitude_vector"
        for part, name in (("embed", self.model.embed_name), ("head", self.model.head_name)):
            module = target_name(table[name], self.namespace).removesuffix(".weight")
            peft = f"base_model.model.{module}.token_adapter.trainable_tokens_delta"
            names[f"trained_rows.{part}.trainable_tokens_delta"] = peft
        return names

    def _base(self) -> tuple[str, str | None]:
        """The name of the base under which others find it, and its commit on the hub."""
        checkpoint = self.run.model.checkpoint
        return public_source(checkpoint.source, checkpoint.path, checkpoint.revision)

    def _tokenizer_files(self) -> list[str]:
        """Names of the base's tokenizer and chat template, which the adapter was trained with."""
        names = self.run.model.checkpoint.sidecars
        return [name for name in names if any(fnmatch(name, each) for each in TOKENIZER_FILES)]

    def _card(self, config: Mapping[str, Any]) -> str:
        base, revision = self._base()
        pairs = [module.lora.r for _, module in self.model.adapters() if module.lora]
        card = Card(
            base=base,
            revision=revision,
            class_name=(config["auto_mapping"] or {}).get("base_model_class", ""),
            ranks=frozenset(pairs),
            groups={line["group"]: line["hit"] for line in self.coverage if line["hit"]},
            variables=self.run.data.chat.kwargs,
            tokenizer="tokenizer_config.json" in self._tokenizer_files(),
            dora=config["use_dora"],
        )
        return model_card(card)

    def _adapter(self, out: Writer) -> dict[str, Any]:
        base, settings, names = self.run.model, self.run.settings, self._names()
        tensors = {
            names[name]: parameter.detach().to("cpu", torch.float32).contiguous()
            for name, parameter in self.model.trainable()
        }
        check_written(tensors.items(), "adapter")
        out.write_bytes(WEIGHTS, save(tensors, metadata={"format": "pt"}))
        source, revision = self._base()
        config = peft_config(
            {name: module.lora for name, module in self.model.adapters() if module.lora},
            base.layout,
            r=settings.r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            base=source,
            revision=revision,
            namespace=self.namespace,
            token_ids={
                self.model.embed_name: settings.trainable_token_indices,
                self.model.head_name: settings.trainable_head_token_indices,
            }
            if settings.trainable_head_token_indices
            else {self.model.embed_name: settings.trainable_token_indices},
            classes=classes_of(base.checkpoint.config),
        )
        out.write_json(CONFIG, config, editable=DESCRIPTIVE)
        initial, present = self.run.initial, fingerprints(base.layout, self.digests)
        if initial is not None:
            out.meta["init_adapter"] = initial.as_json()
        out.meta.update(
            verb="train",
            model=base.provenance(),
            layout=LAYOUT,
            adapter_class={"name": self.namespace.name, "classes": list(self.namespace.classes)},
            fingerprints=present if initial is None else initial.fingerprints(present),
            modalities=self._modalities(),
            tensors=dict(self.digests),
            data=dict(self.run.summary),
            chat=self.run.data.chat.as_json(),
            identity=self.identity(),
            ranks=self.run.world.size,
            coverage=[dict(line) for line in self.coverage],
        )
        return config
