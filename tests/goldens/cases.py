"""All recorded commands: the demos, then chains that run beside one another.

This file decides the order of a record. The demos come first because the inputs are derived from
the checkpoints that they write.
"""

from __future__ import annotations

from goldens.case import Case, Chain
from goldens.error_cases import ADAPTER_ERRORS, ERRORS
from goldens.run_cases import DEMOS, DENSE, MOE, REPORTS, TEXT_CLASS, VISION

#: What runs once the inputs exist; the cases of a chain in order, the longest chains first.
CHAINS: tuple[Chain, ...] = (DENSE + ADAPTER_ERRORS, VISION, MOE, TEXT_CLASS, *REPORTS, *ERRORS)
CASES: tuple[Case, ...] = tuple(case for chain in (*DEMOS, *CHAINS) for case in chain)
#: The cases that the test suite runs too.
CHEAP: tuple[Case, ...] = tuple(case for case in CASES if case.cheap)
