r"""Trains published shapes on one GPU and on several, in turn, and compares speed, memory, numbers.

    python benchmarks/multi_gpu.py --gpus 2 --cases first --save two-gpus
    python benchmarks/multi_gpu.py --gpus 2,4,8 --cases 4b:2x4096,27b:1x8192
    torchrun --nnodes 2 --nproc-per-node 8 ... benchmarks/multi_gpu.py --cases 4b:2x4096

Each case is measured on one card (rank 0, the others idle) and on all, on the same random weights
and rows, in one process group: tokens/s, peak memory of each rank beside the planner's, the time
of one sum of all gradients, and losses. ``gradients:`` cases compare gradients with those of one
rank. `multi.cases` says how a case is written, and what ``first``, ``large``, ``dense`` and
``tiny`` stand for.

Ranks are started by ``torchrun``. Every measurement is appended to ``--records`` at once. A case
that fails or takes longer than ``--limit`` ends its ranks, and the next case gets new ones; one
that runs out of memory is tried under a policy that takes less, then with fewer layers. Started by
``torchrun``, a process is one rank, and ``--records`` on rank 0 has the figures. With ``--device
cpu --cases tiny`` it shows that the command runs, and no figure of it means anything.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from multi.cases import Case, parse
from multi.table import Record, append, is_wrong, lines, read
from train_step_gpu import VERSIONS, commit, installed

HERE = Path(__file__).resolve().parent
START = 180  #: seconds in which the ranks must have begun their first case
#: NVLink multicast is off: where a host's GPUs are shared, it can put them out of service.
ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1",
    "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1",
}  # fmt: skip


def main() -> int:
    """Parse; then be a rank, or start the ranks and report."""
    given = _arguments()
    if "RANK" in os.environ:
        from multi.rank import run

        run(given, given.parsed)
        return 0
    with tempfile.TemporaryDirectory(prefix="qcore-bench-") as folder:
        records = Path(given.records or Path(folder) / "records.jsonl").resolve()
        given.records = str(records)
        records.touch()
        head = [
            f"{time.strftime('%Y-%m-%d %H:%M')} commit {commit()}; {' '.join(sys.argv[1:])}",
            ", ".join(f"{name} {found}" for name in VERSIONS if (found := installed(name))),
        ]
        print("\n".join(head), flush=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        end = time.monotonic() + given.total
        try:
            for count in given.gpus:
                _all_cases(given, list(given.parsed), count, end)
        finally:
            text = [*head, *lines(read(records))]
            print("\n".join(text[2:]), flush=True)
            if given.save:
                path = HERE / "results" / f"{given.save}.txt"
                path.write_text("\n".join(text) + "\n", encoding="utf-8")
        return int(any(map(is_wrong, read(records))))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="first", help="see multi.cases; comma-separated")
    parser.add_argument("--gpus", default="2", help="numbers of ranks, comma-separated")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a placement")
    parser.add_argument("--limit", type=int, default=240, help="seconds that a case may take")
    parser.add_argument("--total", type=int, default=3600, help="seconds of all cases")
    parser.add_argument("--records", help="file to append JSON lines to")
    parser.add_argument("--save", help="name of the file under benchmarks/results")
    given = parser.parse_args()
    try:
        given.parsed = parse(given.cases)
        given.gpus = [int(count) for count in given.gpus.split(",")]
    except ValueError as error:
        parser.error(str(error))
    if "RANK" in os.environ and not given.records:
        parser.error("--records is needed where torchrun starts this command")
    return given


def _all_cases(given: argparse.Namespace, cases: list[Case], count: int, end: float) -> None:
    """Measure all cases on `count` ranks; after a failure new ranks go on."""
    while cases and time.monotonic() < end:
        ranks = _Ranks(given, cases, count)
        try:
            failed = ranks.follow(end)
        finally:
            ranks.stop()
        if failed is None:
            return
        cases = cases[ranks.ended + 1 :]
        if failed.get("out_of_memory"):
            smaller = parse(failed["case"])[0].smaller(failed["policies"])
            cases[:0] = [smaller] if smaller else []
    for case in cases:
        why = f"not measured within {given.total} s"
        append(Path(given.records), {"case": case.word, "ranks": count, "failed": why})


class _Ranks:
    """Processes that measure cases, started together.

    Args:
        given: the command's arguments.
        cases: what they measure.
        count: how many there are.

    Attributes:
        ended: cases that are through.
    """

    def __init__(self, given: argparse.Namespace, cases: list[Case], count: int) -> None:
        self.given, self.cases, self.count, self.ended = given, cases, count, 0
        self._records = Path(given.records)
        self._read = len(read(self._records))
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count),
            "--master-addr", "127.0.0.1", "--master-port", str(_free_port()),
            str(HERE / "multi_gpu.py"), "--cases", ",".join(case.word for case in cases),
        ]  # fmt: skip
        for name in ("device", "steps", "limit", "records"):
            command += [f"--{name}", str(getattr(given, name))]
        path = [str(HERE), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        environment = ENVIRONMENT | os.environ | {"PYTHONPATH": os.pathsep.join(path)}
        self._process = subprocess.Popen(command, env=environment, start_new_session=True)

    @property
    def current(self) -> Case:
        """The case that is being measured."""
        return self.cases[self.ended]

    def follow(self, end: float) -> Record | None:
        """Wait until all cases are through; else a record of the one that failed."""
        deadline = time.monotonic() + START
        failed: list[Record] = []
        while True:
            status = self._process.poll()
            for record in self._new():
                if "begin" in record:
                    deadline = time.monotonic() + self.given.limit
                failed += [record] if "rank" in record else []
                self.ended += "end" in record
            if self.ended == len(self.cases):
                return None
            if status is not None and failed:
                return max(failed, key=lambda record: bool(record["out_of_memory"]))
            if status is not None:
                return self._failed(f"the ranks ended with status {status}")
            if time.monotonic() > min(deadline, end):
                return self._failed("no result within the time limit")
            time.sleep(0.2)

    def _new(self) -> list[Record]:
        records = read(self._records)[self._read :]
        self._read += len(records)
        return records

    def _failed(self, why: str) -> Record:
        record: Record = {"case": self.cases[self.ended].word, "ranks": self.count, "failed": why}
        append(self._records, record)
        return record

    def stop(self) -> None:
        """End the processes that are left; `torchrun` ends those that it started."""
        for kind, patience in ((signal.SIGTERM, 40), (signal.SIGKILL, 5)):
            if self.ended < len(self.cases) or kind == signal.SIGKILL:
                self._process.send_signal(kind)
            try:
                self._process.wait(patience)
                return
            except subprocess.TimeoutExpired:
                continue


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
