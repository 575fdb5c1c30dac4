"""The plan of a run: its policy, its refusal, a resumed one, memory that runs out after all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.plan_kit import DENSE_4B, MOE_35B, found_of, shared_measures

from qcore.config.settings import Settings
from qcore.errors import InputError
from qcore.nn.device import is_out_of_memory
from qcore.nn.recompute import POLICIES
from qcore.planning import Planner
from qcore.planning.compare import RunPlan, comparison_line
from qcore.planning.gpus import CARDS, card_of
from qcore.planning.host_memory import available
from qcore.planning.oom import Usage, Watch
from qcore.planning.packs import packs_of
from qcore.planning.run import Room, plan_run, room_of
from qcore.planning.saved import PLAN, PreviousPlan, load_plan, save_plan
from qcore.planning.trace import Trace
from qcore.plugins.resolve_model import Identified, identify
from qcore.training.meter import Meter
from qcore_qwen35.tiny import write

CPU = torch.device("cpu")
ROWS = [200, 90, 300, 64]


@pytest.fixture(scope="module", autouse=True)
def _shared_measures() -> Iterator[None]:
    with shared_measures():
        yield


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Identified:
    """A tiny checkpoint."""
    path = tmp_path_factory.mktemp("tiny")
    write(path)
    return identify(str(path))


@pytest.fixture(scope="module")
def four() -> Identified:
    """Eight layers of a 4B."""
    pytest.importorskip("triton")
    return found_of(DENSE_4B | {"num_hidden_layers": 8})


def settings(**given: Any) -> Settings:
    return Settings(**({"r": 4, "gradient_accumulation_steps": 1} | given))


def planned(
    found: Identified,
    room: Room,
    rows: list[int] = ROWS,
    held_out: tuple[int, ...] = (),
    kept: tuple[str, ...] = (),
    **given: Any,
) -> tuple[RunPlan, list[str]]:
    chosen = settings(**given)
    before = PreviousPlan(policies=kept)
    return plan_run(found, chosen, packs_of(rows, held_out, chosen), room, before=before)


def peak(found: Identified, policy: str, rows: tuple[int, ...] = (300,)) -> int:
    """Bytes of a pack on the CPU under one policy."""
    planner = Planner(found, settings(), None)
    return planner.plan(rows, (policy,) * len(planner.measure.kinds)).peak


# -- the policy


@pytest.mark.parametrize(
    ("given", "policy"),
    [
        ({}, "full"),
        ({"recompute": "elementwise"}, "elementwise"),
        ({"gradient_checkpointing": False}, "none"),
        ({"recompute": "none"}, "none"),
        ({"gradient_checkpointing": False, "recompute": "none"}, "none"),
    ],
)
def test_on_the_cpu_it_is_what_the_settings_say_and_no_time_is_claimed(
    found: Identified, given: dict[str, Any], policy: str
) -> None:
    assert room_of(CPU) == Room()
    plan, notes = planned(found, Room(), **given)
    assert set(plan.policies) == {policy}
    assert notes == []
    assert (plan.seconds, plan.tokens_per_second) == (None, None)
    line = plan.line()
    assert f"recompute {policy}" in line
    assert "no limit known" in line
    assert "no time predicted" in line
    assert "tokens/s" not in line


def test_the_fastest_that_fits_the_room(found: Identified) -> None:
    for policy in ("none", "elementwise", "full"):
        plan, notes = planned(found, Room(budget=peak(found, policy)))
        assert plan.worst.fits
        assert plan.worst.lengths == (300,)
        # No layer gives up more than it must.
        assert set(plan.policies[:1]) == {policy}
        assert notes == []
    between = (peak(found, "elementwise") + peak(found, "none")) // 2
    mixed, _ = planned(found, Room(budget=between))
    assert set(mixed.policies) == {"elementwise", "none"}


def test_time_is_of_the_usual_pack_and_memory_of_the_largest(four: Identified) -> None:
    room = Room(card=CARDS[0])
    rows = [512] * 14 + [8192, 512]
    plan, _ = planned(four, room, rows, gradient_accumulation_steps=8)
    assert plan.worst.lengths == (8192,)
    assert plan.usual.lengths == (512,)
    assert plan.micro_steps == 8
    assert plan.seconds == pytest.approx(8 * plan.usual.seconds)
    assert "s a step" in plan.line()
    assert plan.line().endswith("on H100-80")


def test_a_card_of_unknown_rates_has_a_memory_plan(four: Identified) -> None:
    known, _ = planned(four, Room(card=CARDS[0], budget=10**10), [2048])
    card = card_of("Frobnicator 3000", 24 * 2**30)
    plan, notes = planned(four, Room(card=card, budget=10**10), [2048])
    assert plan.worst.peak == known.worst.peak
    assert plan.worst.fits
    assert plan.tokens_per_second is None
    assert "no time predicted, on Frobnicator 3000" in plan.line()
    assert any("rates of Frobnicator 3000 are not known" in note for note in notes)
    assert planned(four, Room(card=card), [2048])[0].worst.budget == card.budget


# -- what does not fit


def test_nothing_fits(found: Identified) -> None:
    with pytest.raises(InputError) as caught:
        planned(found, Room(budget=1_000_000))
    error = caught.value
    assert (error.code, error.exit_code) == ("QC-PLAN-001", 65)
    assert "\n" not in error.message
    assert "most of it " in str(error.found)
    assert error.fix == "use a GPU with more memory, a smaller model, or fewer target_groups"


def check_fixes(found: Identified, error: InputError, room: Room, given: dict[str, Any]) -> None:
    """Each of them fits."""
    assert error.fix is not None
    for fix in error.fix.split(" or "):
        words = fix.removeprefix("with ").removesuffix(" it fits").split()
        numbers = {name: int(text) for name, text in pairwise(words) if text.isdecimal()}
        assert numbers, fix
        rows = [min(500, numbers.pop("max_length", 500))] * 4
        assert planned(found, room, rows, **(given | numbers))[0].worst.fits, fix


@pytest.mark.slow
def test_a_refusal_names_the_largest_term_and_fixes_that_are_true(found: Identified) -> None:
    given = {"per_device_train_batch_size": 4}
    room = Room(budget=peak(found, "full", (500, 500)) + 10_000)
    with pytest.raises(InputError) as caught:
        planned(found, room, [500] * 4, **given)
    error = caught.value
    assert "4 x 500 tokens" in str(error.found)
    assert "most of it workspace" in str(error.found) or "activations" in str(error.found)
    assert "with per_device_train_batch_size 2 it fits" in str(error.fix)
    assert "max_length" not in str(error.fix)  # one longer than the rows would change nothing
    check_fixes(found, error, room, given)


@pytest.mark.slow
def test_one_very_long_row_is_what_is_refused(found: Identified) -> None:
    room = Room(budget=peak(found, "full", (600,)))
    rows = [40] * 30 + [1000]
    with pytest.raises(InputError, match="1 x 1000 tokens"):
        planned(found, room, rows)
    assert planned(found, room, rows, max_steps=1, seed=1)[0].worst.lengths == (40,)


@pytest.mark.slow
def test_a_policy_by_hand_makes_it_a_warning(found: Identified) -> None:
    room = Room(budget=peak(found, "full"))
    for given in ({"gradient_checkpointing": False}, {"recompute": "elementwise"}):
        plan, notes = planned(found, room, **given)
        assert not plan.worst.fits
        assert plan.by_hand
        (warning,) = notes
        assert warning.startswith("warning: QC-PLAN-001 ")
        assert "; with recompute=auto (" in warning
        assert "\n" not in warning

    # -- what is parked on the host

    assert (available() or 10**9) > 10**6


#: Bytes of one input of 4096 tokens, 2560 wide, in bf16; a block of them is 32 MiB.
BLOCK = 32 * 2**20


def test_offload_states_what_it_parks(four: Identified) -> None:
    plan, notes = planned(four, Room(card=CARDS[0]), [4096], recompute="offload")
    assert plan.worst.host == 8 * BLOCK
    assert plan.as_json()["host_bytes"] == 8 * BLOCK
    assert f"{8 * BLOCK / 1e9:.1f} GB of host memory" in " ".join(notes)
    none, _ = planned(four, Room(card=CARDS[0]), [4096], recompute="full")
    assert none.worst.host == 0


def test_more_than_the_host_has_is_refused_also_by_hand(four: Identified) -> None:
    for rows in ([4096], [4096, 100]):
        planned(four, Room(card=CARDS[0], host=8 * BLOCK), rows, recompute="offload")
    with pytest.raises(InputError) as caught:
        planned(four, Room(card=CARDS[0], host=8 * BLOCK - 1), [4096], recompute="offload")
    error = caught.value
    assert (error.code, error.field, error.exit_code) == ("QC-PLAN-006", "recompute", 65)
    assert "0.268 GB of pinned memory for 1 x 4096 tokens, recompute offload" in error.message
    assert "with recompute=auto (none) it fits or with max_length 3264 it fits" in str(error.fix)
    room = Room(card=CARDS[0], host=8 * BLOCK - 1)
    planned(four, room, [3264], recompute="offload")
    with pytest.raises(InputError):
        planned(four, room, [3328], recompute="offload")
    planned(four, room, [4096], recompute="full")


def test_a_plan_by_itself_parks_no_more_than_the_host_has(four: Identified) -> None:
    """Only offload fits the card, and the host has no room: the run does not fit."""
    rows, given = [32768], {"target_groups": ("attn",)}
    full = planned(four, Room(card=CARDS[0]), rows, recompute="full", **given)[0].worst.peak
    least = planned(four, Room(card=CARDS[0]), rows, recompute="offload", **given)[0].worst.peak
    assert least < full
    room = Room(card=CARDS[0], budget=(least + full) // 2)
    assert planned(four, room, rows, **given)[0].worst.host > 0
    with pytest.raises(InputError) as caught:
        planned(four, replace(room, host=2**20), rows, **given)
    assert caught.value.code == "QC-PLAN-006"
    assert "max_length" in str(caught.value.fix)  # under full, of which nothing is parked


# -- evaluation


@pytest.mark.slow
def test_a_held_out_row_can_be_the_worst(found: Identified) -> None:
    plan, _ = planned(found, Room(), [64, 64], held_out=(1200, 64))
    assert plan.worst.moment == "evaluation of a held-out row"
    assert plan.worst.lengths == (1200,)
    assert sum(plan.worst.memory.values()) == plan.worst.peak
    assert plan.usual.lengths == (64,)
    with pytest.raises(InputError, match="evaluation of a held-out row") as caught:
        planned(found, Room(budget=plan.worst.peak - 1), [64, 64], held_out=(1200, 64))
    assert "max_length" in str(caught.value.fix)
    planned(found, Room(budget=plan.worst.peak), [64, 64], held_out=(1200, 64))


def test_an_evaluation_takes_what_is_planned(tmp_path: Path) -> None:
    for moe in (False, True):
        write(tmp_path / str(moe), moe=moe)
        mine = identify(str(tmp_path / str(moe)))
        planner = Planner(mine, settings(), None)
        expected = planner.evaluation(193)
        assert "activations" not in expected
        found = _evaluated(mine, 193)
        assert expected["batch"] + expected["workspace"] == pytest.approx(found, rel=0.05)


def _evaluated(found: Identified, length: int) -> int:
    from qcore.api.blocks import Packed
    from qcore.nn.load import load
    from qcore.nn.model import Model

    model = Model(
        found.decision.architecture, found.checkpoint.config, found.layout, torch.bfloat16, {}
    )
    load(model, found.layout, found.checkpoint, device=CPU, quantize=True)
    model.eval()
    with Trace("cpu") as trace, torch.no_grad():
        row = torch.randint(0, 200, (length,))
        batch = Packed.of([row], [row]).to(CPU)
        trace.mark()
        model.loss(batch)
    return trace.peak


# -- a run that was stopped


def test_the_policy_is_kept_where_it_fits(found: Identified) -> None:
    first, _ = planned(found, Room(budget=peak(found, "full")))
    again, notes = planned(found, Room(budget=10**12), kept=first.policies)
    assert again.policies == first.policies
    assert len(set(first.policies)) == 2
    assert notes == ["recompute as before the run was stopped: 2 full, 2 elementwise"]


def test_another_policy_is_said(found: Identified) -> None:
    layers = len(Planner(found, settings(), None).measure.kinds)
    plan, notes = planned(found, Room(budget=peak(found, "full")), kept=("none",) * layers)
    assert "none" not in plan.policies
    (note,) = notes
    assert "recompute was none before the run was stopped, which does not fit now: 2 full" in note


def test_policies_are_written_and_read(found: Identified, tmp_path: Path) -> None:
    plan, _ = planned(found, Room())
    assert load_plan(tmp_path, POLICIES)[0] == PreviousPlan()
    save_plan(tmp_path, plan)
    assert load_plan(tmp_path, POLICIES) == (PreviousPlan(policies=plan.policies, together=0), [])
    save_plan(tmp_path, replace(plan, together=4096))
    assert load_plan(tmp_path, POLICIES)[0].together == 4096
    assert [path.name for path in tmp_path.iterdir()] == [PLAN]


DAMAGED = ["", "[]", "{", '{"policies": 3}', '{"policies": [1]}', "null"]
DAMAGED += ['{"policies": ["full"], "together": -1}', '{"policies": ["full"], "together": "8"}']
DAMAGED += ['{"policies": "full"}', '{"policies": ["full", "bogus"]}', '{"policies": [["full"]]}']


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_plan_is_said(tmp_path: Path, text: str) -> None:
    (tmp_path / PLAN).write_text(text)
    before, (line,) = load_plan(tmp_path, POLICIES)
    assert before == PreviousPlan()
    assert "recompute is planned again" in line


# -- beside the measurement


def card_plan(four: Identified) -> RunPlan:
    return planned(four, Room(card=CARDS[0]), [1024])[0]


def test_prediction_beside_measurement(four: Identified) -> None:
    plan, meter = card_plan(four), Meter()
    meter.step(1024, 60.0, plan.worst.peak // 2)  # compiles
    meter.step(1024, 0.1, 2 * plan.worst.peak)
    meter.step(1024, 0.1, plan.worst.peak)
    meter.saw(plan.worst.peak)
    line = comparison_line(plan, meter.measured("cuda"))
    assert "(plan -50.0%)" in line
    assert "10,240 tokens/s measured" in line
    assert meter.measured("cuda").as_json() == {
        "memory": "allocated", "peak_bytes": 2 * plan.worst.peak, "tokens_per_second": 10240.0,
    }  # fmt: skip


def test_on_the_cpu_nothing_is_compared(found: Identified) -> None:
    plan, meter = planned(found, Room())[0], Meter()
    assert "no step ran" in comparison_line(plan, meter.measured("cpu"))
    meter.step(100, 2.0, 10**9)
    line = comparison_line(plan, meter.measured("cpu"))
    assert "1.00 GB resident in the process; no time planned, 50 tokens/s measured" in line
    assert "%" not in line


# -- memory that runs out


OOM = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB."
)


def report(plan: RunPlan, error: Exception, *usages: Usage | None) -> InputError:
    left = list(usages)

    def usage(device: torch.device) -> Usage | None:
        return left.pop(0) if len(left) > 1 else left[0]

    watch = Watch(plan, CPU, usage)
    watch.at("loading the base")
    watch.loaded()
    watch.at("step 3")
    with pytest.raises(InputError) as caught, watch:
        raise error
    assert caught.value.__cause__ is error
    return caught.value


def test_the_plans_terms_stand_beside_the_measured(four: Identified) -> None:
    plan = card_plan(four)
    before = Usage(3 * 10**9, 3 * 10**9, 4 * 10**9, 70 * 10**9)
    after = Usage(70 * 10**9, 76 * 10**9, 80 * 10**9, 2 * 10**9)
    error = report(plan, OOM, before, after)
    assert (error.code, error.exit_code, error.field) == ("QC-PLAN-004", 65, "step 3")
    assert "\n" not in error.message
    for part in (
        "76.00 GB allocated at the most, 3.00 GB before the steps, 80.00 GB reserved, 2.00 GB free",
        "Tried to allocate 2.00 GiB",
        f"by the plan {plan.worst.peak / 1e9:.2f} GB",
        f"embeddings {plan.worst.memory['embeddings'] / 1e9:.2f} GB",
        "1 x 1024 tokens, recompute none",
    ):
        assert part in error.message
    assert "the plan was wrong" in str(error.fix)


def test_who_is_to_blame(four: Identified) -> None:
    plan = card_plan(four)
    taken = Usage(10**9, 10**9, 10**9, 10**9)
    assert "another process took memory" in str(report(plan, OOM, taken).fix)
    small = replace(plan, worst=replace(plan.worst, budget=10**9))
    assert "leave recompute at auto" in str(report(small, OOM, taken).fix)


def test_what_means_that_memory_ran_out(found: Identified) -> None:
    plan = planned(found, Room())[0]
    for error in (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ):
        assert is_out_of_memory(error)
        assert report(plan, error, None).code == "QC-PLAN-004"
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    for other in (KeyboardInterrupt(), ValueError("out of memory"), InputError("QC-X-001", "no")):
        with pytest.raises(type(other)) as caught, Watch(plan, CPU):
            raise other
        assert caught.value is other


def test_the_hosts_memory_is_not_the_devices(found: Identified) -> None:
    plan = planned(found, Room())[0]
    for error in (MemoryError(), RuntimeError("CUDA error: out of memory in pin_memory")):
        said = report(plan, error, None)
        assert said.code == "QC-PLAN-004"
        assert "host" in said.message
        assert "batch" not in str(said.fix)


def test_a_mixture_of_experts_has_a_plan_too() -> None:
    pytest.importorskip("triton")
    found = found_of(MOE_35B | {"num_hidden_layers": 4}, moe=True)
    groups = ("attn", "gdn", "shared_expert")
    room = Room(card=CARDS[0], budget=8 * 10**9)
    plan, _ = planned(found, room, [8192], held_out=(4096,), target_groups=groups)
    assert plan.worst.fits
    assert plan.tokens_per_second
