"""Training checkpoints: what a run writes to resume from, and the adapter folder it publishes.

This file decides what the folder and the manifest of a trained adapter hold, and what is
restored from a checkpoint; whether it is the same run is up to `resume`. State is safetensors
and JSON, never a pickle. The order of rows, the learning rate and random numbers are functions
of the step, so a checkpoint is the step, the adapter and AdamW's moments.

The run folder lies beside the output: ``OUTPUT.run/`` holds ``metrics.jsonl`` and
``checkpoint-N/``, each a complete adapter folder with state. It is removed at the end of a run
that leaves no checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ..adapter.peft_names import CONFIG, LAYOUT, WEIGHTS, peft_config, stems
from ..api.parameters import Namespace
from ..checkpoint.fingerprint import fingerprints
from ..data.rejects import REJECTED
from ..errors import InputError, UsageError
from ..io.artifact import Writer, publish, verify
from ..io.atomic import make_folders, remove_tree, writing
from ..io.run_lock import Lock
from ..nn.model import Model
from .resume import compare, identity
from .run import Run

OPTIMIZER = "optimizer.safetensors"
METRICS = "metrics.jsonl"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, oldest first."""
    steps = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            steps.append((int(match[1]), path))
    return sorted(steps)


def newest(folder: Path) -> tuple[tuple[int, Path] | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each damaged one passed over.

    Raises:
        InputError: ``QC-RESUME-004`` when there are checkpoints and all are damaged: starting
            again would throw away what may still be mended.
    """
    damaged: list[str] = []
    for step, path in reversed(checkpoints(folder)):
        report = verify(path)
        if report.ok:
            return (step, path), damaged
        damaged.append(f"{path.name} is damaged and passed over: {report.problems[0]}")
    if damaged:
        raise InputError(
            "QC-RESUME-004",
            "holds no checkpoint that can be resumed from",
            file=folder,
            found=damaged[0],
            fix="restore one, or delete the folder to start again",
        )
    return None, []


def run_folder(output: Path, *, resume: bool) -> Path:
    """Where a run that writes `output` keeps its checkpoints and metrics.

    Raises:
        UsageError: ``QC-RESUME-001`` nothing to resume, ``-003`` an unfinished run is there.
        WriteError: ``QC-WRITE-010`` that run is going on.
    """
    folder = output.with_name(output.name + ".run")
    if resume and not folder.is_dir():
        raise UsageError(
            "QC-RESUME-001",
            "there is no run to resume",
            file=folder,
            field="--resume",
            fix="drop --resume, or name the --output of the run that was stopped",
        )
    if not resume and checkpoints(folder):
        with Lock(folder):  # the fix below deletes the folder, which must not be in use
            pass
        raise UsageError(
            "QC-RESUME-003",
            "holds the checkpoints of another run",
            file=folder,
            fix="pass --resume to go on with it, or delete the folder to start again",
        )
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Lock the run folder; removed afterwards unless it holds a checkpoint."""
    with writing(folder):
        made = make_folders(folder)
    # Outside the try: where another run holds the lock, its folder is not removed.
    with Lock(folder):
        try:
            yield folder
        finally:
            if not checkpoints(folder):
                remove_tree(folder)
                for parent in reversed(made[:-1]):
                    if not any(parent.iterdir()):
                        parent.rmdir()


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

    def save(self, folder: Path, step: int, optimizer: torch.optim.Optimizer) -> Path:
        """Publish ``checkpoint-STEP``, then delete the oldest beyond ``save_total_limit``."""
        path = folder / f"checkpoint-{step}"
        with publish(path, kind="checkpoint", overwrite=True) as out:
            self._adapter(out)
            moments: dict[str, Tensor] = {}
            for name, parameter in self.model.trainable():
                for key, value in optimizer.state[parameter].items():
                    moments[f"{name}:{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
            out.write_bytes(OPTIMIZER, save(moments))
            out.meta["step"] = step
        # Only now is the new one durable. Checkpoints of later steps were left by the run that
        # was resumed from an earlier one; they belong to steps that are computed again.
        earlier = [old for number, old in checkpoints(folder) if number <= step]
        later = [old for number, old in checkpoints(folder) if number > step]
        for old in [*later, *earlier[: -self.run.settings.save_total_limit]]:
            remove_tree(old)
        return path

    def restore(self, path: Path, optimizer: torch.optim.Optimizer) -> None:
        """Restore the adapter and the moments of a checkpoint.

        Raises:
            InputError: ``QC-RESUME-002`` naming the first thing that changed.
        """
        compare(path, self.identity())
        weights, moments = load_file(path / WEIGHTS), load_file(path / OPTIMIZER)
        names = self._names()
        for name, parameter in self.model.trainable():
            with torch.no_grad():
                parameter.copy_(weights[names[name]])
            state = optimizer.state[parameter]
            for key in ("exp_avg", "exp_avg_sq", "step"):
                # AdamW keeps its step counter on the CPU unless it is fused.
                on_device = key != "step" or optimizer.defaults.get("fused")
                state[key] = moments[f"{name}:{key}"].to(parameter.device if on_device else "cpu")

    def publish(self, target: Path, metrics: Path, result: Mapping[str, Any]) -> None:
        """The adapter folder: PEFT's two files, the run's metrics, the manifest."""
        with publish(target, kind="adapter") as out:
            self._adapter(out)
            out.copy(METRICS, metrics)
            if self.run.data.rejects.count:
                out.copy(REJECTED, metrics.with_name(REJECTED))
            out.meta["result"] = dict(result)

    def _modalities(self) -> dict[str, dict[str, Any]]:
        """Kinds of media in trained rows, and what changed in a tower; empty for text alone."""
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
        return {
            f"{name.removesuffix('.weight')}.lora_{side}": f"{stem}.lora_{side}.weight"
            for name, stem in by_name.items()
            for side in "AB"
        }

    def _adapter(self, out: Writer) -> None:
        base, settings, names = self.run.model, self.run.settings, self._names()
        tensors = {
            names[name]: parameter.detach().to("cpu", torch.float32).contiguous()
            for name, parameter in self.model.trainable()
        }
        out.write_bytes(WEIGHTS, save(tensors, metadata={"format": "pt"}))
        config = peft_config(
            {name: module.lora for name, module in self.model.adapters() if module.lora},
            base.layout,
            r=settings.r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            base=base.checkpoint.source,
            revision=base.checkpoint.revision,
            namespace=self.namespace,
        )
        out.write_json(CONFIG, config)
        out.meta.update(
            verb="train",
            model=base.provenance(),
            layout=LAYOUT,
            adapter_class={"name": self.namespace.name, "classes": list(self.namespace.classes)},
            fingerprints=fingerprints(base.layout, self.digests),
            modalities=self._modalities(),
            tensors=dict(self.digests),
            data=dict(self.run.summary),
            chat=self.run.data.chat.as_json(),
            identity=self.identity(),
            coverage=[dict(line) for line in self.coverage],
        )
