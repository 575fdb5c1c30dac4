"""Compares the peak memory and step time that the planner predicts with those measured on a GPU.

    python benchmarks/plan_check_gpu.py [--shapes 0.8b,4b,9b,35b-a3b] [--layers 0] [--save NAME]

Twenty points in one process: four models at their published sizes on random weights made on the
device, 512 to 32,768 tokens, all four policies and a mixture of two. A point is planned from the
config alone; then four steps of the training loop are run, the most of
``max_memory_allocated`` of the last three and the median of their times are set beside the plan.
Time is a model; 15 % is what to expect of it. ``--layers`` takes that many layers of each shape,
and says so: then the points are not those of whole models.

The last line is RESULT and JSON. With ``--device cpu --shapes tiny,tiny-moe`` it shows that the
harness runs, and no figure of it means anything.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from peers.qcore_side import adapted, architecture, backends, describe, rows
from peers.shapes import ALPHA, RANK, Job

from qcore.config.settings import Settings
from qcore.nn.device import is_out_of_memory
from qcore.nn.model import Model
from qcore.planning import Planner
from qcore.planning.run import Room, room_of
from qcore.planning.static import LIBRARIES
from qcore.plugins.manager import Plugins
from qcore.plugins.resolve_model import Identified
from qcore.training.step import Loop

STEPS = 4  #: of a point; the first compiles and warms up
SHAPES = ("0.8b", "4b", "9b", "35b-a3b")
#: Shape -> (rows, tokens of each, policy; two policies: half of the layers each).
POINTS: dict[str, list[tuple[int, int, str]]] = {
    "0.8b": [
        (1, 512, "none"), (4, 2048, "elementwise"), (1, 8192, "none"), (8, 1024, "full"),
        (1, 32768, "offload"),
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
    "tiny": [
        (2, 33, "none"), (1, 65, "elementwise"), (1, 65, "full+elementwise"), (1, 65, "offload"),
    ],
    "tiny-moe": [(1, 65, "full")],
}  # fmt: skip

Point = dict[str, Any]


def main() -> None:
    """Print a line a point, then the worst."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--layers", type=int, default=0, help="of each shape; 0: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--save", help="file name under benchmarks/results/")
    given = parser.parse_args()
    device = torch.device(given.device)
    points: list[Point] = []
    lines = [_machine(device)]
    if given.layers:
        lines.append(f"SLICES of {given.layers} layers, not whole models")
    lines.append(
        f"{'shape':8} {'tokens':>10} {'policy':18} {'plan GB':>8} {'GB':>8} {'off':>7} "
        f"{'plan s':>7} {'s':>7} {'off':>7} {'took':>6}  moment"
    )
    print("\n".join(lines), flush=True)
    try:
        for shape in given.shapes.split(","):
            for point in _shape(Job(shape=shape, layers=given.layers, device=given.device)):
                points.append(point)
                lines.append(_line(point))
                print(lines[-1], flush=True)
            _clear()
    finally:  # what is there is told, whatever stopped it
        lines += _ending(points, given)
        print("\n".join(lines[-2:]), flush=True)
        if given.save:
            path = Path(__file__).parent / "results" / given.save
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _machine(device: torch.device) -> str:
    if device.type != "cuda":
        return f"cpu, torch {torch.__version__}: no figure means anything"
    card = torch.cuda.get_device_properties(device)
    return f"{card.name}, torch {torch.__version__}, {card.total_memory / 1e9:.1f} GB"


