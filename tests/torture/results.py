"""The file of results: one JSON object a line, appended; and the table of its sums.

This file decides what a result is bound to: the digest of the sources that were tested, so that a
change of documentation keeps the results, and the commit for readers. A point that the file has
for these sources is not run again.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Final

from torture.bench import Outcome
from torture.judge import VERDICTS

_ROOT: Final = Path(__file__).resolve().parents[2]
#: Kinds of points, as the table names them, with the goals of the full sweep.
KINDS: Final[Mapping[str, tuple[str, int]]] = {
    "fault": ("fault points", 2_000),
    "kill": ("random SIGKILLs", 1_000),
    "signal": ("signals", 300),
    "resume": ("stopped after a step and resumed", 600),
    "bad input": ("named bad inputs", 1_000),
    "mutation": ("mutations of headers and JSON", 1_000_000),
}
PEER: Final = "peer"  #: the kind of the points of other tools


@dataclass(frozen=True, slots=True)
class Source:
    """What is tested.

    Attributes:
        digest: of all sources of the distributions.
        commit: short name; with ``+`` if the sources differ from it.
    """

    digest: str
    commit: str

    @classmethod
    def current(cls) -> Source:
        """That of this checkout."""
        digest = hashlib.sha256()
        for path in sorted(_ROOT.glob("*/src/**/*")):
            if path.is_file() and path.suffix != ".pyc" and ".egg-info" not in str(path):
                digest.update(f"{path.relative_to(_ROOT)}\0".encode() + path.read_bytes())
        commit = _git("rev-parse", "--short", "HEAD") or "unknown"
        changed = _git("status", "--porcelain", "--", "*/src")
        return cls(digest.hexdigest()[:16], f"{commit}+" if changed else commit)


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(_ROOT), *words], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


class Results:
    """The file, and what it says of one source.

    Args:
        path: the file; made with its folder at the first result.
        source: what is tested.
    """

    def __init__(self, path: Path, source: Source) -> None:
        self.path, self.source = path, source
        self.lines = [line for line in _read(path) if line.get("source") == source.digest]
        self._done = {(line["kind"], line["suite"], line["key"]) for line in self.lines}

    def has(self, kind: str, suite: str, key: str) -> bool:
        """Whether a point was run."""
        return (kind, suite, key) in self._done

    def add(self, kind: str, suite: str, key: str, outcome: Outcome) -> None:
        """Append the outcome of a point; the line is on the disk when this returns."""
        line: dict[str, Any] = {
            "source": self.source.digest, "commit": self.source.commit,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "kind": kind, "suite": suite, "key": key, "verdict": outcome.verdict,
            "count": outcome.count, "seconds": round(outcome.seconds, 3),
        }  # fmt: skip
        if outcome.detail:
            line["detail"] = outcome.detail
        if outcome.left:
            line["left"] = list(outcome.left)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.tell() and not _ends_a_line(file):  # left by a process that was killed
                file.write(b"\n")
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)
        self._done.add((kind, suite, key))

    def bad(self) -> list[dict[str, Any]]:
        """The results that are a fault of qcore's."""
        return [
            line for line in self.lines
            if line["kind"] != PEER and line["verdict"] not in ("recovered", "missed")
        ]  # fmt: skip

    def table(self) -> str:
        """The sums as Markdown."""
        return "\n".join([*_sums(self.lines, self.source.commit), "", *_peers(self.lines)])


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read() == b"\n"


def _read(path: Path) -> Iterable[dict[str, Any]]:
    if not path.exists():
        return
    for text in path.read_text("utf-8").splitlines():
        try:
            yield json.loads(text)
        except ValueError:  # the last line of a run that was killed
            continue


def _count(lines: Iterable[Mapping[str, Any]]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for line in lines:
        if line["verdict"] != "missed":
            counts[line["verdict"]] += line["count"]
    return counts


def _left(lines: Iterable[Mapping[str, Any]]) -> int:
    """How many points left temporary files beside a result that is right."""
    return sum(1 for line in lines if line.get("left"))


def _row(words: Sequence[object]) -> str:
    shown = (f"{word:,}" if isinstance(word, int) else str(word) for word in words)
    return f"| {' | '.join(shown)} |"


def _sums(lines: Sequence[Mapping[str, Any]], commit: str) -> list[str]:
    """A row for each kind and configuration."""
    head = ["", "points", *VERDICTS, "leftovers", "full goal"]
    rows = [f"Commit {commit}", "", _row(head), _row(["---", *["---:"] * (len(head) - 1)])]
    for kind, (title, goal) in KINDS.items():
        mine = [line for line in lines if line["kind"] == kind]
        counts = _count(mine)
        cells = [counts[verdict] for verdict in VERDICTS]
        rows.append(_row([title, sum(cells), *cells, _left(mine), goal]))
        for suite in sorted({line["suite"] for line in mine}) if kind != "bad input" else ():
            own = [line for line in mine if line["suite"] == suite]
            counts = _count(own)
            cells = [counts[verdict] for verdict in VERDICTS]
            rows.append(_row([f"&nbsp;&nbsp;{suite}", sum(cells), *cells, _left(own), ""]))
    return rows


def _peers(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """qcore beside the tools that do the same, over the same faults."""
    columns = {
        "training, qcore": ("fault", ("dense/train", "dense/resume")),
        "training, transformers' Trainer": (PEER, ("peer/train",)),
        "merge, qcore": ("fault", ("dense/merge",)),
        "merge over an older one, PEFT": (PEER, ("peer/merge",)),
    }
    rows = [_row(["", *columns]), _row(["---", *["---:"] * len(columns)])]
    sums = [
        _count(line for line in lines if line["kind"] == kind and line["suite"] in suites)
        for kind, suites in columns.values()
    ]
    rows.append(_row(["fault points", *(sum(each.values()) for each in sums)]))
    return rows + [_row([verdict, *(each[verdict] for each in sums)]) for verdict in VERDICTS]
