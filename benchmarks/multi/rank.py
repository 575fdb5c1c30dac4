"""A process of `multi_gpu`: measures cases one after another in one process group.

Rank 0 appends a JSON line to the file of records as soon as it knows one, so that a run that is
killed keeps what it has. A rank that fails records why and ends at once, because the others may
wait for it in a collective; `torchrun` then ends them, and the command goes on with the next case.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from peers.qcore_side import backends

from qcore.nn.device import is_out_of_memory
from qcore.nn.kernels.registry import Chosen
from qcore.parallel.world import World

from .base import RandomBase
from .cases import Case
from .gradients import compare
from .peer import measure_peer
from .table import append, brief
from .timing import clear, measure


class Rank:
    """What a rank has for all cases.

    Args:
        world: the ranks.
        device: of this one.
        given: the command's arguments.

    Attributes:
        policies: those of the layers in the loop that was made last.
    """

    def __init__(self, world: World, device: torch.device, given: argparse.Namespace) -> None:
        self.world, self.device, self.given = world, device, given
        self.random = RandomBase(device)
        self.policies: list[str] = []
        self._chosen: dict[str, Chosen] = {}

    @property
    def several(self) -> bool:
        """Whether there are other ranks."""
        return self.world.size > 1

    def say(self, record: dict[str, Any]) -> None:
        """Append a record, and print it; rank 0 alone."""
        if self.world.first:
            append(Path(self.given.records), record)
            print(brief(record), flush=True)

    def note(self, text: str) -> None:
        """Print a line; rank 0 alone."""
        if self.world.first:
            print(text, flush=True)

    def backends(self, case: Case) -> Chosen:
        """Backends of a case, verified on this rank's device."""
        if case.shape not in self._chosen:
            began = time.perf_counter()
            self._chosen[case.shape] = backends(case.job, self.device)
            if (took := time.perf_counter() - began) > 1:
                print(f"rank {self.world.rank}: {case.word}: kernels in {took:.1f} s", flush=True)
        return self._chosen[case.shape]

    def prepare(self, cases: list[Case]) -> None:
        """Verify and compile kernels, each kind of model on another rank; then all read caches."""
        kinds = {case.job.moe: case for case in reversed(cases) if not case.peer}
        for number, case in enumerate(kinds.values()):
            if number % self.world.size == self.world.rank:
                self.backends(case)
        self.world.wait(None)
        for case in kinds.values():
            self.backends(case)
        self.world.wait(None)

    def allocated(self) -> int:
        """Bytes that torch has allocated on this rank's device."""
        self.wait()
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def run(given: argparse.Namespace, cases: list[Case]) -> None:
    """Measure all cases as the rank that the environment describes."""
    cores = pin()
    kind = torch.device(given.device)
    with World.of_environment(kind) as world:
        device = torch.device("cuda", world.local_rank) if kind.type == "cuda" else kind
        rank = Rank(world, device, given)
        rank.say({"machine": machine(device), "ranks": world.size, "cores": cores})
        rank.prepare(cases)
        for case in cases:
            # Where each rank was, should the command lose patience.
            faulthandler.dump_traceback_later(max(1, given.limit - 3))
            rank.say({"begin": case.word, "ranks": world.size})
            began = time.perf_counter()
            try:
                run_case(rank, case)
            except Exception as error:
                fail(rank, case, error)
                raise
            clear()
            rank.say({"end": case.word, "took": round(time.perf_counter() - began, 1)})
        faulthandler.cancel_dump_traceback_later()


def pin() -> int:
    """Run on this rank's own share of the machine's cores; returns how many those are."""
    if not hasattr(os, "sched_setaffinity"):
        return 0
    cores = sorted(os.sched_getaffinity(0))
    count, local = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    each = len(cores) // count
    if each:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), cores[local * each : (local + 1) * each])
    return each


def run_case(rank: Rank, case: Case) -> None:
    """Measure a case; where it does not fit, the largest number of its layers that does."""
    if case.gradients:
        compare(rank, case)
        return
    if case.peer:
        measure_peer(rank, case)
        return
    trial: Case | None = case
    while trial is not None and not measure(rank, trial):
        trial = trial.fewer()
        clear()


def fail(rank: Rank, case: Case, error: Exception) -> None:
    """Record what ended a case, and end this process."""
    traceback.print_exc()
    text = f"{type(error).__name__}: {error}"[:400]
    append(
        Path(rank.given.records),
        {"case": case.word, "ranks": rank.world.size, "rank": rank.world.rank, "failed": text,
         "out_of_memory": is_out_of_memory(error), "policies": rank.policies},
    )  # fmt: skip
    sys.stderr.flush()
    os._exit(3)


def machine(device: torch.device) -> str:
    """The card in words."""
    if device.type != "cuda":
        return f"cpu, torch {torch.__version__}: no figure means anything"
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, torch {torch.__version__}, {found.total_memory / 1e9:.1f} GB"
