"""A base of which each rank holds some rows computes what a whole one does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.e2e_kit import write_stock
from support.four_bit_kit import write_four_bit
from support.fp8_kit import write_fp8
from support.moe_kit import tensors_of
from support.shard_kit import MOE, SIZES, compare, damaged, idle, run

from qcore.nn.qlora.nf4 import dequantize
from qcore.nn.sharding import codes
from qcore.nn.sharding.rows import appointed, rows_of

DENSE = ["attn", "gdn", "mlp"]
TEXT_LINEARS = r"layers\.\d+\..*(_proj|in_proj_(qkv|z))\.weight$"
MIXED = ["attn", "gdn", "experts", "shared_expert", "router"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stock(tmp_path_factory.mktemp("dense"), "text", **SIZES)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stock(tmp_path_factory.mktemp("moe"), "text", moe=True, **SIZES, **MOE)


def equal(found: dict[str, Any]) -> None:
    """Values, codes, outputs, gradients under each policy, and the fingerprint of the base."""
    assert found["differ"] == []
    assert found["logits"] == 0
    assert max(found["gradients"].values()) <= 1e-6, found["gradients"]
    assert found["names"] > 20
    assert found["digests"]


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [True, False], ids=["nf4", "16bit"])
@pytest.mark.parametrize("size", [2, 3])
def test_dense(dense: Path, size: int, quantize: bool) -> None:
    found = run(compare, size, dense, DENSE, quantize=quantize)
    equal(found)
    assert max(found["held"]) < 1.15 * found["whole"] / size


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [True, False], ids=["nf4", "16bit"])
@pytest.mark.parametrize("size", [2, 3])
def test_mixture_of_experts(moe: Path, size: int, quantize: bool) -> None:
    found = run(compare, size, moe, MIXED, quantize=quantize)
    equal(found)
    assert max(found["held"]) < 1.3 * found["whole"] / size


@pytest.mark.slow
def test_bytes_as_floating_point(moe: Path) -> None:
    """As on torch before 2.12."""
    equal(run(compare, 2, moe, MIXED, quantize=True, floating=True))


@pytest.mark.slow
def test_dora(dense: Path) -> None:
    equal(run(compare, 2, dense, DENSE, quantize=True, dora=True))


@pytest.mark.slow
def test_rank_without_rows(dense: Path) -> None:
    found = run(idle, 3, dense, DENSE)
    assert found["again"] <= 1e-6
    assert found["last"] <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_bytes_that_a_rank_reads(moe: Path, size: int) -> None:
    """Its rows, what is replicated, and its part of the tensors that one rank hashes."""
    found = run(compare, size, moe, MIXED, quantize=False)
    on_disk = sum(tensor.nbytes for tensor in tensors_of(moe).values())
    replicated = sum(
        tensor.nbytes for name, tensor in tensors_of(moe).items() if "layers." not in name
    )
    assert found["read"] == found["share"]
    # Twice its part of the linear maps and a part of the experts; ceil(7 / 3) experts of 7.
    assert max(found["read"]) - replicated < 1.6 * (on_disk - replicated) / size


@pytest.mark.slow
def test_codes_of_bitsandbytes(dense: Path, tmp_path: Path) -> None:
    folder = write_four_bit(dense, tmp_path / "four", pattern=TEXT_LINEARS)
    equal(run(compare, 3, folder, DENSE, quantize=True))


@pytest.mark.slow
def test_block_fp8(moe: Path, tmp_path: Path) -> None:
    folder = write_fp8(moe, tmp_path / "fp8")
    equal(run(compare, 3, folder, MIXED, quantize=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("layers.0.linear_attn.out_proj.weight", 63),
        ("layers.2.mlp.experts.1.up_proj.weight", 0),
        ("model.norm.weight", 0),
    ],
)
def test_rank_that_cannot_load(moe: Path, tmp_path: Path, name: str, row: int) -> None:
    """Every rank ends with the error of the rank that holds the value."""
    tensors = tensors_of(moe)
    (full,) = (one for one in tensors if one.endswith(name))
    tensors[full][row] = torch.nan
    folder = shutil.copytree(moe, tmp_path / "damaged")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = run(damaged, 2, folder, MIXED)
    assert found["code"] == ["QC-LOAD-003"] * 2
    assert found["fields"][0] == found["fields"][1]


def test_rows_of_ranks() -> None:
    assert [rows_of(7, rank, 3) for rank in range(3)] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert [rows_of(1, rank, 3) for rank in range(3)] == [slice(0, 1), slice(1, 1), slice(1, 1)]


def test_tensors_that_are_read_whole_are_spread() -> None:
    sizes = [("a", 5), ("b", 3), ("c", 1), ("d", 2)]
    assert appointed(sizes, 2) == {"a": 0, "b": 1, "c": 1, "d": 1}


@pytest.mark.parametrize("width", [64, 192])
def test_codes_never_have_one_dtype(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Before torch 2.12, FSDP copies values of one dtype, and a GPU changes those that are NaN."""
    monkeypatch.setattr(codes, "FLOATING", True)
    for stored in (
        codes.ShardedNF4((8, width), torch.bfloat16, dequantize).stored,
        codes.ShardedNF4Stack((8, 4, width), torch.bfloat16, dequantize).stored,
    ):
        dtypes = {parameter.dtype for parameter in stored.parameters()}
        assert len(dtypes) > 1
        assert all(dtype.is_floating_point for dtype in dtypes)
