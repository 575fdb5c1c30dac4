"""What reliability costs on the CPU: the guards of a training step, and publishing files.

Trains an adapter and switches the guards off in every second step of the same run: the check of
the parameters, and the scores of loss and gradient norm over a full window. Then it publishes a
folder of some GB as a run does and verifies it, in turn with a plain copy of the same bytes that is
written, synced and read. Steps are timed in CPU seconds of the process, on one thread, so that
other programs on the machine do not count; files in both.

    python benchmarks/guards_cpu.py --model FOLDER --data ROWS.jsonl [--steps 80] [--gb 2]

Prints the median of a step with and without guards and the ratio, and the seconds per GB of publish
and verify beside those of the plain copy, with the goals: 1 % of a step, 2.5 s per GB.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")


_SHARE, _PER_GB = 0.01, 2.5  # the goals
_CHUNK = 1 << 26


class Clock:
    """CPU seconds of steps and of the guards in them.

    Attributes:
        with_guards: seconds of each step with guards.
        without: of each step without.
        own: seconds in the guards, of each step with them.
    """

    def __init__(self) -> None:
        self.with_guards: list[float] = []
        self.without: list[float] = []
        self.own: list[float] = []
        self._on, self._spent = True, 0.0

    def step(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Time `Loop.step`; guards are on in steps of even number."""

        def timed(loop: Any, number: int) -> Any:
            self._on, self._spent = number % 2 == 0, 0.0
            if not number:
                for at in range(128):  # a full window: the price of a long run
                    loop.guard.losses.append(2.0 + at % 7 / 10)
                    loop.guard.norms.append(0.5 + at % 5 / 10)
            began = time.process_time()
            result = run(loop, number)
            (self.with_guards if self._on else self.without).append(time.process_time() - began)
            if self._on:
                self.own.append(self._spent)
            return result

        return timed

    def guard(self, run: Callable[..., Any], instead: Callable[[], Any]) -> Callable[..., Any]:
        """Time a guard where it is on; return ``instead()`` where it is off."""

        def timed(*args: Any) -> Any:
            if not self._on:
                return instead()
            began = time.process_time()
            result = run(*args)
            self._spent += time.process_time() - began
            return result

        return timed


def measure(model: str, rows: str, steps: int) -> Clock:
    """Run the steps."""
    import torch

    import qcore.training.train as training
    from qcore.config.settings import Settings
    from qcore.training.spikes import SpikeGuard
    from qcore.training.step import Loop

    torch.set_num_threads(1)
    clock, zero = Clock(), torch.zeros(())
    guarded: Any = Loop
    guarded._largest = clock.guard(Loop._largest, lambda: zero)
    scores: Any = SpikeGuard
    scores.judge = clock.guard(SpikeGuard.judge, lambda: None)
    scores.add = clock.guard(SpikeGuard.add, lambda: None)
    guarded.step = clock.step(Loop.step)
    settings = Settings(max_steps=steps, save_steps=0, publish_without_gain=True)
    with tempfile.TemporaryDirectory() as folder:
        training.train(model, rows, Path(folder) / "adapter", settings, device="cpu")
    return clock


class Spent(NamedTuple):
    """Seconds of a job per GB.

    Attributes:
        wall: as they pass, with those of other programs.
        cpu: of this process.
    """

    wall: float
    cpu: float


def timed(job: Callable[[], object], size: int) -> Spent:
    """Run a job on `size` bytes."""
    wall, cpu = time.perf_counter(), time.process_time()
    job()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Spent(wall * 1e9 / size, cpu * 1e9 / size)


def files(size: int, rounds: int = 3) -> tuple[Spent, Spent]:
    """The medians of publish and verify, and of a plain copy, in turn."""
    from qcore.io.artifact import publish, verify

    data = os.urandom(_CHUNK)
    chunks = [data] * (size // _CHUNK)

    def published(folder: Path) -> None:
        with publish(folder / "artifact", kind="benchmark") as out, out.stream("weights") as file:
            for chunk in chunks:
                file.write(chunk)
        assert verify(folder / "artifact").ok

    def plain(folder: Path) -> None:
        path = folder / "plain"
        with path.open("wb", buffering=0) as file:
            for chunk in chunks:
                file.write(chunk)
            os.fsync(file.fileno())
        with path.open("rb", buffering=0) as file:
            while file.read(_CHUNK):
                pass

    spent: dict[str, list[Spent]] = {"ours": [], "plain": []}
    for _ in range(rounds):
        for name, job in (("plain", plain), ("ours", published)):
            with tempfile.TemporaryDirectory() as folder:
                spent[name].append(timed(lambda: job(Path(folder)), len(chunks) * _CHUNK))  # noqa: B023
    ours, other = (
        Spent(*(statistics.median(column) for column in zip(*spent[name], strict=True)))
        for name in ("ours", "plain")
    )
    return ours, other


def main() -> None:
    """Parse, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--gb", type=float, default=2.0, help="of files; written to TMPDIR")
    given = parser.parse_args()
    if given.steps < 8:
        sys.exit("--steps: at least 8")
    clock = measure(given.model, given.data, given.steps)
    on, off = (statistics.median(x[2:]) for x in (clock.with_guards, clock.without))
    own = statistics.median(clock.own[2:])
    print(f"{platform.processor() or platform.machine()}, torch {version('torch')}, one thread")
    print(f"steps: {len(clock.with_guards)} with guards, {len(clock.without)} without")
    print(f"median step: {1e3 * on:.2f} ms with guards, {1e3 * off:.2f} ms without")
    print(f"ratio: {on / off:.4f} ({_word(on / off - 1 <= _SHARE)} {1 + _SHARE:g})")
    print(f"guards themselves: {1e3 * own:.3f} ms, {100 * own / off:.2f} % of a step")
    ours, plain = files(max(_CHUNK, int(given.gb * 1e9)))
    print(f"publish and verify: {ours.wall:.2f} s per GB ({ours.cpu:.2f} s of CPU), "
          f"{_word(ours.wall <= _PER_GB)} {_PER_GB:g}")  # fmt: skip
    print(f"plain write, sync and read: {plain.wall:.2f} s per GB ({plain.cpu:.2f} s of CPU); "
          f"ratio {ours.wall / plain.wall:.2f}")  # fmt: skip


def _word(within: bool) -> str:
    return "within" if within else "above"


if __name__ == "__main__":
    main()
