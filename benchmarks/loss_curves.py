"""Compares the loss of qcore and of transformers + peft + bitsandbytes, step by step.

    python benchmarks/loss_curves.py [--shape 0.8b] [--layers 8] [--steps 300] [--peer hf-fla]

A base with random weights is written once, by transformers; every side reads it, puts the same
maps in NF4 and trains on the same rows in the same order, at the same rates, from adapters with
the same values. Rows are walks over a graph of a few hundred tokens, so there is something to
learn. The peer runs with two seeds of the adapters; qcore has the first. Asked is whether qcore
is as far from the peer as the peer is from itself. Each side is a process of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers.shapes import ALPHA, RANK, SHAPES, TARGETS, Job
from train_step_gpu import HERE, VERSIONS, child, commit, installed

WINDOW = 20  #: steps that a curve is averaged over before it is compared
ACTIVE, BRANCHES = 512, 4  #: tokens of the graph, and ways out of each
ENTROPY = math.log(BRANCHES)


def rows(job: Job) -> Any:
    """``[steps, batch, seq]`` int64: walks that take each of a token's ways out alike."""
    import torch

    generator = torch.Generator().manual_seed(7)
    active = min(ACTIVE, job.text["vocab_size"] // 2)
    names = torch.randperm(job.text["vocab_size"] - 320, generator=generator)[:active]
    ways = torch.randint(0, active, (active, BRANCHES), generator=generator)
    at = torch.randint(0, active, (job.steps, job.batch), generator=generator)
    walk = [at]
    for _ in range(job.seq - 1):
        way = torch.randint(0, BRANCHES, at.shape, generator=generator)
        at = ways[at, way]
        walk.append(at)
    return names[torch.stack(walk, -1)]


def initial(seed: int, name: str, shape: Sequence[int]) -> Any:
    """LoRA's A of a map, uniform as in PEFT; by `seed` and the map's name alone."""
    import torch

    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(*shape).uniform_(-bound, bound, generator=generator)


def short(name: str) -> str:
    """``layers.0.mlp.up_proj``, of whatever class and wrapper."""
    return name[name.index("layers.") :].split(".lora_")[0].removesuffix(".weight")


def settings(job: Job, rate: float) -> Any:
    """Of qcore's run; the peer takes its rates from the same schedule."""
    from qcore.config.settings import Settings

    return Settings(
        max_steps=job.steps, per_device_train_batch_size=job.batch, gradient_accumulation_steps=1,
        max_length=job.seq, learning_rate=rate, r=RANK, lora_alpha=ALPHA,
    )  # fmt: skip


def write(job: Job, folder: str) -> list[float]:
    """The base, in bfloat16, under the text class."""
    from peers.transformers_side import causal_lm

    model: Any = causal_lm(job)
    model.save_pretrained(folder)
    return []


def qcore_losses(job: Job, folder: str, seed: int, rate: float, kernels: list[str]) -> list[float]:
    """`Loop.step` on the base as it is loaded from disk."""
    import torch
    from peers.qcore_side import rows as dataset

    from qcore.adapter.targets import targets
    from qcore.nn.kernels.registry import choose, installed
    from qcore.nn.load import load
    from qcore.nn.model import Model, ops_of
    from qcore.nn.qlora.lora_layer import Lora
    from qcore.plugins.resolve_model import identify
    from qcore.training.step import Loop

    device = torch.device(job.device)
    found = identify(folder, generation="3.5")
    wanted = dict(one.split("=", 1) for one in kernels)
    used = ops_of(found.decision.architecture, found.checkpoint.config, found.layout)
    chosen = choose(installed(found.plugins), device, wanted, used)
    print("\n".join(chosen.lines()), file=sys.stderr)
    lora = targets(found.layout, (), Lora(r=RANK, lora_alpha=ALPHA))
    model = Model(
        found.decision.architecture, found.checkpoint.config, found.layout, torch.bfloat16, lora,
        chosen,
    )  # fmt: skip
    load(model, found.layout, found.checkpoint, device=device, quantize=True)
    for name, module in model.adapters():
        a, b = module.lora_shapes(RANK)
        value = initial(seed, short(name), a).to(device)
        module.set_lora(value, torch.zeros(b, device=device), trained=True)
    given = settings(job, rate)
    loop = Loop(model, dataset(rows(job), given), given, device, recompute=job.policy)
    return [float(loop.step(step)["loss"]) for step in range(job.steps)]


def peer_losses(job: Job, folder: str, seed: int, rate: float, fla: bool) -> list[float]:
    """The stock stack as its documentation has it."""
    import torch
    from peers.transformers_side import KEPT, adapted, hide_fla

    if not fla:
        hide_fla()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qcore.data.sampler import Schedule
    from qcore.training.lr_schedule import learning_rate

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=list(KEPT),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.bfloat16,
        device_map={"": job.device},
    )  # fmt: skip
    model.config.use_cache = False
    model = adapted(job, model)
    kinds = {n: type(m).__name__ for n, m in model.named_modules()}
    held = sorted(n for n, kind in kinds.items() if kind == "Linear4bit" and "base_layer" in n)
    expected = {f".{name}" for name in TARGETS}
    assert all(any(n.removesuffix(".base_layer").endswith(t) for t in expected) for n in held), held
    count = 0
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data.copy_(initial(seed, short(name), parameter.shape))
            count += 1
        elif "lora_B" in name:
            parameter.data.zero_()
    assert count == len(held), f"{count} adapters, {len(held)} maps in 4 bit"
    trained = [p for p in model.parameters() if p.requires_grad]
    device = torch.device(job.device)
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=device.type == "cuda")
    data, losses = rows(job), []
    chosen = settings(job, rate)
    total = Schedule(job.steps * job.batch, chosen).total
    for step in range(job.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(chosen, step, total)
        ids = data[step].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses


def main() -> None:
    """Parse, then either train one side or run all in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.8b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--policy", default="elementwise")
    parser.add_argument("--kernels", action="append", default=[], metavar="OP=BACKEND")
    parser.add_argument("--peer", choices=("hf", "hf-fla"), default="hf")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--timeout", type=int, default=540)
    parser.add_argument("--save", help="name of the file under benchmarks/results")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print("RESULT " + json.dumps({"losses": _run(given)}), flush=True)
        return
    lines = report(given)
    print("\n".join(lines))
    if given.save:
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / f"{given.save}.txt").write_text("\n".join(lines) + "\n", "utf-8")


def _run(given: argparse.Namespace) -> list[float]:
    """The body of a child process."""
    side, _, rest = given.side.partition(":")
    seed, _, folder = rest.partition(":")
    job = Job(
        shape=given.shape, layers=given.layers, batch=given.batch, seq=given.seq,
        steps=given.steps, device=given.device, policy=given.policy, quantize=side != "write",
    )  # fmt: skip
    if side == "write":
        return write(job, folder)
    if side == "qcore":
        return qcore_losses(job, folder, int(seed), given.rate, given.kernels)
    return peer_losses(job, folder, int(seed), given.rate, side == "hf-fla")


def report(given: argparse.Namespace) -> list[str]:
    """Run the sides; the curves, their distances, and what that says."""
    lines = [
        f"{time.strftime('%Y-%m-%d %H:%M')} commit {commit()}; {' '.join(sys.argv[1:])}",
        ", ".join(f"{name} {found}" for name in VERSIONS if (found := installed(name))),
        f"{given.shape}, {given.layers} layers, {given.steps} steps of {given.batch} x "
        f"{given.seq} tokens, rate {given.rate:g}; the rows' own entropy is {ENTROPY:.3f}",
    ]
    curves: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="qcore-bench-") as temporary:
        caches, base = Path(temporary), Path(temporary) / "base"
        for side in ("write:0", "qcore:1", f"{given.peer}:1", f"{given.peer}:2"):
            result = child(__file__, f"{side}:{base}", caches, given.timeout)
            if "failed" in result:
                return [*lines, f"{side}: FAILED: {result['failed']}"]
            curves[side] = result["losses"]
    del curves["write:0"]
    lines.append(f"{'steps':>12}" + "".join(f"{side:>12}" for side in curves))
    for at in range(0, given.steps, WINDOW):
        means = [statistics.mean(curve[at : at + WINDOW]) for curve in curves.values()]
        lines.append(
            f"{f'{at + 1}-{min(at + WINDOW, given.steps)}':>12}"
            + "".join(f"{mean:>12.4f}" for mean in means)
        )
    ours, peer, other = curves.values()
    for what, pick in (("mean over steps", statistics.mean), ("worst window", max)):
        apart, spread = (_apart(one, peer, what) for one in (ours, other))
        verdict = "within" if pick(apart) <= pick(spread) else "OUTSIDE"
        lines.append(
            f"{what}: qcore differs from the peer by {pick(apart):.4f}, the peer's two seeds by "
            f"{pick(spread):.4f}: {verdict}"
        )
    return lines


def _apart(one: list[float], two: list[float], what: str) -> list[float]:
    """Absolute differences, by step or of the means of windows."""
    if what == "mean over steps":
        return [abs(a - b) for a, b in zip(one, two, strict=True)]
    starts = range(0, len(one), WINDOW)
    mean = statistics.mean
    return [abs(mean(one[at : at + WINDOW]) - mean(two[at : at + WINDOW])) for at in starts]


if __name__ == "__main__":
    main()
