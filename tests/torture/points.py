"""The points of a sweep: one fault at one place, in a seeded order.

This file decides how many points there are of each kind, and in which order they are run: in
rounds over groups, so that a short run meets every kind.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from torture.bad_inputs import bad_inputs, refused
from torture.bench import Bench, Outcome
from torture.mutations import batch
from torture.results import PEER
from torture.shim import FAULTS
from torture.suites import RECIPE_STEPS, RECIPES, SIGNALS, Suite, peers, recipe, suites

_ONE_CALL: Final = ("kill", "torn", "eio", "enospc")  #: at every call of a suite
_ONWARDS: Final = ("full", "gone")  #: at every fourth
_KILLS: Final = 22  #: of each suite: more than 300 together
_SIGNALS: Final = 5  #: of each suite and signal: more than 60 of each signal
_PER_ROUND: Final = 4  #: points of a group in a round
_BAD_PER_ROUND: Final = 20


#: Suites that are also disturbed while their processes import, and how often by each signal.
_COLD: Final = ("dense/train", "dense/resume", "dense/merge")
_COLD_EACH: Final = 3
_BATCHES: Final = 100  #: of mutations


@dataclass(frozen=True, slots=True)
class Point:
    """One fault at one place.

    Attributes:
        kind: of `results.KINDS`, or that of peers.
        suite: what is run.
        key: the place and the fault.
        run: runs it.
    """

    kind: str
    suite: str
    key: str
    run: Callable[[], Outcome]


@dataclass(frozen=True, slots=True)
class Group:
    """Points that share a reference, which is made when the first of them is asked for.

    Attributes:
        kind: of its points.
        suite: of its points; empty: several.
        points: the points.
        per_round: how many are run in a round.
    """

    kind: str
    suite: str
    points: Callable[[], Iterator[Point]]
    per_round: int = _PER_ROUND


def chosen(all_groups: list[Group], only: str) -> list[Group]:
    """Groups that may hold a point whose name contains a text, without making their points."""
    suites_named = {group.suite for group in all_groups if group.suite and group.suite in only}
    kinds_named = {group.kind for group in all_groups if group.kind and only.startswith(group.kind)}
    return [
        group for group in all_groups
        if (not suites_named or group.suite in suites_named)
        and (not kinds_named or group.kind in kinds_named)
    ]  # fmt: skip


def groups(bench: Bench, seed: int, *, faults: bool) -> list[Group]:
    """The groups of disturbed runs, in a seeded order.

    Args:
        bench: runs them.
        seed: of the order, and of the times of kills and signals.
        faults: calls can be failed on this machine.
    """
    made = []
    for suite in suites(bench.inputs):
        if faults:
            made.append(Group("fault", suite.name, partial(_faults, bench, suite, seed)))
        made.append(Group("kill", suite.name, partial(_kills, bench, suite, seed), 1))
        made.append(Group("signal", suite.name, partial(_signals, bench, suite, seed), 1))
    for suite in suites(bench.inputs):
        if suite.name in _COLD:
            made.append(Group("", suite.name, partial(_cold, bench, suite, seed), 1))
    for name in RECIPES:
        made.append(Group("resume", f"recipe/{name}", partial(_resumes, bench, name, seed), 1))
    if faults:
        made += [
            Group(PEER, suite.name, partial(_faults, bench, suite, seed), 1)
            for suite in peers(bench.inputs)
        ]
    made.append(Group("bad input", "", partial(_bad_inputs, bench, seed), _BAD_PER_ROUND))
    made.append(Group("mutation", "", partial(_mutations, bench, seed), 1))
    random.Random(seed).shuffle(made)
    return made


def _shuffled(points: list[Point], *seed: object) -> Iterator[Point]:
    random.Random("/".join(map(str, seed))).shuffle(points)
    return iter(points)


def _faults(bench: Bench, suite: Suite, seed: int) -> Iterator[Point]:
    """Faults at every call, or at every so many."""
    calls = bench.reference(suite).calls
    first = random.Random(f"{seed}/{suite.name}").randrange(suite.every)
    made = []
    for place, call in enumerate(calls[first :: suite.every]):
        for name in (*_ONE_CALL, *(_ONWARDS if place % 4 == 0 else ())):
            run = partial(bench.failing, suite, FAULTS[name], call.number)
            key = f"{name}@{call.number} {call.name}"
            made.append(Point(PEER if suite.peer else "fault", suite.name, key, run))
    return _shuffled(made, seed, suite.name, "faults")


def _kills(bench: Bench, suite: Suite, seed: int) -> Iterator[Point]:
    """SIGKILL at random times."""
    for number in range(_KILLS):
        share = random.Random(f"{seed}/{suite.name}/kill/{number}").random()
        run = partial(bench.signalled, suite, signal.SIGKILL, share)
        yield Point("kill", suite.name, f"{seed}.{number} at {share:.4f}", run)


def _signals(bench: Bench, suite: Suite, seed: int) -> Iterator[Point]:
    """Each signal at random times."""
    for number in range(_SIGNALS):
        for name, sent in SIGNALS.items():
            share = random.Random(f"{seed}/{suite.name}/{name}/{number}").random()
            run = partial(bench.signalled, suite, sent, share)
            yield Point("signal", suite.name, f"{name} {seed}.{number} at {share:.4f}", run)


def _cold(bench: Bench, suite: Suite, seed: int) -> Iterator[Point]:
    """SIGKILL and each signal in processes that have imported nothing."""
    for number in range(_COLD_EACH):
        for name, sent in {"KILL": signal.SIGKILL, **SIGNALS}.items():
            share = random.Random(f"{seed}/{suite.name}/cold/{name}/{number}").random()
            run = partial(bench.signalled, suite, sent, share, cold=True)
            kind = "kill" if name == "KILL" else "signal"
            yield Point(kind, suite.name, f"cold {name} {seed}.{number} at {share:.4f}", run)


def _resumes(bench: Bench, name: str, seed: int) -> Iterator[Point]:
    """A recipe stopped after each of its steps."""
    suite = recipe(bench.inputs, name)
    made = []
    for step in range(1, RECIPE_STEPS):
        run = partial(bench.stopped, suite, step, signal.SIGTERM)
        made.append(Point("resume", suite.name, f"step {step}", run))
    return _shuffled(made, seed, suite.name, "resumes")


def _bad_inputs(bench: Bench, seed: int) -> Iterator[Point]:
    """Each named input once."""
    made = [Point("bad input", one.name.split("/")[0], one.name, partial(refused, bench, one))
            for one in bad_inputs()]  # fmt: skip
    return _shuffled(made, seed, "bad inputs")


def _mutations(bench: Bench, seed: int) -> Iterator[Point]:
    """Batches; another seed gives other mutations."""
    for number in range(_BATCHES):
        run = partial(batch, bench, seed, number)
        yield Point("mutation", "readers", f"{seed}.{number}", run)
