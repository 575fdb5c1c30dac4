"""Runs of several ranks on the CPU: what each step trained on, its gradients, how a run ended.

`spawn` starts one process a rank, in which `main` goes through a list of runs with one connection.
Each run leaves what rank 0 saw of it in a folder.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qcore.training.train as verb
from qcore.config.settings import Settings
from qcore.errors import QcoreError, WriteError
from qcore.nn.model import Model
from qcore.parallel.world import World
from qcore.reporting import Event, Reporter, Step
from qcore.training.shares import Share
from qcore.training.step import Loop
from qcore.training.train import train

GRADIENTS, SEEN, ENDED = "gradients.safetensors", "seen.json", "ended.json"
_NOT_PLANNED = ("max_steps", "learning_rate", "save_steps", "save_total_limit")
_PLANS: dict[str, Any] = {}  # of this process


@dataclass(kw_only=True)
class Job:
    """A run.

    Attributes:
        model: folder of the base.
        rows: file with the rows; of rank 1 `other_rows`, where there are any.
        output: the adapter folder; what is recorded lies beside it.
        settings: of the run.
        initial: adapter to start from.
        resume: continue the run that was stopped.
        fault: what happens to a rank: `FAULTS`.
        at: step, from 1, in which it happens.
        rank: to which.
    """

    model: str
    rows: str
    output: str
    settings: dict[str, Any]
    initial: str | None = None
    resume: bool = False
    fault: str = ""
    at: int = 0
    rank: int = 1
    other_rows: str = ""
    record: bool = field(default=True)

    @property
    def notes(self) -> Path:
        """The folder with what is recorded."""
        return Path(self.output + ".notes")


def seen(job: Job) -> dict[str, Any]:
    """What rank 0 recorded of a run: rows and losses by step, and whether ranks were idle."""
    found: dict[str, Any] = json.loads((job.notes / SEEN).read_text())
    return found


def ended(job: Job) -> list[dict[str, Any] | None]:
    """The error of each rank."""
    found: list[dict[str, Any] | None] = json.loads((job.notes / ENDED).read_text())
    return found


def gradients(job: Job) -> dict[str, torch.Tensor]:
    """Gradients of the first step."""
    return load_file(job.notes / GRADIENTS)


def off(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> float:
    """The largest norm of a difference of two tensors of one name, by the norm of the wanted."""
    assert found.keys() == wanted.keys()
    worst = 0.0
    for name, value in wanted.items():
        norm, difference = value.norm(), (found[name] - value).norm()
        assert norm or not difference, name
        worst = max(worst, float(difference / norm) if norm else 0.0)
    return worst


class _Seen:
    """Records the steps of a loop; the first of them with its gradients."""

    def __init__(self, job: Job, world: World) -> None:
        self.job, self.world = job, world
        self.rows: dict[str, list[int]] = {}
        self.packs: dict[str, list[int]] = {}
        self.partial: list[str] = []  # weights with experts that a rank has no gradient for

    def checked(self, loop: Loop, share: Share) -> None:
        """Gradients are summed now."""
        self.rows[str(share.step + 1)] = [*share.rows]
        counts = self.world.gather(len(share.packs))
        self.packs[str(share.step + 1)] = counts
        if len(self.rows) > 1:
            return
        grads = _grads(loop.model)
        sums = self.world.gather([float(grad.double().sum()) for grad in grads.values()])
        assert all(each == sums[0] for each in sums), "gradients differ between ranks"
        if self.world.first:
            self.job.notes.mkdir(exist_ok=True)
            save_file(grads, self.job.notes / GRADIENTS)

    def local(self, loop: Loop) -> None:
        """Gradients are those of this rank."""
        if self.rows or loop.model.sharded is not None:  # ranks still gather its layers
            return
        for name, grad in _grads(loop.model).items():
            if "experts." in name and name.endswith("lora_A"):  # rows of one expert after another
                reached = self.world.gather(grad.any(1).tolist())
                if any(len(set(expert)) > 1 for expert in zip(*reached, strict=True)):
                    self.partial.append(name)


def _grads(model: Model) -> dict[str, torch.Tensor]:
    named = model.trainable()
    return {name: p.grad.detach().clone() for name, p in named if p.grad is not None}


@contextmanager
def _watched(job: Job, world: World) -> Iterator[_Seen]:
    found = _Seen(job, world)
    checked, backward = Loop._checked, Loop._backward

    def check(self: Loop, share: Share, sums: Any) -> Any:
        found.checked(self, share)
        return checked(self, share, sums)

    def run(self: Loop, share: Share) -> torch.Tensor:
        losses = backward(self, share)
        found.local(self)
        return losses

    with pytest.MonkeyPatch.context() as patch:
        if job.record:
            patch.setattr(Loop, "_checked", check)
            patch.setattr(Loop, "_backward", run)
        if job.fault and job.rank == world.rank:
            FAULTS[job.fault](patch, job)
        _planned_once(patch, job, world)
        yield found


def _at(patch: pytest.MonkeyPatch, job: Job, act: Callable[[], None]) -> None:
    real = Loop._backward

    def run(self: Loop, share: Share) -> torch.Tensor:
        if share.step + 1 == job.at:
            act()
        return real(self, share)

    patch.setattr(Loop, "_backward", run)


def _signal(number: int) -> Callable[[pytest.MonkeyPatch, Job], None]:
    return lambda patch, job: _at(patch, job, lambda: os.kill(os.getpid(), number))


def _raising(error: BaseException) -> Callable[[pytest.MonkeyPatch, Job], None]:
    def act() -> None:
        raise error

    return lambda patch, job: _at(patch, job, act)


def _evaluation(patch: pytest.MonkeyPatch, job: Job) -> None:
    """A signal while the first row is evaluated."""
    real = Loop._loss

    def loss(self: Loop, batch: Any, **more: Any) -> Any:
        if not self.model.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, **more)

    patch.setattr(Loop, "_loss", loss)


def _other_torch(patch: pytest.MonkeyPatch, job: Job) -> None:
    patch.setattr("qcore.training.resume.torch.__version__", "0.0")


def _full_disk(patch: pytest.MonkeyPatch, job: Job) -> None:
    def emit(self: Reporter, event: Event) -> None:
        if isinstance(event, Step) and event.step == job.at:
            raise WriteError("QC-WRITE-004", "no space left", file="metrics.jsonl")
        real(self, event)

    real = Reporter.emit
    patch.setattr(Reporter, "emit", emit)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch, Job], None]] = {
    "stop": _signal(signal.SIGTERM),
    "save": _signal(signal.SIGUSR1),
    "error": _raising(QcoreError("QC-TEST-001", "fails", field="layer")),
    "memory": _raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")),
    "evaluation": _evaluation,
    "versions": _other_torch,
    "disk": _full_disk,
}


def _planned_once(patch: pytest.MonkeyPatch, job: Job, world: World) -> None:
    """Plan runs of one model with the same settings once: a plan takes longer than their steps."""
    settings = {name: job.settings[name] for name in job.settings if name not in _NOT_PLANNED}
    key = json.dumps([job.model, settings, job.resume, world.size], sort_keys=True)
    real = verb.plan_memory

    def planned(*arguments: Any) -> Any:
        if key not in _PLANS:
            _PLANS[key] = real(*arguments)
        return _PLANS[key]

    patch.setattr(verb, "plan_memory", planned)


def run(job: Job, world: World) -> QcoreError | None:
    """Run one job on this rank; returns its error."""
    rows = job.other_rows if job.other_rows and world.rank == job.rank else job.rows
    error: QcoreError | None = None
    with _watched(job, world) as found:
        try:
            train(
                job.model, rows, job.output, Settings(**job.settings), device="cpu",
                resume=job.resume, init_adapter=job.initial, world=world,
            )  # fmt: skip
        except QcoreError as raised:
            error = raised
    errors = world.gather(
        error and error.as_json() | {"found": str(error.found), "what": error.what}
    )
    if world.first:
        job.notes.mkdir(exist_ok=True)
        facts = {"rows": found.rows, "packs": found.packs, "partial": found.partial}
        (job.notes / SEEN).write_text(json.dumps(facts))
        (job.notes / ENDED).write_text(json.dumps(errors))
    return error


def spawn(size: int, jobs: Sequence[Job], folder: Path) -> None:
    """Run jobs, one after another, on `size` ranks."""
    file = folder / f"jobs-{size}.json"
    file.write_text(json.dumps([asdict(job) for job in jobs]))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    tests = str(Path(__file__).parents[1])
    common = {
        "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "PYTHONPATH": tests, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "support.shared_runs", str(file)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    outputs = [child.communicate(timeout=900)[0] for child in children]
    codes = [child.returncode for child in children]
    assert codes == [0] * size, f"exit statuses {codes}\n" + "\n".join(outputs)[-6000:]


def main(file: str) -> None:
    """One rank."""
    torch.set_num_threads(1)
    with World.of_environment(torch.device("cpu")) as world:
        for record in json.loads(Path(file).read_text()):
            run(Job(**record), world)


if __name__ == "__main__":
    main(sys.argv[1])
