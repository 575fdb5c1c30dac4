"""``qcore plan``: what it says, as a table and as JSON, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.cli_kit import here, modules_after
from support.plan_kit import DENSE_4B

from qcore.api.parameters import Table
from qcore.planning.gpus import CARDS, gpu_by_name
from qcore.testing import write_sparse_checkpoint
from qcore_qwen35.table import parts
from qcore_qwen35.tiny import tiny_config, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers of a 4B: headers and a config; the files are holes."""
    pytest.importorskip("triton")
    text = DENSE_4B | {"num_hidden_layers": 4}
    config = tiny_config(vocab_size=text.pop("vocab_size"), **text)
    config["text_config"]["mtp_num_hidden_layers"] = 0
    table = Table(parts(config, moe=False))
    shapes = {one.name: one.shape for one in table if one.part.loaded and one.row.tie is None}
    folder = write_sparse_checkpoint(tmp_path_factory.mktemp("model"), config, shapes)
    write(tiny := tmp_path_factory.mktemp("tiny"))
    shutil.copy(tiny / "chat_template.jinja", folder)  # by which its generation is known
    return folder


def test_a_row_for_each_card_and_the_terms_of_the_first(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    ended = here(capsys, "plan", folder, "--max-length", 128)
    assert ended.code == 0
    for card in CARDS:
        assert sum(line.startswith(f"{card.name} ") for line in ended.out.splitlines()) == 1
    for term in ("weights nf4", "embeddings", "adapters", "gradients", "optimizer", "activations"):
        assert f"\n  {term} " in ended.out
    assert "in all" in ended.out


def test_json_holds_the_whole_plan(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    ended = here(
        capsys, "plan", folder, "--rows", 2, "--max-length", 96, "--r", 4, "--gpu", "L40S",
        "--gpu", "h200", "--json",
    )  # fmt: skip
    plans = ended.json["plans"]
    assert [one["card"] for one in plans] == ["L40S", "H200"]
    for one in plans:
        assert (one["rows"], one["max_length"], one["recompute"]) == (2, 96, "none")
        assert one["fits"] is True
        assert sum(one["memory_bytes"].values()) == one["peak_bytes"]
        assert one["longest_row"] >= 96
        assert one["seconds"] > 0
    assert ended.json["trained_parameters"] > 0


@pytest.mark.slow
def test_more_rank_is_more_of_what_is_trained(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    trained = {
        r: here(capsys, "plan", folder, "--r", r, "--gpu", "H200", "--json").json[
            "trained_parameters"
        ]
        for r in (4, 8)
    }
    assert trained[8] == 2 * trained[4]
    one = here(capsys, "plan", folder, "--groups", "attn", "--r", 4, "--gpu", "H200", "--json")
    assert 0 < one.json["trained_parameters"] < trained[4]


def test_a_budget_that_is_too_small_is_said_and_no_error(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    ended = here(
        capsys, "plan", folder, "--rows", 1, "--max-length", 4096, "--gpu", "L40S",
        "--budget", "1.6",
    )  # fmt: skip
    assert ended.code == 0
    assert "does not fit (" in ended.out
    assert "note: L40S: does not fit; use a GPU with more memory" in ended.err


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (("--gpu", "T9000"), "QC-PLAN-002"),
        (("--budget", "much"), "QC-PLAN-003"),
        (("--set", "max_lenght=3"), "QC-CONFIG-001"),
        (("--groups", "nothing"), "QC-LORA-001"),
        (("--max-length", "1"), "QC-CONFIG-003"),
        (("--set", "router_aux_loss_coef=0.01"), "QC-TRAIN-007"),
        (("--set", "adapter_class=audio"), "QC-ADAPTER-001"),
        (("--set", "chat_template_kwargs.xyzzy=true"), "QC-CONFIG-008"),
        (("--set", "chat_template_kwargs.messages=x"), "QC-CONFIG-009"),
        (("--set", "chat_template_kwargs.enable_thinking=maybe"), "QC-QWEN35-020"),
        (("--set", "kernels.experts=reference"), "QC-KERNEL-007"),
        (("--set", "kernels.nonsense=reference"), "QC-KERNEL-001"),
        (("--rows", "8192", "--max-length", "1048576"), "QC-PLAN-005"),
    ],
)
def test_what_is_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, flags: tuple[str, ...], code: str
) -> None:
    assert code in here(capsys, "plan", folder, *flags).error(code)


@pytest.mark.slow
def test_no_weight_is_read(folder: Path) -> None:
    """The files are holes: reading one would give zeros, and take as long as they are large."""
    ended, modules = modules_after("plan", folder, "--gpu", "H200", "--max-length", 64)
    assert ended.code == 0
    assert "transformers" not in {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--max-length", "1"), "error[QC-CONFIG-003] --max-length: is out of range: found 1"),
        (("--rows", "0"), "error[QC-CONFIG-003] --rows: is out of range: found 0"),
        (("--r", "9999"), "error[QC-CONFIG-003] --r: is out of range"),
        (("--groups", "nothing"), "error[QC-LORA-001] --groups: is not a LoRA group"),
        (("--rows", "8192", "--max-length", "1048576"), "error[QC-PLAN-005] --rows: is more"),
        (("--set", "max_length=1"), "error[QC-CONFIG-003] --set max_length: is out of range"),
        (("--set", "target_groups=nothing"), "error[QC-LORA-001] target_groups: is not"),
        (
            ("--set", "max_length=64", "--max-length", "64"),
            "error[QC-CONFIG-005] --max-length: is given twice",
        ),
    ],
    ids=str,
)
def test_the_flag_that_was_typed_is_named(
    capsys: pytest.CaptureFixture[str], folder: Path, flags: tuple[str, ...], line: str
) -> None:
    assert here(capsys, "plan", folder, *flags).err.startswith(line)


