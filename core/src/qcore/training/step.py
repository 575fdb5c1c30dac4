"""The optimizer step: loss over its micro-batches, gradient clipping, one AdamW update.

This file decides the loss (mean over the supervised tokens of the step, however they are spread
over rows, micro-batches and ranks, so accumulating 4 x 1 equals 1 x 4), gradient clipping, and
that a value that is not finite stops the run before the update. What it checks of a step comes to
the host in one transfer. With several ranks gradients and losses are summed before anything is
decided, so that all decide alike; random numbers depend on the step and the rows of a pack. The
order of rows is up to `data.sampler`, which rank runs what to `shares`, the learning rate to
`lr_schedule`, what a spike is to `spikes`, files to `checkpoints`.
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
from ..data.rendering.masking import Example
from ..data.sampler import Schedule, seed_of
from ..errors import PluginError, QcoreError
from ..io.stop_signals import StopNow, StopSignals
from ..nn.device import peak_bytes, reset_peak
from ..nn.model import Model
from ..nn.optim import FlatAdamW
from ..parallel.agreement import agree
from ..parallel.world import World
from ..planning.policies import default_policy
from .collate import Batches
from .evaluation import mean_loss
from .lr_schedule import learning_rate
from .meter import Meter
from .moved import prove_moved
from .shared_signals import SharedSignals
from .shares import Share, Shares
from .spikes import Spike, SpikeGuard
from .step_checks import (
    REACHED_BY,
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
        peak: bytes, the largest peak of a rank; 0 for a process of its own.
    """

    loss: float
    balance: float
    norm: float
    largest: float
    peak: float = 0.0