def _clear() -> None:
    """Give back what the last loop or model had; a loop freezes what lies there when it is made."""
    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _shape(job: Job) -> Iterator[Point]:
    """The points of a shape."""
    device = torch.device(job.device)
    chosen = backends(job, device)
    config, layout = describe(job)
    found = SimpleNamespace(
        layout=layout,
        checkpoint=SimpleNamespace(config=config),
        decision=SimpleNamespace(architecture=architecture(job)),
        plugins=Plugins.discover().for_model_type("qwen3_5"),
        modality=None,
    )
    # Of one that is full of something else the budget says so; the plan is not to be blamed.
    room = room_of(device)
    began = time.perf_counter()
    planner = Planner(
        cast(Identified, found), _settings(job), room.card, backends=chosen, budget=room.budget
    )
    print(f"{job.shape}: a planner in {time.perf_counter() - began:.1f} s")
    began, before = time.perf_counter(), _allocated(device)
    model = adapted(job, device, chosen)
    print(
        f"{job.shape}: loaded in {time.perf_counter() - began:.1f} s, "
        f"{(_allocated(device) - before) / 1e9:.3f} GB; plan without optimizer "
        f"{_loaded(planner.static) / 1e9:.3f}; {before / 1e9:.3f} GB were there",
        flush=True,
    )
    # Libraries' workspace is a term of the plan; what else lay there is not the steps'.
    stray = max(0, before - LIBRARIES)
    for batch, seq, policy in POINTS[job.shape]:
        point = replace(job, batch=batch, seq=seq, steps=STEPS)
        yield _point(point, policy, planner, model, room, stray)
        _clear()


def _point(job: Job, policy: str, planner: Planner, model: Model, room: Room, stray: int) -> Point:
    """Plan it, then run it."""
    began = time.perf_counter()
    policies = _policies(policy, len(model.trunk.layers))
    plan = planner.plan((job.seq,) * job.batch, policies)
    point: Point = {
        "shape": job.shape, "layers": len(policies), "rows": job.batch, "length": job.seq,
        "policy": policy, "plan_bytes": plan.peak, "plan_seconds": plan.seconds,
        "fits": plan.fits if room.limited else None, "moment": plan.moment,
    }  # fmt: skip
    device, settings = torch.device(job.device), _settings(job)
    try:
        loop = Loop(model, rows(job.ids(), settings), settings, device, recompute=policies)
        steps = [loop.step(number) for number in range(STEPS)][1:]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return point | {"error": str(error)[:120], "took": time.perf_counter() - began}
    measured = round(max(step["memory_gb"] for step in steps) * 1e9) - stray
    seconds = statistics.median(step["seconds"] for step in steps)
    return point | {
        "bytes": measured, "seconds": seconds, "off": plan.peak / measured - 1,
        "late": plan.seconds / seconds - 1, "took": time.perf_counter() - began,
    }  # fmt: skip


def _line(point: Point) -> str:
    start = (
        f"{point['shape']:8} {point['rows']:>2} x {point['length']:<5} {point['policy']:18} "
        f"{point['plan_bytes'] / 1e9:8.2f}"
    )
    if "error" in point:
        said = "the plan said it fits" if point["fits"] else "as the plan said"
        return f"{start} OUT OF MEMORY, {said}: {point['error']}"
    return (
        f"{start} {point['bytes'] / 1e9:8.2f} {point['off']:+7.1%} {point['plan_seconds']:7.3f} "
        f"{point['seconds']:7.3f} {point['late']:+7.1%} {point['took']:5.1f}s  {point['moment']}"
    )


def _ending(points: list[Point], given: argparse.Namespace) -> list[str]:
    """The worst in words, and the result."""
    ran = [point for point in points if "error" not in point]
    wrong = [point for point in points if "error" in point and point["fits"]]
    result: dict[str, Any] = {
        "machine": _machine(torch.device(given.device)), "layers": given.layers,
        "points": points, "ran": len(ran), "out_of_memory_though_it_fits": len(wrong),
    }  # fmt: skip
    words = f"{len(ran)} of {len(points)} points ran"
    for name, what in (("off", "memory"), ("late", "time")):
        errors = [abs(point[name]) for point in ran]
        if errors:
            result[f"{what}_error_max"] = round(max(errors), 4)
            result[f"{what}_error_median"] = round(statistics.median(errors), 4)
            words += f"; {what} off by at most {max(errors):.1%}, median "
            words += f"{statistics.median(errors):.1%}"
    words += f"; out of memory though the plan said it fits: {len(wrong)}"
    return [words, "RESULT " + json.dumps(result)]


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(device)


def _settings(job: Job) -> Settings:
    groups = ("attn", "gdn", "shared_expert") if job.moe else ()
    return Settings(
        max_steps=STEPS + 3, per_device_train_batch_size=job.batch, gradient_accumulation_steps=1,
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
