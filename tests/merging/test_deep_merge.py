"""Merges of deep models: float32 drifts through forty layers and routers flip, the proof holds.

The proof compares layer by layer from the same input. A proof of logits alone refused sound
merges of these bases, dense ones by drift and mixtures by a token that went elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.conversations import conversations, write_rows
from support.e2e_kit import figure
from support.tiers import fast

from qcore.config.settings import Settings
from qcore.merging.merge import merge
from qcore.training.train import train
from qcore_qwen35.tiny import write

SIZES: dict[str, dict[str, Any]] = {
    "dense": {"moe": False},
    "experts": {"moe": True, "num_experts": 64, "num_experts_per_tok": 8},
}


@pytest.mark.parametrize("kind", fast(SIZES, "dense"))
@pytest.mark.slow
def test_forty_layers_are_proved(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "base", num_hidden_layers=40, hidden_size=64, **SIZES[kind])
    rows = write_rows(tmp_path / "rows.jsonl", conversations(4))
    settings = Settings(
        max_steps=2, gradient_accumulation_steps=1, learning_rate=1e-2, quantization="none",
        save_steps=0,
    )  # fmt: skip
    train(str(tmp_path / "base"), rows, tmp_path / "adapter", settings, device="cpu")
    proof = merge(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out").proof
    assert proof is not None
    figure(f"{kind}: {proof}")
    assert proof["layers"] <= 0.5
    assert proof["effect"] > 1
