"""Is the plan right: predicted peak and time of a step beside what a card measured.

    python benchmarks/plan_check_gpu.py [--shapes 0.8b,4b,9b,35b-a3b] [--points 20]

Twenty-one points: four models at their published sizes on random weights made on the device, 512
to 32,768 tokens, all four policies and a mixture of two. A point is planned from the config alone,
then three steps of the training loop are run, and the second's ``max_memory_allocated`` and the
third's time are set beside the plan. Time is a model; 15 % is what to expect of it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from peers.qcore_side import adapted, architecture, backends, describe, rows
from peers.shapes import ALPHA, RANK, Job

from qcore.identify import Identified
from qcore.loop import Loop
from qcore.plan import Planner
from qcore.plan_cards import card_of
from qcore.plugins import Plugins
from qcore.settings import Settings

#: Shape -> (rows, tokens of each, policy; two policies: half of the layers each).
POINTS: dict[str, list[tuple[int, int, str]]] = {
    "0.8b": [
        (1, 512, "none"), (4, 2048, "elementwise"), (1, 8192, "none"), (8, 1024, "full"),
        (1, 32768, "full"), (1, 32768, "offload"),
    ],
    "4b": [
        (1, 512, "full"), (2, 4096, "none"), (2, 4096, "elementwise"), (2, 4096, "full"),
        (2, 4096, "offload"), (1, 32768, "full"),
    ],
    "9b": [
        (1, 2048, "none"), (1, 8192, "elementwise"), (1, 8192, "full+elementwise"),
        (1, 8192, "offload"), (1, 16384, "full"),
    ],
    "35b-a3b": [
        (1, 2048, "none"), (1, 8192, "elementwise"), (1, 8192, "full"), (1, 8192, "offload"),
    ],
}  # fmt: skip


def main() -> None:
    """Print a line a point, then the worst."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default=",".join(POINTS))
    given = parser.parse_args()
    memory, times = [], []
    card = torch.cuda.get_device_properties(0)
    print(f"{card.name}, torch {torch.__version__}, {card.total_memory / 1e9:.1f} GB")
    print(f"{'shape':8} {'tokens':>9} {'policy':18} {'plan GB':>8} {'GB':>8} {'off':>7} "
          f"{'plan s':>7} {'s':>7} {'off':>7}  moment")  # fmt: skip
    for shape in given.shapes.split(","):
        for off, late, line in _shape(shape):
            memory.append(off)
            times.append(late)
            print(line, flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    print(f"{len(memory)} points: memory off by at most {max(map(abs, memory)):.1%}, median "
          f"{statistics.median(map(abs, memory)):.1%}; time by at most {max(map(abs, times)):.1%}, "
          f"median {statistics.median(map(abs, times)):.1%}")  # fmt: skip


def _shape(shape: str) -> Iterator[tuple[float, float, str]]:
    """(error of memory, error of time, line) of each point of a shape."""
    device = torch.device("cuda")
    job = Job(shape=shape, batch=1, seq=512, steps=3)
    chosen = backends(job, device)
    config, layout = describe(job)
    groups = ("attn", "gdn", "shared_expert") if job.moe else ()
    found = SimpleNamespace(
        layout=layout,
        checkpoint=SimpleNamespace(config=config),
        decision=SimpleNamespace(architecture=architecture(job)),
        plugins=Plugins.discover().for_model_type("qwen3_5"),
    )
    properties = torch.cuda.get_device_properties(device)
    card = card_of(properties.name, properties.total_memory)
    began = time.perf_counter()
    settings = _settings(1, groups)
    planner = Planner(cast(Identified, found), settings, card, backends=chosen)
    print(f"{shape}: a planner in {time.perf_counter() - began:.1f} s")
    began = time.perf_counter()
    before = torch.cuda.memory_allocated()
    model = adapted(job, device, chosen)
    torch.cuda.synchronize()
    print(f"{shape}: loaded in {time.perf_counter() - began:.1f} s, "
          f"{(torch.cuda.memory_allocated() - before) / 1e9:.3f} GB; plan without optimizer "
          f"{_loaded(planner.static) / 1e9:.3f}; {before / 1e9:.3f} GB were there")  # fmt: skip
    for batch, seq, policy in POINTS[shape]:
        policies = _policies(policy, len(model.trunk.layers))
        plan = planner.plan((seq,) * batch, policies)
        point = replace(job, batch=batch, seq=seq)
        here = _settings(batch, groups)
        loop = Loop(model, rows(point.ids(), here), here, device, recompute=policies)
        try:
            steps = [loop.step(number) for number in range(3)]
        except torch.OutOfMemoryError as error:
            print(f"{shape:8} {batch} x {seq} {policy}: {str(error)[:90]}; plan "
                  f"{plan.peak / 1e9:.2f} GB")  # fmt: skip
            continue
        gb, took = steps[1]["memory_gb"], steps[2]["seconds"]
        off, late = plan.peak / 1e9 / gb - 1, plan.seconds / took - 1
        yield (
            off,
            late,
            (
                f"{shape:8} {batch:>2} x {seq:<5} {policy:18} {plan.peak / 1e9:8.2f} {gb:8.2f} "
                f"{off:+7.1%} {plan.seconds:7.3f} {took:7.3f} {late:+7.1%}  {plan.moment}"
            ),
        )
        del loop
        gc.collect()
        torch.cuda.empty_cache()


def _settings(batch: int, groups: tuple[str, ...]) -> Settings:
    return Settings(
        max_steps=6, per_device_train_batch_size=batch, gradient_accumulation_steps=1,
        max_length=32768, learning_rate=1e-4, warmup_ratio=0.0, r=RANK, lora_alpha=ALPHA,
        target_groups=groups,
    )  # fmt: skip


def _policies(policy: str, layers: int) -> tuple[str, ...]:
    first, _, second = policy.partition("+")
    half = layers // 2
    return (first,) * half + (second or first,) * (layers - half)


def _loaded(static: Any) -> int:
    later = ("optimizer", "gradients", "libraries", "adapters in the run's dtype")
    return sum(size for term, size in static.items() if term not in later)


if __name__ == "__main__":
    main()
