"""`support.cuda_memory` without a card: which blocks it asks for, and what it says of tensors."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from support.cuda_memory import MIB, _blocks, holders, requests


def _segment(kind: str, *blocks: tuple[int, str], **more: Any) -> dict[str, Any]:
    made = [{"size": size, "state": state} for size, state in blocks]
    given = {"device": 0, "stream": 0, "segment_type": kind, "segment_pool_id": (0, 0)}
    return {**given, "blocks": made, **more}


ACTIVE, FREE = "active_allocated", "inactive"


def test_every_free_block_is_asked_for_by_its_size() -> None:
    """Those of another stream, device or pool are not to be had, nor are waiting ones."""
    snapshot = [
        _segment("large", (8 * MIB, ACTIVE), (504 * MIB, FREE)),
        _segment("small", (512, FREE), (512, ACTIVE), (MIB + 512, FREE)),
        _segment("large", (64 * MIB, "active_pending_free"), (MIB, FREE)),
        _segment("large", (64 * MIB, FREE), stream=7),
        _segment("large", (64 * MIB, FREE), device=1),
        _segment("large", (64 * MIB, FREE), segment_pool_id=(0, 1)),
    ]
    # More than 1 MiB of a small segment cannot be asked for at once: the rest is in the next round.
    assert list(requests(snapshot)) == [504 * MIB, 512, MIB]
    assert list(requests(snapshot, stream=7)) == [64 * MIB]
    assert _blocks(snapshot) == "1 x 64.0 MiB, 1 x 8.0 MiB"


class _Keeper:
    """Keeps a tensor in a circle, as a map and its product do."""

    def __init__(self, size: int) -> None:
        self.kept = torch.zeros(size)
        self.own = self


@pytest.mark.parametrize("frozen", [False, True])
def test_holders_names_who_keeps_the_largest_tensor(frozen: bool) -> None:
    gc.collect()
    keeper = _Keeper(50 * MIB)
    if frozen:
        gc.freeze()
    del keeper
    text = holders("cpu", most=1)
    line = text.splitlines()[-1]
    assert f"Tensor ({50 * MIB},) torch.float32" in line
    assert "_Keeper" in line
    assert ("\n0 objects were frozen" in text) != frozen
    gc.collect()
    assert "_Keeper" not in holders("cpu", most=1)
