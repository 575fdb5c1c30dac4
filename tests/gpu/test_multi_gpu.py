"""Gradients of two ranks under NCCL equal those of one, whole on each rank and sharded.

Four layers of the published 4B and 35B-A3B shapes in 4 bit, with the kernels that a run chooses.
The yardstick is bfloat16 itself: how far one rank is from float32 on the same weights and rows.
`benchmarks/multi_gpu.py` runs the ranks; `tests/parallel` has the same on the CPU in float32.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
COMMAND = Path(__file__).parents[2] / "benchmarks" / "multi_gpu.py"
#: Of the error of bfloat16; what the ranks compute differs in the order of sums alone.
SHARE = 0.2


@pytest.mark.parametrize("shape", ["4b", "35b-a3b"])
def test_gradients_of_two_ranks_are_those_of_one(shape: str, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    records = tmp_path / "records"
    done = subprocess.run(
        [sys.executable, str(COMMAND), "--gpus", "2", "--records", str(records),
         "--cases", f"gradients:{shape}:1x1024:l4"],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in records.read_text().splitlines()]
    one, data, sharded = (record for record in found if "beside" in record)
    assert one["placement"] == "one"
    for record in (data, sharded):
        assert record["same_on_all_ranks"]
        assert record["tensors"] == one["tensors"]
        assert record["median"] < SHARE * one["median"], record
        assert record["worst"] < one["median"], record
