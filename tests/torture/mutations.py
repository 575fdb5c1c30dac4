"""Mutations of headers and JSON files, a thousand a batch, read in one forked process.

This file decides the verdict on a mutation: ``recovered`` if it is refused with an error of qcore's
or has the same effect; ``silent`` if it is accepted with another effect than an independent reader
sees; ``unclean`` for any other exception; ``hung`` after five seconds.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final

import numpy as np

from torture.bench import Bench, Outcome
from torture.client import Command
from torture.mutators import mutate
from torture.readers import Reader, readers

BATCH: Final = 1000
_LIMIT: Final = 5.0  #: seconds that one mutation may take
_BATCH_LIMIT: Final = 300.0
_MEMORY: Final = 2 << 30  #: bytes that a batch may add to its process


class _TooLong(BaseException):
    """No `except Exception` of a reader may take it."""


def batch(bench: Bench, seed: int, number: int) -> Outcome:
    """Run a batch in a forked process; the bad mutations are the outcome's `also`."""
    bench.make_adapters()
    file = bench.scratch / "mutations.json"
    file.unlink(missing_ok=True)
    arguments = [str(bench.inputs), str(bench.scratch / "mutated"), str(seed), str(number),
                 str(file)]  # fmt: skip
    command = Command(program="mutations", arguments=arguments, options={}, env={})
    ended = bench.client.run(command, bench.scratch, limit=_BATCH_LIMIT)
    if ended.status or not file.exists():
        verdict = "hung" if ended.hung else "unclean"
        detail = f"the process ended with {ended.status}: {ended.err[-600:]}"
        return Outcome(verdict=verdict, detail=detail, seconds=ended.seconds)
    found = json.loads(file.read_text("utf-8"))
    also = tuple(Outcome(verdict=verdict, detail=detail) for verdict, detail in found["bad"])
    return Outcome(
        verdict="recovered", detail=json.dumps(found["counts"]), seconds=ended.seconds,
        count=BATCH - len(also), also=also,
    )  # fmt: skip


def run_batch(arguments: Sequence[str], options: Mapping[str, Any]) -> None:
    """The program of a batch: INPUTS WORK SEED NUMBER RESULT."""
    inputs, work, seed, number, result = arguments
    shutil.rmtree(work, ignore_errors=True)
    _limit_memory()
    made = readers(Path(inputs), Path(work))
    goods = [(reader, (reader.folder / reader.file).read_bytes()) for reader in made]
    effects = {reader.name: reader.read(reader.folder) for reader in made}
    signal.signal(signal.SIGALRM, _alarm)
    counts: Counter[str] = Counter()
    bad = []
    for one in range(BATCH):
        key = f"{seed}/{number}/{one}"
        rng = random.Random(key)
        reader, good = rng.choice(goods)
        path = reader.folder / reader.file
        changed = mutate(good, reader.form, rng)
        path.write_bytes(changed)
        word, detail = _tried(reader, effects[reader.name])
        counts[word] += 1
        if word not in ("refused", "same", "as judged"):
            bad.append((word, f"{reader.name}, mutation {key}: {detail}"))
        path.write_bytes(good)
    Path(result).write_text(json.dumps({"counts": counts, "bad": bad}), "utf-8")


def _tried(reader: Reader, effect: Any) -> tuple[str, str]:
    """What a reader does with the mutated file, and details where it is bad."""
    from qcore.errors import QcoreError

    signal.setitimer(signal.ITIMER_REAL, _LIMIT)
    try:
        found = reader.read(reader.folder)
    except QcoreError as error:
        return ("unclean", str(error)[:300]) if "INTERNAL" in error.code else ("refused", "")
    except _TooLong:
        return "hung", ""
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001, all others too; panics of Rust derive from BaseException
        return "unclean", traceback.format_exc()[-500:]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if found == effect:
        return "same", ""
    if reader.judge is None:
        return "silent", "accepted with another effect, in spite of its manifest or index"
    with np.errstate(all="ignore"):
        return _judged(reader, found)


def _judged(reader: Reader, found: Any) -> tuple[str, str]:
    assert reader.judge is not None
    try:
        expected = reader.judge(reader.folder)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001, the judge refuses
        return "silent", f"accepted; the independent reader refuses: {str(error)[:200]}"
    if found == expected:
        return "as judged", ""
    return "silent", f"{str(found)[:200]}, where another reader has {str(expected)[:200]}"


def _alarm(number: int, frame: FrameType | None) -> None:
    raise _TooLong


def _limit_memory() -> None:
    """A reader that follows a forged size fails here, not on the machine."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    most = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    sys.setrecursionlimit(1000)