class Loop:
    """A loaded model, its optimizer and its rows.

    Attributes:
        optimizer: AdamW over the adapters.
        schedule: rows of every step.
        shares: what this rank computes of every step.
        batches: turns rows into packs.
        meter: peak memory and speed of the steps so far.
        guard: judges loss and gradient norm of each step.
        abandonable: context of the part of a step after which nothing has changed; a signal may
            raise in it.
        watch: context of the same part that turns running out of memory into a `QcoreError`.
        signals: of all ranks.
        failure: an error of this rank outside of steps, which ends all ranks with the next one.
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
        world: World | None = None,
    ) -> None:
        self.model = model
        self.data = data
        self.settings = settings
        self.device = device
        self.recompute = recompute or default_policy(settings)
        self.meter = Meter()
        self.guard = SpikeGuard()
        self.world = world or World.alone()
        self.abandonable: Callable[[], AbstractContextManager[None]] = nullcontext
        self.watch: AbstractContextManager[object] = nullcontext()
        self.signals = SharedSignals(StopSignals(), self.world)
        self.failure: QcoreError | None = None
        self.own_tokens = 0  # of this rank, in the newest step
        self._tower_alone = model.trains_tower and not model.trains_trunk
        keep = in_bytes(settings.media_cache_gb)
        self.batches = Batches(model, device, reader, keep)
        self.schedule = Schedule(data.train_sizes, settings, data.train.lengths)
        self.shares = Shares(data, self.schedule, together, self.world)
        self._units = data.train.units
        # Loaded objects live to the end: garbage collection must not walk them in a step.
        gc.freeze()
        self.parameters = [parameter for _, parameter in model.trainable()]
        rate, decay = settings.learning_rate, settings.weight_decay
        self.optimizer: torch.optim.Optimizer
        if device.type == "cuda" or self.world.size > 1:  # gradients that are summed are one tensor
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
        share = self.shares.of(step)
        self.own_tokens = share.own
        sums = self._accumulate(share)
        spike = self._checked(share, sums)
        rate = learning_rate(self.settings, step, self.schedule.total)
        if spike is None or self.settings.on_spike != "rollback":
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.guard.add(sums.loss, sums.norm, spike)
        self.optimizer.zero_grad(set_to_none=True)
        if step + 1 == REACHED_BY:
            check_reached(self.model, self.optimizer, media=self._media_until(REACHED_BY))
        seconds = time.perf_counter() - began
        peak = max(peak_bytes(self.device), int(sums.peak))
        self.meter.step(share.tokens, seconds, peak)
        return {
            "step": step + 1,
            "loss": sums.loss,
            **({"aux_loss": sums.balance} if self.settings.router_aux_loss_coef else {}),
            "grad_norm": sums.norm,
            "learning_rate": rate,
            "tokens": share.tokens,
            "supervised_tokens": share.supervised,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(share.tokens / seconds, 1),
            "memory_gb": round(peak / 1e9, 3),
            **({"spike": spike.as_json() | self._rows(share)} if spike else {}),
            **({"ranks": self.world.size} if self.world.size > 1 else {}),
        }

    def _checked(self, share: Share, sums: _Sums) -> Spike | None:
        """Check what a step computed; returns its spike, unless that stops the run."""
        if not all(map(math.isfinite, (sums.loss, sums.norm, sums.largest))):
            check_parameters(self.model, share.step)
            raise not_finite(share.step, self._place(share), sums.loss, sums.norm)
        spike = self.guard.judge(sums.loss, sums.norm)
        if spike is not None and self.settings.on_spike == "stop":
            raise spiked(share.step + 1, self._place(share), spike.found)
        return spike

    def _place(self, share: Share) -> tuple[Path | None, str]:
        """File and rows of a step."""
        return self.data.place(self.data.train[row] for row in share.rows)

    def _media_until(self, done: int) -> bool:
        """Whether a row of the first steps has media."""
        return bool(self._units) and any(
            self._units[row]
            for step in range(done)
            for rows in self.schedule.micro_batches(step)
            for row in rows
        )

    def _rows(self, share: Share) -> dict[str, str]:
        """Which rows a step trains on."""
        path, where = self._place(share)
        return {"rows": where if path is None else f"{path}: {where}"}

    def _accumulate(self, share: Share) -> _Sums:
        """Gradients of the mean loss; returns what is checked before the update.

        Raises:
            QcoreError: of this rank, or of another one.
            StopNow: a signal to a rank interrupted the step there.
        """
        if self.world.size == 1:
            with self.abandonable():
                return _Sums(*self._finished(self._backward(share)).tolist())
        losses = torch.zeros(2, device=self.device)
        failed: QcoreError | StopNow | None = self.failure
        if failed is None:
            try:
                with self.watch, self.abandonable():
                    losses = self._backward(share)
            except (QcoreError, StopNow) as error:
                failed = error
        if self.model.sharded is not None:
            self.model.sharded.gathers.complete(share.rounds)
        # A rank that failed takes part in the sums, for which the others wait.
        shared = torch.cat([losses.double(), self._facts(failed)])
        self.world.sum_(shared, f"the loss of step {share.step + 1}")
        sums: list[float] = self._finished(shared).tolist()
        loss, balance, failures, stop, save, *peaks, norm, largest = sums
        self.signals.agree(bool(stop), bool(save))
        if failures and (agreed := agree(self.world, failed)) is not None:
            raise agreed
        return _Sums(loss, balance, norm, largest, max(peaks))

    def _facts(self, failed: BaseException | None) -> Tensor:
        """What else the ranks sum: whether this one failed, its signals, its peak in its place."""
        peaks = [0.0] * self.world.size
        peaks[self.world.rank] = peak_bytes(self.device)
        facts = [failed is not None, *self.signals.noted(), *peaks]
        # Pinned, so that the host does not wait until the device has run the backward.
        pinned = self.device.type == "cuda"
        host = torch.tensor(facts, dtype=torch.float64, pin_memory=pinned)
        return host.to(self.device, non_blocking=True)

    def _backward(self, share: Share) -> Tensor:
        """Gradients of this rank's packs; returns its part of loss and balance."""
        total = torch.zeros((), device=self.device)
        balance = torch.zeros((), device=self.device)
        for rows in share.packs:
            # A pack draws the same random numbers on any rank.
            torch.manual_seed(seed_of(self.settings.seed, "dropout", share.step, *rows))
            batch = [self.data.train[row] for row in rows]
            loss, aux = self._loss(batch, recompute=self.recompute)
            loss = loss / share.supervised
            total += loss.detach()
            if aux is not None:
                balance += aux.detach() / share.count
                loss = loss + aux * (self.settings.router_aux_loss_coef / share.count)
            if self._reaches(batch):
                torch.autograd.backward(loss)
        self._define_gradients()
        return torch.stack([total, balance])

    def _finished(self, values: Tensor) -> Tensor:
        """Sum gradients over ranks and clip them; returns all that is checked, as one tensor.

        One tensor is one transfer: each would wait for the device.

        Args:
            values: a vector that comes first, before norm and largest parameter.
        """
        limit = self.settings.max_grad_norm or math.inf
        if isinstance(self.optimizer, FlatAdamW):
            gradients = self.optimizer.flat.grad
            assert gradients is not None
            self.world.sum_(gradients, "the gradients of a step")
            norm = self.optimizer.clip(limit)
        else:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        return torch.cat([values, torch.stack([norm.float(), self._largest()])])

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
        if isinstance(self.optimizer, FlatAdamW):  # its gradients always exist
            return
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
        value = mean_loss(
            self.data, lambda example: float(self._loss([example])[0]),
            self.world, self.signals.alone, between, self._gather_rest,
        )  # fmt: skip
        self.meter.saw(peak_bytes(self.device))
        return value

    def _gather_rest(self, rounds: int) -> None:
        """Take part in the forwards that other ranks have left of an evaluation."""
        if self.model.sharded is not None:
            self.model.sharded.gathers.complete(rounds, backward=False)

    def prove_moved(self, start: Mapping[str, Tensor] | None = None) -> tuple[int, int]:
        """How many linear maps moved from where they started, and of how many (`prove_moved`)."""
        return prove_moved(self.model, self.optimizer, start)
