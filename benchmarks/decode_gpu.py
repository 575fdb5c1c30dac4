"""Times greedy decoding on a GPU, batch 1: qcore, transformers, and the memory-bandwidth bound.

    python benchmarks/decode_gpu.py [--shape 4b] [--prompt 128] [--tokens 64] [--peers hf]

Weights are random and bf16. A side decodes a short and a long answer to the same prompt; the time
of a token is the difference over the difference, so that prefill is not in it, nor what a first
token prepares, which is told apart. The floor is the time in which the GPU reads every weight
once, at the rate of a copy that is measured in the same run. Every side is a process of its own.
``--profile`` lists the kernels of qcore's token. ``--device cpu --shape tiny`` shows that it runs.
The last lines are RESULT and JSON, one a side.
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
from typing import Any

from peers.shapes import SHAPES, Job
from train_step_gpu import HERE, VERSIONS, child, commit, installed

Decode = Callable[[int], int]  #: decodes so many tokens, returns how many came


def qcore_decode(job: Job, prompt: list[int]) -> Decode:
    """`generate.decode` on a model that was filled in place: its loading from disk is left out."""
    import torch
    from peers.qcore_side import architecture, backends, describe, fill

    from qcore.inference.decoder import Decoder, way_of
    from qcore.inference.sampling import decode
    from qcore.nn.model import Model

    device = torch.device(job.device)
    config, layout = describe(job)
    chosen = backends(job, device)
    model = Model(architecture(job), config, layout, torch.bfloat16, {}, chosen).eval()
    fill(layout, model, device, quantize=job.quantize)
    decoder, known = Decoder(model, device, way_of(chosen)[0]), job.text["vocab_size"]
    return lambda tokens: len(decode(decoder, prompt, tokens, known=known)[0])


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


#: Repetitions to each that is asked for: where a token is short, its time varies by as much.
OFTEN = {"qcore": 4, "hf": 1}
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
        (timed(given.tokens) - timed(short)) / (given.tokens - short)
        for _ in range(given.repeat * OFTEN[given.side])
    ]
    peak = torch.cuda.max_memory_allocated() if given.device == "cuda" else 0
    result = {"token_s": each, "first_s": first, "peak_bytes": peak}
    if given.profile and given.side == "qcore" and given.device == "cuda":
        result["kernels"] = kernels(decode, short, given.tokens)
    return result


def kernels(decode: Decode, short: int, tokens: int) -> list[tuple[str, float, float]]:
    """Name, ms a token and launches a token of each kernel, the longest first.

    Of a long answer less a short one. Under the profiler kernels do not follow each other as
    closely as they do without; what one of them takes is as it is.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    held: dict[str, list[float]] = {}
    for count, sign in ((short, -1), (tokens, 1)):
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            decode(count)
            torch.cuda.synchronize()
        for event in profiler.events() or ():
            if event.device_type.name == "CUDA":
                found = held.setdefault(event.name, [0.0, 0.0])
                found[0] += sign * event.time_range.elapsed_us() / 1e3
                found[1] += sign
    more = tokens - short
    rows = [(name[:90], ms / more, count / more) for name, (ms, count) in held.items()]
    return sorted(rows, key=lambda row: -row[1])[:30]


def main() -> None:
    """Parse, then either measure one side or run all in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peers", default="hf", help="hf, or nothing")
    parser.add_argument("--kernels", action="append", default=[], metavar="OP=BACKEND")
    parser.add_argument("--profile", action="store_true", help="list the kernels of qcore's")
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
    floor, medians, results = None, {}, []
    with tempfile.TemporaryDirectory(prefix="qcore-bench-") as folder:
        caches = Path(folder)
        if given.device == "cuda":
            card = child(__file__, "card", caches, 120)
            floor = weights / card["copy_tb_s"] / 1e12
            lines.append(
                f"{card['name']}: copy {card['copy_tb_s']:.2f} TB/s; {weights / 1e9:.2f} GB of "
                f"weights a token: at least {1e3 * floor:.2f} ms, at most {1 / floor:.0f} tokens/s"
            )
        for side in ("qcore", *[peer for peer in given.peers.split(",") if peer]):
            result = child(__file__, side, caches, given.timeout)
            if "failed" in result:
                lines.append(f"{side}: FAILED: {result['failed']}")
                results.append({"side": side, "failed": result["failed"]})
                continue
            medians[side] = statistics.median(result["token_s"])
            lines += told(side, medians[side], floor, result)
            results.append(
                {
                    "side": side, "shape": given.shape, "ms_per_token": 1e3 * medians[side],
                    "tokens_per_s": 1 / medians[side],
                    "of_floor": floor / medians[side] if floor else None,
                    "first_s": result["first_s"], "peak_bytes": result["peak_bytes"],
                }
            )  # fmt: skip
    for side, median in medians.items():
        if "qcore" in medians and side != "qcore":
            lines.append(f"qcore is {median / medians['qcore']:.2f}x {side}")
            results.append({"ratio_to": side, "ratio": median / medians["qcore"]})
    return lines + ["RESULT " + json.dumps(one) for one in results]


def told(side: str, median: float, floor: float | None, result: dict[str, Any]) -> list[str]:
    """A side's figures in words, and its kernels where they were listed."""
    share = f", {100 * floor / median:.0f} % of the floor" if floor else ""
    lowest, highest = (1e3 * edge(result["token_s"]) for edge in (min, max))
    lines = [
        f"{side}: {1e3 * median:.2f} ms a token ({lowest:.2f} to {highest:.2f}), "
        f"{1 / median:.1f} tokens/s{share}; first answer after {result['first_s']:.1f} s; peak "
        f"{result['peak_bytes'] / 1e9:.2f} GB"
    ]
    if rows := result.get("kernels"):
        busy, count = sum(ms for _, ms, _ in rows), sum(launches for _, _, launches in rows)
        lines.append(f"  kernels of a token: {busy:.3f} ms in {count:.0f} launches")
        lines += [f"  {ms:8.4f} ms {launches:6.1f}  {name}" for name, ms, launches in rows]
    return lines


if __name__ == "__main__":
    main()
