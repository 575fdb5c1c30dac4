"""The links between the GPUs of a machine: which there are, and what they transfer.

This file decides what is measured (an all-reduce and an all-gather over all ranks) and reported.
``qcore doctor`` runs this file as a module under torchrun, in a child process with a time limit,
because a broken link can hang NCCL for ever; a run under torchrun measures in its own ranks.

Codes: ``QC-DOCTOR-006`` note: links and rates, ``-007`` the GPUs cannot exchange data, or slowly.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..api.records import Finding, Severity
from ..parallel.world import World

if TYPE_CHECKING:
    import torch

LIMIT = 120.0  #: seconds for the child process
BYTES = 256 * 2**20  #: bytes of a measured collective on GPUs
SMALL = 2**20  #: the same on the CPU
_REPEATS = 5
_SLOW = 0.5  # fraction of the rate that a plan assumes, below which a warning is reported


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Measured collectives of all ranks.

    Attributes:
        ranks: number of ranks.
        nbytes: bytes of the whole tensor.
        all_reduce: seconds of an all-reduce of float32.
        all_gather: seconds of an all-gather of uint8.
    """

    ranks: int
    nbytes: int
    all_reduce: float
    all_gather: float

    @property
    def reduce_rate(self) -> float:
        """Bytes per second over each link of a ring, in the all-reduce."""
        return 2 * self._moved / self.all_reduce

    @property
    def gather_rate(self) -> float:
        """Bytes per second over each link of a ring, in the all-gather."""
        return self._moved / self.all_gather

    @property
    def _moved(self) -> float:
        return self.nbytes * (self.ranks - 1) / self.ranks

    @property
    def text(self) -> str:
        """Both collectives, for users."""
        size = f"{self.nbytes / 1e6:.0f} MB"
        return (
            f"{self.ranks} ranks: all-reduce of {size} {self.all_reduce * 1e3:.3g} ms "
            f"({self.reduce_rate / 1e9:.3g} GB/s), all-gather {self.all_gather * 1e3:.3g} ms "
            f"({self.gather_rate / 1e9:.3g} GB/s)"
        )


def measure(world: World, device: torch.device, nbytes: int = 0) -> Rates:
    """Measure both collectives; every rank calls this.

    Args:
        world: the ranks.
        device: of this rank.
        nbytes: bytes of the whole tensor; by default `BYTES` or `SMALL`.
    """
    import torch
    from torch import distributed

    nbytes = nbytes or (BYTES if device.type == "cuda" else SMALL)
    share = nbytes // 4 // world.size * 4
    whole = torch.zeros(share * world.size, dtype=torch.uint8, device=device)
    own = torch.zeros(share, dtype=torch.uint8, device=device)
    values = whole.view(torch.float32)

    def timed(name: str) -> float:
        seconds = []
        for _ in range(_REPEATS + 2):  # the first ones connect the ranks
            _finish(device)
            world.barrier()
            began = time.perf_counter()
            if name == "reduce":
                distributed.all_reduce(values)
            else:
                distributed.all_gather_into_tensor(whole, own)
            _finish(device)
            seconds.append(time.perf_counter() - began)
        slowest = max(world.gather(statistics.median(seconds[2:])))
        return max(slowest, 1e-9)

    return Rates(
        ranks=world.size, nbytes=len(whole), all_reduce=timed("reduce"), all_gather=timed("gather")
    )


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def links() -> Iterator[Finding]:
    """Report the links of this machine's GPUs and what they transfer; nothing for a single GPU."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        return
    yield _note(f"{topology(count)}; NCCL {_nccl()}")
    yield from judged(in_child(count, "cuda"), torch.cuda.get_device_name(0))


def topology(count: int) -> str:
    """Return how the GPUs are linked, by ``nvidia-smi topo``, and which cannot reach each other."""
    import torch

    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    apart = [f"{a}-{b}" for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    kinds = sorted(set(_kinds()))
    text = f"{count} GPUs" + (f" linked by {', '.join(kinds)}" if kinds else "")
    if apart:
        text += f", without peer access: {', '.join(apart[:8])}" + (", ..." if apart[8:] else "")
    return text


def _kinds() -> Iterator[str]:
    """Yield the entries between two GPUs of the table of ``nvidia-smi topo -m``: NV18, PIX, SYS."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=20, check=True
        )
        yield from kinds_in(done.stdout)