@pytest.mark.slow
def test_the_policy_of_the_longest_row_is_named(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    flags = ("plan", folder, "--gpu", "h200", "--rows", 1, "--max-length", 64)
    policies = {"auto": "offload"} | {name: name for name in ("none", "elementwise", "full")}
    longest = []
    for setting, policy in policies.items():
        ended = here(capsys, *flags, "--set", f"recompute={setting}")
        head = ended.out.splitlines()[1]
        assert head.endswith(f"longest row ({policy})")
        (plan,) = here(capsys, *flags, "--set", f"recompute={setting}", "--json").json["plans"]
        assert plan["longest_row_recompute"] == policy
        assert setting == "auto" or plan["recompute"] == policy
        longest.append(plan["longest_row"])
    assert longest[1] < longest[2] < longest[3] <= longest[0]


def test_all_settings_that_do_not_suit_are_named_at_once(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    ended = here(
        capsys, "plan", folder, "--set", "router_aux_loss_coef=0.01", "--set", "adapter_class=x"
    )
    assert (ended.code, ended.out) == (2, "")
    assert [line.partition("]")[0] for line in ended.err.splitlines()] == [
        "error[QC-ADAPTER-001", "error[QC-TRAIN-007",
    ]  # fmt: skip


@pytest.mark.slow
def test_more_tokens_than_positions_are_a_warning(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    flags = ("plan", folder, "--gpu", "H200", "--rows", 1, "--max-length")
    (line,) = [x for x in here(capsys, *flags, 262145).err.splitlines() if "warning" in x]
    assert line.startswith("warning: max_length: exceeds the context length")
    assert "found 262145, expected at most 262144" in line
    assert "warning" not in here(capsys, *flags, 262144).err
    assert "found 262145" in here(capsys, *flags, 262145, "--json").json["notes"][0]


def test_a_card_that_is_named_twice_is_planned_once(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    flags = ("--gpu", "H100-80", "--gpu", "h200", "--gpu", "h100", "--json")
    plans = here(capsys, "plan", folder, "--max-length", 64, *flags).json["plans"]
    assert [one["card"] for one in plans] == ["H100-80", "H200"]


@pytest.mark.slow
def test_a_budget_above_a_card_is_what_the_card_has(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    flags = ("plan", folder, "--max-length", 64, "--rows", 1, "--gpu", "h200", "--gpu", "rtx-4090")
    ended = here(capsys, *flags, "--budget", 60, "--json")
    large, small = ended.json["plans"]
    assert (large["budget_bytes"], small["budget_bytes"]) == (
        60 * 10**9,
        gpu_by_name("rtx-4090").budget,
    )
    (line,) = ended.json["notes"]
    assert line == ("note: --budget 60 is more than a plan may use; using 23.8 GB on RTX-4090")
    assert line in here(capsys, *flags, "--budget", 60).err.splitlines()
    assert "a plan may use" not in here(capsys, *flags, "--budget", 23).err


def test_an_op_that_is_not_used_is_named_with_those_that_are(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    ended = here(capsys, "plan", folder, "--set", "kernels.experts=reference")
    line = ended.error("QC-KERNEL-007")
    assert "kernels.experts: is an op that this model does not use" in line
    assert "delta_rule" in line


def test_several_gpus_share_a_step(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    ended = here(
        capsys, "plan", folder, "--max-length", 96, "--gpus", 4, "--nodes", 2, "--gpu", "H200",
        "--gpu", "l40s", "--json",
    )  # fmt: skip
    fast, slow = (one["ranks"] for one in ended.json["plans"])
    assert (fast["gpus"], fast["nodes"], fast["base"], fast["packs"]) == (4, 2, "whole", 8)
    assert fast["packs_of_busiest_rank"] == 1
    assert fast["link"] == "network"
    assert fast["all_reduce_bytes"] == ended.json["plans"][0]["memory_bytes"]["gradients"]
    assert fast["all_reduce_seconds"] == slow["all_reduce_seconds"] > 0
    assert fast["tokens_per_second"] == pytest.approx(8 * fast["tokens_per_second_per_gpu"], 0.01)
    assert 0 < fast["scaling"] <= 1
    nearer = here(
        capsys, "plan", folder, "--max-length", 96, "--gpus", 8, "--gpu", "H200", "--json"
    )  # fmt: skip
    assert nearer.json["plans"][0]["ranks"]["all_reduce_seconds"] < fast["all_reduce_seconds"]


def test_the_same_for_people_with_what_to_change(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    ended = here(
        capsys, "plan", folder, "--max-length", 96, "--rows", 4, "--gpus", 4, "--gpu", "H200",
        "--set", "gradient_accumulation_steps=2",
    )  # fmt: skip
    assert "\na step of 4 GPUs:\ncard  base   packs  of a GPU  idle" in ended.out
    assert "H200: each GPU holds the whole base, which fits; all-reduce of " in ended.err
    assert "a step has 2 packs for 4 ranks: 2 of them compute nothing" in ended.err
    scaled = here(
        capsys, "plan", folder, "--max-length", 96, "--rows", 4, "--gpus", 4, "--gpu", "H200",
        "--set", "gradient_accumulation_steps=2", "--set", "scale_batch=true",
    )  # fmt: skip
    assert "compute nothing" not in scaled.err


def test_one_gpu_has_no_ranks(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    ended = here(
        capsys, "plan", folder, "--max-length", 96, "--gpus", 1, "--gpu", "H200", "--json"
    )  # fmt: skip
    assert "ranks" not in ended.json["plans"][0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpus", "H100"), "--gpu NAME names a kind of GPU"),
        (("--gpu", "2"), "pass --gpus 2 for a number of GPUs"),
        (("--gpus", "0"), "QC-PLAN-009"),
        (("--gpus", "2", "--network", "0"), "QC-PLAN-010"),
    ],
)
def test_a_number_and_a_name_of_gpus_are_not_confused(
    capsys: pytest.CaptureFixture[str], folder: Path, arguments: tuple[str, ...], words: str
) -> None:
    ended = here(capsys, "plan", folder, *arguments)
    assert ended.code == 2
    assert words in ended.err
