"""Codes as parameters that FSDP of torch below 2.12 gathers as bytes, never as values."""

from __future__ import annotations

import pytest
import torch

from qcore.nn.sharding import codes


@pytest.mark.parametrize("columns", [(1280, 40), (1280, 41), (31, 1)])
def test_codes_and_scales_are_of_two_dtypes(
    columns: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP gathers bytes only of a group with two dtypes. A copy of 16-bit values on CUDA turns
    every NaN into 0x7fff, and any two codes may look like one."""
    monkeypatch.setattr(codes, "FLOATING", True)
    packed, absmax = columns
    stored = codes.StoredCodes({"packed": (4, packed), "absmax": (4, absmax)}, {})
    dtypes = [parameter.dtype for parameter in stored.parameters()]
    assert len(set(dtypes)) == 2
    assert all(dtype.is_floating_point for dtype in dtypes)
    assert [parameter.shape[0] for parameter in stored.parameters()] == [4, 4]


def test_bytes_are_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "FLOATING", True)
    every = torch.arange(256, dtype=torch.uint8).view(2, 128)
    for name in ("packed", "absmax"):
        held = codes.as_parameter(name, every)
        assert held.data_ptr() == every.data_ptr()
        assert torch.equal(held.view(torch.uint8).view(2, -1), every)
