"""A run that starts from an adapter: what it loads, what it sets, what it refuses."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.cli_kit import here
from support.e2e_kit import CPU, loaded_adapter, resave, stock, wrapped, write_stock
from support.run_kit import SHORT, raw, start, stop_at, words
from support.sinks import Heard
from support.tiers import fast

from qcore.config.settings import Settings
from qcore.errors import InputError, Interrupted, NumericError, QcoreError, TrustError, UsageError
from qcore.io.artifact import read_manifest
from qcore.nn.moe.experts import Experts
from qcore.nn.qlora.lora_layer import Lora
from qcore.plugins.resolve_model import identify
from qcore.training.initial_adapter import AdapterWords, start_from
from qcore.training.step import Loop

pytestmark = pytest.mark.usefixtures("one_thread")
#: Of a run that starts from an adapter: it does not say what the adapter says.
REST = {key: value for key, value in SHORT.items() if key not in ("r", "lora_alpha")}
REST |= {"max_steps": 2, "learning_rate": 5e-3, "quantization": "none"}
GROUPS = ("attn", "mlp")


@pytest.fixture(scope="module")
def home(rows: Path, once: Callable[..., Path]) -> Path:
    """A small base, and an adapter that was trained on it: rank 4, in the MLPs rank 2."""

    def write(folder: Path) -> None:
        write_stock(folder / "base", "vl", dtype=torch.bfloat16)
        numbers = {"r": 4, "lora_alpha": 8, "group_r": {"mlp": 2}, "target_groups": GROUPS}
        start(folder / "base", rows, folder / "first", REST | numbers)

    return once("init-adapter", write)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def chosen(home: Path, adapter: Path, *, trust: bool = False, **settings: Any) -> Settings:
    """The settings of a run from an adapter, without the run."""
    asked = AdapterWords(init_adapter=adapter, trust_base=trust)
    return start_from(asked, identify(str(home / "base")), Settings(**settings))[1]


# -- what it starts from


def test_it_starts_where_the_adapter_is(home: Path, rows: Path, tmp_path: Path) -> None:
    seen: list[Loop] = []
    before: dict[str, torch.Tensor] = {}
    begin = Loop.__init__

    def watched(self: Loop, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        seen.append(self)
        before.update({n: p.detach().clone() for n, p in self.model.trainable()})
        assert not self.optimizer.state

    heard = Heard()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "__init__", watched)
        report = start(
            home / "base", rows, tmp_path / "out", REST, init_adapter=home / "first",
            reporter=heard.reporter,
        )  # fmt: skip
    first, now = tensors(home / "first"), tensors(tmp_path / "out")
    assert len(before) == len(first) > 0
    for name, value in before.items():
        stem, side = name.rsplit(".", 1)
        peft = f"base_model.model.{stem}.{side}.weight"
        assert torch.equal(value, first[peft]), name
        assert not torch.equal(first[peft], now[peft]), name
    assert {float(state["step"]) for state in seen[0].optimizer.state.values()} == {2.0}
    # The first loss is that of the stock class with the adapter on it.
    held = seen[0].data.train
    chosen_rows = seen[0].schedule.micro_batches(0)[0]
    reference, total, count = loaded_adapter(stock(home / "base", "vl"), home / "first"), 0.0, 0
    for row in chosen_rows:
        ids, labels = torch.tensor(held[row].ids), torch.tensor(held[row].labels)
        with torch.no_grad():
            logits = reference(input_ids=ids[None], use_cache=False).logits[0]
        total += float(
            torch.nn.functional.cross_entropy(
                logits[:-1], labels[1:].long(), ignore_index=-100, reduction="sum"
            )
        )
        count += held[row].supervised
    assert report.first_loss == pytest.approx(total / count, rel=1e-5)
    meta = read_manifest(tmp_path / "out").meta
    assert meta["init_adapter"] == {
        "source": str(home / "first"),
        "sha256": hashlib.sha256(raw(home / "first")).hexdigest(),
        "config_sha256": hashlib.sha256(
            (home / "first" / "adapter_config.json").read_bytes()
        ).hexdigest(),
        "trusted_without_fingerprint": False,
    }
    configs = [json.loads((f / "adapter_config.json").read_text())
               for f in (home / "first", tmp_path / "out")]  # fmt: skip
    assert configs[0] == configs[1]
    assert heard.said("r = 4 (from the initial adapter)")
    assert heard.said("target_groups = attn,mlp (from the initial adapter)")
    assert not heard.said("warning: the initial adapter")


def test_its_numbers_become_settings(home: Path) -> None:
    found = chosen(home, home / "first", learning_rate=1e-3)
    assert (found.r, found.lora_alpha, found.learning_rate) == (4, 8, 1e-3)
    assert found.target_groups == GROUPS
    assert dict(found.group_r) == {"mlp": 2}
    assert not found.group_lora_alpha
    assert found.adapter_class == "vl"


# -- what contradicts it

CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"r": 8}, "r"),
    "alpha": ({"lora_alpha": 16}, "lora_alpha"),
    "groups": ({"target_groups": ("attn",)}, "target_groups"),
    "rank of a group": ({"group_r": {"mlp": 3}}, "group_r.mlp"),
    "rank of a group that it lacks": ({"group_r": {"gdn": 4}}, "group_r.gdn"),
    "alpha of a group": ({"group_lora_alpha": {"mlp": 3.5}}, "group_lora_alpha.mlp"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_setting_that_contradicts_it(home: Path, case: str) -> None:
    settings, field = CONTRADICTIONS[case]
    with pytest.raises(UsageError) as error:
        chosen(home, home / "first", **settings)
    assert (error.value.code, error.value.field) == ("QC-TRAIN-011", field)


def test_settings_that_agree_with_it(home: Path) -> None:
    same = {"r": 4, "lora_alpha": 8, "group_r": {"mlp": 2}, "target_groups": ("mlp", "attn")}
    assert chosen(home, home / "first", **same) == chosen(home, home / "first")


def test_an_explicit_default_counts_and_a_preset_does_not(home: Path) -> None:
    model, settings = identify(str(home / "base")), Settings(r=16, lora_alpha=64)
    origins = dict.fromkeys(Settings().to_dict(), "default") | {"lora_alpha": "preset x"}
    asked = AdapterWords(init_adapter=home / "first", origins=origins)
    assert start_from(asked, model, settings)[1].lora_alpha == 8
    asked = AdapterWords(init_adapter=home / "first", origins=origins | {"r": "flag"})
    with pytest.raises(UsageError) as error:
        start_from(asked, model, settings)
    assert (error.value.field, error.value.found, error.value.expected) == ("r", "16", "4")


def test_consent_without_an_adapter(home: Path) -> None:
    with pytest.raises(UsageError, match="no effect") as error:
        start_from(AdapterWords(trust_base=True), identify(str(home / "base")), Settings())
    assert error.value.code == "QC-TRAIN-011"


# -- another training


def test_another_base_is_refused(home: Path, rows: Path, tmp_path: Path) -> None:
    base = shutil.copytree(home / "base", tmp_path / "base")
    values = load_file(base / "model.safetensors")
    name = next(name for name in values if name.endswith("mlp.up_proj.weight"))
    values[name][0, 0] += 1
    resave(base, values)
    with pytest.raises(InputError, match="not the base that the initial adapter") as error:
        start(base, rows, tmp_path / "out", REST, init_adapter=home / "first")
    assert (error.value.code, error.value.field) == ("QC-TRAIN-010", "part 'text'")
    assert not (tmp_path / "out").exists()


def test_what_differs_is_named(home: Path, tmp_path: Path) -> None:
    base = shutil.copytree(home / "base", tmp_path / "base")
    template = base / "chat_template.jinja"
    template.write_text(template.read_text() + "{#- another -#}\n")
    asked = AdapterWords(init_adapter=home / "first")
    initial, found, lines = start_from(
        asked, identify(str(base)), Settings(adapter_class="text")
    )  # fmt: skip
    assert initial is not None
    assert not list(initial.other_variables({}))
    lines += initial.other_variables({"enable_thinking": False})
    warned = [line for line in lines if line.startswith("warning: ")]
    assert found.adapter_class == "text"
    assert [any(word in line for line in warned) for word in (
        "for class 'vl', and this run writes one for class 'text'",
        "under another chat template",
        "with quantization none, and it is nf4 now",
        "with chat_template_kwargs.enable_thinking unset, and it is false now",
    )] == [True] * 4  # fmt: skip
    assert len(warned) == 4


# -- adapters of stock PEFT


@pytest.fixture(scope="module")
def peft_adapter(home: Path, once: Callable[..., Path]) -> Callable[..., Path]:
    """``peft_adapter(name, ...)``: a folder that stock PEFT saved, every B random."""

    def make(name: str, **config: Any) -> Path:
        def write(folder: Path) -> None:
            model = wrapped(stock(home / "base", "vl"), **config)
            torch.manual_seed(3)
            with torch.no_grad():
                for key, value in model.named_parameters():
                    if "lora_B" in key:
                        value.copy_(0.1 * torch.randn(value.shape))
            model.save_pretrained(str(folder), save_embedding_layers=False)

        return once(f"peft-{name}", write)

    return make


MLP = ["gate_proj", "up_proj", "down_proj"]


def test_one_of_stock_peft(
    home: Path, rows: Path, tmp_path: Path, peft_adapter: Callable[..., Path]
) -> None:
    adapter = peft_adapter("mlp", r=4, lora_alpha=6, use_rslora=True, target_modules=MLP)
    with pytest.raises(TrustError) as error:
        chosen(home, adapter)
    assert error.value.code == "QC-ADAPTER-009"
    found = chosen(home, adapter, trust=True)
    assert (found.lora_alpha, found.use_rslora) == (6, True)
    heard = Heard()
    start(
        home / "base", rows, tmp_path / "out", REST | {"max_steps": 1}, init_adapter=adapter,
        trust_base=True, reporter=heard.reporter,
    )  # fmt: skip
    assert heard.said("warning: the initial adapter has no fingerprint")
    first, now = tensors(adapter), tensors(tmp_path / "out")
    assert first.keys() == now.keys()
    moved = {name: float((now[name] - first[name]).abs().max()) for name in first}
    # One step of AdamW from fresh moments is the learning rate.
    assert all(0 < value < 1.01 * 5e-3 for value in moved.values())


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "a part of a group": ({"target_modules": ["q_proj", "v_proj"]}, "in part"),
    "an alpha that settings do not allow": ({"lora_alpha": 10**6}, "lora_alpha"),
}


@pytest.mark.parametrize("case", fast(UNFIT, "a part of a group"))
def test_one_that_settings_cannot_express(
    home: Path, peft_adapter: Callable[..., Path], case: str
) -> None:
    more, what = UNFIT[case]
    config: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": MLP} | more
    with pytest.raises(InputError, match=what) as error:
        chosen(home, peft_adapter(case.replace(" ", "-"), **config), trust=True)
    assert error.value.code == "QC-TRAIN-009"


# -- what moved


def test_moved_is_measured_from_the_adapter(home: Path, rows: Path, tmp_path: Path) -> None:
    """Weight decay changes B without any gradient, which does not count as training."""
    options = REST | {"learning_rate": 1e-60, "max_steps": 1}
    with pytest.raises(NumericError, match="never moved") as error:
        start(home / "base", rows, tmp_path / "out", options, init_adapter=home / "first")
    assert (error.value.code, error.value.found) == (
        "QC-TRAIN-004", "lora_B as in the initial adapter",
    )  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_decay_alone_moves_nothing(home: Path, rows: Path, tmp_path: Path) -> None:
    options = REST | {"weight_decay": 0.5, "max_steps": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_reaches", lambda self, batch: False)
        with pytest.raises(NumericError, match="never moved"):
            start(home / "base", rows, tmp_path / "out", options, init_adapter=home / "first")


def test_experts_are_counted_one_by_one() -> None:
    module = Experts((3, 5, 4), torch.float32, Lora(r=2, lora_alpha=2))
    module.reset_lora("experts", 0, CPU)
    values = torch.zeros(5, 6)
    values[2, 1 * 3 + 2] = 1.0  # column k E + e: k 1 of expert 2
    assert module.touched(values).tolist() == [False, False, True]
    assert module.moved == (0, 3)


# -- resumed, and finished


@pytest.mark.slow
def test_a_run_from_an_adapter_is_resumed(home: Path, rows: Path, tmp_path: Path) -> None:
    options = REST | {"max_steps": 3}
    more = {"init_adapter": home / "first"}
    start(home / "base", rows, tmp_path / "whole", options, **more)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Interrupted):
            start(home / "base", rows, tmp_path / "out", options, **more)
    with pytest.raises(InputError) as error:
        start(home / "base", rows, tmp_path / "out", options, resume=True)
    assert (error.value.code, error.value.field) == ("QC-RESUME-002", "init_adapter")
    start(home / "base", rows, tmp_path / "out", options, resume=True, **more)
    assert raw(tmp_path / "out") == raw(tmp_path / "whole")


def test_a_finished_run_is_not_resumed(
    home: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fix is a command that works as it is printed."""
    out = shutil.copytree(home / "first", tmp_path / "my out")
    settings = REST | {"max_steps": 1}
    ended = here(capsys, *words(home / "base", rows, out, settings), "--resume")
    line = ended.err.splitlines()[-1]
    assert ended.code == 2
    assert line.startswith("error[QC-RESUME-005] ")
    assert "schedule ended with step 2" in line
    command = shlex.split(line[line.index("qcore train") :])
    assert "--resume" not in command
    assert command[-4:] == ["--init-adapter", str(out), "--output", f"{out}-2"]
    again = here(capsys, *command[1:], "--json")
    assert again.code == 0, again.err
    assert again.json["output"] == f"{out}-2"
    meta = read_manifest(Path(f"{out}-2")).meta
    assert meta["init_adapter"]["source"] == str(out)


@pytest.mark.slow
def test_a_longer_run_names_the_way(home: Path, rows: Path, tmp_path: Path) -> None:
    """The adapter was removed; its last checkpoint is there."""
    out = tmp_path / "out"
    start(home / "base", rows, out, REST | {"save_steps": 1}, init_adapter=home / "first")
    shutil.rmtree(out)
    longer = REST | {"save_steps": 1, "max_steps": 4}
    with pytest.raises(QcoreError) as error:
        start(home / "base", rows, out, longer, init_adapter=home / "first", resume=True)
    checkpoint = tmp_path / "out.run" / "checkpoint-1"
    assert error.value.field == "settings.max_steps"
    assert f"--init-adapter {checkpoint}" in str(error.value.fix)
    start(home / "base", rows, tmp_path / "more", REST, init_adapter=checkpoint)
    assert read_manifest(tmp_path / "more").meta["init_adapter"]["source"] == str(checkpoint)
