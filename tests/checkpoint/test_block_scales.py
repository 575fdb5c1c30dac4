"""Block FP8 on disk: one rule for the scales, whoever asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qcore.checkpoint.block_scales import BadBlockError, block_size, scale_problem
from qcore.checkpoint.safetensors_header import Header

CORE = Path(__file__).parents[2] / "core/src/qcore"


def header(name: str, *shape: int, dtype: str = "F8_E4M3") -> Header:
    return Header(name, dtype, shape, "a.safetensors", 0, 0)


@pytest.mark.parametrize(
    ("weight", "scale"),
    [((5, 7), (2, 3)), ((4, 6), (1, 2)), ((3, 5, 7), (3, 2, 3)), ((7,), (1, 3))],
)
def test_one_scale_for_each_block(weight: tuple[int, ...], scale: tuple[int, ...]) -> None:
    asked = header("w", *weight), header("w_scale_inv", *scale, dtype="F32")
    assert scale_problem(*asked, (4, 3), Path("base")) is None
    for other in (None, header("w_scale_inv", *scale, 1), header("w_scale_inv", *scale[:-1], 9)):
        error = scale_problem(asked[0], other, (4, 3), Path("base"))
        assert error is not None
        assert (error.code, error.field) == ("QC-KEY-007", "w")
        assert error.expected == f"w_scale_inv {list(scale)}"
        assert error.file == str(Path("base/a.safetensors"))


@pytest.mark.parametrize("where", [(), ("text_config",)])
def test_the_block_is_read_at_the_top_or_one_below(where: tuple[str, ...]) -> None:
    def config(section: Any) -> dict[str, Any]:
        made = {"quantization_config": section}
        return {where[0]: made} if where else made

    assert block_size(config({"weight_block_size": [64, 32]})) == (64, 32)
    assert block_size(config({"quant_method": "fp8"})) == (128, 128)
    for wrong in ([64], [64, 0], [64, True], "64", None):
        with pytest.raises(BadBlockError) as caught:
            block_size(config({"weight_block_size": wrong}))
        assert caught.value.value == wrong
        assert caught.value.field.endswith("quantization_config.weight_block_size")
    with pytest.raises(BadBlockError):
        block_size(config("fp8"))


def test_it_is_raised_in_one_place() -> None:
    assert [p.name for p in CORE.rglob("*.py") if '"QC-KEY-007"' in p.read_text("utf-8")] == [
        "block_scales.py"
    ]
