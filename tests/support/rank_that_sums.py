"""``qcore train`` whose run is replaced by sums over the ranks; ``PLAN`` says what fails where.

Keys of the plan: ``steps``, ``seconds`` of a step, ``timeout``, and for a rank ``"1"`` a list of
``[step, place, what]``: where it is ``prepare``, ``step``, ``sum`` or ``save``, and what it does
there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from qcore.cli.main import main
from qcore.errors import InputError, Interrupted
from qcore.parallel import agent

PLAN: dict[str, Any] = json.loads(os.environ["PLAN"])
HOME = Path(os.environ["HOME_OF_MARKS"])
ME = os.environ.get("RANK", "0")


def here(step: int, place: str) -> None:
    """Do what the plan says for this rank."""
    (HOME / f"at-{ME}-{step}-{place}").touch()
    for at, where, what in PLAN.get(ME, []):
        if (at, where) != (step, place):
            continue
        if what == "error":
            raise InputError("QC-DATA-001", "is wrong", file="rows.jsonl", fix="mend it")
        if what == "bug":
            raise ZeroDivisionError("here")
        if what == "hang":
            time.sleep(600)
        if what == "slow":
            time.sleep(PLAN["slow"])
        if what.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, what))
        if what == "once" and not (HOME / "once").exists():
            (HOME / "once").touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Report:
    """As much of a report as the command line prints."""

    output, steps, first_loss, last_loss, adapter_class = Path("out"), 3, 2.0, 1.0, "text"
    eval_loss = best_evaluation = published_step = None

    def as_json(self) -> dict[str, Any]:
        return {"steps": self.steps}


def train(*_: Any, reporter: Any, stop: Any, **__: Any) -> Report:
    """Sums, and a checkpoint when a signal asks for one."""
    import torch

    from qcore.parallel.world import World

    (HOME / f"pid-{ME}").write_text(str(os.getpid()))
    here(0, "prepare")
    with World.of_environment(
        torch.device("cpu"), timedelta(seconds=PLAN.get("timeout", 60))
    ) as world:
        for step in range(1, PLAN.get("steps", 3) + 1):
            stop.doing = f"finishing step {step}, then writing a checkpoint and ending"
            here(step, "step")
            time.sleep(PLAN.get("seconds", 0.01))
            sums = torch.tensor([float(bool(stop.asked)), float(stop.take_save())])
            here(step, "sum")
            world.sum_(sums, f"the sum of step {step}")
            for line in world.step(tokens=100):
                reporter.warning(line)
            if world.first and (sums[0] or sums[1]):
                with world.finishing():
                    here(step, "save")
                    with (HOME / "saved").open("a") as file:
                        file.write(f"{step}\n")
            if sums[0]:
                what = f"stopped by {stop.asked or 'a signal to another rank'} after step {step}"
                raise Interrupted("QC-TRAIN-006", what, fix="go on")
            reporter.note(f"step {step}")
        world.barrier()
    return Report()


def replaced() -> None:
    import qcore.training.train

    qcore.training.train.train = train


if __name__ == "__main__":
    agent.python = lambda: [sys.executable, "-u", __file__]
    if "RANK" in os.environ:
        replaced()
    main()
