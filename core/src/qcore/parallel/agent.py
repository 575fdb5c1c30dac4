"""Runs torchrun's own agent in a thread of this process, with one rank for each GPU.

This file decides what a rank is started with: the command, its threads, where its output goes.
Settings of torchrun itself, such as those of a rendezvous between machines, are read from
torchrun's own variables (``PET_NNODES``, ``PET_RDZV_ENDPOINT``, ...). What becomes of the ranks is
up to `launch`.

Codes: ``QC-PARALLEL-010`` there are fewer GPUs than ranks.
"""

from __future__ import annotations

import logging
import os
import sys
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from ..errors import UsageError
from ..io.cores import available_cores
from .rank import LAUNCHED

#: Environments of the ranks, by local rank -> files for stdout, stderr and the error of each.
Placed = Callable[[Mapping[int, Mapping[str, str]]], tuple[dict[int, str], ...]]
_FEW: Final = 8  # processes on the CPU that are never too many


def run_agent(
    gpus: int, arguments: Sequence[str], device: str, placed: Placed, *, debug: bool
) -> Mapping[int, Any]:
    """Run the ranks, and start them again as ``PET_MAX_RESTARTS`` says.

    torchrun handles no signals in another thread than the main thread.

    Args:
        gpus: how many ranks on this machine.
        arguments: of ``qcore``, the same for every rank.
        device: ``auto``, ``cpu`` or ``cuda``.
        placed: called before each start of the ranks; an error that it raises ends the run.
        debug: show what torchrun logs.

    Returns:
        How ranks failed, in the order in which torchrun noticed it.

    Raises:
        UsageError: ``QC-PARALLEL-010``.
    """
    if device == "cpu":
        _check_processes(gpus)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // gpus)))
    if not debug:
        warnings.simplefilter("ignore")
    import torch

    if not debug:
        logger = logging.getLogger("torch.distributed.elastic")
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
    if device != "cpu":
        _check_gpus(gpus, torch.cuda.device_count())
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import launch_agent

    # torchrun replaces ${local_rank} in the arguments, and $$ by $.
    command = [*python(), *(word.replace("$", "$$") for word in arguments)]
    options = ["--nproc-per-node", str(gpus), "--no-python"]
    config, entry, words = run.config_from_args(run.parse_args([*options, *command]))
    if config.max_nodes == 1 and config.rdzv_backend == "static":  # as torchrun --standalone
        config.rdzv_backend, config.rdzv_endpoint = "c10d", "localhost:0"
        config.run_id = str(uuid.uuid4())
        config.rdzv_configs.pop("rank", None)
    config.logs_specs = _logs_specs(placed)
    os.environ[LAUNCHED] = "1"
    try:
        launch_agent(config, entry, list(words))
    except ChildFailedError as error:
        return error.failures
    finally:
        del os.environ[LAUNCHED]
    return {}


def python() -> list[str]:
    """How a rank is started: as this process, and never from the current folder."""
    return [sys.executable, "-u", "-P", "-m", "qcore"]


def unfit(gpus: int, expected: str, fix: str) -> UsageError:
    """The error about a number of ranks that is not possible."""
    return UsageError(
        "QC-PARALLEL-010", "cannot be used", field="--gpus", found=gpus, expected=expected, fix=fix
    )


def _check_processes(count: int) -> None:
    """Refuse more processes on the CPU than its cores can run.

    Raises:
        UsageError: ``QC-PARALLEL-010``.
    """
    most = max(_FEW, available_cores())
    if count > most:
        raise unfit(count, f"at most {most} processes on the CPU", f"--gpus {most}")


def _check_gpus(count: int, visible: int) -> None:
    """Refuse more ranks than GPUs.

    Raises:
        UsageError: ``QC-PARALLEL-010``.
    """
    if count > visible:
        other = f"--device cpu runs {count} processes on the CPU"
        fix = f"--gpus {visible}; {other}" if visible else other
        raise unfit(count, f"at most {visible}, the GPUs that are visible here", fix)


def _logs_specs(placed: Placed) -> Any:
    """Where torchrun sends the output of the ranks: that of the first one to ours."""
    from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

    class Specs(LogsSpecs):
        """Asks the launcher."""

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            stdouts, stderrs, errors = placed(envs)
            for local, file in errors.items():
                envs[local]["TORCHELASTIC_ERROR_FILE"] = file
            return LogsDest(stdouts, stderrs, {}, {}, errors)

        @property
        def root_log_dir(self) -> str:
            return os.devnull

    return Specs()
