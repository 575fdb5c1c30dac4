"""A run whose base is sharded over ranks is the run in which every rank holds it whole.

All runs share one set of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.e2e_kit import write_stock
from support.run_kit import raw
from support.shard_kit import MOE, SIZES
from support.shared_runs import Job, ended, gradients, off, seen, spawn

pytestmark = pytest.mark.slow

RANKS = 3
BASE: dict[str, Any] = {
    "max_steps": 2, "learning_rate": 1e-3, "r": 4, "lora_alpha": 8, "dtype": "fp32",
    "save_steps": 0, "eval_fraction": 0.2, "eval_steps": 2,
    "publish_without_gain": True, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2, "warmup_ratio": 0.0,
}  # fmt: skip
#: Two micro-batches on three ranks: one rank computes nothing.
CASES: dict[str, dict[str, Any]] = {
    "dense": {"lora_dropout": 0.1},
    "moe": {"router_aux_loss_coef": 0.01, "target_groups": ("attn", "gdn", "experts", "router")},
}
FAULTS = ("error", "evaluation")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Iterator[dict[str, Job]]:
    folder = tmp_path_factory.mktemp("sharded")
    dense = write_stock(folder / "base", "text", **SIZES)
    moe = write_stock(folder / "base-moe", "text", moe=True, **SIZES, **MOE)
    text = folder / "rows.jsonl"
    text.write_text("".join(rows.read_text().splitlines(keepends=True)[:24]))
    made: dict[str, Job] = {}

    def job(name: str, case: str, shard: str, **more: Any) -> None:
        model = moe if case == "moe" else dense
        settings = BASE | CASES[case] | {"shard_base": shard}
        made[name] = Job(
            model=str(model), rows=str(text), output=str(folder / name), settings=settings, **more
        )

    for case in CASES:
        job(case, case, "always")
        job(f"{case} whole", case, "never")
    for fault in FAULTS:
        job(fault, "dense", "always", fault=fault, at=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        spawn(RANKS, list(made.values()), folder)
        yield made


@pytest.mark.parametrize("case", CASES)
def test_sharded_is_whole(jobs: dict[str, Job], case: str) -> None:
    sharded, whole = jobs[case], jobs[f"{case} whole"]
    assert ended(sharded) == ended(whole) == [None] * RANKS
    assert seen(sharded)["rows"] == seen(whole)["rows"]
    assert off(gradients(sharded), gradients(whole)) <= 1e-6
    assert raw(Path(sharded.output)) == raw(Path(whole.output))


@pytest.mark.parametrize("name", FAULTS)
def test_rank_that_fails_ends_all(jobs: dict[str, Job], name: str) -> None:
    errors = ended(jobs[name])
    assert len({error and error["code"] for error in errors}) == 1, errors
    assert errors[0] is not None


def test_ranks_were_idle(jobs: dict[str, Job]) -> None:
    assert torch.tensor([*seen(jobs["dense"])["packs"].values()]).amin() == 0
