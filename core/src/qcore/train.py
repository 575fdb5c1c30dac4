"""Train: rows + base -> a PEFT adapter that is proved to have an effect.

The whole verb, top to bottom: identify and preflight, encode the rows, stream the base in,
print what will be trained, run the steps, publish. What each station decides is in its own
file; this one decides their order, the loop, and what makes a run fail: a number that is not
finite, a group that is declared 4-bit and is not, an adapter tensor that never moved.

The loss of a step is the mean over its supervised tokens, however they are spread over rows
and micro-batches, so accumulating 4 x 1 equals 1 x 4.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from . import __version__
from .adapter import CONFIG, WEIGHTS, choose_class, peft_config, peft_name
from .artifact import Lock, MetricsLog, Writer, check_target, publish, remove_tree
from .data.dataset import Dataset, Example, dataset
from .data.mask import load_tokenizer
from .errors import InputError, Interrupted, NumericError, UsageError
from .fingerprint import fingerprints
from .identify import Identified, classes_of, identify
from .load import load
from .memory import peak_bytes, reset_peak
from .model import Coverage, Model, coverage, targets
from .nn.linear import Lora
from .nn.protocols import Packed
from .preflight import preflight
from .report import Reporter, Silent
from .schedule import Schedule, seed_of
from .settings import Settings
from .signals import StopSignals
from .state import (
    check_same,
    checkpoints,
    newest,
    restore,
    rotate,
    run_folder,
    write_optimizer,
)
from .table import Namespace, Store

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """What a run did.

    Attributes:
        output: the adapter folder.
        steps: optimizer steps in all.
        first_loss: mean loss per supervised token of the first step.
        last_loss: of the last step.
        eval_loss: of the held-out rows at the end, or ``None``.
        adapter_class: the class that the adapter is written for.
        coverage: what was trained, by group.
    """

    output: Path
    steps: int
    first_loss: float
    last_loss: float
    eval_loss: float | None
    adapter_class: str
    coverage: tuple[Coverage, ...]


def train(
    model: str,
    data: str | Path,
    output: str | Path,
    settings: Settings,
    *,
    device: str = "auto",
    resume: bool = False,
    reporter: Reporter | None = None,
) -> TrainReport:
    """Fine-tune a base with LoRA over 4-bit or 16-bit weights.

    Args:
        model: a folder or a hub id.
        data: chat JSONL.
        output: the adapter folder to publish; absent or empty.
        settings: everything else.
        device: ``auto``, ``cpu`` or ``cuda``.
        resume: go on with the run that wrote ``OUTPUT.run/``.
        reporter: who is told; nobody by default.

    Raises:
        QcoreError: see docs/errors.md; nothing is published unless the run succeeded.
    """
    tell = reporter or Silent()
    target = check_target(output)
    folder = run_folder(target)
    _check_run(folder, resume)
    where = pick_device(device)
    found = identify(model, generation=settings.generation)
    chat = found.chat_format()
    tokenizer = load_tokenizer(found.checkpoint)
    warnings = preflight(
        found, verb="train", settings=settings.to_dict(), token_ids=tokenizer.get_vocab()
    )
    for line in (*found.decision.evidence, *warnings):
        tell.note(line)
    rows = dataset(
        data,
        found.checkpoint,
        chat,
        settings.max_length,
        settings.eval_fraction,
        settings.seed,
        tokenizer=tokenizer,
    )
    with ExitStack() as stack:
        stack.enter_context(Lock(folder))
        stop = stack.enter_context(StopSignals())
        run = _Run(found, rows, settings, where, target, folder, tell, stop)
        log = stack.enter_context(MetricsLog(folder / "metrics.jsonl"))
        start = run.resume() if resume else 0
        log.truncate_after(start)
        for metrics in run.steps(start):
            log.write(metrics)
            tell.step(metrics)
        run.prove_moved()
        eval_loss = run.evaluate()
        if eval_loss is not None:
            log.write({"step": run.schedule.total, "eval_loss": eval_loss})
        log.close()
        run.publish_final(folder / "metrics.jsonl", eval_loss)
    if not checkpoints(folder):
        remove_tree(folder)
    return TrainReport(
        output=target,
        steps=run.schedule.total,
        first_loss=run.first_loss,
        last_loss=run.last_loss,
        eval_loss=eval_loss,
        adapter_class=run.namespace.name,
        coverage=tuple(run.coverage),
    )


def pick_device(device: str) -> torch.device:
    """``auto`` is CUDA where there is one. Raises ``QC-DEVICE-001``, never falls back."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "QC-DEVICE-001",
            "CUDA was asked for and is not available",
            field="--device",
            found="no CUDA device",
            fix="pass --device cpu, or install a torch build with CUDA",
        )
    return torch.device(device)


