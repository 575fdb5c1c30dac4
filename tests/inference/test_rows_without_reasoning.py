"""Rows without reasoning for a template that opens a think block: answers are as trained.

The prompt that such a template renders by default (``<think>\\n``) is one that no row had. Train,
merge and generate must agree on the prompt of the rows, without an option of the user.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.chat_kit import bot, user, write_rows
from support.cli_kit import here
from support.e2e_kit import tiny_folder
from support.run_kit import SHORT, words

from qcore.inference.generate import Generator

pytestmark = pytest.mark.usefixtures("one_thread")
TURNS = {f"Word number {n}?": word for n, word in enumerate(("sword", "fish", "lamp", "rope"))}
ROWS = [{"messages": [user(asked), bot(word)]} for asked, word in TURNS.items()]
CLOSED = "enable_thinking is defined and enable_thinking is true"
SETTINGS = SHORT | {
    "per_device_train_batch_size": 4, "max_steps": 60, "learning_rate": 5e-3, "r": 16,
    "lora_alpha": 32, "quantization": "none", "gradient_checkpointing": False,
}  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The tiny checkpoint; its template opens a think block unless `enable_thinking` is false."""
    shutil.copytree(tiny_folder(), tmp_path / "base")
    template = tmp_path / "base" / "chat_template.jinja"
    text = template.read_text()
    assert text.count(CLOSED) == 1
    template.write_text(
        text.replace(CLOSED, "enable_thinking is not defined or enable_thinking is true")
    )
    return tmp_path / "base"


def said(model: Path, adapter: Path | None = None) -> dict[str, str]:
    """The greedy answers with no option of the template."""
    generator = Generator(str(model), adapter=adapter, device="cpu", dtype="fp32")
    return {asked: generator.prompt(asked, max_new_tokens=12).text for asked in TURNS}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_adapter_and_merge_answer_as_trained(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    def run(*flags: object) -> dict[str, Any]:
        ended = here(capsys, *flags, "--json")
        assert ended.code == 0, ended.err
        return ended.json

    rows, adapter, merged = (tmp_path / name for name in ("rows.jsonl", "adapter", "merged"))
    run(*words(base, write_rows(rows, ROWS), adapter, SETTINGS | {"seed": seed}))
    run("merge", "--model", base, "--adapter", adapter, "--output", merged)
    assert said(base, adapter) == TURNS
    assert said(merged) == TURNS
    asked, word = next(iter(TURNS.items()))
    told = run("generate", merged, "--prompt", asked, "--device", "cpu", "--dtype", "fp32")
    assert (told["text"], told["prompt"].endswith("<think>\n\n</think>\n\n")) == (word, True)
