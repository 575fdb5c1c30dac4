"""Which parameters of a test belong to the fast tier; the others are run by `make test-slow`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def fast(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """Parameters of which all but the chosen ones are marked ``slow``.

    Args:
        cases: Values, tuples of values, or keys of a dict of cases.
        chosen: Those of ``cases`` that the fast tier runs; without any, the first one.
    """
    cases = list(cases)
    chosen = chosen or tuple(cases[:1])
    missing = [case for case in chosen if case not in cases]
    assert not missing, f"not a case: {missing}"
    return [case if case in chosen else slow(case) for case in cases]


def slow(case: Any) -> Any:
    """One parameter of a test, or a tuple of them, marked ``slow``."""
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
