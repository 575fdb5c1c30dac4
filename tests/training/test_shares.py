"""What a rank runs of a step: each micro-batch on one rank, whatever the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.sinks import Heard

from qcore.config.settings import Settings
from qcore.data.sampler import Schedule
from qcore.errors import InputError
from qcore.parallel.world import World
from qcore.planning.gpus import gpu_by_name
from qcore.planning.links import NCCL
from qcore.planning.run import Room
from qcore.training.auto_resume import Start
from qcore.training.ranks import check_output, note_idle, scaled, smallest_room
from qcore.training.shares import Share, Shares

LENGTHS = [37, 900, 64, 12, 512, 256, 30, 31, 700, 65, 66, 67, 5]


def shares(ranks: int, rank: int, together: int = 0, units: Any = (), **more: Any) -> list[Share]:
    """All steps of an epoch, as a rank sees them."""
    settings = Settings(
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, **more}
    )
    supervised = np.array(LENGTHS) // 2
    train = SimpleNamespace(lengths=LENGTHS, units=units, column=lambda name: supervised)
    data: Any = SimpleNamespace(train=train)
    schedule = Schedule(len(LENGTHS), settings, LENGTHS)
    made = Shares(data, schedule, together, World(rank, ranks, rank))
    return [made.of(step) for step in range(schedule.steps_per_epoch)]


@pytest.mark.parametrize("together", [0, 1200])
@pytest.mark.parametrize("units", [(), [n % 3 for n in range(len(LENGTHS))]])
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_share_the_rows_of_a_step(ranks: int, units: Any, together: int) -> None:
    one = shares(1, 0, together, units)
    each = [shares(ranks, rank, together, units) for rank in range(ranks)]
    for step, whole in enumerate(one):
        parts = [own[step] for own in each]
        for part in parts:
            assert part.rows == whole.rows
            assert (part.supervised, part.tokens) == (whole.supervised, whole.tokens)
        run = [row for part in parts for pack in part.packs for row in pack]
        assert sorted(run) == sorted(whole.rows)
    assert sum(share.tokens for share in one) == sum(LENGTHS)


def test_packs_are_those_of_one_rank_unless_they_are_joined() -> None:
    one = shares(1, 0)[0]
    parts = [shares(3, rank)[0] for rank in range(3)]
    packs = [[*pack] for part in parts for pack in part.packs]
    assert sorted(packs) == sorted([*pack] for pack in one.packs)
    assert {part.count for part in parts} == {one.count} == {3}


def test_a_rank_joins_its_own_packs_alone() -> None:
    parts = [shares(2, rank, 10**6)[0] for rank in range(2)]
    assert [len(part.packs) for part in parts] == [1, 1]


def test_a_rank_may_have_nothing_to_run() -> None:
    parts = [shares(4, rank)[0] for rank in range(4)]
    assert [len(part.packs) for part in parts] == [1, 1, 1, 0]


@dataclass(frozen=True)
class Scripted(World):
    """A rank whose `gather` returns what the others are said to have."""

    others: Any = field(default=())

    def gather(self, value: Any) -> Any:
        return [value, *self.others]


def test_scale_batch_multiplies_the_step_and_says_so() -> None:
    heard, world = Heard(), World(0, 4, 0)
    plain = Settings(gradient_accumulation_steps=3)
    assert scaled(plain, world, heard.reporter) == plain
    asked = Settings(gradient_accumulation_steps=3, scale_batch=True)
    assert scaled(asked, World.alone(), heard.reporter) == asked
    assert scaled(asked, world, heard.reporter).gradient_accumulation_steps == 12
    tokens = Settings(tokens_per_step=1000, scale_batch=True)
    assert scaled(tokens, world, heard.reporter).tokens_per_step == 4000
    assert "gradient_accumulation_steps is 3 x 4 ranks = 12" in "\n".join(heard.notes)


def test_the_plan_has_the_memory_that_every_rank_has() -> None:
    own = Room(budget=100, host=64)
    assert smallest_room(World.alone(), own) is own
    # Rank 1 is on this machine; rank 2 alone on another one.
    world = Scripted(0, 3, 0, others=[[None, 90, 64, 0], [None, 95, 40, 2]])
    assert smallest_room(world, own) == Room(budget=90, host=32)
    unknown = Scripted(0, 2, 0, others=[[None, None, None, 0]])
    assert smallest_room(unknown, Room()) == Room()


def test_the_plan_of_a_run_leaves_room_for_nccl() -> None:
    """As `qcore plan --gpus` does; both must agree on whether the base is sharded."""
    card, free = gpu_by_name("RTX-4090"), 20 * 10**9
    other = [card.memory, free, None, 0]
    room = smallest_room(Scripted(0, 2, 0, others=[other]), Room(card=card, budget=free + 1))
    assert room == Room(card=card, budget=free - NCCL)
    unlimited = [card.memory, None, None, 0]
    room = smallest_room(Scripted(0, 2, 0, others=[unlimited]), Room(card=card))
    assert room == Room(card=card, budget=card.budget - NCCL)
    assert smallest_room(World.alone(), Room(card=card, budget=free)).budget == free


def test_a_rank_that_sees_another_output_is_refused() -> None:
    """Else it starts at step 1 while the others go on, and their gradients are summed."""
    check_output(World.alone(), output=Start().kind)
    check_output(Scripted(0, 2, 0, others=[{"output": "no run"}]), output=Start().kind)
    world = Scripted(0, 2, 0, others=[{"output": Start().kind}])
    with pytest.raises(InputError) as caught:
        check_output(world, output=Start(resume=True).kind)
    assert caught.value.code == "QC-PARALLEL-003"
    assert caught.value.message == (
        "output: rank 1 differs from rank 0: found no run, expected a run to go on with"
    )
    assert "file system that every machine sees" in str(caught.value.fix)


def test_idle_ranks_are_named() -> None:
    heard = Heard()
    settings = Settings(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    schedule = Schedule(32, settings)
    run: Any = SimpleNamespace(world=World(0, 3, 0), reporter=heard.reporter)
    note_idle(run, schedule)
    assert "2 micro-batches for 3 ranks, so that 1 of them compute nothing" in "\n".join(
        heard.notes
    )
    before = [*heard.notes]
    note_idle(SimpleNamespace(world=World(0, 2, 0), reporter=heard.reporter), schedule)  # type: ignore[arg-type]
    assert heard.notes == before
