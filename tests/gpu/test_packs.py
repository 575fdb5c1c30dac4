"""Random packs on a GPU: every row gives the logits and gradients it gives alone.

`support.pack_kit` decides the packs; `tests/training/test_packs.py` runs them on the CPU. The model
has 4-bit weights and the kernels that a run chooses. The reference is each row alone in float32. A
pack in float32 agrees with it to rounding. In bfloat16 the bound is the error of the kernels: a
pack is as close to the reference as its rows alone in bfloat16 are, and closer to these rows than
they are to the reference. All outcomes use the experts that the reference chooses. The test prints
the errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from statistics import median
from typing import Any

import pytest
import torch
from support.gradient_cases import Routes
from support.pack_kit import (
    GROUPS,
    PACKS,
    Errors,
    Images,
    alone,
    errors,
    model_of,
    over,
    rows_of,
    together,
)

from qcore.training.collate import Batches
from qcore_multimodal.tiny import add_tower
from qcore_qwen35.tiny import write as write_tiny

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
BLOCK = 50  #: packs of one test
MOST, MEDIAN = 2e-3, 2e-5  #: relative error in float32, as on the CPU
#: Head sizes of the published models, few of everything else.
TEXT: dict[str, Any] = {
    "hidden_size": 512, "head_dim": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
    "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}  # fmt: skip
MAPS: dict[str, dict[str, Any]] = {
    "dense": {"intermediate_size": 1024},
    "moe": {
        "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128, "num_experts": 16,
        "num_experts_per_tok": 4,
    },
}  # fmt: skip
VISION: dict[str, Any] = {"hidden_size": 144, "intermediate_size": 296, "num_heads": 2}


@pytest.fixture(scope="module", autouse=True)
def _float32() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Errors of a pack and of its rows.

    Attributes:
        float32: the pack in float32 against its rows alone in float32, the reference.
        pack: the pack in bfloat16 against the reference.
        rows: the rows alone in bfloat16 against the reference.
        pack_to_rows: the pack in bfloat16 against the rows alone in bfloat16.
    """

    float32: Errors
    pack: Errors
    rows: Errors
    pack_to_rows: Errors


@dataclass(frozen=True, slots=True)
class Models:
    """The same 4-bit weights in float32 and in bfloat16."""

    float32: Batches
    bfloat16: Batches

    def compare(self, number: int) -> Compared:
        """Run pack `number`, and its rows alone."""
        rows, routes = rows_of(number), Routes()
        reference = alone(self.float32, rows, routes)
        experts = routes.by_layer() or None
        float32 = together(self.float32, rows, Routes(forced=experts))
        pack = together(self.bfloat16, rows, Routes(forced=experts))
        apart = alone(self.bfloat16, rows, Routes(forced=experts))
        return Compared(
            float32=errors(float32, reference),
            pack=errors(pack, reference),
            rows=errors(apart, reference),
            pack_to_rows=errors(pack, apart),
        )


@pytest.fixture(scope="module", params=GROUPS)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    kind = request.param
    folder = tmp_path_factory.mktemp("packs") / "base"
    write_tiny(folder, moe=kind == "moe", **TEXT, **MAPS[kind])
    add_tower(folder, **VISION)

    def batches(dtype: torch.dtype) -> Batches:
        model = model_of(folder, kind, dtype=dtype, device=CUDA, quantize=True)
        return Batches(model, CUDA, Images(folder))

    return Models(batches(torch.float32), batches(torch.bfloat16))


@pytest.mark.parametrize("first", range(0, PACKS, BLOCK))
def test_a_pack_is_its_rows_alone(models: Models, first: int) -> None:
    packs = {number: models.compare(number) for number in range(first, first + BLOCK)}
    medians = {}
    for field in fields(Compared):
        values = [getattr(pack, field.name) for pack in packs.values()]
        medians[field.name] = over(values, median)
        print(f"\n{field.name}: median {medians[field.name]}\n  largest {over(values, max)}")
    for number, pack in packs.items():
        message = f"pack {number}: {pack}"
        assert max(pack.float32.token, pack.float32.worst) <= MOST, message
        assert pack.pack.logits <= 1.25 * pack.rows.logits, message
        assert pack.pack.gradients <= 1.25 * pack.rows.gradients, message
        assert pack.pack_to_rows.logits <= pack.rows.logits, message
        assert pack.pack_to_rows.gradients <= pack.rows.gradients, message
    assert max(medians["float32"].token, medians["float32"].worst) <= MEDIAN
    assert medians["pack"].logits <= 1.02 * medians["rows"].logits
    assert medians["pack"].gradients <= 1.02 * medians["rows"].gradients
