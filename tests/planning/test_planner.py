"""The plan against measurements of real steps, and against itself."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.plan_kit import DENSE_4B, MOE_35B, found_of
from support.tiers import fast

from qcore.adapter.targets import targets
from qcore.api.blocks import Packed
from qcore.config.frozen_map import Entries
from qcore.config.settings import Settings
from qcore.errors import InputError, UsageError
from qcore.nn.device import DTYPES
from qcore.nn.load import load
from qcore.nn.model import Model
from qcore.nn.qlora.lora_layer import Lora
from qcore.planning import Planner
from qcore.planning.gpus import CARDS, card_of, gpu_by_name, parse_budget
from qcore.planning.run import refusal
from qcore.planning.segments import extrapolated, smaller
from qcore.planning.trace import Trace
from qcore.plugins.resolve_model import identify
from qcore.training.loading import _start_rows
from qcore_qwen35.tiny import write

CPU = torch.device("cpu")
H100 = CARDS[0]


# -- against a step that runs


@pytest.fixture(scope="module", params=["dense", "moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint."""
    path = tmp_path_factory.mktemp(request.param)
    write(path, moe=request.param == "moe")
    return path


def measured(folder: Path, settings: Settings, lengths: tuple[int, ...], policy: str) -> int:
    """The most that tensors of a forward and backward take, over what was there before."""
    found = identify(str(folder))
    lora = targets(
        found.layout, settings.target_groups,
        Lora(r=settings.r, lora_alpha=settings.lora_alpha, use_dora=settings.use_dora),
    )  # fmt: skip
    model = Model(
        found.decision.architecture, found.checkpoint.config, found.layout,
        DTYPES[settings.dtype], lora, token_ids=settings.trainable_token_indices,
        head_token_ids=settings.trainable_head_token_indices,
    )  # fmt: skip
    load(model, found.layout, found.checkpoint, device=CPU, quantize=True)
    for name, module in model.adapters():
        module.reset_lora(name, 0, CPU)
    if model.trained_rows is not None:
        _start_rows(model, model.trained_rows)
    for _, parameter in model.trainable():
        parameter.grad = torch.zeros_like(parameter)
    model.train()
    with Trace("cpu") as trace:
        rows = [torch.randint(0, 200, (length,)) for length in lengths]
        batch = Packed.of(rows, rows).to(CPU)
        del rows
        gc.collect()
        trace.mark()
        loss = model.loss(batch, recompute=policy)
        torch.autograd.backward(loss / batch.supervised().numel())
    return trace.peak


@pytest.mark.parametrize("policy", fast(["none", "elementwise", "full"], "elementwise"))
@pytest.mark.parametrize("lengths", fast([(193,), (64, 31, 97)], (64, 31, 97)), ids=str)
def test_the_peak_is_what_a_step_takes(folder: Path, lengths: tuple[int, ...], policy: str) -> None:
    settings = Settings(r=4)
    planner = Planner(identify(str(folder)), settings, None)
    plan = planner.plan(lengths, (policy,) * len(planner.measure.kinds))
    found = measured(folder, settings, lengths, policy)
    expected = sum(plan.memory[term] for term in ("batch", "activations", "workspace"))
    assert expected == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("policy", fast(["none", "elementwise", "full"], "full"))
def test_the_peak_with_dora_is_what_a_step_takes(folder: Path, policy: str) -> None:
    groups = ("attn", "gdn", "shared_expert" if folder.name.startswith("moe") else "mlp")
    settings, lengths = Settings(r=4, use_dora=True, target_groups=groups), (64, 31, 97)
    planner = Planner(identify(str(folder)), settings, None)
    plan = planner.plan(lengths, (policy,) * len(planner.measure.kinds))
    found = measured(folder, settings, lengths, policy)
    expected = sum(plan.memory[term] for term in ("batch", "activations", "workspace"))
    assert expected == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("policy", fast(["none", "full"], "full"))
