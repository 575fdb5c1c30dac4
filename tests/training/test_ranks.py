"""Two and three ranks compute what one does: rows, gradients, runs that stop and go on.

All runs of a number of ranks share one set of processes; each test looks at some of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.e2e_kit import figure
from support.run_kit import raw
from support.shared_runs import Job, ended, gradients, off, run, seen, spawn

from qcore.io.artifact import read_manifest, verify
from qcore.parallel.world import World
from qcore_multimodal.tiny import add_tower
from qcore_qwen35.tiny import write

pytestmark = pytest.mark.slow

BASE: dict[str, Any] = {
    "max_steps": 20, "learning_rate": 1e-3, "r": 4, "lora_alpha": 8, "dtype": "fp32",
    "save_steps": 0, "eval_fraction": 0.2, "eval_steps": 10, "publish_without_gain": True,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "warmup_ratio": 0.0,
}  # fmt: skip
#: By case what differs; of 3 ranks one has no row in the steps of two micro-batches.
CASES: dict[str, dict[str, Any]] = {
    "dense": {"gradient_accumulation_steps": 5, "lora_dropout": 0.1},
    "moe": {
        "router_aux_loss_coef": 0.01, "target_groups": ("attn", "gdn", "experts", "router"),
        "per_device_train_batch_size": 1,
    },
    "media": {
        "target_groups": ("attn", "gdn", "mlp", "vision", "merger"), "quantization": "none",
        "per_device_train_batch_size": 1, "eval_fraction": 0.0, "eval_steps": 0,
    },
}  # fmt: skip
SHORT = BASE | {"max_steps": 6, "save_steps": 2, "save_total_limit": 9, "eval_steps": 3}
RANKS = (2, 3)


@dataclass
class Runs:
    """Where the runs are, by number of ranks and name."""

    folder: Path
    models: dict[str, Path]
    rows: dict[str, Path]
    jobs: dict[tuple[int, str], Job] = field(default_factory=dict)

    def job(self, ranks: int, name: str, case: str = "dense", **more: Any) -> Job:
        """A job of a case, which is kept under its number of ranks and name."""
        settings = more.pop("settings", None) or BASE | CASES[case]
        output = more.pop("output", None) or str(self.folder / f"{name}-{ranks}")
        self.jobs[ranks, name] = job = Job(
            model=str(self.models[case]), rows=str(self.rows[case]), output=output,
            settings=settings, **more,
        )  # fmt: skip
        return job

    def adapter(self, ranks: int, name: str) -> dict[str, torch.Tensor]:
        """The adapter of a run."""
        return load_file(Path(self.jobs[ranks, name].output) / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("ranks")
    models = {name: folder / f"base-{name}" for name in CASES}
    write(models["dense"])
    write(models["moe"], moe=True)
    write(models["media"])
    add_tower(models["media"])
    text = folder / "rows.jsonl"
    text.write_text("".join(rows.read_text().splitlines(keepends=True)[:40]))
    rows_of = {"dense": text, "moe": _short_rows(folder), "media": _media_rows(folder)}
    made = Runs(folder, models, rows_of)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("QCORE_DATA_CACHE_GB", "1")  # the first rank fills it, the others read it
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        _start(made)
        torch.set_num_threads(before)
        yield made


def _start(runs: Runs) -> None:
    """All runs."""
    alone = World.alone()
    for case, settings in CASES.items():
        start = runs.job(1, f"start-{case}", case, settings=_start_settings(settings))
        assert run(start, alone) is None  # B is not zero, so that all gradients are not
        for ranks in (1, *RANKS):
            runs.job(ranks, case, case, initial=start.output)
        assert run(runs.jobs[1, case], alone) is None
    whole = runs.job(1, "whole", settings=SHORT)
    assert run(whole, alone) is None
    again = str(runs.folder / "again")
    stop = runs.job(2, "stop", settings=SHORT, output=again, fault="stop", at=2)
    two = [runs.jobs[2, case] for case in CASES]
    two += [
        stop,
        runs.job(2, "whole", settings=SHORT),
        runs.job(2, "stopped", settings=SHORT, fault="stop", at=3),
        runs.job(2, "scaled", settings=SHORT | {"scale_batch": True, "max_steps": 2}),
    ]
    stopped = runs.jobs[2, "stopped"]
    runs.jobs[2, "resumed"] = replace(stopped, fault="", resume=True)
    two.append(runs.jobs[2, "resumed"])
    other = runs.folder / "other.jsonl"
    other.write_text("".join(runs.rows["dense"].read_text().splitlines(keepends=True)[1:]))
    faults = {
        "data": {"other_rows": str(other)}, "versions": {"fault": "versions"},
        "error": {"fault": "error", "at": 3}, "memory": {"fault": "memory", "at": 2},
        "disk": {"fault": "disk", "at": 1, "rank": 0}, "save": {"fault": "save", "at": 1},
        "evaluation": {"fault": "evaluation"},
    }  # fmt: skip
    two += [runs.job(2, name, settings=SHORT, **more) for name, more in faults.items()]
    spawn(2, two, runs.folder)
    one = replace(stop, fault="", resume=True)
    one.fault, one.at, one.rank = "stop", 4, 0
    assert run(one, alone) is not None
    three = [runs.jobs[3, case] for case in CASES]
    runs.jobs[3, "again"] = replace(stop, fault="", resume=True)
    spawn(3, [*three, runs.jobs[3, "again"]], runs.folder)


def _start_settings(case: dict[str, Any]) -> dict[str, Any]:
    return BASE | case | {"max_steps": 3, "learning_rate": 5e-3}


def _short_rows(folder: Path) -> Path:
    """Rows of few tokens, which reach few experts."""
    rows = []
    for number in range(24):
        user = {"role": "user", "content": "abcdefgh"[number % 8] * (1 + number % 5)}
        rows.append({"messages": [user, {"role": "assistant", "content": f"{number}"}]})
    path = folder / "short.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _media_rows(folder: Path) -> Path:
    """Text alone, a picture, two pictures, text alone; of uneven lengths."""
    rows = []
    for number in range(9):
        size = 32 + 32 * (number % 3), 64
        Image.new("RGB", size, (number * 20, 99, 0)).save(folder / f"{number}.png")
        picture = {"type": "image", "image": f"{number}.png"}
        words = {"type": "text", "text": "What is this? " * (1 + number)}
        user = {"role": "user", "content": [picture, words] if number % 3 else "Who are you?"}
        rows.append({"messages": [user, {"role": "assistant", "content": f"Number {number}."}]})
    path = folder / "media.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_compute_what_one_does(runs: Runs, ranks: int, case: str) -> None:
    wanted, job = runs.jobs[1, case], runs.jobs[ranks, case]
    assert ended(job) == [None] * ranks
    assert seen(job)["rows"] == seen(wanted)["rows"]
    assert len(seen(job)["rows"]) == 20
    gradient = off(gradients(job), gradients(wanted))
    adapter = off(runs.adapter(ranks, case), runs.adapter(1, case))
    figure(f"{ranks} ranks, {case}: gradients {gradient:.1e}, adapter {adapter:.1e}")
    assert gradient <= 1e-6
    assert adapter <= 1e-4
    logs = [_metrics(runs, n, case) for n in (1, ranks)]
    for one, other in zip(*logs, strict=True):
        assert (one["step"], one.get("tokens")) == (other["step"], other.get("tokens"))
        for key in {"loss", "eval_loss", "aux_loss", "grad_norm"} & one.keys():
            assert one[key] == pytest.approx(other[key], rel=1e-4)
        assert other.get("ranks") == (ranks if "tokens" in other else None)
    assert read_manifest(Path(job.output)).meta["ranks"] == ranks


def _metrics(runs: Runs, ranks: int, name: str) -> list[dict[str, Any]]:
    path = Path(runs.jobs[ranks, name].output) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_cases_are_what_they_are_meant_to_be(runs: Runs) -> None:
    packs = seen(runs.jobs[2, "dense"])["packs"]
    assert sorted(packs["1"]) == [2, 3], "accumulation"
    assert 0 in seen(runs.jobs[3, "moe"])["packs"]["1"], "a rank without a row"
    assert 0 in seen(runs.jobs[3, "media"])["packs"]["1"]
    assert seen(runs.jobs[2, "moe"])["partial"], "an expert that a rank never sees"


def test_2_then_1_then_3_ranks_are_an_uninterrupted_run(runs: Runs) -> None:
    assert ended(runs.jobs[3, "again"]) == [None] * 3
    found = load_file(Path(runs.jobs[3, "again"].output) / "adapter_model.safetensors")
    assert off(found, runs.adapter(1, "whole")) <= 1e-4
    log = _metrics(runs, 3, "again")
    assert [row.get("ranks") for row in log if "tokens" in row] == [2, 2, None, None, 3, 3]


def test_the_same_number_of_ranks_resumes_to_the_same_bytes(runs: Runs) -> None:
    assert ended(runs.jobs[2, "resumed"]) == [None, None]
    outputs = [Path(runs.jobs[2, name].output) for name in ("whole", "resumed")]
    assert raw(outputs[0]) == raw(outputs[1])


def test_a_signal_to_one_rank_stops_all_after_the_same_step(runs: Runs) -> None:
    # The file of the run was written again when it went on with one rank: see its checkpoint.
    log = _metrics(runs, 3, "again")
    assert [row["step"] for row in log if row.get("ranks") == 2] == [1, 2]


def test_scale_batch_multiplies_the_rows(runs: Runs) -> None:
    assert len(seen(runs.jobs[2, "scaled"])["rows"]["1"]) == 2 * 2 * 2
    assert len(seen(runs.jobs[2, "whole"])["rows"]["1"]) == 2 * 2


@pytest.mark.parametrize(
    ("name", "code", "named"),
    [
        ("data", "QC-PARALLEL-003", "rank 1 differs from rank 0"),
        ("versions", "QC-PARALLEL-003", "torch"),
        ("error", "QC-TEST-001", "rank 1"),
        ("memory", "QC-PLAN-004", "rank 1"),
        ("disk", "QC-WRITE-004", "metrics.jsonl"),
        ("evaluation", "QC-TRAIN-006", "stopped by SIGTERM in the evaluation after step 3"),
    ],
)
def test_all_ranks_end_with_one_error(runs: Runs, name: str, code: str, named: str) -> None:
    job = runs.jobs[2, name]
    first, other = ended(job)
    assert first is not None
    assert other is not None
    assert first["code"] == other["code"] == code
    assert first["message"] == other["message"]
    assert named in first["message"]
    assert not Path(job.output).exists()
    if code == "QC-PARALLEL-003":
        assert not seen(job)["rows"], "no step was taken"
        assert not Path(job.output + ".run").exists()


def test_a_stop_in_an_evaluation_leaves_one_checkpoint(runs: Runs) -> None:
    folder = Path(runs.jobs[2, "evaluation"].output + ".run")
    assert verify(folder / "checkpoint-3").ok
    assert "pending" in read_manifest(folder / "checkpoint-3").meta


def test_sigusr1_to_one_rank_saves(runs: Runs) -> None:
    assert ended(runs.jobs[2, "save"]) == [None, None]
    folder = Path(runs.jobs[2, "save"].output + ".run")
    assert (folder / "checkpoint-1").is_dir()
