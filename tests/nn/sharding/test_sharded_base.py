"""A base of which each rank holds some rows computes what a whole one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.e2e_kit import write_stock
from support.shard_kit import MOE, SIZES, compare, idle, run

from qcore.nn.sharding.rows import appointed, rows_of

DENSE = ["attn", "gdn", "mlp"]
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


def test_rows_of_ranks() -> None:
    assert [rows_of(7, rank, 3) for rank in range(3)] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert [rows_of(1, rank, 3) for rank in range(3)] == [slice(0, 1), slice(1, 1), slice(1, 1)]


def test_tensors_that_are_read_whole_are_spread() -> None:
    sizes = [("a", 5), ("b", 3), ("c", 1), ("d", 2)]
    assert appointed(sizes, 2) == {"a": 0, "b": 1, "c": 1, "d": 1}
