"""Mixture-of-experts checkpoints, through the command line: right, or refused in one line.

The folders are sparse: true headers, holes for weights, a real tokenizer and template beside
them. Whatever is refused is refused before a weight is read.
"""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cli_kit import Ended, here
from support.model_kit import (
    as_text_class,
    edit_json,
    small_config,
    small_moe_config,
    small_moe_shapes,
    small_shapes,
    snapshot,
)
from support.tiers import fast

import qcore.training.train
from qcore.cli.terminal import TerminalSink
from qcore.testing import write_sparse_checkpoint
from qcore_qwen35.tiny import write

SIDECARS = (
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
)  # fmt: skip
ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
LAYER = "model.language_model.layers"
Shapes = dict[str, tuple[int, ...]]


class WeightsWanted(Exception):
    """Everything before the weights was passed; holds the lines that were told."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that lends its tokenizer and template."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    write(folder)
    return folder


@pytest.fixture
def made(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[str, Any], Shapes], Path]:
    """Writes a sparse folder; no weight is ever read."""

    told: list[str] = []

    def stop(*arguments: Any, **options: Any) -> None:
        raise WeightsWanted(told)

    monkeypatch.setattr(qcore.training.train, "load_base", stop)
    monkeypatch.setattr(TerminalSink, "_line", lambda self, line: told.append(line))
    rows = json.loads((tiny / "config.json").read_text())["text_config"]["vocab_size"]

    def make(config: dict[str, Any], shapes: Shapes) -> Path:
        text = config.get("text_config", config)
        text["vocab_size"] = rows
        for name in shapes:
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                shapes[name] = (rows, 24)
        folder = write_sparse_checkpoint(tmp_path / "base", config, shapes)
        for name in SIDECARS:
            shutil.copyfile(tiny / name, folder / name)
        return folder

    return make


def inspect(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str) -> Ended:
    return here(capsys, "inspect", folder, *flags)


def train(capsys: pytest.CaptureFixture[str], folder: Path) -> Ended:
    """``qcore train`` on one row; raises `WeightsWanted` when all is well."""
    data = folder.parent / "rows.jsonl"
    data.write_text(json.dumps(ROW) + "\n")
    output = folder.parent / "out"
    return here(
        capsys, "train", "--model", folder, "--data", data, "--output", output, "--device", "cpu"
    )


def one_line(ended: Ended, code: str, status: int) -> str:
    (line,) = ended.err.splitlines()
    assert line.startswith(f"error[{code}] "), line
    assert ended.code == status
    assert " Fix: " in line
    return line


def refused(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    code: str,
    *says: str,
    status: int = 65,
    by_headers: bool = True,
) -> None:
    """One line from both verbs, nothing written; `by_headers`: the report refuses it too."""
    ended = inspect(capsys, folder)
    if by_headers:
        line = one_line(ended, code, status)
        assert all(part in line for part in says), line
    else:
        assert (ended.code, ended.err) == (0, "")
        assert "every tensor is accounted for" in ended.out
    before = snapshot(folder)
    ended = train(capsys, folder)
    line = one_line(ended, code, status)
    assert all(part in line for part in says), line
    assert ended.out == ""
    assert snapshot(folder) == before
    assert not (folder.parent / "out").exists()


def accepted(capsys: pytest.CaptureFixture[str], folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The report, and what training says before it wants the weights."""
    report = inspect(capsys, folder, "--json")
    assert (report.code, report.err) == (0, "")
    assert report.json["unaccounted"] == []
    capsys.readouterr()
    with pytest.raises(WeightsWanted) as reached:
        train(capsys, folder)
    told: list[str] = reached.value.args[0]
    assert any("architecture" in line for line in told)
    return report.json, told


# -- what is right

LAYOUTS = {
    "published 3.5": ({}, "fused", "per expert"),
    "published 3.6": ({"mtp_fused": True}, "fused", "fused"),
    "one by one": ({"fused": False}, "per expert", "per expert"),
    "trunk one by one, mtp fused": ({"fused": False, "mtp_fused": True}, "per expert", "fused"),
}


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.slow
def test_every_layout_of_trunk_and_mtp(capsys: Any, made: Any, case: str):
    how, trunk, mtp = LAYOUTS[case]
    shapes = small_moe_shapes(**how)
    report, told = accepted(capsys, made(small_moe_config(), shapes))
    assert report["architecture"] == "qwen3_5_moe"
    assert report["layouts"] == {"text": trunk, "mtp": mtp}
    assert report["tensors"] == len(shapes)
    assert not [line for line in told if "mtp" in line]


