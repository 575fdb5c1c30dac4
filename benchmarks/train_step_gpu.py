r"""Times one QLoRA training step on a GPU: qcore and every installed peer, in one run.

    python benchmarks/train_step_gpu.py --shape 4b --batch 2 --seq 4096 \
        --peers hf,hf-fla,unsloth --policy elementwise [--rounds 2] [--profile]

Every side runs in processes of its own, in turn (A B A B), on the same token ids, with LoRA of
rank 16 on the same ten kinds of linear map, NF4 with double quantization, AdamW and random
weights made on the device. ``--policy`` and ``--kernels op=backend`` are qcore's; several
policies, comma-separated, are several sides. Each round's first process starts with the caches
of the one before it; the first round's are empty, which is where the time of the first step is
read. The GPU's rates are measured before and after.

Prints a table and writes it to ``--save NAME`` under ``benchmarks/results/``. With ``--device
cpu --shape tiny`` it shows that the harness runs, and no figure of it means anything.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peers.shapes import SHAPES, Job

HERE = Path(__file__).resolve().parent
#: Modules that a peer cannot run without.
NEEDS = {
    "hf": ("transformers", "peft", "bitsandbytes"),
    "hf-fla": ("transformers", "peft", "bitsandbytes", "fla"),
    "unsloth": ("unsloth", "unsloth_zoo", "transformers", "peft", "bitsandbytes"),
}
VERSIONS = (
    "torch", "triton", "transformers", "peft", "bitsandbytes", "flash-linear-attention", "fla-core",
    "tilelang", "flash-qla", "unsloth", "unsloth_zoo",
)  # fmt: skip
POLICIES = ("none", "elementwise", "full", "offload", "auto")
PEAK_TFLOPS = 989.4  #: bf16 of an H100 or H200 by the datasheet, dense
Result = dict[str, Any]


def main() -> None:
    """Parse, then either measure one side or run all in turn."""
    given = _arguments()
    if given.side:
        # Where it was, should the parent lose patience.
        faulthandler.dump_traceback_later(max(1, given.timeout - 3))
        print("RESULT " + json.dumps(_measure(given)), flush=True)
        return
    lines = list(_report(given))
    if given.save:
        folder = HERE / "results"
        folder.mkdir(exist_ok=True)
        (folder / f"{given.save}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    parser.add_argument("--layers", type=int, default=0, help="of a slice; 0: all")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--packed", help="rows x tokens, e.g. 32x256: in place of batch and seq")
    parser.add_argument("--peers", default="", help=f"of {', '.join(NEEDS)}; comma-separated")
    parser.add_argument("--policy", default="elementwise", help=f"of {', '.join(POLICIES)}")
    parser.add_argument("--kernels", action="append", default=[], metavar="OP=BACKEND")
    parser.add_argument("--expert-rank", type=int, default=0)
    parser.add_argument("--no-quant", action="store_true", help="bf16 weights")
    parser.add_argument("--no-checkpoint", action="store_true", help="peers keep activations")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a process")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--timeout", type=int, default=540, help="seconds a process may take")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--profile", action="store_true", help="print kernels by GPU time")
    parser.add_argument("--save", help="name of the file under benchmarks/results")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.packed:
        given.batch, given.seq = map(int, given.packed.split("x"))
    given.policies = given.policy.split(",")
    if unknown := set(given.policies) - set(POLICIES):
        parser.error(f"--policy: {', '.join(sorted(unknown))}: expected {', '.join(POLICIES)}")
    given.peers = [name for name in given.peers.split(",") if name]
    if unknown := set(given.peers) - set(NEEDS):
        parser.error(f"--peers: {', '.join(sorted(unknown))}: expected {', '.join(NEEDS)}")
    return given


def _job(given: argparse.Namespace, policy: str) -> Job:
    return Job(
        shape=given.shape, layers=given.layers, batch=given.batch, seq=given.seq,
        steps=given.steps, device=given.device, policy=policy, kernels=tuple(given.kernels),
        expert_rank=given.expert_rank, checkpoint=not given.no_checkpoint,
        quantize=not given.no_quant, profile=given.profile,
    )  # fmt: skip


def _measure(given: argparse.Namespace) -> Result:
    """The body of a child process."""
    side, _, policy = given.side.partition(":")
    if side == "card":
        from peers.measure import card

        return card()
    from peers.measure import measure

    job = _job(given, policy or "full")
    if side == "qcore":
        from peers.qcore_side import make

        return measure(job, make)
    if side == "unsloth":
        from peers import unsloth_side

        return measure(job, unsloth_side.make)
    from peers import transformers_side

    return measure(job, transformers_side.hf_fla if side == "hf-fla" else transformers_side.hf)


def child(script: str, side: str, caches: Path, timeout: int) -> Result:
    """One side of `script` in a process of its own; ``{"failed": why}`` if it did not end well."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join([str(HERE), *(str(Path(p).resolve()) for p in given if p)])
    environment = os.environ | {
        "PYTHONPATH": path, "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TILELANG_CACHE_DIR": str(caches / "tilelang"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, str(Path(script).resolve()), *sys.argv[1:], "--side", side]
    return result_of(command, environment, caches, timeout)


def result_of(
    command: list[str], environment: dict[str, str], folder: Path, timeout: int
) -> Result:
    """What a process that measures a side prints; ``{"failed": why}`` if it did not end well.

    Args:
        command: the process, run in `folder`: what a peer compiles or writes beside itself goes
            where the caches are.
        environment: all of its variables.
        folder: of the caches.
        timeout: seconds that it may take.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment,
            timeout=timeout, cwd=folder,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        text = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else ""
        print("\n".join(text.splitlines()[-12:]), file=sys.stderr)
        return {"failed": f"no result after {timeout} s"}
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode == 0 and found:
        result: Result = json.loads(found[-1].removeprefix("RESULT "))
        return result
    tail = [line for line in done.stderr.splitlines() if line.strip()][-12:]
    print("\n".join(tail), file=sys.stderr)
    return {"failed": tail[-1][:300] if tail else f"exit code {done.returncode}"}


def _report(given: argparse.Namespace) -> Iterator[str]:
    """Run everything; yield the lines of the report, each printed as soon as it is known."""

    def say(line: str) -> str:
        print(line, flush=True)
        return line

    job = _job(given, given.policies[0])
    yield say(f"{time.strftime('%Y-%m-%d %H:%M')} commit {commit()}; {' '.join(sys.argv[1:])}")
    yield say(", ".join(f"{name} {found}" for name in VERSIONS if (found := installed(name))))
    yield say(
        f"{job.shape}, {job.text['num_hidden_layers']} layers, {job.batch} x {job.seq} tokens, "
        f"{job.active / 1e9:.3f} G weights met by a token (N)"
    )
    sides = [f"qcore:{policy}" for policy in given.policies]
    for peer in given.peers:
        absent = [name for name in NEEDS[peer] if importlib.util.find_spec(name) is None]
        if absent:
            yield say(f"{peer}: not installed here ({', '.join(absent)}), not measured")
        else:
            sides.append(peer)
    results: dict[str, list[Result]] = {side: [] for side in sides}
    rate = PEAK_TFLOPS
    with tempfile.TemporaryDirectory(prefix="qcore-bench-") as folder:
        if given.device == "cuda":
            measured = child(__file__, "card", Path(folder), 120)
            rate = measured.get("matmul_tflops", PEAK_TFLOPS)
            yield say(_card(measured))
        for _ in range(given.rounds):
            for side in sides:
                caches = Path(folder) / side.replace(":", "-")
                caches.mkdir(exist_ok=True)
                result = child(__file__, side, caches, given.timeout)
                results[side].append(result)
                yield say(_at_once(side, result))
        if given.device == "cuda":
            yield say(_card(child(__file__, "card", Path(folder), 120)))
    for line in (*_table(job, results, rate), *_ratios(results), *_profiles(given, results)):
        yield say(line)


def _at_once(side: str, result: Result) -> str:
    """What a process gave, said as soon as it ends: a report that is cut off keeps it."""
    if "failed" in result:
        return f"{side}: FAILED: {result['failed']}"
    return (
        f"{side}: {result['median_s']:.4f} s/step, {result['tokens_per_s']:.0f} tokens/s, "
        f"peak {result['peak_bytes'] / 1e9:.2f} GB, first step {result['first_step_s']:.1f} s"
    )


def _card(found: Result) -> str:
    if "failed" in found:
        return f"card: {found['failed']}"
    return (
        f"{found['name']}: 8192^3 bf16 {found['matmul_tflops']:.0f} TFLOP/s, "
        f"copy {found['copy_tb_s']:.2f} TB/s"
    )


def _good(results: list[Result]) -> list[Result]:
    return [one for one in results if "failed" not in one]


def _table(job: Job, results: dict[str, list[Result]], rate: float) -> Iterator[str]:
    """A line a side: the median over all timed steps of all rounds."""
    yield (
        f"{'side':<19}{'s/step':>8}{'min':>8}{'max':>8}{'tokens/s':>10}{'MFU':>6}{'of mm':>7}"
        f"{'peak GB':>9}{'GiB':>7}{'base GB':>9}{'1st step':>10}{'launches':>10}{'/layer':>8}"
        f"{'busy ms':>9}{'loss':>9}"
    )
    for side, rounds in results.items():
        good = _good(rounds)
        if not good:
            continue
        seconds = [one for result in good for one in result["seconds"]]
        median = statistics.median(seconds)
        flops = 4 * job.active * job.tokens / median / 1e12
        peak = max(result["peak_bytes"] for result in good)
        last = good[-1]
        launches = last.get("launches", 0)
        yield (
            f"{side:<19}{median:>8.4f}{min(seconds):>8.4f}{max(seconds):>8.4f}"
            f"{job.tokens / median:>10.0f}{flops / PEAK_TFLOPS:>6.2f}{flops / rate:>7.2f}"
            f"{peak / 1e9:>9.2f}{peak / 2**30:>7.2f}{last['base_bytes'] / 1e9:>9.2f}"
            f"{good[0]['first_step_s']:>9.1f}s{launches:>10}"
            f"{launches / job.text['num_hidden_layers']:>8.1f}{last.get('busy_ms', 0):>9.1f}"
            f"{last['first_loss']:>9.3f}"
        )
    yield (
        f"MFU: 4 N operations a token over {PEAK_TFLOPS:.0f} TFLOP/s; of mm: over the measured "
        "product. launches: kernels of a step, copies aside; 1st step: with cold caches."
    )


def _ratios(results: dict[str, list[Result]]) -> Iterator[str]:
    """How many times as fast as each peer, round by round."""
    mine = [side for side in results if side.startswith("qcore")]
    for side in mine:
        for peer in [other for other in results if other not in mine]:
            pairs = [
                theirs["median_s"] / ours["median_s"]
                for ours, theirs in zip(results[side], results[peer], strict=True)
                if "failed" not in ours and "failed" not in theirs
            ]
            if pairs:
                each = ", ".join(f"{ratio:.2f}" for ratio in pairs)
                yield f"{side} is {statistics.median(pairs):.2f}x {peer} ({each})"


def _profiles(given: argparse.Namespace, results: dict[str, list[Result]]) -> Iterator[str]:
    for side, rounds in results.items():
        good = _good(rounds)
        if not good:
            continue
        last = good[-1]
        yield f"{side}: built and loaded in {good[0]['load_s']:.1f} s"
        for note in last["notes"]:
            yield f"{side}: {note}"
        if not last.get("groups"):
            continue
        shares = "; ".join(
            f"{name} {ms:.1f} ms ({int(count)})" for name, (ms, count) in last["groups"].items()
        )
        yield f"{side}: {shares}"
        if given.profile:
            for name, ms, count in last["kernels"]:
                yield f"  {ms:>9.2f} ms {count:>6}  {name[:110]}"


def commit() -> str:
    """Of the tree that is measured; ``QCORE_COMMIT`` where it was copied without its history."""
    if given := os.environ.get("QCORE_COMMIT"):
        return given
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def installed(name: str) -> str | None:
    """Its version."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
