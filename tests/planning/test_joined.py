"""Short micro-batches in a run's plan: together where it is faster and fits, and as before."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from support.plan_kit import DENSE_4B, found_of

from qcore.config.settings import Settings
from qcore.planning import Planner
from qcore.planning.compare import RunPlan
from qcore.planning.gpus import CARDS
from qcore.planning.packs import may_join, packs_of
from qcore.planning.run import Room, plan_run
from qcore.planning.saved import PreviousPlan
from qcore.plugins.resolve_model import Identified

LONG_AND_SHORT = [2000] * 8 + [200] * 56


@pytest.fixture(scope="module")
def four() -> Identified:
    """Four layers of a 4B."""
    pytest.importorskip("triton")
    return found_of(DENSE_4B | {"num_hidden_layers": 4})


def settings(**given: Any) -> Settings:
    return Settings(**({"r": 4, "gradient_accumulation_steps": 8} | given))


def planned(
    found: Identified,
    rows: list[int],
    budget: int = CARDS[0].budget,
    before: PreviousPlan | None = None,
    **given: Any,
) -> tuple[RunPlan, list[str]]:
    """The plan of these rows, eight micro-batches a step, on an H100."""
    chosen = settings(**given)
    pack = partial(packs_of, rows, [], chosen)
    room = Room(card=CARDS[0], budget=budget)
    return plan_run(
        found, chosen, pack(), room, before=before, join=lambda most: pack(together=most)
    )


def test_short_micro_batches_run_as_one(four: Identified) -> None:
    """Eight rows of 300 tokens wait eight times for the host, or once."""
    plan, _ = planned(four, [300] * 64)
    assert plan.micro_steps == 1
    assert plan.together >= 8 * 364
    assert plan.usual.lengths == (300,) * 8
    assert "1 micro-steps a step" in plan.line()
    assert plan.as_json()["tokens_together"] == plan.together


def test_long_micro_batches_run_alone(four: Identified) -> None:
    plan, _ = planned(four, [16384] * 16)
    assert (plan.together, plan.micro_steps) == (0, 8)
    assert "together" not in plan.line()


def tightest(four: Identified) -> int:
    """A budget in which the longest row alone just fits."""
    planner = Planner(four, settings(), CARDS[0])
    return int(1.005 * planner.plan((2000,), ("offload",) * 4).peak)


def test_what_costs_memory_that_there_is_not_is_not_joined(four: Identified) -> None:
    """Where the longest row just fits, short ones run together up to its length."""
    assert planned(four, LONG_AND_SHORT)[0].together > 2064
    tight, _ = planned(four, LONG_AND_SHORT, tightest(four))
    assert tight.worst.fits
    assert 0 < tight.together <= 2064
    assert sum(tight.worst.lengths) <= 2000


@pytest.mark.parametrize("together", [0, 2064, 4096])
def test_a_resumed_run_joins_as_before(four: Identified, together: int) -> None:
    before = PreviousPlan(policies=("full",) * 4, together=together)
    plan, notes = planned(four, LONG_AND_SHORT, before=before)
    assert (plan.together, plan.policies) == (together, before.policies)
    (note,) = [one for one in notes if "before the run was stopped" in one]
    assert note == "recompute as before the run was stopped: full"


def test_under_another_policy_a_resumed_run_joins_as_before(four: Identified) -> None:
    plan, _ = planned(four, LONG_AND_SHORT, before=PreviousPlan(together=4096), recompute="full")
    assert (plan.together, set(plan.policies)) == (4096, {"full"})


def test_a_resumed_run_that_no_longer_fits_says_that_sums_change(four: Identified) -> None:
    roomy, _ = planned(four, LONG_AND_SHORT)
    before = PreviousPlan(policies=roomy.policies, together=roomy.together)
    plan, notes = planned(four, LONG_AND_SHORT, tightest(four), before)
    assert plan.together < roomy.together
    assert any(
        f"joined up to {roomy.together} tokens before" in one and "in another order" in one
        for one in notes
    )


def test_the_update_is_counted_once_a_step(four: Identified) -> None:
    plan, _ = planned(four, [300] * 64)
    planner = Planner(four, settings(), CARDS[0])
    steps = [planner.plan((300,) * 8, plan.policies, steps).seconds for steps in (1, 8)]
    assert steps[0] > steps[1]
    assert plan.seconds == steps[0]


def test_what_is_each_micro_batchs_own_stays_so() -> None:
    assert may_join(settings())
    for given in ({"lora_dropout": 0.1}, {"router_aux_loss_coef": 0.01},
                  {"join_micro_batches": False}):  # fmt: skip
        assert not may_join(settings(**given))