def test_the_peak_with_rows_of_the_embedding(folder: Path, policy: str) -> None:
    found = identify(str(folder))
    tied = any(entry.row.group == "head" and entry.row.tie for entry in found.layout.table)
    rows: dict[str, Any] = {"trainable_token_indices": tuple(range(40))}
    rows |= {} if tied else {"trainable_head_token_indices": tuple(range(50))}
    settings, lengths = Settings(r=4, **rows), (64, 31, 97)
    planner = Planner(found, settings, None)
    plan = planner.plan(lengths, (policy,) * len(planner.measure.kinds))
    measured_peak = measured(folder, settings, lengths, policy)
    expected = sum(plan.memory[term] for term in ("batch", "activations", "workspace"))
    assert expected == pytest.approx(measured_peak, rel=0.03)
    plain = Planner(found, Settings(r=4), None)
    width = planner.measure.width
    assert planner.trained - plain.trained == sum(map(len, rows.values())) * width
    assert planner.static["gradients"] - plain.static["gradients"] == pytest.approx(
        4 * (planner.trained - plain.trained), abs=1024
    )


def test_weights_are_what_loading_holds(folder: Path) -> None:
    found = identify(str(folder))
    planner = Planner(found, Settings(), None)
    model = Model(
        found.decision.architecture, found.checkpoint.config, found.layout, torch.bfloat16, {}
    )
    load(model, found.layout, found.checkpoint, device=CPU, quantize=True)
    held = sum(one.stored_bytes for one in model.lora_layers.values() if one.four_bit)
    held += sum(one.nbytes for one in model.parameters())
    terms = ("weights nf4", "weights 16 bit", "weights fp32", "embeddings")
    expected = sum(planner.static[term] for term in terms)
    # The allocator's rounding of hundreds of small tensors is most of the difference.
    assert held < expected < held + 512 * 12 * (len(model.lora_layers) + 20)


# -- the path of a GPU, on meta


@pytest.fixture(scope="module")
def dense() -> Planner:
    """4B on an H100."""
    pytest.importorskip("triton")
    return Planner(found_of(DENSE_4B), Settings(), H100)


@pytest.fixture(scope="module")
def moe() -> Planner:
    """35B-A3B on an H100, experts frozen."""
    pytest.importorskip("triton")
    settings = Settings(target_groups=("attn", "gdn", "shared_expert"))
    return Planner(found_of(MOE_35B, moe=True), settings, H100)


def all_of(planner: Planner, policy: str) -> tuple[str, ...]:
    return (policy,) * len(planner.measure.kinds)


def test_layers_of_a_kind_are_measured_once(dense: Planner) -> None:
    assert len(set(dense.measure.kinds)) == 2
    assert [dense.measure.kinds.count(kind) for kind in dict.fromkeys(dense.measure.kinds)] == [
        24,
        8,
    ]


def test_the_weights_are_those_of_the_arithmetic(dense: Planner) -> None:
    """3.569 G linear parameters: half a byte, and a scale of a byte for 64 of them."""
    linear = 3.569e9
    assert dense.static["weights nf4"] == pytest.approx(linear * (0.5 + 1 / 64), rel=0.01)
    assert dense.static["embeddings"] == pytest.approx(248320 * 2560 * 2, rel=1e-6)
    # r (in + out) of ten maps: the count of peft at r 16.
    assert dense.trained == 30_539_776 or dense.trained == pytest.approx(30.5e6, rel=0.01)
    assert dense.static["optimizer"] == 2 * dense.static["gradients"]


def test_dora_is_counted(dense: Planner) -> None:
    """Magnitudes with gradient and moments, their norms, what is saved, and at most 1.3 times."""
    planner = Planner(found_of(DENSE_4B), Settings(use_dora=True), H100)
    outputs = planner.trained - dense.trained
    rows = sum(layer.shape[0] for _, layer in planner.measure.model.adapters())
    assert outputs == rows > 400_000
    more = {term: planner.static[term] - size for term, size in dense.static.items()}
    assert more["gradients"] == pytest.approx(4 * rows, rel=0.05)
    assert more["optimizer"] == pytest.approx(8 * rows, rel=0.05)
    assert more["adapters in the run's dtype"] == pytest.approx(16 * rows, rel=0.05)
    for policy in ("none", "full"):
        one, other = (p.plan((8192,), all_of(p, policy)) for p in (dense, planner))
        assert one.peak < other.peak
        assert 1 < other.seconds / one.seconds < 1.2


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_each_policy_takes_less_than_the_one_before(
    name: str, request: pytest.FixtureRequest
) -> None:
    planner: Planner = request.getfixturevalue(name)
    plans = [
        planner.plan((4096, 4096), all_of(planner, policy))
        for policy in ("none", "elementwise", "full", "offload")
    ]
    peaks = [plan.peak for plan in plans]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[1] < 0.85 * peaks[0] or name == "moe"
    assert plans[0].seconds <= plans[1].seconds < plans[2].seconds


