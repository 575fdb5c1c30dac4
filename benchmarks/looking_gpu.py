r"""Proves on a GPU that image input has an effect: trains on pictures and blanks, compares.

    python benchmarks/looking_gpu.py [--steps 2000] [--rate 7e-4] [--save NAME]

A random model with a random tower, its base in NF4 and bf16, is trained on generated pictures of 8
colours, 6 shapes and 1 to 4 of them, and once more on blanks of the same sizes. Both are asked
about pictures that neither saw. Prints the share of right answers by question, beside chance and
the bound of three deviations that guessing stays below.

Exit status 1 where looking is right in 90 % or less, or a side that sees nothing is above the
bound. With ``--device cpu --shape tiny`` it is the small form in float32 that the tests run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from looking import bound
from looking_run import LARGE, SMALL, Form, Seen, run
from train_step_gpu import HERE, VERSIONS, commit, installed

from qcore.reporting import Event, Reporter, Step

ENOUGH = 0.9


class Losses:
    """A sink that prints the loss now and then; the rest of the report is about answers."""

    def __init__(self, every: int) -> None:
        self.every = every

    def handle(self, event: Event, /) -> None:
        """A line each `every` steps."""
        if isinstance(event, Step) and event.step % self.every == 0:
            # Not to stdout: what a sink prints there is sent to stderr.
            text = f"step {event.step}: loss {event.loss:.4f}, {event.seconds:.3f} s"
            print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="large", choices=("large", "tiny"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--steps", type=int, help="optimizer steps of a run")
    parser.add_argument("--batch", type=int, help="rows of a step")
    parser.add_argument("--rate", type=float, help="learning rate")
    parser.add_argument("--each", type=int, help="pictures of a combination to train on")
    parser.add_argument("--save", help="name of the file under benchmarks/results")
    given = parser.parse_args()
    form = _form(given)
    with tempfile.TemporaryDirectory(prefix="qcore-looking-") as folder:
        began = time.perf_counter()
        reporter = Reporter(Losses(max(1, form.settings["max_steps"] // 15)))
        seen = run(Path(folder), form, device=given.device, reporter=reporter)
        lines = list(_report(given.device, form, seen, time.perf_counter() - began))
    print("\n".join(lines))
    if given.save:
        (HERE / "results").mkdir(exist_ok=True)
        text = "\n".join(lines) + "\n"
        (HERE / "results" / f"{given.save}.txt").write_text(text, encoding="utf-8")
    return 0 if lines[-1].startswith("PASSED") else 1


def _form(given: argparse.Namespace) -> Form:
    form = SMALL if given.shape == "tiny" else LARGE
    asked = {
        "max_steps": given.steps, "per_device_train_batch_size": given.batch,
        "learning_rate": given.rate,
    }  # fmt: skip
    changed = {name: value for name, value in asked.items() if value is not None}
    return replace(form, settings={**form.settings, **changed}, each=given.each or form.each)


def _report(device: str, form: Form, seen: Seen, seconds: float) -> Iterator[str]:
    """Where it ran, what it was, what came out, and the verdict."""
    import torch

    card = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    yield f"{time.strftime('%Y-%m-%d %H:%M')} commit {commit()}; {' '.join(sys.argv[1:])}"
    yield ", ".join(f"{name} {found}" for name in VERSIONS if (found := installed(name)))
    yield f"{card}; {', '.join(f'{name} {value}' for name, value in form.settings.items())}"
    yield f"{seconds:.0f} s: " + ", ".join(f"{k} {v:.0f} s" for k, v in seen.seconds.items())
    yield (
        f"{'question':<10}{'asked':>7}{'chance':>8}{'bound':>8}{'looking':>9}"
        f"{'shown blanks':>14}{'trained blank':>15}"
    )
    good = True
    for name, choices in form.task.choices.items():
        most = bound(seen.asked[name], choices)
        row = (seen.looking[name], seen.shown_blanks[name], seen.blank[name])
        good &= row[0] > ENOUGH and max(row[1:]) <= most
        yield (
            f"{name:<10}{seen.asked[name]:>7}{1 / choices:>8.3f}{most:>8.3f}{row[0]:>9.3f}"
            f"{row[1]:>14.3f}{row[2]:>15.3f}"
        )
    yield ("PASSED" if good else "FAILED") + f": looking above {ENOUGH:.0%}, blanks within bounds"


if __name__ == "__main__":
    sys.exit(main())
