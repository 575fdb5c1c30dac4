"""``python -m torture``: runs points until time is up, appends them to a file, prints the sums.

This file decides the options, where the scratch folder lies, and the exit status: 1 if a result
of these sources is neither recovered nor refused as it should be.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from torture import shim
from torture.bench import Bench, Outcome
from torture.client import Client
from torture.points import Group, Point, chosen, groups
from torture.results import Results, Source
from torture.suites import make_inputs

_FILE: Final = Path(__file__).resolve().parents[2] / ".torture" / "results.jsonl"
_PAGE: Final = _FILE.parents[1] / "docs" / "torture.md"
_BEGIN: Final = "<!-- sums -->"
_END: Final = "<!-- end of sums -->"
_ROOM: Final = 2 << 30  #: bytes that the scratch folder may need
_SHOWN: Final = 40  #: bad results that are printed


def main() -> int:
    """Run the command; returns the exit status."""
    options = _options()
    results = Results(options.results, Source.current())
    if options.budget > 0:
        until = time.monotonic() + 60 * options.budget
        with _scratch() as folder:
            _sweep(folder, results, options, until)
    print(results.table())
    if options.docs:
        _write_docs(results.table())
    bad = results.bad()
    for line in bad[:_SHOWN]:
        words = (line["verdict"], line["kind"], line["suite"], line["key"], line.get("detail", ""))
        print(*words, sep="  ")
    print(f"{len(bad)} of {len(results.lines)} results are bad; all are in {results.path}")
    return 1 if bad else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make torture", description=__doc__)
    parser.add_argument("--budget", type=float, default=5, help="minutes; 0 prints the sums")
    parser.add_argument("--seed", type=int, default=0, help="of the order and of random times")
    parser.add_argument("--results", type=Path, default=_FILE, help="file that is appended to")
    parser.add_argument("--only", default="", help="text that the name of a point contains")
    parser.add_argument("--shard", default="1/1", help="I/N: each N-th group, from the I-th")
    parser.add_argument("--docs", action="store_true", help="write the sums to docs/torture.md")
    return parser.parse_args()


def _write_docs(table: str) -> None:
    """Replace what stands between the two marks of the page."""
    before, rest = _PAGE.read_text("utf-8").split(_BEGIN)
    after = rest.split(_END)[1]
    _PAGE.write_text(f"{before}{_BEGIN}\n\n{table}\n\n{_END}{after}", "utf-8")


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder in memory where there is room, because the runs change many small files."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > _ROOM
    with tempfile.TemporaryDirectory(prefix="torture-", dir=memory if roomy else None) as name:
        yield Path(name)


def _sweep(scratch: Path, results: Results, options: argparse.Namespace, until: float) -> None:
    """Run points in rounds over the groups until time is up or all are done."""
    only, (shard, of) = options.only, map(int, options.shard.split("/"))
    library = shim.build(scratch)
    if library is None:
        print("no C compiler (cc): fault points are skipped", file=sys.stderr)
    make_inputs(scratch / "inputs")
    with Client(scratch, library) as client:
        bench = Bench(scratch, scratch / "inputs", client)
        made = chosen(groups(bench, options.seed, faults=bool(library)), only)
        left = [_Left(group, results, only) for group in made[shard - 1 :: of]]
        while left and time.monotonic() < until:
            left = [group for group in left if group.round(until)]


class _Left:
    """The points of a group that are not done.

    Args:
        group: the group.
        results: which points are done.
        only: text that the name of a point contains.
    """

    def __init__(self, group: Group, results: Results, only: str) -> None:
        self._group, self._results, self._only = group, results, only
        self._points: Iterator[Point] | None = None

    def round(self, until: float) -> bool:
        """Run a few points; whether there may be more."""
        if self._points is None:
            try:
                self._points = self._group.points()
            except RuntimeError as error:  # the undisturbed run fails
                outcome = Outcome(verdict="lost", detail=str(error)[-1000:])
                self._results.add("fault", self._group.suite, "undisturbed", outcome)
                return False
        for _ in range(self._group.per_round):
            if time.monotonic() > until:
                return False
            point = self._next()
            if point is None:
                return False
            outcome = point.run()
            self._results.add(point.kind, point.suite, point.key, outcome)
            for number, one in enumerate(outcome.also):
                self._results.add(point.kind, point.suite, f"{point.key}: bad {number}", one)
        return True

    def _next(self) -> Point | None:
        assert self._points is not None
        for point in self._points:
            name = f"{point.kind} {point.suite} {point.key}"
            if self._only in name and not self._results.has(point.kind, point.suite, point.key):
                return point
        return None


if __name__ == "__main__":
    sys.exit(main())