def test_a_layout_that_changes_within_the_trunk(capsys: Any, made: Any):
    """Layer 2 one by one, and of layer 1 only down_proj: each tensor is read by itself."""
    apart, shapes = small_moe_shapes(fused=False), small_moe_shapes()
    for where in (f"{LAYER}.2.mlp.experts.", f"{LAYER}.1.mlp.experts."):
        down_only = ".1." in where
        for name in [n for n in shapes if n.startswith(where)]:
            if not down_only or "down" in name:
                del shapes[name]
        for name, shape in apart.items():
            if name.startswith(where) and (not down_only or "down" in name):
                shapes[name] = shape
    report, _ = accepted(capsys, made(small_moe_config(), shapes))
    assert report["tensors"] == len(shapes)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.slow
def test_a_text_only_save(capsys: Any, made: Any, fused: bool):
    config = small_moe_config()["text_config"]
    config = {**config, "architectures": ["Qwen3_5MoeForCausalLM"], "tie_word_embeddings": True}
    shapes = as_text_class(small_moe_shapes(fused=fused))
    report, told = accepted(capsys, made(config, shapes))
    assert report["namespaces"]["text"] == "text"
    assert report["modalities"] == ["text"]
    # transformers drops mtp.* and keeps what config.json says of it: one line, with the claim.
    (line,) = [line for line in told if "mtp" in line]
    assert "mtp: config.json claims it (mtp_num_hidden_layers 1)" in line
    assert "none of its tensors" in line


def test_a_text_only_save_in_the_hubs_names(capsys: Any, made: Any):
    shapes = {n: s for n, s in small_moe_shapes(vision=False).items() if "mtp." not in n}
    report, _ = accepted(capsys, made(small_moe_config(vision=False), shapes))
    assert report["namespaces"]["text"] == "vl"


def test_a_vision_section_as_transformers_saves_it(capsys: Any, made: Any):
    config = small_moe_config()
    config["vision_config"]["model_type"] = "qwen3_5_moe_vision"
    report, _ = accepted(capsys, made(config, small_moe_shapes()))
    assert report["carried"] == {"model.visual": 3}


@pytest.mark.parametrize("value", [0, None])
@pytest.mark.slow
def test_no_mtp_and_no_claim_is_no_line(capsys: Any, made: Any, value: int | None):
    shapes = {n: s for n, s in small_moe_shapes().items() if "mtp." not in n}
    report, told = accepted(capsys, made(small_moe_config(mtp_num_hidden_layers=value), shapes))
    assert report["differences"] == []
    assert not [line for line in told if "mtp" in line]


def test_keys_that_later_configs_have(capsys: Any, made: Any):
    config = small_moe_config(mlp_only_layers=[], decoder_sparse_step=1, norm_topk_prob=True)
    accepted(capsys, made(config, small_moe_shapes()))


# -- another model


@pytest.mark.parametrize(
    "kind",
    ["qwen3", "qwen3_moe", "qwen3_next", "qwen3_vl_moe", "qwen3_5_moe_vision", "qwen3_5_vision",
     "qwen4_exp", "qwen3_5_moe_", "Qwen3_5_moe"],
)  # fmt: skip
def test_another_family_with_the_same_beginning(capsys: Any, made: Any, kind: str):
    folder = made(small_moe_config() | {"model_type": kind}, small_moe_shapes())
    refused(capsys, folder, "QC-DETECT-001", f"found '{kind}'", status=69)


def test_a_text_section_of_another_family(capsys: Any, made: Any):
    folder = made(small_moe_config(model_type="qwen3_next"), small_moe_shapes())
    refused(capsys, folder, "QC-QWEN35-010", "model_type: ", "'qwen3_next'", by_headers=False)


def test_a_dense_config_with_experts(capsys: Any, made: Any):
    folder = made(small_config(), small_moe_shapes())
    refused(capsys, folder, "QC-QWEN35-005", "declares a dense model", "0.mlp.gate.weight")


def test_a_config_of_experts_with_dense_tensors(capsys: Any, made: Any):
    folder = made(small_moe_config(), small_shapes())
    refused(
        capsys, folder, "QC-QWEN35-005", "declares a mixture of experts", "mlp.gate_proj.weight"
    )


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("says", "there"), [(256, 128), (128, 256)])
def test_another_number_of_experts(capsys: Any, made: Any, fused: bool, says: int, there: int):
    shapes = small_moe_shapes(fused=fused, experts=there)
    refused(
        capsys,
        made(small_moe_config(num_experts=says), shapes),
        "QC-QWEN35-005",
        f"num_experts: declares {says}",
        f"mlp.gate.weight has {there} rows",
    )


