r"""Compares a training step of this checkout with that of another one, in turn on one GPU.

    git archive v0.1 | tar -x -C OTHER
    python benchmarks/step_pair_gpu.py --against OTHER --shape 4b --batch 2 --seq 4096
    python benchmarks/step_pair_gpu.py --against OTHER --shape 35b-a3b --batch 1 --seq 8192 \
        --expert-rank 4

Neither checkout needs an install (`checkout`). Each one runs its own ``train_step_gpu.py`` in
processes of its own, A B A B: so modules may have other names in the other one. Token ids and
weights are the same in both. A checkout's processes share its caches; the first of them starts
with empty ones, which is where the time of the first step is read.

Prints what every process measured as soon as it ends, a table, and the ratio. Exit status 1
where a process failed, or where this checkout is slower or takes more memory by more than
``--within`` percent. With ``--device cpu --shape tiny`` it shows that the harness runs, and no
figure of it means anything.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from checkout import ROOT, python_path
from peers.shapes import SHAPES
from train_step_gpu import HERE, POLICIES, VERSIONS, Result, commit, installed, result_of

GIB = 2**30


@dataclass(slots=True)
class Checkout:
    """One of the two, and what its processes measured."""

    name: str
    root: Path
    commit: str
    results: list[Result] = field(default_factory=list)

    def process(self, given: argparse.Namespace, side: str, caches: Path) -> Result:
        """One process of it."""
        folder = caches / self.name
        folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "PYTHONPATH": python_path(self.root, folder / "metadata"), "HF_HUB_OFFLINE": "1",
            "TRITON_CACHE_DIR": str(folder / "triton"), "XDG_CACHE_HOME": str(folder / "xdg"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        }  # fmt: skip
        script = self.root / "benchmarks" / "train_step_gpu.py"
        command = [
            sys.executable, str(script), "--shape", given.shape, "--layers", str(given.layers),
            "--batch", str(given.batch), "--seq", str(given.seq), "--policy", given.policy,
            "--expert-rank", str(given.expert_rank), "--steps", str(given.steps),
            "--timeout", str(given.timeout), "--device", given.device, "--side", side,
        ]  # fmt: skip
        for one in given.kernels:
            command += ["--kernels", one]
        return result_of(command, environment, folder, given.timeout)

    @property
    def good(self) -> list[Result]:
        """What its processes measured that ended well."""
        return [one for one in self.results if "failed" not in one]

    @property
    def seconds(self) -> list[float]:
        """Of all timed steps."""
        return [one for result in self.good for one in result["seconds"]]

    @property
    def peak(self) -> int:
        """Bytes that torch's allocator held at most in a timed step."""
        return max(int(result["peak_bytes"]) for result in self.good)


def main() -> int:
    """Parse, run, report."""
    given = _arguments()
    this = Checkout("this", ROOT, commit())
    other = Checkout("other", given.against.resolve(), given.against_commit)
    report = Report()
    with tempfile.TemporaryDirectory(prefix="qcore-bench-") as folder:
        passed = _run(given, this, other, given.caches or Path(folder), report)
    if given.save:
        (HERE / "results").mkdir(exist_ok=True)
        text = "\n".join(report.lines) + "\n"
        (HERE / "results" / f"{given.save}.txt").write_text(text, encoding="utf-8")
    return 0 if passed else 1