def _check_run(folder: Path, resume: bool) -> None:
    if resume and not folder.is_dir():
        raise UsageError(
            "QC-RESUME-001", "there is no run to resume", file=folder, field="--resume",
            fix="drop --resume, or name the --output of the run that was stopped",
        )  # fmt: skip
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise UsageError(
            "QC-RESUME-003", "holds an unfinished run", file=folder,
            fix="pass --resume to go on, or delete the folder to start again",
        )  # fmt: skip


@dataclass
class _Run:
    """One run: the loaded model and what happens to it."""

    found: Identified
    data: Dataset
    settings: Settings
    device: torch.device
    target: Path
    folder: Path
    tell: Reporter
    stop: StopSignals
    first_loss: float = float("nan")
    last_loss: float = float("nan")
    digests: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        s, layout = self.settings, self.found.layout
        self.schedule = Schedule(len(self.data.train), s)
        architecture = self.found.decision.architecture
        lora = Lora(r=s.r, lora_alpha=s.lora_alpha, lora_dropout=s.lora_dropout)
        chosen = targets(architecture, layout, s.target_groups, lora)
        config = self.found.checkpoint.config
        part = next(iter(layout.table[name].part.name for name in chosen))
        self.namespace: Namespace = choose_class(layout, part, classes_of(config), s.adapter_class)
        dtype = DTYPES[s.dtype]
        self.model = Model(architecture, config, layout, dtype, chosen)
        quantize = s.quantization == "nf4"
        total = sum(
            place.header.end - place.header.start
            for item in layout.located.values() if item.tensor.part.loaded
            for place in item.places
        )  # fmt: skip
        with self.tell.progress("loading the base", total, "bytes") as advance:
            self.digests = load(
                self.model, layout, self.found.checkpoint,
                device=self.device, quantize=quantize, progress=advance,
            )  # fmt: skip
        for name, module in self.model.adapters():
            module.reset_lora(name, s.seed, self.device)
        self.coverage = coverage(architecture, self.model, layout)
        self.tell.table("what will be trained", [_line(c) for c in self.coverage])
        if quantize:
            self._prove_quantised()
        self.optimizer = torch.optim.AdamW(
            [parameter for _, parameter in self.model.trainable()],
            lr=s.learning_rate,
            weight_decay=s.weight_decay,
            fused=self.device.type == "cuda",
        )

    def _prove_quantised(self) -> None:
        """A tensor that the table declares 4-bit is held in 4 bit, or the run stops."""
        held = dict(self.model.named_modules())
        for entry in self.found.layout.table:
            if entry.row.store is Store.NF4 and entry.part.loaded:
                module = held.get(entry.name.removesuffix(".weight"))
                if getattr(module, "nf4", None) is None:
                    raise NumericError(
                        "QC-TRAIN-005", "is declared 4-bit and is not", field=entry.name,
                        fix="report this, or pass --set quantization=none",
                    )  # fmt: skip
        share = [(c.parameters, c.bits) for c in self.coverage]
        four = sum(count for count, bits in share if bits < 5)
        whole = sum(count for count, _ in share)
        self.tell.note(f"{100 * four / whole:.1f} % of the loaded parameters are held in 4 bit")

    # -- the loop

    def steps(self, start: int) -> Iterator[dict[str, Any]]:
        """Run the optimizer steps from `start`; yields what metrics.jsonl holds."""
        s, total = self.settings, self.schedule.total
        self.model.train()
        with self.tell.progress("training", total, "steps") as advance:
            advance(start)
            for step in range(start, total):
                began = time.perf_counter()
                reset_peak(self.device)
                metrics = self._step(step)
                metrics["seconds"] = round(time.perf_counter() - began, 4)
                metrics["tokens_per_second"] = round(metrics["tokens"] / metrics["seconds"], 1)
                metrics["memory_gb"] = round(peak_bytes(self.device) / 1e9, 3)
                advance(1)
                done = step + 1
                if self._due_eval(done) and (loss := self.evaluate()) is not None:
                    metrics["eval_loss"] = loss
                if done % s.logging_steps == 0 or done in (1, total) or "eval_loss" in metrics:
                    yield metrics
                if self.stop.asked and done < total:
                    self._save(done)
                    raise Interrupted(
                        "QC-TRAIN-006",
                        f"stopped by {self.stop.asked} after step {done} of {total}",
                        file=self.folder / f"checkpoint-{done}",
                        fix="run the same command with --resume",
                    )  # fmt: skip
                if s.save_steps and done % s.save_steps == 0 and done < total:
                    self._save(done)

    def _step(self, step: int) -> dict[str, Any]:
        s = self.settings
        torch.manual_seed(seed_of(s.seed, "dropout", step))
        batches = [
            [self.data.train[row] for row in rows] for rows in self.schedule.micro_batches(step)
        ]
        supervised = sum(example.supervised for batch in batches for example in batch)
        rate = self.schedule.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss, _ = self.model.loss(self._pack(batch), save_memory=s.gradient_checkpointing)
            loss = loss / supervised
            loss.backward()
            total += loss.detach()
        norm = self._clip()
        loss_value, norm_value = float(total), float(norm)
        if not (loss_value == loss_value and abs(loss_value) != float("inf")
                and norm_value == norm_value and norm_value != float("inf")):  # fmt: skip
            lines = sorted(example.line for batch in batches for example in batch)
            raise NumericError(
                "QC-TRAIN-003", f"the loss or its gradient is not finite at step {step + 1}",
                file=self.data.path, field=f"rows at lines {lines}",
                found=f"loss {loss_value}, gradient norm {norm_value}",
                fix="lower learning_rate, or look at these rows; the last checkpoint is intact",
            )  # fmt: skip
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if step == 0:
            self.first_loss = loss_value
        self.last_loss = loss_value
        return {
            "step": step + 1,
            "loss": loss_value,
            "grad_norm": norm_value,
            "learning_rate": rate,
            "tokens": sum(len(example.ids) for batch in batches for example in batch),
            "supervised_tokens": supervised,
        }

    def _clip(self) -> Tensor:
        """The gradient's norm; clipped to ``max_grad_norm`` unless that is 0."""
        parameters = [parameter for _, parameter in self.model.trainable()]
        limit = self.settings.max_grad_norm or float("inf")
        return torch.nn.utils.clip_grad_norm_(parameters, limit)

    def _pack(self, batch: list[Example]) -> Packed:
        return pack(batch).to(self.device)

    def _due_eval(self, done: int) -> bool:
        every = self.settings.eval_steps or self.schedule.steps_per_epoch
        return bool(self.data.eval) and done % every == 0 and done < self.schedule.total

    def evaluate(self) -> float | None:
        """Mean loss per supervised token over the held-out rows; ``None`` without any."""
        if not self.data.eval:
            return None
        total, count = 0.0, 0
        self.model.eval()
        with torch.no_grad():
            for example in self.data.eval:
                loss, supervised = self.model.loss(self._pack([example]))
                total, count = total + float(loss), count + supervised
        self.model.train()
        return total / count

    def prove_moved(self) -> None:
        """Every adapter's B left zero; otherwise training had no effect on that module."""
        still = [
            name
            for name, module in self.model.adapters()
            if module.lora_B is None or not bool(module.lora_B.any())
        ]
        if still:
            raise NumericError(
                "QC-TRAIN-004", f"{len(still)} adapters never moved", file=self.folder,
                field=still[0], found="lora_B all zero",
                fix="raise learning_rate or max_steps, or leave the group out of target_groups",
            )  # fmt: skip

    # -- what is written

    def identity(self) -> dict[str, Any]:
        """What makes a run the same run."""
        provenance = self.found.provenance()
        return {
            "base": fingerprints(self.found.layout, self.digests),
            "template": provenance["template_sha256"],
            "plugins": provenance["plugins"],
            "data": self.data.digest,
            "settings": self.settings.to_dict(),
            "device": self.device.type,
            "qcore": __version__,
        }

    def resume(self) -> int:
        """Restore the newest checkpoint; returns the steps that are done."""
        last = newest(self.folder)
        if last is None:
            self.tell.note("no checkpoint was written before the run stopped: starting at step 1")
            return 0
        step, path = last
        check_same(path, self.identity())
        restore(path, self.model, self.optimizer, self._names())
        self.tell.note(f"resuming after step {step} of {self.schedule.total}")
        return step

    def _names(self) -> dict[str, str]:
        """The adapter file's name of each trainable parameter."""
        names = {}
        for name, _ in self.model.adapters():
            tensor = self.found.layout.table[name]
            module = name.removesuffix(".weight")
            for side in "AB":
                names[f"{module}.lora_{side}"] = peft_name(tensor, self.namespace, side)
        return names

    def _write_adapter(self, out: Writer) -> None:
        s, names = self.settings, self._names()
        tensors = {
            names[name]: parameter.detach().to("cpu", torch.float32).contiguous()
            for name, parameter in self.model.trainable()
        }
        out.write_bytes(WEIGHTS, save(tensors, metadata={"format": "pt"}))
        config = peft_config(
            [self.found.layout.table[name] for name, _ in self.model.adapters()],
            self.found.layout,
            r=s.r,
            lora_alpha=s.lora_alpha,
            lora_dropout=s.lora_dropout,
            base=self.found.checkpoint.source,
            revision=self.found.checkpoint.revision,
            namespace=self.namespace,
        )
        out.write_json(CONFIG, config)
        out.meta.update(
            verb="train",
            model=self.found.provenance(),
            adapter_class={"name": self.namespace.name, "classes": list(self.namespace.classes)},
            fingerprints=fingerprints(self.found.layout, self.digests),
            tensors=dict(self.digests),
            data=_summary(self.data),
            settings=s.to_dict(),
            identity=self.identity(),
            coverage=[_line(c) for c in self.coverage],
            versions={"torch": torch.__version__, "qcore": __version__},
        )

    def _save(self, step: int) -> None:
        with publish(self.folder / f"checkpoint-{step}", kind="checkpoint", overwrite=True) as out:
            self._write_adapter(out)
            write_optimizer(out, self.model, self.optimizer)
            out.meta["step"] = step
        rotate(self.folder, self.settings.save_total_limit)

    def publish_final(self, metrics: Path, eval_loss: float | None) -> None:
        """The adapter folder, with the run's metrics."""
        with publish(self.target, kind="adapter") as out:
            self._write_adapter(out)
            out.copy("metrics.jsonl", metrics)
            out.meta["result"] = {
                "steps": self.schedule.total,
                "first_loss": self.first_loss if self.first_loss == self.first_loss else None,
                "last_loss": self.last_loss if self.last_loss == self.last_loss else None,
                "eval_loss": eval_loss,
            }


def pack(batch: list[Example]) -> Packed:
    """Rows -> one pack; each position's target is the next token's label."""
    ids = [torch.as_tensor(example.ids, dtype=torch.int64) for example in batch]
    wanted = []
    for example in batch:
        labels = torch.as_tensor(example.labels, dtype=torch.int64)
        wanted.append(torch.cat([labels[1:], labels.new_full((1,), -100)]))
    return Packed.of(ids, wanted)


def _summary(data: Dataset) -> dict[str, Any]:
    """What the manifest records of the rows."""
    return {
        "file": str(data.path),
        "sha256": data.digest,
        "rows": data.rows,
        "train_rows": len(data.train),
        "eval_rows": len(data.eval),
        "tokens": data.tokens,
        "supervised_tokens": data.supervised,
        "assistant_turns": data.turns,
        "longest_row": data.longest,
    }


def _line(c: Coverage) -> dict[str, Any]:
    return {
        "group": c.group,
        "modules": c.modules,
        "with LoRA": c.hit,
        "parameters": c.parameters,
        "trained": c.trained,
        "bits": round(c.bits, 2),
    }


__all__ = ["InputError", "TrainReport", "pack", "pick_device", "train"]
