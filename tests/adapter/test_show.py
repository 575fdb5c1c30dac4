"""`qcore adapter show`: what PEFT saved is what the report says, and its norms are PEFT's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cli_kit import here
from support.e2e_kit import SIDECARS, stock, tiny_folder, wrapped, write_stock

from qcore.adapter.show import AdapterReport, Targets, show_adapter

LORA: dict[str, Any] = {
    "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "gate_proj"],
    "rank_pattern": {r".*layers\.1.*gate_proj": 2, "v_proj": 3}, "alpha_pattern": {"v_proj": 5},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stock(tmp_path_factory.mktemp("show") / "base", "vl", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stock(tmp_path_factory.mktemp("show") / "moe", "vl", moe=True, num_experts=20)


def adapted(folder: Path, *, moe: bool = False, **lora: Any) -> Any:
    """Stock PEFT on the base, with random values."""
    model = wrapped(stock(folder, "vl", moe=moe), **lora)
    torch.manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = 0.1 * torch.randn_like(value)
    return model


def norms(model: Any) -> dict[str, list[float]]:
    """The norm of each delta, as PEFT forms it, by the last word of the module's name."""
    found: dict[str, list[float]] = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            delta = module.get_delta_weight("default")
            key = getattr(module, "parameter_name", "") or name.rpartition(".")[2]
            found.setdefault(key, []).append(float(delta.double().norm()))
    return found


def by_name(report: AdapterReport) -> dict[str, Targets]:
    return {targets.name: targets for targets in report.targets}


def test_what_peft_saved_is_what_is_shown(base: Path, tmp_path: Path) -> None:
    adapted(base, **LORA).save_pretrained(tmp_path)
    report = show_adapter(tmp_path)
    facts = report.as_json()
    assert (facts["kind"], facts["peft_version"]) == ("LORA", peft.__version__)
    assert facts["base"] == str(base)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert facts["tensors"] == len(tensors)
    assert facts["parameters"] == sum(value.numel() for value in tensors.values())
    assert facts["fits"] is None
    assert facts["refused"] == facts["notes"] == []
    shown = by_name(report)
    assert shown["self_attn.q_proj"].ranks == (4,)
    assert shown["self_attn.v_proj"].ranks == (3,)
    assert shown["self_attn.v_proj"].scalings == (5 / 3,)
    assert shown["mlp.gate_proj"].ranks == (2, 4)
    assert shown["mlp.gate_proj"].scalings == (2.0, 4.0)
    assert sum(targets.pairs for targets in report.targets) == len(tensors) // 2


@pytest.mark.parametrize("rslora", [False, True])
def test_the_norms_are_those_of_pefts_deltas(base: Path, tmp_path: Path, rslora: bool) -> None:
    model = adapted(base, use_rslora=rslora, **LORA)
    model.save_pretrained(tmp_path)
    expected = norms(model)
    shown = {name.rpartition(".")[2]: t for name, t in by_name(
        show_adapter(tmp_path, norms=True)).items()}  # fmt: skip
    assert shown.keys() == expected.keys()
    for name, values in expected.items():
        assert shown[name].norm == pytest.approx(math.hypot(*values), rel=1e-5)
        assert shown[name].largest == pytest.approx(max(values), rel=1e-5)
    assert show_adapter(tmp_path).targets[0].norm is None


def test_the_norms_of_experts(moe: Path, tmp_path: Path) -> None:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = adapted(moe, moe=True, r=3, lora_alpha=6, target_modules=["q_proj"],
                    target_parameters=parameters)  # fmt: skip
    model.save_pretrained(tmp_path)
    expected = norms(model)
    shown = by_name(show_adapter(tmp_path, norms=True))
    stacks = [v for name in ("gate_up_proj", "down_proj") for v in expected[name]]
    found = [shown["mlp.experts"].norm, shown["mlp.experts.base_layer"].norm]
    assert math.hypot(*found) == pytest.approx(math.hypot(*stacks), rel=1e-5)
    assert shown["mlp.experts"].ranks == (3,)
    fitted = by_name(show_adapter(tmp_path, model=str(moe), norms=True))
    assert fitted["experts"].norm == pytest.approx(math.hypot(*stacks), rel=1e-5)
    assert fitted["experts"].ranks == (3,)


