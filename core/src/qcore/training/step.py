"""The optimizer step: loss over its micro-batches, gradient clipping, one AdamW update.

This file decides the loss (mean over the supervised tokens of the step, however they are spread
over rows and micro-batches, so accumulating 4 x 1 equals 1 x 4), gradient clipping, and that a
value that is not finite stops the run before the update. What it checks of a step comes to the host
in one transfer. The order of rows is up to `data.sampler`, the learning rate to `lr_schedule`, what
a spike is to `spikes`, files to `checkpoints`.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..api.media import MediaReader
from ..config.settings import Settings, in_bytes
from ..data.dataset import Dataset
from ..data.microbatches import joined
from ..data.rendering.masking import Example
from ..data.sampler import Schedule, seed_of
from ..errors import NumericError, PluginError
from ..nn.device import peak_bytes, reset_peak
from ..nn.model import Model
from ..nn.optim import FlatAdamW
from ..nn.qlora.lora_layer import LoraLayer
from ..planning.policies import default_policy
from .collate import Batches
from .lr_schedule import learning_rate
from .meter import Meter
from .spikes import Spike, SpikeGuard
from .step_checks import (
    REACHED_BY,
    bad_evaluation,
    check_parameters,
    check_reached,
    not_finite,
    spiked,
)


class _Sums(NamedTuple):
    """What a step computed before its update.

    Attributes:
        loss: mean over the supervised tokens.
        balance: load balance of the routers.
        norm: of the gradient, before clipping.
        largest: absolute value of a parameter; NaN if any is.
    """

    loss: float
    balance: float
    norm: float
    largest: float


class Loop:
    """A loaded model, its optimizer and its rows.

    Attributes:
        optimizer: AdamW over the adapters.
        schedule: rows of every step.
        together: the most that micro-batches which run as one may take, as
            `microbatches.extent` counts; 0: each runs alone.
        batches: turns rows into packs.
        meter: peak memory and speed of the steps so far.
        guard: judges loss and gradient norm of each step.
        abandonable: context of the part of a step after which nothing has changed; a signal may
            raise in it.
    """

    def __init__(
        self,
        model: Model,
        data: Dataset,
        settings: Settings,
        device: torch.device,
        recompute: str | Sequence[str] | None = None,
        together: int = 0,
        reader: MediaReader | None = None,
    ) -> None:
        self.model = model
        self.data = data
        self.settings = settings
        self.device = device
        self.recompute = recompute or default_policy(settings)
        self.meter = Meter()
        self.guard = SpikeGuard()
        self.abandonable: Callable[[], AbstractContextManager[None]] = nullcontext
        self._tower_alone = model.trains_tower and not model.trains_trunk
        keep = in_bytes(settings.media_cache_gb)
        self.batches = Batches(model, device, reader, keep)
        self.schedule = Schedule(data.train_sizes, settings, data.train.lengths)
        self.together = together
        self._lengths = data.train.lengths
        self._units = data.train.units
        # Loaded objects live to the end: garbage collection must not walk them in a step.
        gc.freeze()
        self.parameters = [parameter for _, parameter in model.trainable()]
        rate, decay = settings.learning_rate, settings.weight_decay
        self.optimizer: torch.optim.Optimizer
        if device.type == "cuda":
            adapters = [module for _, module in model.adapters()]
            others = model.beside_adapters()
            self.optimizer = FlatAdamW(adapters, others, lr=rate, weight_decay=decay)
        else:
            self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=decay)

    def step(self, step: int) -> dict[str, Any]:
        """Run optimizer step `step` (from 0); returns the row of ``metrics.jsonl``.

        With ``on_spike: rollback`` the update of a step with a spike is left out: `train` returns
        to a checkpoint.

        Raises:
            NumericError: ``QC-TRAIN-003`` loss or gradient, or ``-015`` a parameter, is not
                finite; ``-017`` a spike, with ``on_spike: stop``. In all of them nothing was
                updated. ``-016`` an adapter had no gradient in the first steps.
        """
        began = time.perf_counter()
        reset_peak(self.device)
        if not self.model.training:  # walking all modules takes as long as a short step
            self.model.train()
        torch.manual_seed(seed_of(self.settings.seed, "dropout", step))
        micro_batches = self.schedule.micro_batches(step)
        if self.together:
            micro_batches = joined(micro_batches, self._lengths, self.together, self._units)
        batches = [[self.data.train[row] for row in rows] for rows in micro_batches]
        with self.abandonable():
            sums = self._accumulate(batches)
        spike = self._checked(step, batches, sums)
        rate = learning_rate(self.settings, step, self.schedule.total)
        if spike is None or self.settings.on_spike != "rollback":
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.guard.add(sums.loss, sums.norm, spike)
        self.optimizer.zero_grad(set_to_none=True)
        if step + 1 == REACHED_BY:
            check_reached(self.model, self.optimizer, media=self._media_until(REACHED_BY))
        tokens = sum(len(example.ids) for batch in batches for example in batch)
        seconds = time.perf_counter() - began
        peak = peak_bytes(self.device)
        self.meter.step(tokens, seconds, peak)
        return {
            "step": step + 1,
            "loss": sums.loss,
            **({"aux_loss": sums.balance} if self.settings.router_aux_loss_coef else {}),
            "grad_norm": sums.norm,
            "learning_rate": rate,
            "tokens": tokens,
            "supervised_tokens": _supervised(batches),
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
            "memory_gb": round(peak / 1e9, 3),
            **({"spike": spike.as_json() | self._rows(batches)} if spike else {}),
        }

    def _checked(
        self, step: int, batches: Sequence[Sequence[Example]], sums: _Sums
    ) -> Spike | None:
        """Check what a step computed; returns its spike, unless that stops the run."""
        if not all(map(math.isfinite, (sums.loss, sums.norm, sums.largest))):
            check_parameters(self.model, step)
            raise not_finite(step, self._place(batches), sums.loss, sums.norm)
        spike = self.guard.judge(sums.loss, sums.norm)
        if spike is not None and self.settings.on_spike == "stop":
            raise spiked(step + 1, self._place(batches), spike.found)
        return spike

    def _place(self, batches: Sequence[Sequence[Example]]) -> tuple[Path | None, str]:
        """File and rows of a step."""
        return self.data.place(example for batch in batches for example in batch)

    def _media_until(self, done: int) -> bool:
        """Whether a row of the first steps has media."""
        return bool(self._units) and any(
            self._units[row]
            for step in range(done)
            for rows in self.schedule.micro_batches(step)
            for row in rows
        )

    def _rows(self, batches: Sequence[Sequence[Example]]) -> dict[str, str]:
        """Which rows a step trains on."""
        path, where = self._place(batches)
        return {"rows": where if path is None else f"{path}: {where}"}

    def _accumulate(self, batches: Sequence[Sequence[Example]]) -> _Sums:
        """Gradients of the mean loss; returns what is checked before the update."""
        supervised = _supervised(batches)
        total = torch.zeros((), device=self.device)
        balance = torch.zeros((), device=self.device)
        for batch in batches:
            loss, aux = self._loss(batch, recompute=self.recompute)
            loss = loss / supervised
            total += loss.detach()
            if aux is not None:
                balance += aux.detach() / len(batches)
                loss = loss + aux * (self.settings.router_aux_loss_coef / len(batches))
            if self._reaches(batch):
                torch.autograd.backward(loss)
        self._define_gradients()
        limit = self.settings.max_grad_norm or math.inf
        if isinstance(self.optimizer, FlatAdamW):
            norm = self.optimizer.clip(limit)
        else:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        # One transfer: each would wait for the device.
        return _Sums(*torch.stack([total, balance, norm.float(), self._largest()]).tolist())

    def _largest(self) -> Tensor:
        """Largest absolute value of a trained parameter; NaN if any is.

        An update makes a parameter NaN where a moment is, so that parameters show both.
        """
        if isinstance(self.optimizer, FlatAdamW):
            return self.optimizer.largest()
        values = [parameter.detach() for parameter in self.parameters]
        return torch.stack(torch._foreach_norm(values, math.inf)).amax()

    def _reaches(self, batch: Sequence[Example]) -> bool:
        """Whether these rows reach any trained weight. Rows of text never reach a tower."""
        return not self._tower_alone or any(example.media for example in batch)

    def _define_gradients(self) -> None:
        """Give a tower that a step of text did not reach gradients of zero, not ``None``.

        AdamW skips a parameter without a gradient; with zeros, moments and weight decay continue
        as for every other adapter, whether or not a step has media.
        """
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _loss(
        self, batch: Sequence[Example], *, recompute: str | Sequence[str] = "none"
    ) -> tuple[Tensor, Tensor | None]:
        """Sum of the loss over a micro-batch, and its load balance loss where that is trained.

        Raises:
            PluginError: ``QC-PLUGIN-003`` the trunk has experts and computes no balance.
        """
        packed = self.batches.of(batch)
        chunk = self.settings.loss_chunk_size
        loss = self.model.loss(packed, recompute=recompute, chunk=chunk)
        if not (self.settings.router_aux_loss_coef and self.model.training):
            return loss, None
        aux = self.model.trunk.aux_loss(packed)
        if aux is None:
            # Preflight has refused the setting for a model without experts.
            raise PluginError(
                "QC-PLUGIN-003",
                "aux_loss of the trunk returned None",
                field=type(self.model.trunk.module).__name__,
                expected="the load balance of the routers, a scalar",
                fix="update the plugin of this architecture, or set router_aux_loss_coef=0",
            )
        return loss, aux

    def due(self, done: int) -> bool:
        """Whether an evaluation follows step `done`; the end of the run has its own."""
        every = self.settings.eval_steps or self.schedule.steps_per_epoch
        return bool(self.data.eval) and done % every == 0 and done < self.schedule.total

    @torch.no_grad()
    def evaluate(self, between: Callable[[], None] | None = None) -> float | None:
        """Mean loss per supervised token over the held-out rows; ``None`` without any.

        Args:
            between: called before each row.

        Raises:
            NumericError: ``QC-TRAIN-012`` the loss of a row is not finite.
        """
        if not self.data.eval:
            return None
        self.model.eval()
        total, count = 0.0, 0
        for example in self.data.eval:
            if between is not None:
                between()
            value = float(self._loss([example])[0])
            if not math.isfinite(value):
                raise bad_evaluation(self.data.place([example]), value)
            total, count = total + value, count + example.supervised
        self.meter.saw(peak_bytes(self.device))
        return total / count

    def prove_moved(self, start: Mapping[str, Tensor] | None = None) -> tuple[int, int]:
        """Check that every adapter's B moved from where it started: training had an effect on it.

        Args:
            start: B of each weight in the initial adapter; ``None``: zero.

        Returns:
            How many linear maps moved, and of how many. Of a stack of experts, one that no token
            was routed to does not move.

        Raises:
            NumericError: ``QC-TRAIN-004``.
        """
        moved = {
            name: module.moved if start is None else self._moved_from(start[name], module)
            for name, module in self.model.adapters()
        }
        still = [name for name, (count, _) in moved.items() if not count]
        if still:
            raise NumericError(
                "QC-TRAIN-004",
                f"{len(still)} adapters never moved",
                field=still[0],
                found="lora_B all zero" if start is None else "lora_B as in the initial adapter",
                fix="raise learning_rate or max_steps, or leave the group out of target_groups",
            )
        return sum(count for count, _ in moved.values()), sum(n for _, n in moved.values())

    def _moved_from(self, start: Tensor, module: LoraLayer) -> tuple[int, int]:
        """How many linear maps moved away from `start`, and of how many.

        Weight decay moves a B that is not zero without any gradient, so its second moment must
        show that there was one.
        """
        assert module.lora_B is not None
        b = module.lora_B.detach()
        squares = self.optimizer.state[module.lora_B]["exp_avg_sq"]
        moved = module.touched(b != start.to(b.device)) & module.touched(squares)
        return int(moved.sum()), len(moved)


def _supervised(batches: Sequence[Sequence[Example]]) -> int:
    return sum(example.supervised for batch in batches for example in batch)