def test_a_peak_is_affine_in_the_tokens(dense: Planner) -> None:
    for policy in ("elementwise", "full"):
        a, b, c = (dense.plan((t,), all_of(dense, policy)).peak for t in (4096, 8192, 12288))
        assert c - b == pytest.approx(b - a, rel=0.02)


#: Kernels and device operations of a layer's forward and backward, by kind and policy. What is
#: more than these is a regression: raise them with a reason only.
LAUNCHES = {
    ("dense", "none"): 54, ("dense", "elementwise"): 59, ("dense", "full"): 81,
    ("moe", "none"): 108, ("moe", "elementwise"): 114, ("moe", "full"): 164,
}  # fmt: skip
#: Bytes a token that a layer keeps.
KEPT = {
    ("dense", "none"): 136_000, ("dense", "elementwise"): 82_000, ("dense", "full"): 5_200,
    ("moe", "none"): 105_000, ("moe", "elementwise"): 62_000, ("moe", "full"): 4_200,
}  # fmt: skip


@pytest.mark.parametrize(("name", "policy"), list(LAUNCHES))
def test_launches_and_live_memory_of_a_layer(
    name: str, policy: str, request: pytest.FixtureRequest
) -> None:
    planner: Planner = request.getfixturevalue(name)
    for kind in dict.fromkeys(planner.measure.kinds):
        segment = planner.measure.layer(kind, policy, (8192,))
        assert len(segment.forward_work) + len(segment.backward_work) <= LAUNCHES[name, policy]
        assert segment.kept <= KEPT[name, policy] * 8192


def test_the_head_stays_within_its_budget_at_any_length(dense: Planner) -> None:
    for tokens in (1024, 32768):
        end = dense.measure.end((tokens,), 0)
        assert max(end.forward, end.backward) < 2.5e9


