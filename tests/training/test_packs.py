"""Random packs on the CPU in float32: every row gives the logits and gradients it gives alone.

`support.pack_kit` decides the packs. The gradients of a pack are the sum of those of its rows; the
tower is trained too. `tests/gpu/test_packs.py` runs the same packs on a GPU.

The bounds are rounding errors. The delta rule normalizes the output of a head. At the first tokens
of a row this output can be nearly zero, and the normalization amplifies rounding errors: scaling
the adapter's values by ``1 + 2e-7 randn`` changes the gradients of the rows of pack 144, each
alone, by up to 7e-4. In the median pack the error is below 1e-5. A lost boundary changes logits by
more than 1e-2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch
from support.gradient_cases import Routes
from support.pack_kit import (
    GROUPS,
    PACKS,
    Images,
    alone,
    differing,
    errors,
    model_of,
    over,
    rows_of,
    together,
)
from support.tiers import fast, pairs
from support.vision_kit import tiny_vl

from qcore.api.blocks import Packed
from qcore.data.rendering.masking import Example
from qcore.training.collate import Batches

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
BLOCK = 5  #: packs of one test
MOST, MEDIAN = 2e-3, 2e-5  #: relative error of any pack, and of the median pack
LEAK = 1e-2  #: least relative error if a row reads another row


@pytest.fixture(scope="module", params=GROUPS)
def batches(request: pytest.FixtureRequest, once: Callable[..., Path]) -> Batches:
    kind = request.param
    folder = once(f"packs-{kind}", lambda home: tiny_vl(home, moe=kind == "moe"))
    return Batches(model_of(folder, kind), CPU, Images(folder))


#: Blocks of packs, each with one of the models in turn; on a GPU each model runs all of them.
BLOCKS = pairs(GROUPS, range(0, PACKS, BLOCK))


@pytest.mark.parametrize(
    ("batches", "first"), fast(BLOCKS, *BLOCKS[: len(GROUPS)], names=2), indirect=["batches"]
)
def test_a_pack_is_its_rows_alone(batches: Batches, first: int) -> None:
    packs, rerouted = [], 0
    for number in range(first, first + BLOCK):
        rows, of_rows, of_pack = rows_of(number), Routes(), Routes()
        expected = alone(batches, rows, of_rows)
        pack = together(batches, rows, of_pack)
        if ties := differing(of_pack, of_rows):
            rerouted += ties
            pack = together(batches, rows, Routes(forced=of_rows.by_layer()))
        packs.append(errors(pack, expected))
        assert max(packs[-1].token, packs[-1].worst) <= MOST, f"pack {number}: {packs[-1]}"
    usual = over(packs, median)
    assert max(usual.token, usual.worst) <= MEDIAN, usual
    assert over(packs, max).loss <= 5e-6
    assert rerouted <= 1, "routers may choose other experts only where two scores are equal"


class Leaky(Batches):
    """Batches without the boundary after a row."""

    def __init__(self, batches: Batches, row: int) -> None:
        super().__init__(batches.model, batches.device, batches.reader)
        self.row = row

    def of(self, batch: Sequence[Example]) -> Packed:
        packed = super().of(batch)
        ends = packed.cu_seqlens
        return replace(packed, cu_seqlens=ends[: self.row + 1] + ends[self.row + 2 :])


@pytest.mark.parametrize("number", fast([0, 1, 2], 1))
def test_a_lost_boundary_fails(batches: Batches, number: int) -> None:
    rows = rows_of(number)
    expected = alone(batches, rows)
    for row in range(min(3, len(rows) - 1)):
        pack = together(Leaky(batches, row), rows)
        assert errors(pack, expected).token > LEAK


def test_packs_cover_rows_of_every_kind() -> None:
    """Rows of one token, long rows, rows without a target; many rows; images in some packs."""
    packs = [rows_of(number) for number in range(PACKS)]
    rows = [row for pack in packs for row in pack]
    lengths = [len(row.ids) for row in rows]
    assert sum(length == 1 for length in lengths) > 100
    assert sum(length > 250 for length in lengths) > 30
    assert {63, 64, 65, 127, 128, 129} <= set(lengths)
    assert sum(len(pack) >= 12 for pack in packs) >= PACKS // 5
    assert sum(any(row.media for row in pack) for pack in packs) > PACKS // 4
    assert sum(not any(row.media for row in pack) for pack in packs) > PACKS // 2
    assert sum(not row.supervised for row in rows if len(row.ids) > 1) > 10
