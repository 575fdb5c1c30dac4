"""The plan of rows that have media, against steps that run: a tower's share of memory."""

from __future__ import annotations

import gc
from array import array
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli_kit import here
from support.plan_kit import shared_measures
from support.tiers import fast
from support.toy_tower import MERGE, TOY, Reader, Thing, add, install

from qcore.adapter.targets import targets
from qcore.api.media import Placed
from qcore.config.settings import Settings
from qcore.data.microbatches import extent, joined, units_of_rows
from qcore.data.rendering.masking import Example
from qcore.data.sampler import Schedule
from qcore.errors import UsageError
from qcore.nn.device import DTYPES
from qcore.nn.load import load
from qcore.nn.model import Model
from qcore.nn.qlora.lora_layer import Lora
from qcore.planning import Planner
from qcore.planning.gpus import CARDS
from qcore.planning.packs import MOST, check_pack, holds, packs_of
from qcore.planning.report import Pack, units_of
from qcore.planning.run import Room, plan_run
from qcore.planning.trace import Trace
from qcore.plugins.resolve_model import Identified, identify
from qcore.training.collate import Batches
from qcore_qwen35.tiny import write

CPU = torch.device("cpu")
TRUNK = ("attn", "gdn", "mlp")
EVERY = ("none", "elementwise", "full")


@pytest.fixture(scope="module", autouse=True)
def _shared_measures() -> Iterator[None]:
    with shared_measures():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny checkpoint with a toy tower, whose plugin is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(install(tmp_path_factory.mktemp("site"))))
        write(path := tmp_path_factory.mktemp("toy"))
        add(path)
        yield path


@pytest.fixture(scope="module")
def idle(folder: Path) -> Identified:
    """The checkpoint for a run of text."""
    return identify(str(folder))


@pytest.fixture(scope="module")
def found(idle: Identified) -> Identified:
    """For a run of media."""
    assert idle.modality is not None
    assert idle.modality.name == TOY.name
    return idle.using(TOY)


def settings(**given: Any) -> Settings:
    return Settings(**({"r": 4, "gradient_accumulation_steps": 1} | given))


def all_of(planner: Planner, policy: str) -> tuple[str, ...]:
    return (policy,) * len(planner.measure.kinds)


# -- against a step that runs


def row(tokens: int, *units: int) -> Example:
    """A row of so many tokens, whose media come first."""
    count = sum(units) // MERGE
    things = tuple(Thing(digest=f"{n}/{size}", units=size) for n, size in enumerate(units))
    numbers = array("i", range(tokens))
    placed = Placed(where=array("i", range(count)), positions=(numbers,) * 3)
    return Example(
        ids=numbers, labels=numbers, line=1, turns=1, supervised=tokens - 1,
        media=things, placed=placed if units else None,
    )  # fmt: skip


def loaded(found: Identified, chosen: Settings) -> Model:
    """The model as a run loads it, its gradients there."""
    lora = targets(found.layout, chosen.target_groups, Lora(r=chosen.r, lora_alpha=8))
    model = Model(
        found.decision.architecture, found.checkpoint.config, found.layout,
        DTYPES[chosen.dtype], lora, modality=found.modality,
    )  # fmt: skip
    load(model, found.layout, found.checkpoint, device=CPU, quantize=True)
    for name, module in model.adapters():
        module.reset_lora(name, 0, CPU)
    for _, parameter in model.trainable():
        parameter.grad = torch.zeros_like(parameter)
    model.train()
    return model


def measured(
    found: Identified, chosen: Settings, rows: list[Example], policy: str, *, train: bool = True
) -> int:
    """The most that tensors of a step, or of an evaluation, take over what was there before."""
    model = loaded(found, chosen)
    reader: Any = Reader()
    with Trace("cpu") as trace, torch.set_grad_enabled(train):
        keep = int(chosen.media_cache_gb * 1e9)
        batch = Batches(model, CPU, reader, keep).of(rows)
        gc.collect()
        assert batch.media is not None
        if batch.media.features is None:
            trace.mark()  # else the tower has run
        loss = model.loss(batch, recompute=policy)
        if train:
            torch.autograd.backward(loss / batch.supervised().numel())
    return trace.peak


def predicted(memory: Any) -> int:
    return sum(memory.get(term, 0) for term in ("batch", "activations", "workspace"))


ROWS = [row(97, 512), row(31), row(80, 256, 320)]
PACK = Pack((97, 31, 80), 1088)
GROUPS = {
    "frozen": TRUNK,
    "trained": (*TRUNK, "toy", "join"),
    "tower alone": ("toy", "join"),
    "last layer alone": ("join",),
}


