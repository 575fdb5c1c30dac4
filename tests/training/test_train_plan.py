"""``train`` under its plan: what it says, what it refuses, what it keeps over a stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.cli_kit import here
from support.conversations import conversations, write_rows
from support.e2e_kit import resave, tiny_folder
from support.sinks import Heard

from qcore.config.settings import Settings
from qcore.errors import InputError, Interrupted, UsageError
from qcore.io.artifact import read_manifest, verify
from qcore.planning.gpus import card_of
from qcore.planning.run import Room
from qcore.training.step import Loop
from qcore.training.train import TrainReport, train

BASE: dict[str, Any] = {
    "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    "learning_rate": 5e-3, "r": 4, "lora_alpha": 8, "save_steps": 0, "lora_dropout": 0.1,
    "eval_fraction": 0.25, "eval_steps": 2,
}  # fmt: skip


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", conversations(16))


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(
    rows: Path,
    output: Path,
    heard: Heard | None = None,
    room: Room | None = None,
    *,
    model: Path | None = None,
    resume: bool = False,
    **settings: Any,
) -> TrainReport:
    return train(
        str(model or tiny_folder()), rows, output, Settings(**(BASE | settings)), device="cpu",
        reporter=heard and heard.reporter, room=room, resume=resume,
    )  # fmt: skip


def raw(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainReport, Heard]:
    """A run without a limit."""
    torch.set_num_threads(1)
    heard, output = Heard(), tmp_path_factory.mktemp("whole") / "out"
    return output, run(rows, output, heard), heard


def test_prediction_and_measurement_are_side_by_side(
    whole: tuple[Path, TrainReport, Heard],
) -> None:
    output, report, heard = whole
    (plan,) = heard.said("plan: ")
    assert plan.startswith("plan: recompute full, peak 0.0")
    assert plan.endswith("no time predicted, on cpu")
    (beside,) = heard.said("plan and measurement: ")
    assert "no time planned" in beside
    assert heard.notes.index(plan) < heard.notes.index(beside)
    result = read_manifest(output).meta["result"]
    assert result["plan"] == json.loads(json.dumps(report.plan))
    assert result["measured"] == report.measured
    assert result["plan"]["recompute"] == "full"
    assert sum(result["plan"]["memory_bytes"].values()) == result["plan"]["peak_bytes"]
    assert result["measured"]["peak_bytes"] > 10**8
    assert result["measured"]["tokens_per_second"] > 0


@pytest.mark.slow
def test_a_plan_below_the_limit_of_the_cpu_gives_the_same_bytes(
    rows: Path, tmp_path: Path, whole: tuple[Path, TrainReport, Heard]
) -> None:
    """Layers have different policies then, and the adapter is the same."""
    card = card_of("Unheard-of 9", 10**9)
    for number, room in enumerate(
        (
            Room(budget=whole[1].plan["peak_bytes"]),
            Room(budget=10**12),
            Room(card=card, budget=whole[1].plan["peak_bytes"] + 80_000_000),
        )
    ):
        heard = Heard()
        report = run(rows, tmp_path / str(number), heard, room)
        assert report.plan["recompute"] != "full"
        assert report.plan["fits"] is True
        assert raw(tmp_path / str(number)) == raw(whole[0])
    assert "no time predicted, on Unheard-of 9" in heard.said("plan: ")[0]


def test_what_does_not_fit_is_refused_before_a_weight_is_read(rows: Path, tmp_path: Path) -> None:
    heard = Heard()
    with pytest.raises(InputError) as caught:
        run(rows, tmp_path / "out", heard, Room(budget=10**6))
    assert caught.value.code == "QC-PLAN-001"
    assert heard.tables == []
    assert not heard.said("plan")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"router_aux_loss_coef": 0.001}, "QC-TRAIN-007"),
        ({"adapter_class": "audio"}, "QC-ADAPTER-001"),
        ({"chat_template_kwargs": {"xyzzy": True}}, "QC-CONFIG-008"),
    ],
    ids=str,
)
def test_settings_that_do_not_suit_the_model_are_refused_first(
    rows: Path, tmp_path: Path, given: dict[str, Any], code: str
) -> None:
    heard = Heard()
    with pytest.raises(UsageError) as caught:
        run(rows, tmp_path / "out", heard, **given)
    assert caught.value.code == code
    assert (heard.notes, heard.tables) == ([], [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_policy_by_hand_is_warned_of_and_runs(rows: Path, tmp_path: Path) -> None:
    heard = Heard()
    report = run(rows, tmp_path / "out", heard, Room(budget=10**6), recompute="elementwise")
    assert report.plan["fits"] is False
    assert report.plan["by_hand"] is True
    assert len(heard.said("warning: QC-PLAN-001 ")) == 1


@pytest.mark.slow
def test_a_stopped_run_keeps_its_policy(
    rows: Path, tmp_path: Path, whole: tuple[Path, TrainReport, Heard]
) -> None:
    out, budget = tmp_path / "out", whole[1].plan["peak_bytes"]
    with pytest.raises(Interrupted):
        run(rows, out, Heard(2, terminate), Room(budget=budget))
    kept = json.loads((tmp_path / "out.run" / "plan.json").read_text())
    assert len(set(kept["policies"])) == 2
    heard = Heard()
    report = run(rows, out, heard, Room(budget=10**12), resume=True)
    assert report.plan["recompute"] == kept["plan"]["recompute"] != "none"
    assert heard.said("recompute as before the run was stopped: ")
    assert raw(out) == raw(whole[0])


@pytest.mark.slow
def test_a_stopped_run_on_a_smaller_card_says_what_changes(
    rows: Path, tmp_path: Path, whole: tuple[Path, TrainReport, Heard]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(rows, out, Heard(2, terminate), Room(budget=10**12))
    with pytest.raises(InputError, match="does not fit"):
        run(rows, out, Heard(), Room(budget=10**6), resume=True)
    assert verify(tmp_path / "out.run" / "checkpoint-2").ok
    heard = Heard()
    run(rows, out, heard, Room(budget=whole[1].plan["peak_bytes"]), resume=True)
    (line,) = heard.said("recompute was none before the run was stopped")
    assert "does not fit now" in line
    assert raw(out) == raw(whole[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then", "told"),
    [
        ({}, {"recompute": "elementwise"}, "recompute is elementwise now and was auto"),
        ({"recompute": "full"}, {}, "recompute is auto now and was full"),
        (
            {},
            {"gradient_checkpointing": False},
            "gradient_checkpointing is false now and was true",
        ),
    ],
    ids=["named", "left to the plan", "off"],
)
def test_another_policy_is_no_other_run(
    rows: Path, tmp_path: Path, whole: tuple[Path, TrainReport, Heard], first: dict[str, Any],
    then: dict[str, Any], told: str,
) -> None:  # fmt: skip
    """It computes the same numbers, so it is told in a line, and taken."""
    with pytest.raises(Interrupted):
        run(rows, tmp_path / "out", Heard(2, terminate), Room(budget=10**12), **first)
    heard = Heard()
    report = run(rows, tmp_path / "out", heard, Room(budget=10**12), resume=True, **then)
    (line,) = heard.said(told)
    assert line.endswith("before the run was stopped: it computes the same numbers")
    assert not heard.said("recompute as before")
    assert report.plan["recompute"] == then.get("recompute", "none")
    assert raw(tmp_path / "out") == raw(whole[0])


@pytest.mark.slow
def test_another_run_is_refused_before_anything_else(rows: Path, tmp_path: Path) -> None:
    """Before the plan, before the base; what the stopped run left is as it was."""
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(rows, out, Heard(2, terminate), Room(budget=10**12))
    left = {path: path.read_bytes() for path in (tmp_path / "out.run").rglob("*.*")}
    heard = Heard()
    with pytest.raises(InputError) as caught:
        run(rows, out, heard, Room(budget=10**6), resume=True, learning_rate=1e-3)
    assert (caught.value.code, caught.value.field) == ("QC-RESUME-002", "settings.learning_rate")
    assert (heard.tables, heard.said("plan"), heard.said("recompute")) == ([], [], [])
    with pytest.raises(InputError) as caught:
        run(rows, out, heard, Room(budget=10**6), resume=True)
    assert caught.value.code == "QC-PLAN-001"
    assert tmp_path / "out.run" / "plan.json" in left
    assert {path: path.read_bytes() for path in (tmp_path / "out.run").rglob("*.*")} == left


@pytest.mark.slow
def test_a_base_that_changed_leaves_the_plan_of_the_run(rows: Path, tmp_path: Path) -> None:
    """That is known only once the base was read, when the new plan has been made."""
    base, out = shutil.copytree(tiny_folder(), tmp_path / "base"), tmp_path / "out"
    with pytest.raises(Interrupted):
        run(rows, out, Heard(2, terminate), Room(budget=10**12), model=base)
    plan = (tmp_path / "out.run" / "plan.json").read_bytes()
    name = "model.language_model.layers.3.self_attn.k_norm.weight"
    tensors = load_file(base / "model.safetensors")
    resave(base, tensors | {name: tensors[name] + 0.5})
    with pytest.raises(InputError) as caught:
        run(rows, out, model=base, resume=True, recompute="elementwise")
    assert (caught.value.code, caught.value.field) == ("QC-RESUME-002", "base.text")
    assert (tmp_path / "out.run" / "plan.json").read_bytes() == plan


@pytest.mark.slow
def test_without_its_plan_a_stopped_run_is_planned_again(
    rows: Path, tmp_path: Path, whole: tuple[Path, TrainReport, Heard]
) -> None:
    with pytest.raises(Interrupted):
        run(rows, tmp_path / "out", Heard(2, terminate))
    (tmp_path / "out.run" / "plan.json").unlink()
    heard = Heard()
    run(rows, tmp_path / "out", heard, resume=True)
    assert heard.said("out.run has no plan")
    assert raw(tmp_path / "out") == raw(whole[0])


def test_memory_that_runs_out_after_all_is_an_error(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Loop.step

    def step(self: Loop, number: int) -> dict[str, Any]:
        if number + 1 == 3:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. More advice."
            )
        return real(self, number)

    monkeypatch.setattr(Loop, "step", step)
    with pytest.raises(InputError) as caught:
        run(rows, tmp_path / "out", save_steps=2)
    error = caught.value
    assert (error.code, error.field) == ("QC-PLAN-004", "step 3 of 4")
    assert "Tried to allocate 2.00 GiB" in error.message
    assert "by the plan 0.0" in error.message
    assert "More advice" not in error.message
    assert not (tmp_path / "out").exists()
    assert verify(tmp_path / "out.run" / "checkpoint-2").ok


@pytest.mark.slow
def test_json_has_the_plan_and_what_was_measured(
    capsys: pytest.CaptureFixture[str], rows: Path, tmp_path: Path
) -> None:
    sets = [
        word
        for key, value in (BASE | {"max_steps": 2}).items()
        for word in ("--set", f"{key}={value}")
    ]
    ended = here(
        capsys, "train", "--model", tiny_folder(), "--data", rows, "--output", tmp_path / "out",
        "--device", "cpu", *sets, "--json",
    )  # fmt: skip
    assert ended.code == 0
    assert ended.json["plan"]["recompute"] == "full"
    assert ended.json["plan"]["tokens_per_second"] is None
    assert ended.json["measured"]["memory"] == "resident"
    assert ended.json["measured"]["tokens_per_second"] > 0
