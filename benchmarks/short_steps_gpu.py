"""Times short micro-batches on a GPU: one by one, and joined into packs as `train` runs them.

    python benchmarks/short_steps_gpu.py [--shape 4b] [--rows 8] [--lengths 128,900] [--steps 4]

A step has so many micro-batches of one row, of random lengths in between. Alone, each waits for
the host to start its kernels; together they are as few packs as `qcore.data.microbatches.joined`
makes of them. Weights are random, the loop is the one that trains.
"""

from __future__ import annotations

import argparse
import random
import statistics
from array import array
from pathlib import Path

import torch
from peers.qcore_side import adapted, backends
from peers.shapes import ALPHA, RANK, SHAPES, Job

from qcore.config.settings import Settings
from qcore.data.dataset import Dataset
from qcore.data.rendering.chat_record import ChatRecord
from qcore.data.rendering.masking import Example
from qcore.data.store.write import store_of
from qcore.training.step import Loop


def data(lengths: list[int], vocabulary: int) -> Dataset:
    """Random rows, all supervised."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for line, n in enumerate(lengths, 1):
        ids = array("i", torch.randint(0, vocabulary - 320, (n,), generator=draw).tolist())
        rows.append(Example(ids=ids, labels=ids, line=line, turns=1, supervised=n - 1, row=line))
    total = sum(lengths)
    return Dataset(
        samples_sha256="",
        train=store_of(rows).samples(), eval=store_of(()).samples(),
        path=Path("random"), sha256="", rows=len(rows), tokens=total,
        supervised=total - len(rows), turns=len(rows), longest=max(lengths),
        samples=len(rows), chat=ChatRecord(template_sha256=""), sources=(),
    )  # fmt: skip


def main() -> None:
    """Print a line for each round and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    parser.add_argument("--rows", type=int, default=8, help="micro-batches of a step")
    parser.add_argument("--lengths", default="128,900", help="of rows, from and to")
    parser.add_argument("--together", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=4, help="of a round")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    device, job = torch.device(given.device), Job(shape=given.shape, device=given.device)
    low, high = map(int, given.lengths.split(","))
    random.seed(0)
    lengths = [random.randint(low, high) for _ in range(given.rows * (given.steps + 1))]
    settings = Settings(
        max_steps=given.steps + 1, per_device_train_batch_size=1,
        gradient_accumulation_steps=given.rows, max_length=high, learning_rate=1e-4, r=RANK,
        lora_alpha=ALPHA,
    )  # fmt: skip
    model = adapted(job, device, backends(job, device))
    rows = data(lengths, job.text["vocab_size"])
    rates: dict[int, list[float]] = {0: [], given.together: []}
    for _ in range(2):
        for together, found in rates.items():
            loop = Loop(model, rows, settings, device, recompute=job.policy, together=together)
            steps = [loop.step(n) for n in range(given.steps + 1)][1:]
            found += [step["tokens_per_second"] for step in steps]
            said = " ".join(f"{step['seconds']:.3f}" for step in steps)
            peak = max(step["memory_gb"] for step in steps)
            tokens = sum(step["tokens"] for step in steps) / len(steps)
            print(
                f"{given.shape}, {given.rows} rows, {tokens:.0f} tokens a step, together up to "
                f"{together}: {said} s, {statistics.median(found):,.0f} tokens/s, {peak:.2f} GB",
                flush=True,
            )
    alone, joined = (statistics.median(found) for found in rates.values())
    print(f"together is {joined / alone:.2f}x")


if __name__ == "__main__":
    main()