@pytest.mark.parametrize("policy", fast(EVERY, "elementwise"))
@pytest.mark.parametrize("groups", fast(GROUPS, "trained", "last layer alone"))
def test_the_peak_is_what_a_step_takes(found: Identified, groups: str, policy: str) -> None:
    chosen = settings(target_groups=GROUPS[groups], media_cache_gb=0)
    planner = Planner(found, chosen, None)
    plan = planner.plan(PACK, all_of(planner, policy))
    took = measured(found, chosen, ROWS, policy)
    assert predicted(plan.memory) == pytest.approx(took, rel=0.03)


@pytest.mark.parametrize("units", fast([16, 1024, 4096], 1024))
def test_the_peak_is_the_towers_where_there_are_many_units(found: Identified, units: int) -> None:
    moments = {}
    for groups in ("frozen", "trained"):
        chosen = settings(target_groups=GROUPS[groups], media_cache_gb=0)
        planner = Planner(found, chosen, None)
        pack = Pack((256,), units)
        plan = planner.plan(pack, all_of(planner, "full"))
        took = measured(found, chosen, [row(256, units)], "full")
        assert predicted(plan.memory) == pytest.approx(took, rel=0.03)
        moments[groups] = plan.moment
    tower = [moment for moment in moments.values() if "tower" in moment]
    assert len(tower) == (2 if units == 4096 else 0 if units == 16 else len(tower))


def test_what_a_frozen_tower_made_is_carried_in_place_of_media(found: Identified) -> None:
    chosen = settings(target_groups=TRUNK)
    planner = Planner(found, chosen, None)
    for pack, rows in ((Pack((256,), 4096), [row(256, 4096)]), (Pack((99,), 32), [row(99, 32)])):
        plan = planner.plan(pack, all_of(planner, "full"))
        took = measured(found, chosen, rows, "full")
        # On the CPU what is kept lies beside what is carried.
        kept = pack.units // MERGE * 128 * 2
        assert predicted(plan.memory) + kept == pytest.approx(took, rel=0.03)


@pytest.mark.parametrize("groups", ["frozen", "trained"])
def test_a_held_out_row_has_no_backward(found: Identified, groups: str) -> None:
    chosen = settings(target_groups=GROUPS[groups], media_cache_gb=0)
    planner = Planner(found, chosen, None)
    for tokens, units in ((256, 4096), (300, 16)):
        memory = planner.evaluation(tokens, units)
        took = measured(found, chosen, [row(tokens, units)], "none", train=False)
        assert predicted(memory) == pytest.approx(took, rel=0.03)


def test_weights_are_what_loading_holds(found: Identified) -> None:
    chosen = settings(target_groups=GROUPS["trained"])
    planner, model = Planner(found, chosen, None), loaded(found, chosen)
    assert model.tower is not None
    tower: Any = model.tower.module
    join = tower.layers[2].map
    assert join.four_bit
    held = join.stored_bytes
    held += sum(one.nbytes for one in tower.parameters() if not one.requires_grad)
    assert held <= planner.static["tower"] < held + 512 * 20
    trained = sum(one.nbytes for _, one in model.trainable())
    assert planner.static["adapters"] == pytest.approx(trained, rel=0.15)
    assert planner.static["optimizer"] == 2 * planner.static["gradients"]
    assert planner.trained == sum(one.numel() for _, one in model.trainable())


# -- text alone


def test_an_idle_tower_costs_nothing(idle: Identified, tmp_path: Path) -> None:
    write(tmp_path / "text")
    plain = Planner(identify(str(tmp_path / "text")), settings(), None)
    planner = Planner(idle, settings(), None)
    assert "tower" not in planner.static
    mine, other = (one.plan((65, 30), all_of(one, "full")) for one in (planner, plain))
    assert mine.as_json() == other.as_json()
    with pytest.raises(ValueError, match="without a tower"):
        planner.plan(Pack((65,), 16), all_of(planner, "full"))


def test_a_pack_of_text_in_a_run_of_media_takes_the_towers_weights_more(
    idle: Identified, found: Identified
) -> None:
    without, loads = (Planner(one, settings(), None) for one in (idle, found))
    text, media = (one.plan((65, 30), all_of(one, "full")) for one in (without, loads))
    weights = media.memory["tower"]
    assert weights > 0
    assert media.peak == pytest.approx(
        text.peak + weights, abs=4096
    )  # the tables of its 4-bit codes
    assert media.memory["activations"] == text.memory["activations"]


