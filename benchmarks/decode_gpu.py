"""Decoding on a GPU, batch 1, greedy: tokens/s of qcore and of transformers, beside the floor.

    python benchmarks/decode_gpu.py [--shape 4b] [--prompt 128] [--tokens 128] [--peers hf]

Weights are random and bf16. A side decodes a short and a long answer to the same prompt; the time
of a token is the difference over the difference, so that prefill is not in it. The floor is the
time in which the card reads every weight once, at the rate of a copy that is measured in the same
run. Every side is a process of its own. ``--device cpu --shape tiny`` shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peers.shapes import SHAPES, Job
from train_step_gpu import HERE, VERSIONS, child, commit, installed

Decode = Callable[[int], int]  #: decodes so many tokens, returns how many came


def qcore_decode(job: Job, prompt: list[int]) -> Decode:
    """`Generator.decode` on a model that was filled in place: its loading from disk is left out."""
    import torch
    from peers.qcore_side import architecture, backends, describe, fill

    from qcore.generate import Generator
    from qcore.model import Model

    device = torch.device(job.device)
    config, layout = describe(job)
    chosen = backends(job, device)
    model = Model(architecture(job), config, layout, torch.bfloat16, {}, chosen).eval()
    fill(layout, model, device, quantize=job.quantize)
    generator = Generator.__new__(Generator)
    generator.device, generator.model = device, model
    generator.chat = SimpleNamespace(stop_tokens=())  # type: ignore[assignment]
    generator.found = SimpleNamespace(checkpoint=SimpleNamespace(path=Path("random")))  # type: ignore[assignment]
    generator.tokenizer = SimpleNamespace(  # type: ignore[assignment]
        get_added_tokens_decoder=dict,
        get_vocab_size=lambda with_added_tokens: job.text["vocab_size"],
    )
    return lambda tokens: len(generator.decode(prompt, tokens, 0.0, 0)[0])


def hf_decode(job: Job, prompt: list[int]) -> Decode:
    """`generate` of transformers, eager, with its own cache."""
    import torch
    from peers.transformers_side import causal_lm, hide_fla

    hide_fla()
    model: Any = causal_lm(job).eval()
    ids = torch.tensor([prompt], device=job.device)

    def decode(tokens: int) -> int:
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
            min_new_tokens=tokens, do_sample=False, use_cache=True, pad_token_id=0,
        )  # fmt: skip
        return int(out.shape[1]) - len(prompt)

    return decode


SIDES = {"qcore": qcore_decode, "hf": hf_decode}


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """The body of a child process."""
    import torch

    if given.side == "card":
        from peers.measure import card

        return card()
    job = Job(
        shape=given.shape, layers=given.layers, device=given.device, quantize=False,
        kernels=tuple(given.kernels),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    most = job.text["vocab_size"] - 320
    prompt = torch.randint(0, most, (given.prompt,), generator=generator).tolist()
    decode = SIDES[given.side](job, prompt)
    short = max(1, given.tokens // 4)
    began = time.perf_counter()
    decode(short)
    first = time.perf_counter() - began

    def timed(tokens: int) -> float:
        if given.device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        assert decode(tokens) == tokens
        if given.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    decode(given.tokens)
    each = [
        (timed(given.tokens) - timed(short)) / (given.tokens - short) for _ in range(given.repeat)
    ]
    peak = torch.cuda.max_memory_allocated() if given.device == "cuda" else 0
    return {"token_s": each, "first_s": first, "peak_bytes": peak}


def main() -> None:
    """Parse, then either measure one side or run all in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peers", default="hf", help="hf, or nothing")
    parser.add_argument("--kernels", action="append", default=[], metavar="OP=BACKEND")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--timeout", type=int, default=540)
    parser.add_argument("--save", help="name of the file under benchmarks/results")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print("RESULT " + json.dumps(measure(given)), flush=True)
        return
    lines = report(given)
    print("\n".join(lines))
    if given.save:
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / f"{given.save}.txt").write_text("\n".join(lines) + "\n", "utf-8")


def report(given: argparse.Namespace) -> list[str]:
    """Run the sides and say what came out."""
    job = Job(shape=given.shape, layers=given.layers)
    weights = 2 * job.active
    lines = [
        f"{time.strftime('%Y-%m-%d %H:%M')} commit {commit()}; {' '.join(sys.argv[1:])}",
        ", ".join(f"{name} {found}" for name in VERSIONS if (found := installed(name))),
    ]
    floor, rates = None, {}
    with tempfile.TemporaryDirectory(prefix="qcore-bench-") as folder:
        caches = Path(folder)
        if given.device == "cuda":
            card = child(__file__, "card", caches, 120)
            floor = card["copy_tb_s"] * 1e12 / weights
            lines.append(
                f"{card['name']}: copy {card['copy_tb_s']:.2f} TB/s; {weights / 1e9:.2f} GB of "
                f"weights a token: at most {floor:.0f} tokens/s"
            )
        for side in ("qcore", *[peer for peer in given.peers.split(",") if peer]):
            result = child(__file__, side, caches, given.timeout)
            if "failed" in result:
                lines.append(f"{side}: FAILED: {result['failed']}")
                continue
            rates[side] = 1 / statistics.median(result["token_s"])
            share = f", {100 * rates[side] / floor:.0f} % of the floor" if floor else ""
            lines.append(
                f"{side}: {rates[side]:.1f} tokens/s{share}; first answer after "
                f"{result['first_s']:.1f} s; peak {result['peak_bytes'] / 1e9:.2f} GB"
            )
    if "qcore" in rates:
        for side, rate in rates.items():
            if side != "qcore":
                lines.append(f"qcore is {rates['qcore'] / rate:.2f}x {side}")
    return lines


if __name__ == "__main__":
    main()