class Report:
    """Prints each line at once, so that a run that is stopped has said what it knew."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, required=True, help="folder of the other checkout")
    parser.add_argument("--against-commit", default="unnamed", help="its commit, for the report")
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    parser.add_argument("--layers", type=int, default=0, help="of a slice; 0: all")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--policy", choices=POLICIES, default="elementwise")
    parser.add_argument("--kernels", action="append", default=[], metavar="OP=BACKEND")
    parser.add_argument("--expert-rank", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each checkout")
    parser.add_argument("--timeout", type=int, default=270, help="seconds a process may take")
    parser.add_argument("--within", type=float, default=2.0, help="percent")
    parser.add_argument("--caches", type=Path, help="folder of the caches; default: a new one")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--save", help="name of the file under benchmarks/results")
    return parser.parse_args()


def _run(
    given: argparse.Namespace, this: Checkout, other: Checkout, caches: Path, say: Report
) -> bool:
    """Measure in turn and report; whether this checkout is as good as the other."""
    caches = caches.resolve()
    say(f"{time.strftime('%Y-%m-%d %H:%M')} {' '.join(sys.argv[1:])}")
    say(f"this: commit {this.commit}; other: commit {other.commit} ({other.root})")
    versions = [f"{name} {found}" for name in VERSIONS if (found := installed(name))]
    say(", ".join([f"Python {platform.python_version()}", *versions]))
    if given.device == "cuda":
        say(_card(this.process(given, "card", caches)))
    for number in range(given.rounds):
        for side in (this, other):
            result = side.process(given, f"qcore:{given.policy}", caches)
            side.results.append(result)
            say(_at_once(side, result))
        if "failed" not in this.results[-1] and "failed" not in other.results[-1]:
            ratio = this.results[-1]["tokens_per_s"] / other.results[-1]["tokens_per_s"]
            say(f"round {number + 1}: this / other tokens/s {ratio:.4f}")
    if given.device == "cuda":
        say(_card(this.process(given, "card", caches)))
    if not (this.good and other.good):
        say("FAILED: no figures of one of the checkouts")
        return False
    for line in _table(given, (this, other)):
        say(line)
    return _verdict(given, this, other, say)


def _at_once(side: Checkout, result: Result) -> str:
    if "failed" in result:
        return f"{side.name}: FAILED: {result['failed']}"
    return (
        f"{side.name}: {result['median_s']:.4f} s/step, {result['tokens_per_s']:.0f} tokens/s, "
        f"peak {result['peak_bytes'] / GIB:.3f} GiB, loaded in {result['load_s']:.1f} s, first "
        f"step {result['first_step_s']:.1f} s, losses {result['first_loss']:.6f} to "
        f"{result['last_loss']:.6f}"
    )


def _card(found: Result) -> str:
    if "failed" in found:
        return f"card: {found['failed']}"
    return (
        f"{found['name']}: 8192^3 bf16 {found['matmul_tflops']:.0f} TFLOP/s, "
        f"copy {found['copy_tb_s']:.2f} TB/s"
    )


def _table(given: argparse.Namespace, sides: tuple[Checkout, ...]) -> Iterator[str]:
    """A line a checkout: the median over all timed steps of all its processes."""
    yield (
        f"{'checkout':<10}{'s/step':>9}{'min':>9}{'max':>9}{'tokens/s':>10}{'peak GiB':>10}"
        f"{'base GiB':>10}{'1st step':>10}{'launches':>10}{'busy ms':>9}  commit"
    )
    for side in sides:
        first, last, median = side.good[0], side.good[-1], statistics.median(side.seconds)
        yield (
            f"{side.name:<10}{median:>9.4f}{min(side.seconds):>9.4f}{max(side.seconds):>9.4f}"
            f"{given.batch * given.seq / median:>10.0f}{side.peak / GIB:>10.3f}"
            f"{last['base_bytes'] / GIB:>10.3f}{first['first_step_s']:>9.1f}s"
            f"{last.get('launches', 0):>10}{last.get('busy_ms', 0):>9.1f}  {side.commit}"
        )


def _verdict(given: argparse.Namespace, this: Checkout, other: Checkout, say: Report) -> bool:
    """Say the ratios; whether every process ended well and this checkout is within the bound."""
    speed = statistics.median(other.seconds) / statistics.median(this.seconds)
    memory = this.peak / other.peak
    share = given.within / 100
    whole = len(this.good) + len(other.good) == 2 * given.rounds
    passed = bool(whole and speed >= 1 - share and memory <= 1 + share)
    same = this.good[0]["first_loss"] == other.good[0]["first_loss"]
    say(f"first losses are {'equal' if same else 'not equal'}")
    say(
        f"{'PASSED' if passed else 'FAILED'}: {given.shape} {given.batch} x {given.seq}: this / "
        f"other tokens/s {speed:.4f}, peak {memory:.4f}; bound {given.within:g} %"
    )
    return passed


if __name__ == "__main__":
    sys.exit(main())
