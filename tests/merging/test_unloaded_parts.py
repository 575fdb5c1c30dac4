"""The proof of a merge reads no part that a run does not load, whatever its tensors are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.conversations import conversations, write_rows
from support.tiers import fast
from support.toy_draft import add, install

from qcore.config.settings import Settings
from qcore.merging import disk_rows, layer_stream, vocabulary
from qcore.merging.merge import merge
from qcore.training.train import train
from qcore_qwen35.tiny import write

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("tied", fast([True, False]))
def test_names_of_the_trunk_in_a_part_that_is_not_loaded(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(install(tmp_path / "plugin"))
    base = tmp_path / "base"
    write(base, tie_word_embeddings=tied)
    unloaded = add(base)
    rows = write_rows(tmp_path / "rows.jsonl", conversations(4))
    settings = Settings(
        max_steps=2, gradient_accumulation_steps=1, learning_rate=1e-2, quantization="none",
        save_steps=0,
    )  # fmt: skip
    train(str(base), rows, tmp_path / "adapter", settings, device="cpu")
    read: set[str] = set()

    def reading(function: Any) -> Any:
        def call(checkpoint: Any, item: Any, *arguments: Any) -> Any:
            read.add(item.tensor.name)
            return function(checkpoint, item, *arguments)

        return call

    names = ("read_tensor", "gather", "blocks")
    for module in (disk_rows, layer_stream, vocabulary):
        for name in (one for one in names if hasattr(module, one)):
            monkeypatch.setattr(module, name, reading(getattr(module, name)))
    proof = merge(str(base), tmp_path / "adapter", tmp_path / "out").proof
    assert proof is not None
    assert proof["effect"] > 0
    assert read
    assert not read & unloaded
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert name not in unloaded or bool((tensor == 7).all())
    assert unloaded <= load_file(tmp_path / "out" / "model.safetensors").keys()
