"""From a tokenizer with added special tokens to a merge: the steps of docs/training.md."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.e2e_kit import loaded_adapter, stock, stock_logits, write_stock
from support.run_kit import SHORT, start
from transformers import AutoTokenizer

from qcore.errors import QcoreError
from qcore.inference.generate import Generator
from qcore.merging.merge import merge

pytestmark = pytest.mark.usefixtures("one_thread")
NEW = ["<call>", "</call>"]
RUN = SHORT | {
    "max_steps": 2, "target_groups": ("attn",), "learning_rate": 5e-3, "quantization": "none",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(once: Callable[..., Path]) -> Path:
    return once("added-tokens", lambda folder: write_stock(folder / "b", tied=True)) / "b"


def with_tokens(base: Path, folder: Path, *, special: bool = False) -> tuple[Path, list[int]]:
    """The base with another tokenizer, and the ids of its new tokens."""
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(NEW, special_tokens=special)
    tokenizer.save_pretrained(folder)
    return folder, tokenizer.convert_tokens_to_ids(NEW)


def rows_of(path: Path) -> Path:
    rows = [
        {"messages": [
            {"role": "user", "content": f"add {n} and 1"},
            {"role": "assistant", "content": f"<call>add({n}, 1)</call>"},
        ]} for n in range(8)
    ]  # fmt: skip
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_added_tokens_are_trained_merged_and_generated(base: Path, tmp_path: Path) -> None:
    ours, ids = with_tokens(base, tmp_path / "ours")
    settings = RUN | {"trainable_token_indices": tuple(ids)}
    start(ours, rows_of(tmp_path / "rows.jsonl"), tmp_path / "ada", settings)
    # The fingerprint is that of the weights: the original base and the copy are one base.
    report = merge(str(base), tmp_path / "ada", tmp_path / "out", take_tokenizer=True)
    assert report.proof is not None
    assert report.replaced == 1
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "<call>add(1, 1)</call>"
    assert again(text).input_ids[0] == ids[0]
    docs = [torch.tensor(again(text).input_ids), torch.tensor([*ids, 5, 7])]
    peer = loaded_adapter(stock(base, "vl"), tmp_path / "ada")
    merged = stock_logits(stock(tmp_path / "out", "vl").eval(), docs)
    assert float((merged - stock_logits(peer, docs)).abs().max()) <= 1e-4
    assert float((merged - stock_logits(stock(base, "vl").eval(), docs)).abs().max()) > 1e-3
    generator = Generator(
        str(base), adapter=tmp_path / "ada", take_tokenizer=True, device="cpu", dtype="fp32"
    )
    assert generator.tokenizer.encode("<call>").ids == ids[:1]


def test_special_tokens_in_rows_are_refused_with_the_way(base: Path, tmp_path: Path) -> None:
    """Text of a row must not become a control token, so that a row cannot end its own turn."""
    ours, ids = with_tokens(base, tmp_path / "ours", special=True)
    settings = RUN | {"trainable_token_indices": tuple(ids)}
    with pytest.raises(QcoreError) as caught:
        start(ours, rows_of(tmp_path / "rows.jsonl"), tmp_path / "ada", settings)
    assert "'<call>'" in str(caught.value)
    assert "tokenizer.add_tokens" in str(caught.value.fix)