@pytest.mark.parametrize("groups", ["frozen", "trained"])
@pytest.mark.parametrize("policy", fast(EVERY, "elementwise"))
def test_more_units_never_take_less(found: Identified, groups: str, policy: str) -> None:
    planner = Planner(found, settings(target_groups=GROUPS[groups]), None)
    peaks = [
        planner.peak(Pack((512,), units), all_of(planner, policy))
        for units in (0, 16, 100, 1000, 5000, 65536)
    ]
    assert peaks == sorted(peaks)
    assert peaks[-1] > peaks[0]


def test_towers_are_planned_at_any_size(found: Identified) -> None:
    pytest.importorskip("triton")
    planner = Planner(found, settings(target_groups=GROUPS["trained"]), CARDS[0])
    plan = planner.fastest(Pack((8192,), 65536))
    assert plan.units == 65536
    text = planner.plan((8192,), plan.policies)
    assert plan.seconds > text.seconds
    assert plan.launches > text.launches


# -- which packs


def test_few_tokens_and_many_units_may_be_the_worst(found: Identified) -> None:
    """The longest row is text; what takes most is a short one."""
    chosen = settings(target_groups=GROUPS["trained"], media_cache_gb=0)
    lengths, units = [200, 90, 120, 64], [0, 16, 1600, 0]
    packs = packs_of(lengths, [], chosen, units=units)
    assert packs.largest == ((200,), Pack((120,), 1600))
    plan, _ = plan_run(found, chosen, packs, Room())
    assert plan.worst.lengths == Pack((120,), 1600)
    assert "1 x 120 tokens and 1,600 units of media" in plan.line()
    assert plan.as_json()["largest_pack"] == [120]
    assert plan.as_json()["largest_pack_units"] == 1600
    assert packs.usual == Pack((120,), 404)


def test_a_pack_between_the_extremes_is_planned() -> None:
    """Less of tokens than one and of units than another, it may take more than both."""
    packs = packs_of([100, 90, 10, 80], [], settings(), units=[0, 900, 1000, 800])
    assert packs.largest == ((100,), Pack((90,), 900), Pack((10,), 1000))


def test_many_such_packs_are_bounded() -> None:
    lengths = list(range(1000, 0, -10))
    units = list(range(0, 1600, 16))
    packs = packs_of(lengths, [], settings(num_train_epochs=1), units=units)
    assert len(packs.largest) <= 18
    for pack in zip(lengths, units, strict=True):
        assert any(sum(one) >= pack[0] and units_of(one) >= pack[1] for one in packs.largest)


def test_the_held_out_row_of_most_units_need_not_be_the_longest(found: Identified) -> None:
    chosen = settings(target_groups=TRUNK, media_cache_gb=0)
    packs = packs_of(
        [64], [200, 90], chosen, units=[0], held_out_units=[0, 1440]
    )  # fmt: skip
    assert (packs.held_out, packs.held_out_units) == (200, 1440)
    plan, _ = plan_run(found, chosen, packs, Room())
    assert plan.worst.moment == "evaluation of a held-out row"
    assert plan.worst.units == 1440


def test_an_endless_run_is_bounded_in_both() -> None:
    chosen = settings(max_steps=10**7, per_device_train_batch_size=2)
    lengths, units = [10] * 50 + [400, 300], [160] * 3 + [0] * 49
    packs = packs_of(lengths, [], chosen, units=units, draws=8)
    assert packs.largest == (Pack((400, 300), 320),)
    together = packs_of(lengths, [], chosen, units=units, draws=8, together=2000)
    (bound,) = together.largest
    assert extent(bound) >= 2000
    assert units_of(bound) >= 2000


@pytest.mark.parametrize("together", [500, 2000, 9000])
def test_joined_packs_are_bounded_in_units(together: int) -> None:
    lengths, units = [60, 90, 100, 64] * 12, [320, 0, 1600, 0] * 12
    chosen = settings(gradient_accumulation_steps=16)
    schedule = Schedule(len(lengths), chosen)
    most = 0
    for step in range(schedule.total):
        alone = schedule.micro_batches(step)
        batches = joined(alone, lengths, together, units)
        assert sorted(chain(*batches)) == sorted(chain(*alone))
        for rows in batches:
            size = extent([lengths[n] for n in rows], sum(units[n] for n in rows))
            assert size <= together or len(rows) == 1
            most = max(most, sum(units[n] for n in rows))
    packs = packs_of(lengths, [], chosen, units=units, together=together)
    assert max(map(units_of, packs.largest)) == most


def test_units_of_rows_are_of_all_their_media() -> None:
    assert units_of_rows(ROWS) == (512, 0, 576)
    assert units_of_rows([row(5), row(6)]) == ()


