"""Which parameters of a test belong to the fast tier; the others are run by `make test-slow`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

import pytest


def fast(cases: Iterable[Any], *chosen: Any, names: int = 1) -> list[Any]:
    """Parameters of which all but the chosen ones are marked ``slow``.

    Args:
        cases: The values of a parameter, such as the keys of a dict of cases.
        chosen: Those of ``cases`` that the fast tier runs; without any, the first one.
        names: How many parameters a case has values for; more than one makes a case a tuple.
    """
    cases = list(cases)
    chosen = chosen or tuple(cases[:1])
    missing = [case for case in chosen if case not in cases]
    assert not missing, f"not a case: {missing}"
    return [case if case in chosen else slow(case, names=names) for case in cases]


def slow(case: Any, *, names: int = 1) -> Any:
    """A case of one parameter, or a tuple for several, marked ``slow``."""
    return pytest.param(*(case if names > 1 else (case,)), marks=pytest.mark.slow)


def pairs(first: Iterable[Any], second: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Each value of ``second`` with the values of ``first`` in turn, in place of all products."""
    return list(zip(cycle(first), second, strict=False))
