"""Times a peer on one GPU and under torch's `DistributedDataParallel`, as its documentation has it.

The model and its step are those that `train_step_gpu` measures on one GPU, with rows drawn as for
qcore. Each rank holds the whole base, and clips by the gradient of all ranks.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from peers import transformers_side
from peers.measure import Step

from .cases import Case
from .steps import COMPARED
from .table import Record
from .timing import clear

if TYPE_CHECKING:
    from .rank import Rank

STEPS = 3  #: timed steps at most; a step of a peer may take seconds


def measure_peer(rank: Rank, case: Case) -> None:
    """Time one rank alone, then all."""
    if case.peer == "hf":
        transformers_side.hide_fla()
    job = replace(case.job, device=rank.device.type)
    before = rank.allocated()
    model = transformers_side.adapted(job)
    weights = rank.world.wait(rank.allocated() - before)
    known = {"case": case.word, "weights_bytes": weights, "policy": "gradient checkpointing"}
    one: Record = {}
    if rank.world.first and "one" in case.placements:
        one = _timed(rank, case, transformers_side.step_of(model, job, _ids(rank, case, 0)))
    one = rank.world.wait(one)[0]
    if one:
        rate = case.batch * case.seq / one["seconds"]
        rank.say({**known, "placement": "one", "ranks": 1, "tokens_per_second": rate, **one})
    clear()
    if "data" not in case.placements or not rank.several:
        return
    devices = [rank.device] if rank.device.type == "cuda" else None
    shared = torch.nn.parallel.DistributedDataParallel(model, device_ids=devices)
    ids = _ids(rank, case, rank.world.rank)
    found = _timed(rank, case, transformers_side.step_of(shared, job, ids))
    found["peak_bytes"] = rank.world.gather(found["peak_bytes"][0])
    found["tokens_per_second"] = rank.world.size * case.batch * case.seq / found["seconds"]
    if one:
        found["times_one"] = found["tokens_per_second"] / (case.batch * case.seq / one["seconds"])
    rank.say({**known, "placement": "data", "ranks": rank.world.size, **found})


def _ids(rank: Rank, case: Case, number: int) -> torch.Tensor:
    """Token ids ``[steps, batch, seq]`` of one rank."""
    generator = torch.Generator().manual_seed(1)
    most = max(2, case.job.text["vocab_size"] - 320)
    size = (COMPARED + STEPS, rank.world.size, case.batch, case.seq)
    return torch.randint(0, most, size, generator=generator)[:, number]


def _timed(rank: Rank, case: Case, step: Step) -> Record:
    """As `Timing` times a step, with fewer of them."""
    began = time.perf_counter()
    losses = [step(0)]
    rank.wait()
    first = time.perf_counter() - began
    losses += [step(number) for number in range(1, COMPARED)]
    if rank.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for number in range(COMPARED, COMPARED + min(STEPS, rank.given.steps)):
        rank.wait()
        began = time.perf_counter()
        step(number)
        rank.wait()
        seconds.append(time.perf_counter() - began)
    peak: Any = 0
    if rank.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() - rank.random.nbytes
    return {
        "seconds": statistics.median(seconds), "least": min(seconds), "most": max(seconds),
        "first_seconds": first, "losses": losses, "finite": all(one == one for one in losses),
        "peak_bytes": [peak],
    }  # fmt: skip
