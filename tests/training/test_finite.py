"""No run writes a value that is not finite, and an error names a checkpoint that was read again."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.e2e_kit import resave, write_stock
from support.run_kit import SHORT, start
from support.sinks import Heard

from qcore.errors import NumericError
from qcore.nn.optim import FlatAdamW
from qcore.nn.qlora.linear import Linear
from qcore.nn.qlora.lora_layer import Lora
from qcore.nn.value_range import is_finite
from qcore.training.checkpoints import RunFiles
from qcore.training.rotation import checkpoints
from qcore.training.step import Loop, _Sums

pytestmark = pytest.mark.usefixtures("one_thread")
RUN: dict[str, Any] = SHORT | {
    "max_steps": 6, "learning_rate": 5e-3, "quantization": "none", "target_groups": ("attn",),
    "save_steps": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(once: Callable[..., Path]) -> Path:
    return once("best-base", lambda folder: write_stock(folder, "vl", dtype=torch.bfloat16))


def steps(folder: Path) -> list[int]:
    return [step for step, _ in checkpoints(folder)]


def bad_loss(patch: pytest.MonkeyPatch, at: int, value: float = math.nan) -> None:
    """Make the loss of step `at`, from 1, `value`."""
    accumulate = Loop._accumulate

    def changed(self: Loop, batches: Any) -> _Sums:
        self.seen = getattr(self, "seen", 0) + 1  # type: ignore[attr-defined]
        found = accumulate(self, batches)
        return found._replace(loss=value) if self.seen == at else found  # type: ignore[attr-defined]

    patch.setattr(Loop, "_accumulate", changed)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_value_is_seen(value: float, dtype: torch.dtype) -> None:
    values = torch.randn(1000).to(dtype)
    assert is_finite(values)
    values[777] = value
    assert not is_finite(values)
    assert is_finite(torch.empty(0))
    assert is_finite(torch.tensor([3]))


# -- the error names a checkpoint


def test_the_checkpoint_of_the_error_was_verified(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad_loss(monkeypatch, 4)
    with pytest.raises(NumericError) as error:
        start(base, rows, tmp_path / "out", RUN)
    assert (error.value.code, error.value.exit_code) == ("QC-TRAIN-003", 76)
    intact = tmp_path / "out.run" / "checkpoint-3"
    assert str(error.value.fix).endswith(f"{intact} is intact (verified now)")
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_not_called_intact(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Loop.step

    def damaging(self: Loop, number: int) -> dict[str, Any]:
        if number == 3:
            path = tmp_path / "out.run" / "checkpoint-3" / "adapter_model.safetensors"
            path.write_bytes(path.read_bytes()[:-1] + b"\x01")
        return step(self, number)

    monkeypatch.setattr(Loop, "step", damaging)
    bad_loss(monkeypatch, 4)
    with pytest.raises(NumericError) as error:
        start(base, rows, tmp_path / "out", RUN)
    fix = str(error.value.fix)
    assert "checkpoint-3 is damaged: " in fix
    assert fix.endswith(f"{tmp_path / 'out.run' / 'checkpoint-2'} is intact (verified now)")


def test_without_a_checkpoint_none_is_named(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad_loss(monkeypatch, 2)
    with pytest.raises(NumericError) as error:
        start(base, rows, tmp_path / "out", RUN | {"save_steps": 0})
    assert str(error.value.fix).endswith("no checkpoint was written")
    assert list(tmp_path.iterdir()) == []


def test_rotation_keeps_a_checkpoint_until_the_next_step_is_finite(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest one may be the one that leads to NaN."""
    bad_loss(monkeypatch, 4)
    with pytest.raises(NumericError):
        start(base, rows, tmp_path / "out", RUN | {"save_total_limit": 1})
    assert steps(tmp_path / "out.run") == [2, 3]


# -- evaluation


