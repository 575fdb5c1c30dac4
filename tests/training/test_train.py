"""Training a tiny checkpoint: the loss, what moves, what is asked for, what is refused."""

from __future__ import annotations

import gc
import json
import math
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.e2e_kit import (
    CPU,
    GATES,
    LINEARS,
    PREFIX,
    figure,
    ours,
    random_b,
    resave,
    stock,
    tiny_folder,
    write_stock,
)
from support.run_kit import raw
from support.sinks import Heard
from torch.utils._python_dispatch import TorchDispatchMode

from qcore.api.blocks import Packed
from qcore.config.settings import Settings
from qcore.data.dataset import Dataset, dataset
from qcore.errors import NumericError, PluginError, QcoreError, UsageError
from qcore.io.artifact import read_manifest, verify
from qcore.nn.qlora.linear import Linear
from qcore.nn.qlora.lora_layer import Lora
from qcore.plugins.resolve_model import identify
from qcore.training.collate import pack
from qcore.training.step import Loop
from qcore.training.train import TrainReport, train

pytestmark = pytest.mark.usefixtures("one_thread")
FAST: dict[str, Any] = {
    "max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
    "learning_rate": 5e-3, "warmup_ratio": 0.0, "r": 4, "lora_alpha": 8, "dtype": "fp32",
    "save_steps": 0, "gradient_checkpointing": False,
}  # fmt: skip
#: Parameters of the tiny checkpoint's text part, by hand: hidden 128, 4 layers, ffn 256.
IN_FOUR_BIT = 65536 + 393216 + 393216  # attention, delta nets, mlp
LOADED = IN_FOUR_BIT + 6144 + 65536 + 1312 + 6144 + 48  # gates, embedding, norms, conv, state


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smaller than the tiny checkpoint; its vocabulary is the size of nothing else."""
    return write_stock(tmp_path_factory.mktemp("small"), "vl", dtype=torch.bfloat16)


def run(
    model: Path, rows: Path, output: Path, *, heard: Heard | None = None, **settings: Any
) -> TrainReport:
    return train(
        str(model), rows, output, Settings(**(FAST | settings)), device="cpu",
        reporter=heard and heard.reporter,
    )  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def loop_of(model: Path, rows: Path, **settings: Any) -> Loop:
    """A loop as `train` builds it, float32 and without files."""
    chosen = Settings(**(FAST | settings))
    lora = Lora(r=chosen.r, lora_alpha=chosen.lora_alpha, lora_dropout=chosen.lora_dropout)
    return Loop(ours(model, lora=lora), encoded(model, rows), chosen, CPU)


def encoded(model: Path, rows: Path) -> Dataset:
    found = identify(str(model))
    return dataset(rows, found.checkpoint, found.chat_format(), 2048)


# -- the loss, and what moves


@pytest.mark.parametrize("frozen", [False, True], ids=["nothing frozen", "frozen before"])
def test_a_run_leaves_no_model_in_memory(
    small: Path, rows: Path, tmp_path: Path, frozen: bool
) -> None:
    """A second run in the process has the memory of the first; Python 3.12 starts with frozen."""
    gc.unfreeze()
    if frozen:
        gc.freeze()
    made: list[weakref.ref[Any]] = []
    begin = Loop.__init__

    def watched(self: Loop, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        assert gc.get_freeze_count() > 0
        made.extend(weakref.ref(module) for module in self.model.modules())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "__init__", watched)
        run(small, rows, tmp_path / "out", max_steps=2)
    gc.collect()
    assert made
    assert [module for one in made if (module := one()) is not None] == []
    assert gc.get_freeze_count() == 0


@pytest.mark.slow
def test_every_kind_of_row_trains_every_adapter(rows: Path, tmp_path: Path) -> None:
    heard = Heard()
    report = run(
        tiny_folder(), rows, tmp_path / "out", heard=heard, max_steps=24, learning_rate=1e-2,
        per_device_train_batch_size=4,
    )  # fmt: skip
    figure(f"loss {report.first_loss:.3f} -> {report.last_loss:.3f}")
    assert report.last_loss < 0.6 * report.first_loss
    assert verify(tmp_path / "out").ok
    trained = weights(tmp_path / "out")
    assert len(trained) == 2 * 25  # 9 in the delta nets, 4 in attention, 12 in the mlps
    start = ours(tiny_folder(), lora=Lora(r=4, lora_alpha=8))
    for name, module in start.adapters():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        assert module.lora_A is not None
        assert not torch.equal(trained[f"{stem}.lora_A.weight"], module.lora_A), name
        assert trained[f"{stem}.lora_B.weight"].any(), name
    four = f"{100 * IN_FOUR_BIT / LOADED:.1f} % of the loaded parameters are held in 4 bit"
    assert four in heard.notes
    hit = {line["group"]: line["with LoRA"] for line in heard.tables[0].rows}
    assert hit["gdn"] == 9
    assert hit["gdn_gates"] == hit["embed"] == 0


def test_the_first_loss_is_the_stock_class_on_the_same_tokens(small: Path, rows: Path) -> None:
    loop = loop_of(small, rows, per_device_train_batch_size=5)
    batch = [loop.data.train[row] for micro in loop.schedule.micro_batches(0) for row in micro]
    reference, total, count = stock(small, "vl"), 0.0, 0
    for example in batch:
        ids, labels = torch.tensor(example.ids), torch.tensor(example.labels)
        with torch.no_grad():
            logits = reference(input_ids=ids[None], use_cache=False).logits[0]
        total += float(
            torch.nn.functional.cross_entropy(
                logits[:-1], labels[1:].long(), ignore_index=-100, reduction="sum"
            )
        )
        count += int((labels[1:] >= 0).sum())
    found = loop.step(0)
    assert found["supervised_tokens"] == count
    assert found["loss"] == pytest.approx(total / count, rel=1e-6)


def test_accumulating_4_x_1_equals_1_x_4(rows: Path) -> None:
    at_once = loop_of(tiny_folder(), rows, per_device_train_batch_size=4)
    one_by_one = loop_of(
        tiny_folder(), rows, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    batch = [at_once.data.train[row] for row in at_once.schedule.micro_batches(0)[0]]
    assert len({len(example.ids) for example in batch}) > 1
    assert len({example.supervised for example in batch}) > 1
    for loop in (at_once, one_by_one):  # B off zero, so that A has a gradient too
        random_b(loop.model, size=0.02)
    one, four = at_once.step(0), one_by_one.step(0)
    gradient = adapter = 0.0
    for p, q in zip(at_once.parameters, one_by_one.parameters, strict=True):
        mine = at_once.optimizer.state[p]["exp_avg"]
        theirs = one_by_one.optimizer.state[q]["exp_avg"]
        assert theirs.any()
        gradient = max(gradient, relative(mine, theirs))
        # Where a gradient is all rounding, AdamW's first step is the sign of rounding.
        clear = theirs.abs() >= 1e-4 * theirs.abs().max()
        adapter = max(adapter, relative(p[clear].detach(), q[clear].detach()))
    figure(f"loss {one['loss'] - four['loss']:.1e}, gradient {gradient:.1e}, adapter {adapter:.1e}")
    assert one["loss"] == pytest.approx(four["loss"], rel=1e-6)
    assert gradient <= 1e-5
    assert adapter <= 1e-5


def test_micro_batches_that_run_together_are_the_same_step(rows: Path) -> None:
    given = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 5}
    alone, joined = loop_of(tiny_folder(), rows, **given), loop_of(tiny_folder(), rows, **given)
    joined.shares.together = 700
    packs: list[int] = []
    whole = joined.model.loss

    def counted(batch: Packed, **more: Any) -> torch.Tensor:
        packs.append(len(batch.ids))
        return whole(batch, **more)

    joined.model.loss = counted  # type: ignore[method-assign]
    for loop in (alone, joined):
        random_b(loop.model, size=0.02)
    one, two = alone.step(0), joined.step(0)
    assert 1 < len(packs) < 5
    assert sum(packs) == one["tokens"] == two["tokens"]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
    for p, q in zip(alone.parameters, joined.parameters, strict=True):
        state = [loop.optimizer.state[x]["exp_avg"] for loop, x in ((joined, q), (alone, p))]
        assert relative(*state) <= 1e-5


def relative(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    scale = float(theirs.abs().max())
    return float((mine - theirs).abs().max()) / scale if scale else float(mine.any())


# -- what is asked for


def test_a_group_that_is_asked_for(rows: Path, tmp_path: Path) -> None:
    run(tiny_folder(), rows, tmp_path / "out", target_groups=("gdn_gates",), max_steps=2)
    trained = weights(tmp_path / "out")
    assert {name.split(".")[-3] for name in trained} == set(GATES)
    assert all(value.any() for value in trained.values())


@pytest.mark.parametrize("group", ["embed", "head", "norm", "attention"])
def test_a_group_that_is_never_trained(rows: Path, tmp_path: Path, group: str) -> None:
    with pytest.raises(UsageError, match=group) as error:
        run(tiny_folder(), rows, tmp_path / "out", target_groups=("attn", group))
    assert error.value.code == "QC-LORA-001"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["text", "vl"])
def test_the_class_that_is_asked_for(rows: Path, tmp_path: Path, kind: str) -> None:
    run(tiny_folder(), rows, tmp_path / "out", adapter_class=kind, max_steps=1)
    names = weights(tmp_path / "out")
    assert all(name.startswith(f"base_model.model.{PREFIX[kind]}layers.") for name in names)
    assert read_manifest(tmp_path / "out").meta["adapter_class"]["name"] == kind
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    targets = config["target_modules"]
    assert all(name.startswith(f"{PREFIX[kind]}layers.") for name in targets)
    assert {name.rpartition(".")[2] for name in targets} == set(LINEARS)


def test_a_class_that_is_unknown(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="text"):
        run(tiny_folder(), rows, tmp_path / "out", adapter_class="audio")
    assert list(tmp_path.iterdir()) == []


def test_held_out_rows_and_rows_of_metrics(rows: Path, tmp_path: Path) -> None:
    report = run(
        tiny_folder(), rows, tmp_path / "out", eval_fraction=0.25, eval_steps=2, logging_steps=3,
        max_steps=7,
    )  # fmt: skip
    found = metrics(tmp_path / "out")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 6, 7, 7]
    assert [row["step"] for row in found if "eval_loss" in row] == [2, 4, 6, 7]
    assert found[-1] == {"step": 7, "eval_loss": report.eval_loss}
    assert report.eval_loss is not None
    assert report.eval_loss < found[1]["eval_loss"]
    keys = {"loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens", "seconds",
            "tokens_per_second", "memory_gb"}  # fmt: skip
    assert all(keys <= row.keys() for row in found[:-1])
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in found[:-1])
    data = read_manifest(tmp_path / "out").meta["data"]
    assert (data["rows"], data["train_rows"], data["eval_rows"]) == (24, 18, 6)


def test_evaluation_is_the_mean_over_held_out_tokens(small: Path, rows: Path) -> None:
    loop = loop_of(small, rows)
    held = loop.data.train[:3]
    loop.data = Dataset(
        **{name: getattr(loop.data, name) for name in loop.data.__slots__ if name != "eval"},
        eval=held,
    )
    with torch.no_grad():
        total = sum(float(loop.model.eval().loss(pack([example]))) for example in held)
    assert loop.evaluate() == pytest.approx(total / sum(e.supervised for e in held), rel=1e-6)


# -- the same run, the same bytes


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(rows: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lora_dropout": 0.2, "dtype": "bf16", "max_steps": 3}
    for name, more in {
        "one": {}, "two": {}, "recomputed": {"gradient_checkpointing": True}, "other": {"seed": 7},
    }.items():  # fmt: skip
        run(tiny_folder(), rows, tmp_path / name, **(options | more))
    assert raw(tmp_path / "one") == raw(tmp_path / "two")
    assert raw(tmp_path / "one") == raw(tmp_path / "recomputed")
    assert raw(tmp_path / "one") != raw(tmp_path / "other")


class Largest(TorchDispatchMode):
    """Keeps the sizes of tensors, and the most rows that one of width `vocab` had."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab = vocab
        self.rows = 0
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.sizes.add(value.numel())
                if value.ndim and value.shape[-1] == self.vocab:
                    self.rows = max(self.rows, value.numel() // self.vocab)
        return out


@pytest.mark.parametrize("recompute", [False, True])
def test_full_logits_never_exist(small: Path, rows: Path, recompute: bool) -> None:
    loop = loop_of(
        small, rows, per_device_train_batch_size=24, loss_chunk_size=16,
        gradient_checkpointing=recompute,
    )  # fmt: skip
    vocab = len(loop.model.head)
    assert vocab == 512
    with Largest(vocab) as seen:
        found = loop.step(0)
    figure(f"{found['tokens']} tokens, {seen.rows} rows of logits")
    # The head itself, turned, has as many rows as the hidden size.
    assert 16 <= seen.rows <= 48
    assert found["supervised_tokens"] > 48
    assert not seen.sizes & {found[key] * vocab for key in ("tokens", "supervised_tokens")}


# -- runs that must not end well


def nothing_but(folder: Path, *names: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def refused(error: QcoreError, code: str, status: int) -> None:
    assert (error.code, error.exit_code) == (code, status), error


def test_a_base_with_an_infinity(rows: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_folder(), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = "model.language_model.layers.2.mlp.up_proj.weight"
    tensors[name][3, 5] = torch.inf
    resave(base, tensors)
    with pytest.raises(NumericError, match=name) as error:
        run(base, rows, tmp_path / "out")
    refused(error.value, "QC-LOAD-003", 76)
    nothing_but(tmp_path, "base")


def test_a_loss_that_overflows(rows: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_folder(), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.language_model.layers.1.mlp.down_proj.weight"].fill_(3e38)  # finite, just
    resave(base, tensors)
    with pytest.raises(NumericError, match="step 1") as error:
        run(base, rows, tmp_path / "out", quantization="none")
    refused(error.value, "QC-TRAIN-003", 76)
    assert error.value.file == str(rows)
    assert "lines" in str(error.value.field)
    nothing_but(tmp_path, "base")


@pytest.mark.parametrize("at", [0, 2])
def test_a_gradient_that_is_not_finite_updates_nothing(
    small: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    loop = loop_of(small, rows)
    for step in range(at):
        loop.step(step)
    before = [parameter.detach().clone() for parameter in loop.parameters]
    loop.parameters[-1].register_hook(lambda grad: grad * math.nan)
    with pytest.raises(NumericError, match=f"step {at + 1}") as error:
        loop.step(at)
    refused(error.value, "QC-TRAIN-003", 76)
    for old, now in zip(before, loop.parameters, strict=True):
        assert torch.equal(old, now)


def test_an_adapter_that_never_moved(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericError, match="never moved") as error:
        run(tiny_folder(), rows, tmp_path / "out", learning_rate=1e-60, max_steps=2)
    refused(error.value, "QC-TRAIN-004", 76)
    nothing_but(tmp_path)


def test_declared_four_bit_that_is_not(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold: Callable[..., None] = Linear.hold

    def lazy(
        self: Linear, rows: slice, weight: torch.Tensor, *, quantize: bool, dtype: torch.dtype
    ) -> None:
        hold(self, rows, weight, quantize=quantize and len(weight) != 256, dtype=dtype)

    monkeypatch.setattr(Linear, "hold", lazy)
    with pytest.raises(NumericError, match="4-bit") as error:
        run(tiny_folder(), rows, tmp_path / "out")
    refused(error.value, "QC-TRAIN-005", 76)
    nothing_but(tmp_path)


def test_a_router_that_is_not_there_is_not_balanced(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no router") as error:
        run(tiny_folder(), rows, tmp_path / "out", router_aux_loss_coef=0.001)
    refused(error.value, "QC-TRAIN-007", 2)
    nothing_but(tmp_path)


def test_a_trunk_without_a_load_balance_is_the_plugins_fault(rows: Path) -> None:
    """Preflight refuses the setting for a model without experts, so only a plugin leads here."""
    loop = loop_of(tiny_folder(), rows, router_aux_loss_coef=0.001)
    with pytest.raises(PluginError, match="aux_loss of the trunk returned None") as error:
        loop.step(0)
    refused(error.value, "QC-PLUGIN-003", 69)


def test_an_output_that_is_not_empty(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(QcoreError) as error:
        run(tiny_folder(), rows, tmp_path / "out")
    refused(error.value, "QC-WRITE-001", 73)
    nothing_but(tmp_path, "out")
