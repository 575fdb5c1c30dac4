"""Stopped runs on a card: they resume to the same bytes, and a signal costs at most a step.

The quick form of the resume matrix: each recipe is stopped once, at a step of its own. In 16 bit
the backward of FlashAttention and of cuDNN's attention adds into the gradient of q in any order;
torch has an order for them under ``torch.use_deterministic_algorithms``, which is set here. Every
other op of a step gives the same bits in each run without it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.conversations import conversations, write_rows
from support.run_kit import raw, stop_at, words

import qcore_qwen35.tiny as tiny
from qcore.config.settings import Settings
from qcore.errors import Interrupted
from qcore.training.train import train

pytestmark = pytest.mark.gpu
#: The linear maps of the published 9B, under the vocabulary of the tiny tokenizer.
DENSE_9B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "head_dim": 256,
    "num_attention_heads": 16, "num_key_value_heads": 4, "linear_key_head_dim": 128,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
    "max_position_embeddings": 32768,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10], "mrope_interleaved": True,
    },
}  # fmt: skip
BASE: dict[str, Any] = {
    "max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "r": 4,
    "lora_alpha": 8, "learning_rate": 2e-3, "save_steps": 0,
}  # fmt: skip
#: Settings of a recipe, and the step that it is stopped after.
RECIPES: dict[str, tuple[dict[str, Any], int]] = {
    "NF4": ({}, 1),
    "16 bit": ({"quantization": "none"}, 2),
    "float32": ({"quantization": "none", "dtype": "fp32"}, 3),
    "dropout, accumulation": ({"lora_dropout": 0.2, "gradient_accumulation_steps": 3}, 4),
    "DoRA": ({"use_dora": True}, 5),
    "recompute none": ({"recompute": "none"}, 3),
    "recompute full": ({"recompute": "full"}, 2),
    "recompute offload": ({"recompute": "offload"}, 4),
    "evaluation, decay": ({"eval_fraction": 0.25, "eval_steps": 2, "weight_decay": 0.1}, 3),
    "token rows": ({"trainable_token_indices": (3, 9, 40)}, 3),
    "experts": ({}, 3),
    "experts, 16 bit": ({"quantization": "none", "recompute": "full"}, 2),
    "experts, router loss": ({"router_aux_loss_coef": 0.01}, 4),
}


@pytest.fixture(autouse=True)
def _needs_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch demands it
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_stopped_run_resumes_to_the_same_bytes(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, at = RECIPES[recipe]
    base, settings = tmp_path / "base", Settings(**BASE | options)
    tiny.write(base, moe=recipe.startswith("experts"))
    data = write_rows(tmp_path / "rows.jsonl", conversations(24))
    train(str(base), data, tmp_path / "whole", settings, device="cuda")
    stop_at(monkeypatch, at)
    with pytest.raises(Interrupted, match=f"after step {at} of 6"):
        train(str(base), data, tmp_path / "out", settings, device="cuda")
    stop_at(monkeypatch, 99)
    train(str(base), data, tmp_path / "out", settings, device="cuda", resume=True)
    assert raw(tmp_path / "out") == raw(tmp_path / "whole")


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_sigterm_ends_a_9b_within_a_step(nine: Path, tmp_path: Path, share: float) -> None:
    """The run ends after the step it is in, and the checkpoint is of that step."""
    data = write_rows(tmp_path / "rows.jsonl", conversations(240))
    options = BASE | {
        "max_steps": 40, "per_device_train_batch_size": 80, "gradient_accumulation_steps": 1,
        "max_length": 2048, "recompute": "full", "logging_steps": 1, "chat_template_kwargs": {},
    }  # fmt: skip
    line = [str(word) for word in words(nine, data, tmp_path / "out", options)]
    line[line.index("cpu")] = "cuda"
    metrics = tmp_path / "out.run" / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, "-m", "qcore", *line, "--json"], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    ) as child:  # fmt: skip
        steps = _wait_for(metrics, 5, child)
        seconds = steps[-1]["seconds"]
        time.sleep(share * seconds)
        sent = time.monotonic()
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=120)
        ended = time.monotonic() - sent
    assert child.returncode == 75, errors[-2000:]
    saved = sorted((tmp_path / "out.run").glob("checkpoint-*"))
    step = int(saved[-1].name.rpartition("-")[2])
    print(
        f"\nstep {seconds:.2f} s; signal {share} into step {len(steps) + 1}; checkpoint of step "
        f"{step}; the process ended {ended:.2f} s after the signal"
    )
    assert len(steps) + 1 <= step <= len(steps) + 2  # metrics are read a moment later
    assert ended < 2 * seconds + 15  # a checkpoint of 43 MB, and the end of the process


def _wait_for(metrics: Path, count: int, child: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """The rows of the steps once there are `count`."""
    until = time.monotonic() + 240
    while time.monotonic() < until and child.poll() is None:
        if metrics.exists():
            lines = metrics.read_text().splitlines()
            if len(lines) >= count:
                return [json.loads(line) for line in lines]
        time.sleep(0.005)
    raise AssertionError(f"{count} steps were not reached: {child.communicate()[1][-2000:]}")


@pytest.fixture(scope="module")
def nine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the 9B's linear maps; large matrices repeat one block of random values."""
    block = torch.randn(1 << 26, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    plain = tiny._random

    def quick(tensor: Any, generator: torch.Generator) -> torch.Tensor:
        size = math.prod(tensor.shape)
        if len(tensor.shape) != 2 or size < 1 << 20:
            return plain(tensor, generator)
        copies = -(-size // len(block))
        values = block.repeat(copies)[:size].view(tensor.shape)
        return torch.mul(values, tensor.shape[-1] ** -0.5)

    folder = tmp_path_factory.mktemp("nine") / "base"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "_random", quick)
        tiny.write(folder, **DENSE_9B)
    return folder