def test_a_held_out_loss_that_is_not_finite_names_its_row(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Loop._loss

    def bad(self: Loop, batch: Any, **more: Any) -> Any:
        value, aux = loss(self, batch, **more)
        last = [*self.data.eval][-1]
        wrong = not self.model.training and batch[0].row == last.row
        return (value * math.nan if wrong else value), aux

    monkeypatch.setattr(Loop, "_loss", bad)
    held = tmp_path / "held.jsonl"
    held.write_text("".join(rows.read_text().splitlines(keepends=True)[:3]))
    for number, more in enumerate(({"eval_fraction": 0.25}, {})):
        named: dict[str, Any] = {} if more else {"eval_data": held}
        with pytest.raises(NumericError) as error:
            start(base, rows, tmp_path / f"{number}", RUN | {"eval_steps": 2} | more, **named)
        assert (error.value.code, error.value.exit_code) == ("QC-TRAIN-012", 76)
        assert error.value.file == str(held if named else rows)
        assert str(error.value.field).startswith("lines ")
        assert error.value.found == "loss nan"
        assert "checkpoint-2 is intact" in str(error.value.fix)
        if named:
            assert error.value.field == "lines 3"


# -- what is written


@pytest.mark.parametrize("which", ["lora_B", "exp_avg_sq"])
def test_no_checkpoint_with_a_value_that_is_not_finite(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    save = RunFiles.save

    def poisoned(self: RunFiles, folder: Path, step: int, optimizer: Any, *a: Any, **k: Any) -> Any:
        if step == 2:
            _, parameter = [*self.model.trainable()][-1]
            where = parameter.data if which == "lora_B" else optimizer.state[parameter][which]
            where.view(-1)[0] = math.inf
        return save(self, folder, step, optimizer, *a, **k)

    monkeypatch.setattr(RunFiles, "save", poisoned)
    with pytest.raises(NumericError) as error:
        start(base, rows, tmp_path / "out", RUN)
    assert (error.value.code, error.value.exit_code) == ("QC-TRAIN-015", 76)
    assert which in str(error.value.field)
    assert "checkpoint-1 is intact" in str(error.value.fix)
    assert steps(tmp_path / "out.run") == [1]


def test_no_adapter_with_a_value_that_is_not_finite(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = RunFiles.publish

    def poisoned(self: RunFiles, *args: Any, **more: Any) -> None:
        next(iter(self.model.trainable()))[1].data.view(-1)[0] = math.nan
        publish(self, *args, **more)

    monkeypatch.setattr(RunFiles, "publish", poisoned)
    with pytest.raises(NumericError) as error:
        start(base, rows, tmp_path / "out", RUN | {"save_steps": 0})
    assert error.value.code == "QC-TRAIN-015"
    assert not (tmp_path / "out").exists()


def test_a_parameter_that_becomes_nan_stops_the_next_step(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no token reads it: the loss does not show it."""
    step = Loop.step

    def poisoned(self: Loop, number: int) -> dict[str, Any]:
        if number == 2:
            self.parameters[0].data.view(-1)[0] = math.nan
            self._accumulate = lambda batches: _Sums(1.0, 0.0, 1.0, float(self._largest()))  # type: ignore[method-assign]
        return step(self, number)

    monkeypatch.setattr(Loop, "step", poisoned)
    with pytest.raises(NumericError) as error:
        start(base, rows, tmp_path / "out", RUN)
    assert error.value.code == "QC-TRAIN-015"
    assert "step 3" in str(error.value)


def test_the_flat_optimizer_shows_the_largest_value() -> None:
    module = Linear((8, 4), torch.float32, Lora(r=2, lora_alpha=4))
    module.set_lora(torch.full((2, 4), 0.5), torch.full((8, 2), -3.0), trained=True)
    flat = FlatAdamW([module], lr=1e-3, weight_decay=0.0)
    assert float(flat.largest()) == 3.0
    assert module.lora_A is not None
    module.lora_A.data[0, 0] = math.nan
    assert math.isnan(float(flat.largest()))


# -- adapters that cannot learn


def test_an_adapter_without_a_gradient_stops_by_step_three(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm that multiplies by 1 + w = 0: nothing enters the attention of that layer."""
    broken = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(broken / "model.safetensors")
    layer = next(n for n in tensors if n.endswith("self_attn.o_proj.weight")).split(".self")[0]
    tensors[f"{layer}.input_layernorm.weight"].fill_(-1.0)
    resave(broken, tensors)
    ran: list[int] = []
    step = Loop.step

    def counted(self: Loop, number: int) -> dict[str, Any]:
        ran.append(number + 1)
        return step(self, number)

    monkeypatch.setattr(Loop, "step", counted)
    with pytest.raises(NumericError) as error:
        start(broken, rows, tmp_path / "out", RUN | {"max_steps": 40})
    assert (error.value.code, error.value.exit_code) == ("QC-TRAIN-016", 76)
    assert str(error.value.field).startswith(f"{layer}.self_attn.")
    assert "4 adapters" in str(error.value)
    assert ran == [1, 2, 3]


def test_constant_weights_are_named_while_the_base_is_loaded(
    base: Path, rows: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(broken / "model.safetensors")
    zero = next(name for name in tensors if name.endswith("mlp.up_proj.weight"))
    same = next(name for name in tensors if name.endswith("mlp.gate_proj.weight"))
    tensors[zero].zero_()
    tensors[same].fill_(0.25)
    resave(broken, tensors)
    heard = Heard()
    start(broken, rows, tmp_path / "out", RUN | {"max_steps": 2}, reporter=heard.reporter)
    (line,) = [text for text in heard.notes if "constant" in text]
    assert "2 weights of the base are constant" in line
    assert f"{zero} is 0" in line or f"{same} is 0.25" in line
    whole = Heard()
    start(base, rows, tmp_path / "fine", RUN | {"max_steps": 2}, reporter=whole.reporter)
    assert not [text for text in whole.notes if "constant" in text]


def test_metrics_of_a_stopped_run_are_json(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad_loss(monkeypatch, 3)
    with pytest.raises(NumericError):
        start(base, rows, tmp_path / "out", RUN)
    lines = (tmp_path / "out.run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
