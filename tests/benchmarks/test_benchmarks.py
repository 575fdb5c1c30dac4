"""The GPU benchmarks' harness runs on the CPU on tiny shapes, and counts what it says it counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from shutil import copytree, ignore_patterns
from types import ModuleType

import pytest
from packaging.requirements import Requirement

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    import peers

    return peers


def _run(script: str, *arguments: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), "--device", "cpu", "--shape", "tiny", *arguments],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == status, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_training_step_is_measured_beside_a_peer() -> None:
    text = _run(
        "train_step_gpu.py", "--packed", "3x33", "--peers", "hf,unsloth", "--policy", "full",
        "--steps", "1",
    )  # fmt: skip
    assert "FAILED" not in text
    assert "qcore:full is " in text
    import importlib.util

    if importlib.util.find_spec("unsloth") is None:
        assert "unsloth: not installed here" in text


@pytest.mark.slow
def test_a_side_that_fails_is_told(tmp_path: Path) -> None:
    text = _run("train_step_gpu.py", "--kernels", "nonsense=triton", "--steps", "1", "--seq", "9")
    assert "qcore:elementwise: FAILED" in text
    assert "nonsense" in text


@pytest.mark.slow
def test_two_checkouts_are_measured_in_turn(tmp_path: Path) -> None:
    """The other one is a copy without an install, beside which this one's name is not imported."""
    other = tmp_path / "other"
    for folder in ("core", "qwen35_plugin", "qwen36_plugin", "multimodal_plugin", "benchmarks"):
        copytree(FOLDER.parent / folder, other / folder, ignore=ignore_patterns("*.egg-info"))
    text = _run(
        "step_pair_gpu.py", "--against", str(other), "--against-commit", "abc", "--batch", "1",
        "--seq", "9", "--steps", "1", "--rounds", "1", "--within", "10000",
    )  # fmt: skip
    assert "FAILED" not in text
    assert "first losses are equal" in text
    assert text.splitlines()[-1].startswith("PASSED: tiny 1 x 9: this / other tokens/s ")
    init = other / "core" / "src" / "qcore" / "__init__.py"
    init.write_text(init.read_text() + "\nraise RuntimeError('the other one')\n")
    text = _run(
        "step_pair_gpu.py", "--against", str(other), "--seq", "9", "--steps", "1", "--rounds", "1",
        status=1,
    )  # fmt: skip
    assert "other: FAILED: RuntimeError: the other one" in text


def test_metadata_is_what_an_installer_writes(tmp_path: Path, peers: ModuleType) -> None:
    """Entry points and requirements of every distribution, as setuptools installed them here."""
    import checkout

    path = checkout.python_path(FOLDER.parent, tmp_path).split(os.pathsep)
    made = {one.name: one for one in metadata.distributions(path=[str(tmp_path)])}
    assert {"qcore-framework", "qcore-qwen35", "qcore-qwen36", "qcore-multimodal"} <= made.keys()
    for name, one in made.items():
        there = metadata.distribution(name)
        assert one.version == there.version
        assert set(one.entry_points) == set(there.entry_points)
        assert sorted(map(_plain, one.requires or ())) == sorted(map(_plain, there.requires or ()))
    sources = [Path(one) / "qcore" for one in path if (Path(one) / "qcore").is_dir()]
    assert sources == [FOLDER.parent / "core" / "src" / "qcore"]


def _plain(requirement: str) -> str:
    return str(Requirement(requirement))


@pytest.mark.slow
def test_decoding_is_measured() -> None:
    text = _run("decode_gpu.py", "--prompt", "5", "--tokens", "8", "--repeat", "1", "--peers", "")
    assert "tokens/s" in text
    assert "FAILED" not in text
    result = json.loads(text.splitlines()[-1].removeprefix("RESULT "))
    assert result["side"] == "qcore"
    assert result["ms_per_token"] * result["tokens_per_s"] == pytest.approx(1000)


@pytest.mark.slow
def test_short_micro_batches_are_timed_alone_and_together() -> None:
    text = _run("short_steps_gpu.py", "--rows", "2", "--lengths", "5,9", "--steps", "1")
    assert text.count("together up to 0:") == text.count("together up to 8192:") == 2
    assert "together is " in text.splitlines()[-1]


@pytest.mark.slow
def test_plans_are_checked_beside_steps() -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "plan_check_gpu.py"), "--device", "cpu",
         "--shapes", "tiny,tiny-moe"],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))
    assert (result["ran"], result["out_of_memory_though_it_fits"]) == (5, 0)
    assert {point["policy"] for point in result["points"]} >= {"none", "elementwise", "offload"}
    assert result["memory_error_max"] > 0
    assert result["time_error_max"] > 0


def test_the_points_are_those_that_must_be_shown(peers: ModuleType) -> None:
    import plan_check_gpu as check

    points = [point for shape in check.SHAPES for point in check.POINTS[shape]]
    assert len(points) == 20
    assert {rows * length for rows, length, _ in points} >= {512, 8192, 32768}
    policies = {policy for *_, name in points for policy in name.split("+")}
    assert policies == {"none", "elementwise", "full", "offload"}


@pytest.mark.slow
def test_curves_are_compared() -> None:
    """In float of the same values the two stacks must lie closer than two seeds."""
    text = _run("loss_curves.py", "--layers", "4", "--steps", "40", "--seq", "48")
    assert text.count(": within") == 2


@pytest.mark.parametrize(("shape", "billions"), [("4b", 3.569), ("9b", 6.919), ("27b", 24.35)])
def test_weights_of_the_published_sizes(peers: ModuleType, shape: str, billions: float) -> None:
    """Of all linear maps, as computed from transformers' own modules on meta."""
    from peers.shapes import Job

    job = Job(shape=shape)
    head = job.text["hidden_size"] * job.text["vocab_size"]
    assert (job.active - head) / 1e9 == pytest.approx(billions, abs=0.006)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNN", "gemm"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "dequant"),
        ("chunk_gated_delta_rule_fwd_kernel_h_blockdim64", "delta rule"),
        ("pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", "elementwise"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
    ],
)  # fmt: skip
def test_kernels_are_grouped(peers: ModuleType, name: str, group: str) -> None:
    from peers.groups import group_of

    assert group_of(name) == group


def test_step_n_trains_on_the_nth_ids(peers: ModuleType) -> None:
    """Whatever order the schedule shuffles rows into."""
    from peers.qcore_side import rows
    from peers.shapes import Job

    from qcore.config.settings import Settings
    from qcore.data.sampler import Schedule

    job = Job(shape="tiny", batch=3, seq=5, steps=4)
    ids = job.ids()
    settings = Settings(
        max_steps=len(ids), per_device_train_batch_size=3, gradient_accumulation_steps=1
    )
    data = rows(ids, settings)
    schedule = Schedule(len(data.train), settings)
    for step, expected in enumerate(ids.tolist()):
        (numbers,) = schedule.micro_batches(step)
        assert [list(data.train[number].ids) for number in numbers] == expected