# -- tensors of experts

UP, DOWN = f"{LAYER}.1.mlp.experts.gate_up_proj", f"{LAYER}.1.mlp.experts.down_proj"
ONE = f"{LAYER}.1.mlp.experts.3"
MTP = "mtp.layers.0.mlp.experts"


def swap_all(shapes: Shapes) -> None:
    for name, shape in shapes.items():
        if "visual" not in name and name.endswith(("gate_up_proj", "experts.down_proj")):
            shapes[name] = (shape[0], shape[2], shape[1])


TENSORS: dict[str, tuple[dict[str, Any], Callable[[Shapes], object], str, tuple[str, ...]]] = {
    "gate_up turned": (
        {}, lambda s: s.update({UP: (4, 24, 20)}), "QC-KEY-003",
        (UP, "found [4, 24, 20]", "expected [4, 20, 24]"),
    ),
    "down turned": (
        {}, lambda s: s.update({DOWN: (4, 10, 24)}), "QC-KEY-003", ("expected [4, 24, 10]",)
    ),
    "all turned": ({}, swap_all, "QC-KEY-003", ("(one of 8)", "expected [4, 20, 24]")),
    "gate and up swapped for a stack of both": (
        {}, lambda s: s.update({UP: (8, 10, 24)}), "QC-KEY-003", ("found [8, 10, 24]",)
    ),
    "a stack with an expert too few": (
        {}, lambda s: s.update({DOWN: (3, 24, 10)}), "QC-KEY-003", ("found [3, 24, 10]",)
    ),
    "no stack": ({}, lambda s: s.pop(UP), "QC-KEY-001", (f"{UP}: is missing",)),
    "a stack renamed": (
        {}, lambda s: s.update({f"{UP}s": s.pop(UP)}), "QC-KEY-001", (f"{UP}: is missing", f"{UP}s")
    ),
    "a stack with .weight": (
        {}, lambda s: s.update({f"{UP}.weight": s.pop(UP)}), "QC-KEY-001", (f"{UP}.weight",)
    ),
    "one expert missing": (
        {"fused": False},
        lambda s: [s.pop(f"{ONE}.{m}_proj.weight") for m in ("gate", "up", "down")],
        "QC-KEY-004", (f"{ONE}.gate_proj.weight", "2 of 8 pieces are missing"),
    ),
    "one matrix of an expert missing": (
        {"fused": False}, lambda s: s.pop(f"{ONE}.up_proj.weight"), "QC-KEY-004",
        (f"{ONE}.up_proj.weight", "1 of 8 pieces are missing"),
    ),
    "one matrix of an expert renamed": (
        {"fused": False},
        lambda s: s.update({f"{ONE}.w3.weight": s.pop(f"{ONE}.up_proj.weight")}),
        "QC-KEY-004", (f"{ONE}.up_proj.weight", f"{ONE}.w3.weight"),
    ),
    "an expert turned": (
        {"fused": False}, lambda s: s.update({f"{ONE}.up_proj.weight": (24, 10)}), "QC-KEY-003",
        ("expected [10, 24]",),
    ),
    "an expert too many": (
        {"fused": False}, lambda s: s.update({f"{LAYER}.1.mlp.experts.4.up_proj.weight": (10, 24)}),
        "QC-KEY-002", ("experts.4.up_proj.weight",),
    ),
    "fused and one by one": (
        {}, lambda s: s.update({f"{ONE}.up_proj.weight": (10, 24)}), "QC-KEY-002",
        (f"{ONE}.up_proj.weight",),
    ),
    "no router": (
        {}, lambda s: s.pop(f"{LAYER}.1.mlp.gate.weight"), "QC-KEY-001", ("1.mlp.gate.weight",)
    ),
    "a router with another number of rows": (
        {}, lambda s: s.update({f"{LAYER}.1.mlp.gate.weight": (5, 24)}), "QC-KEY-003",
        ("found [5, 24]",),
    ),
    "no shared expert": (
        {}, lambda s: [s.pop(n) for n in list(s) if n.startswith(f"{LAYER}.1.mlp.shared_expert")],
        "QC-KEY-001", ("shared_expert", "(one of 4)"),
    ),
    "no gate of the shared expert": (
        {}, lambda s: s.pop(f"{LAYER}.1.mlp.shared_expert_gate.weight"), "QC-KEY-001",
        ("shared_expert_gate",),
    ),
    "one expert of mtp missing": (
        {}, lambda s: [s.pop(f"{MTP}.2.{m}_proj.weight") for m in ("gate", "up", "down")],
        "QC-KEY-004", (f"{MTP}.2.gate_proj.weight",),
    ),
    "no experts in mtp": (
        {}, lambda s: [s.pop(n) for n in list(s) if n.startswith(MTP)], "QC-KEY-005",
        ("mtp.layers.0.mlp.experts.gate_up_proj", "17 of 19 tensors"),
    ),
    "half of a fused mtp": (
        {"mtp_fused": True}, lambda s: s.pop(f"{MTP}.down_proj"), "QC-KEY-005",
        (f"{MTP}.down_proj", "18 of 19 tensors"),
    ),
    "a dense mtp": (
        {}, lambda s: [s.pop(n) for n in list(s) if n.startswith("mtp.layers.0.mlp.")]
        + [s.update({f"mtp.layers.0.mlp.{m}_proj.weight": (40, 24)}) for m in ("gate", "up")],
        "QC-KEY-005", ("mtp.layers.0.mlp.gate.weight", "mtp.layers.0.mlp.gate_proj.weight"),
    ),
    "mtp without its first tensor": (
        {}, lambda s: s.pop("mtp.fc.weight"), "QC-KEY-005", ("mtp.fc.weight", "18 of 19 tensors")
    ),
    "a tensor of mtp renamed": (
        {}, lambda s: s.update({"mtp.norms.weight": s.pop("mtp.norm.weight")}), "QC-KEY-005",
        ("mtp.norm.weight", "mtp.norms.weight"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", fast(TENSORS, *[*TENSORS][::5]))
def test_tensors_of_experts(capsys: Any, made: Any, case: str):
    how, change, code, says = TENSORS[case]
    shapes = small_moe_shapes(**how)
    change(shapes)
    refused(capsys, made(small_moe_config(), shapes), code, *says)


# -- prediction layers and what config.json says of them


def second(shapes: Shapes) -> Shapes:
    """The same with another prediction layer."""
    more = {n: s for n, s in shapes.items() if n.startswith("mtp.layers.0.")}
    return shapes | {n.replace("mtp.layers.0.", "mtp.layers.1."): s for n, s in more.items()}


@pytest.mark.parametrize("dense", [True, False])
def test_more_prediction_layers_than_the_config_says(capsys: Any, made: Any, dense: bool):
    config, shapes = (
        (small_config(), small_shapes()) if dense else (small_moe_config(), small_moe_shapes())
    )
    refused(
        capsys, made(config, second(shapes)), "QC-QWEN35-005",
        "mtp_num_hidden_layers: declares 1", "found mtp.layers.1.",
    )  # fmt: skip


def test_two_prediction_layers_where_the_config_says_two(capsys: Any, made: Any):
    config = small_moe_config(mtp_num_hidden_layers=2)
    report, _ = accepted(capsys, made(config, second(small_moe_shapes())))
    assert report["unaccounted"] == []


def test_fewer_prediction_layers_than_the_config_says(capsys: Any, made: Any):
    folder = made(small_moe_config(mtp_num_hidden_layers=2), small_moe_shapes())
    refused(capsys, folder, "QC-KEY-005", "mtp.layers.1.", "19 of 34 tensors")


@pytest.mark.parametrize("value", [0, None, "absent"])
@pytest.mark.parametrize("vision", [True, False])
def test_mtp_that_the_config_does_not_claim(capsys: Any, made: Any, value: Any, vision: bool):
    config = small_moe_config(vision=vision, mtp_num_hidden_layers=value)
    if value == "absent":
        del config["text_config"]["mtp_num_hidden_layers"]
    folder = made(config, small_moe_shapes(vision=vision))
    refused(capsys, folder, "QC-QWEN35-005", "mtp_num_hidden_layers", "found mtp.")


# -- numbers

NUMBERS: dict[str, tuple[dict[str, Any], str, bool]] = {
    "mtp_num_hidden_layers huge": ({"mtp_num_hidden_layers": 10**9}, "QC-QWEN35-001", True),
    "mtp_num_hidden_layers negative": ({"mtp_num_hidden_layers": -1}, "QC-QWEN35-001", True),
    "mtp_num_hidden_layers true": ({"mtp_num_hidden_layers": True}, "QC-QWEN35-001", True),
    "mtp_num_hidden_layers a text": ({"mtp_num_hidden_layers": "1"}, "QC-QWEN35-001", True),
    "mtp_num_hidden_layers 1.5": ({"mtp_num_hidden_layers": 1.5}, "QC-QWEN35-001", True),
    "mtp_num_hidden_layers a list": ({"mtp_num_hidden_layers": []}, "QC-QWEN35-001", True),
    "num_experts huge": ({"num_experts": 2**31 - 1}, "QC-QWEN35-005", True),
    "num_experts beyond any": ({"num_experts": 10**400}, "QC-QWEN35-005", True),
    "num_experts negative": ({"num_experts": -4}, "QC-QWEN35-005", True),
    "num_experts 0": ({"num_experts": 0}, "QC-QWEN35-005", True),
    "num_experts missing": ({"num_experts": None}, "QC-QWEN35-001", True),
    "num_experts a text": ({"num_experts": "4"}, "QC-QWEN35-001", True),
    "num_experts 4.0": ({"num_experts": 4.0}, "QC-QWEN35-001", True),
    "moe_intermediate_size 0": ({"moe_intermediate_size": 0}, "QC-QWEN35-001", True),
    "moe_intermediate_size missing": ({"moe_intermediate_size": None}, "QC-QWEN35-001", True),
    "moe_intermediate_size another": ({"moe_intermediate_size": 12}, "QC-KEY-003", True),
    "shared_expert_intermediate_size 0": (
        {"shared_expert_intermediate_size": 0}, "QC-QWEN35-001", True
    ),
    "shared_expert_intermediate_size missing": (
        {"shared_expert_intermediate_size": None}, "QC-QWEN35-001", True
    ),
    "num_experts_per_tok beyond num_experts": ({"num_experts_per_tok": 5}, "QC-QWEN35-012", False),
    "num_experts_per_tok 0": ({"num_experts_per_tok": 0}, "QC-QWEN35-012", False),
    "num_experts_per_tok negative": ({"num_experts_per_tok": -1}, "QC-QWEN35-012", False),
    "num_experts_per_tok missing": ({"num_experts_per_tok": None}, "QC-QWEN35-012", False),
    "num_experts_per_tok a text": ({"num_experts_per_tok": "2"}, "QC-QWEN35-012", False),
    "num_experts_per_tok true": ({"num_experts_per_tok": True}, "QC-QWEN35-012", False),
    "mlp_only_layers": ({"mlp_only_layers": [0]}, "QC-QWEN35-010", False),
    "decoder_sparse_step": ({"decoder_sparse_step": 2}, "QC-QWEN35-010", False),
    "norm_topk_prob": ({"norm_topk_prob": False}, "QC-QWEN35-010", False),
    "hidden_act": ({"hidden_act": "gelu"}, "QC-QWEN35-010", False),
    "output_gate_type": ({"output_gate_type": "sigmoid"}, "QC-QWEN35-010", False),
    "output_gate_type empty": ({"output_gate_type": ""}, "QC-QWEN35-010", False),
}  # fmt: skip


@pytest.mark.parametrize("case", fast(NUMBERS, *[*NUMBERS][::5]))
@pytest.mark.parametrize("fused", fast([True, False]))
def test_a_value_of_the_config(capsys: Any, made: Any, case: str, fused: bool):
    change, code, by_headers = NUMBERS[case]
    folder = made(small_moe_config(), small_moe_shapes(fused=fused))

    def edit(config: dict[str, Any]) -> None:
        for key, value in change.items():
            config["text_config"][key] = value
            if value is None:
                del config["text_config"][key]

    edit_json(folder / "config.json", edit)
    (field,) = change
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    refused(capsys, folder, code, "" if code == "QC-KEY-003" else field, by_headers=by_headers)
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_huge_counts_with_nothing_to_hold_them_against(capsys: Any, made: Any):
    """No router says how many experts there are, so the table has to name what is missing."""
    names = small_moe_shapes()
    shapes = {n: names[n] for n in names if ".mlp." not in n and not n.startswith("mtp.")}
    for experts, code in ((2**31 - 1, "QC-QWEN35-001"), (4096, "QC-KEY-001")):
        config = small_moe_config(num_experts=experts, mtp_num_hidden_layers=0)
        folder = made(config, shapes)
        started = time.process_time()
        refused(capsys, folder, code)
        assert time.process_time() - started < 10