def test_variants_saved_modules_and_token_rows_are_named(tmp_path: Path) -> None:
    untied = write_stock(tmp_path / "base", "vl", tied=False)
    model = adapted(untied, r=2, lora_alpha=2, use_dora=True, target_modules=["q_proj"],
                    modules_to_save=["lm_head"], trainable_token_indices=[3, 5])  # fmt: skip
    model.save_pretrained(tmp_path)
    report = show_adapter(tmp_path)
    facts = report.as_json()
    assert (report.kind, facts["use_dora"]) == ("LORA + DoRA", True)
    assert any(name.endswith("lm_head.weight") for name in facts["saved"])
    assert list(facts["token_rows"].values()) == [2]
    assert facts["modules_to_save"] == ["lm_head"]


def test_a_tokenizer_beside_it_is_named(base: Path, tmp_path: Path) -> None:
    adapted(base, r=2, lora_alpha=2, target_modules=["q_proj"]).save_pretrained(tmp_path)
    for name in SIDECARS:
        (tmp_path / name).write_bytes((tiny_folder() / name).read_bytes())
    facts = show_adapter(tmp_path).as_json()
    assert facts["tokenizer"] == ["tokenizer.json", "tokenizer_config.json"]
    (template,) = facts["templates"]
    assert template["file"] == str(tmp_path / "chat_template.jinja")
    assert template["name"] == "default"


def test_what_fits_a_base_is_counted(base: Path, tmp_path: Path) -> None:
    adapted(base, r=2, lora_alpha=2, target_modules=["q_proj", "gate_proj"]).save_pretrained(
        tmp_path
    )
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    report = show_adapter(tmp_path, model=str(base))
    assert report.fit is not None
    assert (report.fit.matched, report.fit.unmatched) == (len(tensors), ())
    assert report.fit.weights == len(tensors) // 2
    assert set(by_name(report)) == {"attn", "mlp"}
    assert report.problems == ()
    extra = {
        "base_model.model.model.language_model.layers.77.mlp.gate_proj.lora_A.weight",
        "base_model.model.model.language_model.layers.77.mlp.gate_proj.lora_B.weight",
    }
    save_file(tensors | {name: torch.ones(2, 2) for name in extra}, file)
    report = show_adapter(tmp_path, model=str(base))
    assert report.fit is not None
    assert report.fit.matched == len(tensors)
    assert set(report.fit.unmatched) == extra
    assert {problem.code for problem in report.problems} == {"QC-ADAPTER-005"}
    assert by_name(report)[""].pairs == 1


def test_a_config_that_is_not_usable_is_still_shown(base: Path, tmp_path: Path) -> None:
    adapted(base, r=2, lora_alpha=2, target_modules=["q_proj"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for change in ({"r": "many"}, {"bias": "all"}, {"peft_type": "IA3"}, {"lora_alpha": None},
                   {"rank_pattern": {"(": 3}}, {"target_parameters": 3}):  # fmt: skip
        path.write_text(json.dumps(config | change))
        report = show_adapter(tmp_path, norms=True)
        assert report.as_json()["refused"], change
        fitted = show_adapter(tmp_path, model=str(base))
        assert fitted.fit is not None
        assert fitted.fit.matched is None
        assert fitted.problems


def test_the_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapted(base, **LORA).save_pretrained(tmp_path)
    ended = here(capsys, "adapter", "show", tmp_path, "--model", base, "--norms")
    assert (ended.code, ended.err) == (0, "")
    for word in ("LORA", "PEFT", "r 4, lora_alpha 8", "attn", "norm", "0 unmatched"):
        assert word in ended.out
    ended = here(capsys, "adapter", "show", tmp_path, "--json")
    assert ended.json["adapter"] == str(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.x.lora_A.weight": torch.ones(1, 1)},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    ended = here(capsys, "adapter", "show", tmp_path, "--model", base, "--json")
    assert ended.code == 65
    assert ended.json["error"]["code"] == "QC-ADAPTER-005"
    assert ended.json["fits"]["unmatched"] == ["base_model.model.x.lora_A.weight"]
    ended = here(capsys, "adapter", "show", tmp_path, "--model", base)
    assert ended.code == 65
    assert "1 unmatched" in ended.out
    assert "error[QC-ADAPTER-005]" in ended.err
    ended = here(capsys, "inspect", tmp_path)
    assert ended.code == 65
    assert f"qcore adapter show {tmp_path}" in ended.err
    ended = here(capsys, "adapter", "show", tmp_path, "--generation", "3.5")
    assert (ended.code, "--generation" in ended.err) == (2, True)