def kinds_in(table: str) -> Iterator[str]:
    """Yield the entries between two GPUs of a table of ``nvidia-smi topo -m``."""
    rows = [line.split() for line in table.splitlines()]
    cells = [row[1:] for row in rows if row and row[0].startswith("GPU") and "X" in row]
    for row in cells:
        yield from (cell for cell in row[: len(cells)] if cell != "X")


def _nccl() -> str:
    import torch

    with suppress(RuntimeError, AttributeError):
        found = torch.cuda.nccl.version()
        return ".".join(map(str, found)) if isinstance(found, tuple) else str(found)
    return "unknown"


def judged(measured: Rates | str, name: str) -> Iterator[Finding]:
    """Report rates, and whether they are far below those that a plan assumes.

    Args:
        measured: the rates, or why there are none.
        name: of the GPU, as CUDA reports it.
    """
    from ..planning.gpus import card_of

    if isinstance(measured, str):
        yield Finding(
            code="QC-DOCTOR-007",
            severity=Severity.WARNING,
            field="links",
            what=f"the GPUs cannot exchange data ({measured})",
            fix="start qcore doctor with NCCL_DEBUG=INFO; NCCL_P2P_DISABLE=1 avoids the links",
        )
        return
    yield _note(measured.text)
    card = card_of(name, 0)
    if card.known and measured.reduce_rate < _SLOW * card.link.reduce:
        rate = measured.reduce_rate / 1e9
        yield Finding(
            code="QC-DOCTOR-007",
            severity=Severity.WARNING,
            field="links",
            what=f"{rate:.3g} GB/s, where {card.link.name} of a {card.name} has "
            f"{card.link.reduce / 1e9:.3g} GB/s",
            fix=f"pass --link {rate:.3g} to qcore plan; NCCL_DEBUG=INFO shows what NCCL uses",
        )


def _note(what: str) -> Finding:
    return Finding(code="QC-DOCTOR-006", severity=Severity.NOTE, field="links", what=what)


def in_child(ranks: int, device: str, limit: float = LIMIT) -> Rates | str:
    """Measure in a child process.

    Args:
        ranks: ranks to start.
        device: ``cuda`` or ``cpu``.
        limit: seconds after which the child is killed.

    Returns:
        The rates, or why there are none.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={ranks}", "-m", __name__, device,
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    ) as child:  # fmt: skip
        try:
            out, errors = child.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return f"no answer within {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    return parsed(out) or _last_error(errors) or f"status {child.returncode}"


def parsed(out: str) -> Rates | None:
    """Return the rates that a child printed; ``None`` without any."""
    for line in reversed(out.splitlines()):
        with suppress(ValueError, TypeError):
            return Rates(**json.loads(line))
    return None


def _last_error(errors: str) -> str:
    """Return the last line that names an exception of a rank."""
    lines: Sequence[str] = [line.strip() for line in errors.splitlines() if "Error" in line]
    named = [line for line in lines if "ChildFailedError" not in line]
    return named[0].rpartition("]:")[2].strip()[:200] if named else ""


def main() -> None:
    """Measure as one of the ranks that `in_child` started; the first one prints the rates."""
    import torch

    device = torch.device(sys.argv[1])
    with World.of_environment(device) as world:
        if device.type == "cuda":
            device = torch.device("cuda", world.local_rank)
        rates = measure(world, device)
        if world.first:
            sys.stdout.write(json.dumps(asdict(rates)) + "\n")


if __name__ == "__main__":
    main()
