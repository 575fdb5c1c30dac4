"""rsLoRA, rank and alpha by module: what a run trains and writes, against stock PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.e2e_kit import (
    LENGTHS,
    LINEARS,
    documents,
    loaded_adapter,
    stock,
    stock_logits,
    wrapped,
    write_stock,
)
from support.run_kit import SHORT, start

from qcore.adapter.evidence import read_for
from qcore.adapter.targets import lora_targets
from qcore.config.settings import Settings
from qcore.errors import UsageError
from qcore.merging.merge import merge
from qcore.nn.qlora.lora_layer import Lora
from qcore.plugins.resolve_model import classes_of, identify
from qcore.training.initial_adapter import AdapterWords, start_from

pytestmark = pytest.mark.usefixtures("one_thread")
PATTERNS: dict[str, dict[str, Any]] = {
    "names": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
        "alpha_pattern": {"mlp.down_proj": 3.5},
    },
    "the first key counts": {
        "rank_pattern": {"mlp.up_proj": 2, "up_proj": 6, r"layers\.0\..*_proj": 3},
    },
    "expressions": {
        "rank_pattern": {r"layers\.[02]\.mlp\..*": 5},
        "alpha_pattern": {r".*\.(q|k)_proj": 20},
    },
    "rslora": {"use_rslora": True, "rank_pattern": {"o_proj": 9}, "alpha_pattern": {"o_proj": 5}},
}  # fmt: skip
RUN = SHORT | {"max_steps": 1, "quantization": "none", "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def base(once: Callable[..., Path]) -> Path:
    return once("lora-numbers", lambda folder: write_stock(folder / "base", dtype=torch.float32))


def chosen(base: Path, **settings: Any) -> dict[str, Lora]:
    found = identify(str(base / "base"))
    return lora_targets(found.layout, Settings(**settings), classes_of(found.checkpoint.config))


def pefts(base: Path, **config: Any) -> dict[str, tuple[int, float]]:
    """Rank and scaling of each weight that PEFT's own code chooses."""
    model = wrapped(stock(base / "base", "vl"), target_modules=list(LINEARS), **config)
    return {
        f"{name.removeprefix('base_model.model.')}.weight": (
            module.r["default"], module.scaling["default"],
        )
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }  # fmt: skip


@pytest.mark.parametrize("case", PATTERNS)
def test_patterns_match_as_in_peft(base: Path, case: str) -> None:
    numbers = {"r": 4, "lora_alpha": 8}
    found = chosen(base, **numbers, **PATTERNS[case])
    expected = pefts(base, **numbers, **PATTERNS[case])
    assert {name: (lora.r, lora.scaling) for name, lora in found.items()} == expected


def test_a_pattern_without_a_match_is_refused(base: Path) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(UsageError) as error:
            chosen(base, **{field: {"q_proj": 2, "w1": 3}})
        assert (error.value.code, error.value.field) == ("QC-LORA-005", f"{field}.w1")
    with pytest.raises(UsageError) as error:
        chosen(base, rank_pattern={"q_proj": 2}, target_groups=("mlp",))
    assert error.value.code == "QC-LORA-005"


@pytest.mark.parametrize("key", ["", "a(", "x" * 501, "a\nb"])
def test_a_key_that_is_no_expression_is_refused(key: str) -> None:
    with pytest.raises(UsageError) as error:
        Settings(rank_pattern={key: 2})  # type: ignore[arg-type]
    assert error.value.code == "QC-CONFIG-003"


def test_a_run_is_read_by_peft_and_by_us(base: Path, rows: Path, tmp_path: Path) -> None:
    folder, options = base / "base", PATTERNS["names"] | {"use_rslora": True, "group_r": {"gdn": 3}}
    start(folder, rows, tmp_path / "out", RUN | options)
    (tmp_path / "out" / "MANIFEST.json").unlink()
    file = tmp_path / "out" / "adapter_model.safetensors"
    values = load_file(file)
    generator = torch.Generator().manual_seed(3)
    for name, value in values.items():
        if "lora_B" in name:
            values[name] = 0.1 * torch.randn(value.shape, generator=generator)
    save_file(values, file, metadata={"format": "pt"})
    peer = loaded_adapter(stock(folder, "vl"), tmp_path / "out")
    expected = {
        name: (lora.r, lora.scaling) for name, lora in chosen(base, **(RUN | options)).items()
    }
    read = read_for(identify(str(folder)), tmp_path / "out", trust_base=True)
    assert {name: (pair.r, pair.scaling) for name, pair in read.pairs.items()} == expected
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["use_rslora"] is True
    logits = stock_logits(peer, documents(LENGTHS))
    merge(str(folder), tmp_path / "out", tmp_path / "merged", trust_base=True)
    found = stock_logits(stock(tmp_path / "merged", "vl"), documents(LENGTHS))
    assert float((found - logits).abs().max()) <= 1e-4


def test_an_initial_adapter_sets_patterns(base: Path, rows: Path, tmp_path: Path) -> None:
    folder, model = base / "base", identify(str(base / "base"))
    options = PATTERNS["names"] | {"use_rslora": True}
    start(folder, rows, tmp_path / "first", RUN | options)
    initial, settings, _ = start_from(
        AdapterWords(init_adapter=tmp_path / "first"), model, Settings()
    )
    assert initial is not None
    again = lora_targets(model.layout, settings, classes_of(model.checkpoint.config))
    assert again == chosen(base, **(RUN | options))
    with pytest.raises(UsageError) as error:
        start_from(
            AdapterWords(init_adapter=tmp_path / "first"),
            model,
            Settings(rank_pattern={"q_proj": 3}),  # type: ignore[arg-type]
        )
    assert (error.value.code, error.value.field) == ("QC-TRAIN-011", "rank_pattern")
