"""The plan of several GPUs: links, sharing of packs, a sharded base, and what users see of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from support.plan_kit import DENSE_4B, MOE_35B, found_of, shared_measures

from qcore.api.parameters import Kind
from qcore.config.settings import Settings
from qcore.data.microbatches import cost
from qcore.data.sampler import Schedule
from qcore.errors import InputError, UsageError
from qcore.planning import Planner
from qcore.planning.gpus import gpu_by_name
from qcore.planning.links import NVLINK4, PCIE4, Gathers, Link, Ranks, parse_ranks
from qcore.planning.packs import packs_of
from qcore.planning.report import Plan
from qcore.planning.run import Room, plan_run
from qcore.planning.sharding import BESIDE, GATHERED, Sharding
from qcore.planning.shared import SharedStep

H200 = gpu_by_name("H200")
TWO = Ranks(gpus=2)
#: NCCL on two H200 with NVLink 4: bytes and seconds.
REDUCED = {122e6: 0.46e-3, 160e6: 0.56e-3, 435e6: 1.41e-3, 1000e6: 3.05e-3}
GATHERED_TO = {50e6: 0.13e-3, 200e6: 0.42e-3, 800e6: 1.53e-3}


# -- links


@pytest.mark.parametrize("nbytes", REDUCED)
def test_an_all_reduce_over_nvlink_takes_what_was_measured(nbytes: float) -> None:
    assert TWO.all_reduce(int(nbytes)) == pytest.approx(REDUCED[nbytes], rel=0.08)


@pytest.mark.parametrize("nbytes", GATHERED_TO)
def test_an_all_gather_over_nvlink_takes_what_was_measured(nbytes: float) -> None:
    assert TWO.all_gather(int(nbytes)) == pytest.approx(GATHERED_TO[nbytes], abs=30e-6)


@pytest.mark.parametrize(
    ("nodes", "expected"), [(1, (11, 14, 38)), (8, (21, 28, 76))], ids=["pcie", "ethernet"]
)
def test_a_ring_of_eight_is_as_slow_as_its_slowest_link(
    nodes: int, expected: tuple[int, ...]
) -> None:
    """Milliseconds for the LoRA gradients (r = 16, float32) of 4B, 9B and 27B."""
    ranks = Ranks(gpus=8 // nodes, nodes=nodes, link=PCIE4)
    found = [ranks.all_reduce(size) * 1e3 for size in (122_000_000, 160_000_000, 435_000_000)]
    assert found == pytest.approx(expected, abs=0.7)


def test_machines_with_fast_links_wait_for_the_network() -> None:
    assert Ranks(gpus=8, nodes=2).slowest.name == "network"
    assert Ranks(gpus=8, nodes=2, network=1e12).slowest is NVLINK4
    assert Ranks(gpus=8).slowest is NVLINK4
    assert Ranks().all_reduce(10**9) == Ranks().all_gather(10**9) == 0


def test_a_link_that_the_user_measured_replaces_that_of_the_gpu() -> None:
    ranks = parse_ranks(NVLINK4, gpus=4, nodes=2, link=12.5, network=3)
    assert (ranks.size, ranks.link.reduce, ranks.network) == (8, 12.5e9, 3e9)
    assert parse_ranks(PCIE4) == Ranks(link=PCIE4)


@pytest.mark.parametrize(
    ("option", "values", "code"),
    [
        ("--gpus", {"gpus": 0}, "QC-PLAN-009"),
        ("--gpus", {"gpus": 5000}, "QC-PLAN-009"),
        ("--nodes", {"gpus": 2, "nodes": -1}, "QC-PLAN-009"),
        ("--link", {"gpus": 2, "link": 0.0}, "QC-PLAN-010"),
        ("--network", {"nodes": 2, "network": math.nan}, "QC-PLAN-010"),
        ("--network", {"nodes": 2, "network": 1e9}, "QC-PLAN-010"),
    ],
)
def test_numbers_out_of_range_are_refused(option: str, values: dict[str, Any], code: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_ranks(NVLINK4, **values)
    assert (error.value.code, error.value.field) == (code, option)


# -- packs that ranks share


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_a_step_waits_for_the_rank_with_the_most_work(ranks: int) -> None:
    lengths = [64 * (1 + (7 * n) % 23) for n in range(40)]
    settings = Settings(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=9)
    packs = packs_of(lengths, (), settings, ranks=ranks)
    schedule = Schedule(len(lengths), settings)
    steps = [schedule.micro_batches(step) for step in range(9)]
    assert packs.packs == sum(map(len, steps)) / 9
    costs = [[cost([lengths[n] for n in rows]) for rows in step] for step in steps]
    mean = sum(map(sum, costs)) / sum(map(len, costs))
    # No rank can have less than the mean of all, nor less than the longest micro-batch; giving the
    # longest first is at most 4/3 above that.
    least = sum(max(sum(each) / ranks, max(each)) for each in costs) / 9 / mean
    if ranks == 1:
        assert packs.load == packs.micro_steps == packs.packs
    else:
        assert least * (1 - 1e-9) <= packs.load <= 4 / 3 * least


def test_each_rank_joins_its_own_micro_batches() -> None:
    lengths = [100] * 16
    settings = Settings(per_device_train_batch_size=1, gradient_accumulation_steps=16, max_steps=1)
    alone = packs_of(lengths, (), settings, together=1 << 14)
    four = packs_of(lengths, (), settings, together=1 << 14, ranks=4)
    assert (alone.packs, alone.micro_steps, alone.usual) == (1, 1, (100,) * 16)
    assert (four.packs, four.micro_steps, four.usual) == (4, 1, (100,) * 4)


def test_ranks_without_a_pack_are_counted() -> None:
    settings = Settings(per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=3)
    packs = packs_of([128] * 12, (), settings, ranks=2)
    assert (packs.packs, packs.load, packs.micro_steps) == (1, 1, 1)


# -- the step of all ranks


def plan_of(seconds: float = 0.5, gathers: Gathers = Gathers()) -> Plan:  # noqa: B008
    """A plan of 8192 tokens."""
    return Plan(
        card="H200", lengths=(4096, 4096), policies=("none",), budget=10**11, memory={},
        peak=10**10, moment="loss", ops={}, seconds=seconds, launches=1, backends={},
        gathers=gathers,
    )  # fmt: skip


def step_of(packs: float, load: float, size: int = 2, **more: Any) -> SharedStep:
    """A step of `size` ranks on one machine."""
    return SharedStep(
        ranks=Ranks(gpus=size), sharded=False, reason="", packs=packs, load=load,
        usual=plan_of(**more), reduced=122_000_000,
    )  # fmt: skip


def test_two_gpus_with_half_of_the_packs_each_are_twice_as_fast() -> None:
    step = step_of(8, 4)
    assert step.seconds == pytest.approx(4 * 0.5 + TWO.all_reduce(122_000_000))
    assert step.scaling == pytest.approx(1, abs=1e-3)
    assert step.tokens_per_second == pytest.approx(2 * 8192 / 0.5, rel=1e-3)
    assert step.per_gpu == step.tokens_per_second / 2
    assert (step.idle, step.idle_ranks, step.balance()) == (0, 0, None)


def test_ranks_that_compute_nothing_are_reported_with_what_to_change() -> None:
    step = step_of(4, 1, size=8)
    assert (step.idle, step.idle_ranks) == (0.5, 4)
    line = step.balance()
    assert line is not None
    assert line.startswith("a step has 4 packs for 8 ranks: 4 of them compute nothing")
    for setting in ("gradient_accumulation_steps", "scale_batch=true"):
        assert setting in line


def test_ranks_that_wait_for_another_are_reported() -> None:
    line = step_of(5, 2, size=4).balance()
    assert line is not None
    assert line.startswith("ranks wait 38% of the time")


def test_compute_that_waits_for_all_gathers_costs_scaling() -> None:
    whole = step_of(8, 4, seconds=1.0)
    sharded = step_of(8, 4, seconds=1.25, gathers=Gathers(10**9, 0.5, 0.25))
    assert sharded.scaling == pytest.approx(whole.scaling / 1.25, rel=1e-3)
    values = sharded.as_json()
    assert values["all_gather_exposed_seconds"] == 0.25
    assert values["scaling"] == pytest.approx(0.8, abs=1e-3)


# -- a sharded base


def test_the_longer_of_computing_and_gathering_counts() -> None:
    fast = Ranks(gpus=2, link=Link(name="test", reduce=1e9, gather=1e9, latency=0.0))
    shards = Sharding(ranks=fast, terms=({"weights nf4": 2 * 10**9},) * 3)  # 1 s for each layer
    # Nothing runs beside the first gather of each pass; those beside enough compute slow it.
    copies = shards.gathers([(9, 9)] * 3, H200).exposed - 2 - 4 * BESIDE
    assert 0 < copies < 0.01
    assert shards.gathers([(9, 9)] * 3, H200).seconds == 6
    exposed = shards.gathers([(0.125, 0.125)] * 3, H200).exposed
    assert exposed == pytest.approx(2 + 4 * 0.875 + copies)


def test_shards_are_rounded_up_and_two_layers_are_there_at_a_time() -> None:
    shards = Sharding(ranks=Ranks(gpus=4), terms=({"a": 10}, {"a": 20, "b": 6}, {"a": 3}))
    assert shards.saved == {"a": 7 + 15 + 2, "b": 4}
    assert [shards.gathered(n, 1) for n in range(3)] == [36, 29, 3]
    assert [shards.gathered(n, -1) for n in range(3)] == [10, 36, 29]
    assert shards.most == 36


@pytest.fixture(autouse=True)
def measures() -> Iterator[None]:
    """Measure each model once."""
    with shared_measures():
        yield


SMALL = found_of(DENSE_4B | {"num_hidden_layers": 4, "vocab_size": 4096})
SMALL_MOE = found_of(MOE_35B | {"num_hidden_layers": 4, "vocab_size": 4096}, moe=True)


@pytest.mark.parametrize("found", [SMALL, SMALL_MOE], ids=["dense", "moe"])
def test_a_rank_of_two_holds_half_of_the_layers(found: Any) -> None:
    planner = Planner(found, Settings(), H200)
    two = planner.over(TWO, sharded=True)
    values = [
        math.prod(entry.shape)
        for entry in found.layout.table
        if ".layers." in entry.name and entry.row.kind in (Kind.LINEAR, Kind.EXPERTS)
        and entry.row.group != "router" and len(entry.shape) > 1
    ]  # fmt: skip
    # 4 bit, 8 bit for 64 values, and 32 bit for 256 of these.
    expected = sum(values) * (1 / 2 + 1 / 64 + 4 / 64 / 256)
    assert planner.static["weights nf4"] == pytest.approx(expected, rel=0.01)
    assert two.always["weights nf4"] == pytest.approx(expected / 2, rel=0.01)
    for term in ("embeddings", "adapters", "gradients", "optimizer"):
        assert two.always[term] == planner.static[term]


def test_a_sharded_step_holds_a_shard_and_two_layers() -> None:
    planner = Planner(SMALL, Settings(), H200)
    whole, two = planner.over(TWO, sharded=False), planner.over(TWO, sharded=True)
    policies = ("full",) * 4
    each, plan = whole.plan((512,), policies), two.plan((512,), policies)
    layers = two.sharding.layers if two.sharding else []
    assert GATHERED not in each.memory
    assert plan.memory[GATHERED] in {0, layers[0], layers[0] + layers[1], layers[1] + layers[2]}
    assert sum(plan.memory.values()) == plan.peak
    assert plan.peak <= each.peak - sum(layers) / 2 + 2 * max(layers) + 4096
    assert plan.gathers.nbytes == 2 * sum(layers)
    assert plan.seconds == pytest.approx(each.seconds + plan.gathers.exposed)
    assert each.peak == planner.plan((512,), policies).peak  # several ranks need no more memory
    memory = two.evaluation(512)
    assert memory[GATHERED] == max(a + b for a, b in zip(layers, [*layers[1:], 0], strict=True))


# -- the plan of a run


def run_plan(
    budget: int | None, ranks: Ranks | None = TWO, **settings: Any
) -> tuple[Any, list[str]]:
    """Two steps of 8 packs of one row of 4096 tokens."""
    own = Settings(max_steps=2, max_length=4096, join_micro_batches=False, **settings)
    packs = packs_of([4096] * 16, (), own, ranks=1 if ranks is None else ranks.size)
    return plan_run(SMALL, own, packs, Room(card=H200, budget=budget), ranks=ranks)


def frugal(*, sharded: bool) -> int:
    """The least peak of a pack of the run."""
    planner = Planner(SMALL, Settings(), H200).over(TWO, sharded=sharded)
    return min(planner.peak((4096,), policies) for policies in planner.ladder())


def test_the_base_is_whole_where_it_fits() -> None:
    plan, lines = run_plan(None)
    assert (plan.sharded, plan.shared.ranks.size) == (False, 2)
    assert "on 2 x H200, base whole on each" in plan.line()
    assert any("each GPU holds the whole base" in line for line in lines)
    assert plan.as_json()["ranks"]["base"] == "whole"
    assert plan.seconds == plan.shared.seconds > plan.usual.seconds * plan.shared.load


def test_the_base_is_sharded_where_it_does_not_fit_whole() -> None:
    budget = (frugal(sharded=False) + frugal(sharded=True)) // 2
    plan, lines = run_plan(budget)
    assert (plan.sharded, plan.worst.fits) == (True, True)
    assert plan.as_json()["ranks"]["base"] == "sharded"
    assert any("the base is sharded: with all of it a GPU would need" in line for line in lines)
    with pytest.raises(InputError) as error:
        run_plan(budget, None)
    assert error.value.code == "QC-PLAN-001"
    assert "on 2 GPUs with the base sharded over them it fits" in str(error.value.fix)


def test_a_run_that_does_not_fit_sharded_says_over_how_many_gpus() -> None:
    with pytest.raises(InputError) as error:
        run_plan(frugal(sharded=True) - 2 * 10**7)
    assert "the base sharded over 2 GPUs" in str(error.value)
    assert "on 4 GPUs with the base sharded over them it fits" in str(error.value.fix)


@pytest.mark.parametrize(("wanted", "sharded"), [("always", True), ("never", False)])
def test_the_setting_decides_if_it_is_set(wanted: str, sharded: bool) -> None:
    plan, lines = run_plan(None, shard_base=wanted)
    assert plan.sharded is sharded
    assert any(f"shard_base={wanted}" in line for line in lines)


def test_a_run_of_one_process_has_no_ranks() -> None:
    plan, _ = run_plan(None, None)
    assert (plan.sharded, plan.shared) == (False, None)
    assert "ranks" not in plan.as_json()
    assert plan.line().endswith("on H200")


def test_the_cpu_shards_only_if_it_must() -> None:
    settings = Settings(max_steps=2, max_length=256)
    packs = packs_of([256] * 32, (), settings, ranks=2)
    plan, _ = plan_run(SMALL, settings, packs, Room(), ranks=TWO)
    assert (plan.sharded, plan.seconds) == (False, None)
    always = replace(settings, shard_base="always")
    plan, lines = plan_run(SMALL, always, packs, Room(), ranks=TWO)
    assert plan.sharded
    assert plan.as_json()["ranks"]["seconds_per_step"] is None
    assert "shard_base=always" in lines[0]


# -- published sizes


@pytest.mark.slow
def test_a_397b_fits_on_two_h200_when_it_is_sharded() -> None:
    sizes = MOE_35B | {
        "hidden_size": 4096, "num_hidden_layers": 60, "num_attention_heads": 32,
        "linear_num_value_heads": 64, "moe_intermediate_size": 1024, "num_experts": 512,
        "num_experts_per_tok": 10, "shared_expert_intermediate_size": 1024,
    }  # fmt: skip
    settings = Settings(max_length=8192, r=16, target_groups=("attn", "gdn", "shared_expert"))
    planner = Planner(found_of(sizes, moe=True), settings, H200)
    assert not planner.over(TWO, sharded=False).fastest((8192,)).fits
    two = planner.over(TWO, sharded=True)
    weights = sum(size for term, size in two.always.items() if term.startswith(("weights", "emb")))
    assert weights == pytest.approx(106e9, rel=0.01)
    assert two.fastest((8192,)).fits