def test_what_a_long_pack_is_told_from_is_seen_itself() -> None:
    for length in (8192, 8193, 8255, 8256, 8257, 262145, 2**20 - 1):
        for pack in smaller((length, 77, length // 3)):
            assert smaller(pack) == ()
            assert max(pack) < length


@pytest.mark.parametrize("chunk", [0, 1000])
def test_the_end_of_a_long_row_is_told_from_short_ones(dense: Planner, chunk: int) -> None:
    """The loss head walks its chunks: what a long row takes is known without the walk."""
    told, seen = (end((32768,), chunk) for end in (dense.measure.end, dense.measure._end))
    assert told is not seen
    assert told.kept == seen.kept
    assert told.forward == pytest.approx(seen.forward, rel=1e-3)
    assert told.backward == pytest.approx(seen.backward, rel=1e-3)
    assert told.launches == pytest.approx(seen.launches, rel=0.03)
    assert sum(w.flops for w in told.forward_work) == pytest.approx(
        sum(w.flops for w in seen.forward_work)
    )


def test_the_chosen_backend_is_what_is_counted() -> None:
    """The torch delta rule takes more of everything than the kernels'."""
    pytest.importorskip("triton")
    sizes = DENSE_4B | {"num_hidden_layers": 4}
    fused = Planner(found_of(sizes), Settings(), H100)
    from qcore.config.resolve import load_settings

    settings, _ = load_settings(sets=["kernels.delta_rule=reference"])
    plain = Planner(found_of(sizes), settings, H100)
    assert plain.taken.backends["qwen35::delta_rule"] == "reference"
    segments = [
        one.measure.layer(one.measure.kinds[0], "elementwise", (4096,)) for one in (fused, plain)
    ]
    assert segments[1].backward > 1.5 * segments[0].backward
    assert len(segments[1].backward_work) > 3 * len(segments[0].backward_work)


def test_ranks_that_the_kernels_leave_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta, torch 2.11 has no product into another dtype; nothing needs it to be planned."""
    pytest.importorskip("triton")
    addmm = torch.addmm

    def old(*args: Any, **kwargs: Any) -> Any:
        if args[0].is_meta and "out_dtype" in kwargs:
            raise TypeError("addmm() got multiple values for argument 'beta'")
        return addmm(*args, **kwargs)

    monkeypatch.setattr(torch, "addmm", old)
    sizes = DENSE_4B | {"num_hidden_layers": 4}
    few, many = (Planner(found_of(sizes), Settings(r=r), H100) for r in (32, 128))
    plans = [one.plan((4096,), all_of(one, "elementwise")) for one in (few, many)]
    assert plans[0].peak < plans[1].peak
    assert plans[0].seconds < plans[1].seconds < 1.6 * plans[0].seconds


# -- a layer that walks the tokens on the host


@pytest.fixture(scope="module")
def walked() -> Planner:
    """The torch delta rule, whose launches grow with the tokens, in four layers of a 4B."""
    pytest.importorskip("triton")
    settings = Settings(kernels=Entries({"delta_rule": "reference"}))
    return Planner(found_of(DENSE_4B | {"num_hidden_layers": 4}), settings, H100)


@pytest.mark.parametrize("lengths", [(10240,), (9000, 4000, 65, 31)], ids=str)
@pytest.mark.slow
def test_a_long_pack_is_told_from_short_ones(walked: Planner, lengths: tuple[int, ...]) -> None:
    measure, kind = walked.measure, walked.measure.kinds[0]
    assert measure.extrapolates(kind, "full", lengths)
    told, seen = measure.layer(kind, "full", lengths), measure._layer(kind, "full", lengths)
    for term in ("kept", "forward", "backward", "launches"):
        assert getattr(told, term) == pytest.approx(getattr(seen, term), rel=0.02)
    for mine, theirs in (
        (told.forward_work, seen.forward_work),
        (told.backward_work, seen.backward_work),
    ):
        for unit in ("flops", "nbytes"):
            amounts = [sum(getattr(one, unit) for one in work) for work in (mine, theirs)]
            assert amounts[0] == pytest.approx(amounts[1], rel=0.02)
    _, whole = measure._batch_after(lengths, tuple(measure._layer_by_kind))
    assert measure.batch(lengths) == pytest.approx(whole, rel=0.02)
    policies = all_of(walked, "full")
    assert any("a reference loops" in note for note in walked.plan(lengths, policies).notes)


def test_attention_is_quadratic_in_what_is_told(walked: Planner) -> None:
    kind = walked.measure.kinds[3]
    assert not walked.measure.extrapolates(kind, "full", (65536,))  # fused: seen as it is
    packs = smaller((65536,))
    segments = [walked.measure.layer(kind, "full", one) for one in packs]
    told = extrapolated([sum(one) for one in packs], segments, 65536)
    seen = walked.measure.layer(kind, "full", (65536,))
    amounts = [sum(one.flops for one in segment.backward_work) for segment in (told, seen)]
    assert amounts[0] == pytest.approx(amounts[1], rel=1e-3)
    assert amounts[0] > 3 * 8 * sum(one.flops for one in segments[-1].backward_work) / 2


def test_smaller_packs_have_the_same_shape() -> None:
    assert smaller((8192, 8192)) == ()
    assert smaller((16384, 8192, 65, 3)) == (
        (2048, 1024, 1, 3), (4096, 2048, 1, 3), (8192, 4096, 1, 3),
    )  # fmt: skip


def test_fused_kernels_are_seen_at_any_length(dense: Planner) -> None:
    for kind in dict.fromkeys(dense.measure.kinds):
        assert not dense.measure.extrapolates(kind, "full", (1 << 20,))


def test_the_cost_of_planning_does_not_grow_with_the_tokens(walked: Planner) -> None:
    began = time.process_time()
    assert walked.plan((1 << 20,), all_of(walked, "full")).peak > 10**9
    assert time.process_time() - began < 20  # seen whole it would be minutes


def test_a_micro_step_that_nothing_can_compute_is_not_planned(dense: Planner) -> None:
    with pytest.raises(UsageError, match="more than kernels can index"):
        dense.fastest((1 << 20,) * 8192)
    assert dense.best(1 << 20, 64).lengths == (1 << 20,)  # the smallest; larger ones are left out


def test_a_model_that_kernels_have_no_code_for_is_planned_with_references() -> None:
    """As a run would take them."""
    pytest.importorskip("triton")
    sizes = DENSE_4B | {"num_hidden_layers": 4, "linear_key_head_dim": 96}
    planner = Planner(found_of(sizes), Settings(), H100)
    assert planner.taken.backends["qwen35::delta_rule"] == "reference"
    assert planner.taken.backends["qwen35::rms_norm"] == "triton"
    with pytest.raises(UsageError, match="no kernel for heads of size 96") as caught:
        Planner(found_of(sizes), Settings(kernels={"delta_rule": "triton"}), H100)
    assert caught.value.code == "QC-KERNEL-003"


# -- the search


def test_the_fastest_that_fits_is_one_step_before_what_does_not(dense: Planner) -> None:
    ladder = dense.ladder()
    for gigabytes in (8, 16, 24, 30):
        planner = dense.on(H100, gigabytes * 10**9)
        plan = planner.fastest((4096, 4096))
        assert plan.fits
        place = ladder.index(plan.policies)
        assert place > 0
        assert not planner.plan((4096, 4096), ladder[place - 1]).fits
    assert dense.on(H100, 40 * 10**9).fastest((4096, 4096)).recompute == "none"
    assert not dense.on(H100, 4 * 10**9).fastest((4096, 4096)).fits


def test_layers_of_the_bottom_give_up_first(dense: Planner) -> None:
    plan = dense.on(H100, 16 * 10**9).fastest((4096, 4096))
    assert plan.policies[0] == "full"
    assert plan.policies[-1] == "elementwise"


def test_a_policy_that_was_asked_for_is_the_only_one() -> None:
    pytest.importorskip("triton")
    found = found_of(DENSE_4B | {"num_hidden_layers": 4})
    planner = Planner(found, Settings(recompute="full"), H100)
    assert set(planner.ladder()) == {("full",) * 4}
    planner = Planner(found, Settings(gradient_checkpointing=False), H100)
    assert set(planner.ladder()) == {("none",) * 4}


def test_the_longest_row_fits_and_a_longer_one_does_not(dense: Planner) -> None:
    planner = dense.on(H100, 12 * 10**9)
    longest = planner.longest("full")
    assert 8192 < longest < 131072
    assert longest % 64 == 0
    assert planner.plan((longest,), all_of(planner, "full")).fits
    assert not planner.plan((int(longest * 1.05),), all_of(planner, "full")).fits
    assert dense.on(H100, 2 * 10**9).longest() == 0


def test_a_refusal_says_what_would_fit(dense: Planner) -> None:
    planner = dense.on(H100, 6 * 10**9)
    plan = planner.fastest((16384,) * 4)
    assert not plan.fits
    error = refusal(plan, planner)
    assert isinstance(error, InputError)
    assert error.code == "QC-PLAN-001"
    assert error.fix is not None
    assert "per_device_train_batch_size 1 and max_length" in error.fix


# -- cards


def test_cards_are_found_by_name() -> None:
    assert gpu_by_name("rtx-4090").name == "RTX-4090"
    assert gpu_by_name("h100") is H100
    with pytest.raises(UsageError, match="unknown GPU") as caught:
        gpu_by_name("A100")
    assert caught.value.code == "QC-PLAN-002"
    assert card_of("NVIDIA H100 80GB HBM3", 1).name == "H100-80"
    assert card_of("NVIDIA A100-SXM4-40GB", 1).name == "A100-40"
    assert card_of("NVIDIA GeForce RTX 5090", 1).name == "RTX-5090"
    assert card_of("NVIDIA T4", 16 * 10**9).memory == 16 * 10**9


@pytest.mark.parametrize("text", ["", "0", "-3", "nan", "many", "inf"])
def test_a_budget_is_a_size(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_budget(text)
    assert caught.value.code == "QC-PLAN-003"


def test_budgets() -> None:
    assert parse_budget("auto") is None
    assert parse_budget("23.5") == 23_500_000_000