def test_a_pack_is_its_lengths_and_its_units() -> None:
    assert Pack((3, 4)) == (3, 4) != Pack((3, 4), 16)
    assert Pack((3, 4), 16) == Pack((3, 4), 16) != Pack((3, 4), 32)
    assert len({(3, 4), Pack((3, 4)), Pack((3, 4), 16), Pack((3, 4), 32)}) == 3
    assert type(tuple(Pack((3, 4), 16))) is tuple


def test_more_units_than_can_be_numbered_are_refused() -> None:
    assert holds(Pack((64,), MOST - 128))
    assert not holds(Pack((64,), MOST))
    with pytest.raises(UsageError, match="64 tokens and 4194240 units of media in all"):
        check_pack(Pack((64,), MOST))


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_its_units(found: Identified) -> None:
    chosen = settings(target_groups=GROUPS["trained"], per_device_train_batch_size=2)
    packs = packs_of([300, 300], [], chosen, units=[2400, 2400])
    planner = Planner(found, chosen, None)
    room = Room(budget=planner.peak(Pack((300,), 2400), all_of(planner, "full")) + 1000)
    with pytest.raises(Exception, match="2 x 300 tokens and 4,800 units of media") as caught:
        plan_run(found, chosen, packs, room)
    assert "with per_device_train_batch_size 1 it fits" in str(caught.value.fix)  # type: ignore[attr-defined]


# -- the command


def plan(capsys: pytest.CaptureFixture[str], folder: Path, *flags: object) -> Any:
    common = ("--rows", 2, "--max-length", 256, "--gpu", "h200", "--json")
    return here(capsys, "plan", folder, *common, *flags).json


@pytest.mark.slow
def test_the_command_counts_media(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    text = plan(capsys, folder)["plans"][0]
    assert "tower" not in text["memory_bytes"]
    assert "media_units" not in text
    media = plan(capsys, folder, "--media", 2048)["plans"][0]
    assert media["media_units"] == 4096
    assert media["memory_bytes"]["tower"] > 0
    assert media["peak_bytes"] > text["peak_bytes"] + media["memory_bytes"]["tower"]
    ended = here(
        capsys, "plan", folder, "--rows", 1, "--max-length", 256, "--media", 2048, "--gpu", "h200"
    )
    assert ended.code == 0
    assert "1 x 256 + 2,048 units" in ended.out
    assert "\n  tower " in ended.out


def test_a_group_of_the_tower_is_trained(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    text = plan(capsys, folder, "--groups", "attn", "--media", 64)
    both = plan(capsys, folder, "--groups", "attn,join", "--media", 64)
    assert both["trained_parameters"] > text["trained_parameters"]
    assert both["plans"][0]["memory_bytes"]["tower"] > 0


@pytest.mark.parametrize(
    ("words", "code", "start"),
    [
        (("--groups", "attn,join"), "QC-TRAIN-008", "--groups: trains the vision tower"),
        (
            ("--set", "quantize_groups=[join]"),
            "QC-LORA-004",
            "quantize_groups: is a group of",
        ),
    ],
)
def test_a_tower_without_media_is_not_planned(
    capsys: pytest.CaptureFixture[str], folder: Path, words: tuple[str, ...], code: str, start: str
) -> None:
    """As `qcore train` refuses it; else a plan would count none of the tower's units."""
    line = here(capsys, "plan", folder, *words).error(code)
    assert line.startswith(f"error[{code}] {start}")
    assert code == "QC-LORA-004" or "Fix: leave the group out, or pass --media UNITS" in line


@pytest.mark.parametrize(
    ("media", "line"),
    [
        (0, "error[QC-PLAN-008] --media: is not a number of units: found 0"),
        (-3, "error[QC-PLAN-008] --media: is not a number of units: found -3"),
        (4097, "error[QC-PLAN-008] --media: is more than a row can hold: found 4097 units, which "
         "are 257 tokens, expected at most 256 tokens. Fix: pass --max-length 257 or more"),
        (10**12, "error[QC-PLAN-008] --media: is more than kernels can index in a row: found "
         "1000000000000 units beside 256 tokens, expected at most 4193920. Fix: take fewer"),
        (10**20, "error[QC-PLAN-008] --media: is more than kernels can index in a row"),
    ],
)  # fmt: skip
def test_what_a_row_cannot_hold_is_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, media: int, line: str
) -> None:
    ended = here(capsys, "plan", folder, "--max-length", 256, "--media", media)
    assert ended.error("QC-PLAN-008").startswith(line)


def test_media_without_a_modality_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write(tmp_path / "text")
    error = here(capsys, "plan", tmp_path / "text", "--media", 64).error("QC-PLAN-007")
    assert "--media: nothing that is installed reads media for this model" in error
