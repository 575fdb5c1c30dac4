"""DoRA on a card: gradients beside PEFT's on the same 4-bit base, the plan, the time of a step.

Gradients and times are of four layers at the width of the 4B, with the kernels that a run takes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.conversations import conversations, write_rows
from support.dora_slices import (
    SIDES,
    error,
    move_magnitudes,
    our_gradients,
    pefts_gradients,
    seconds_of_steps,
)
from support.gradient_cases import Case
from support.gradient_slices import Slice, text_of
from support.plan_kit import DENSE_4B

from qcore.config.settings import Settings
from qcore.training.train import train
from qcore_qwen35.tiny import write as write_tiny

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
#: A step with DoRA over one without (the aim of the project); plans are within 7 %.
RATIO, PLAN = 1.3, 0.07


@pytest.fixture(autouse=True)
def _needs_cuda() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("policy", ["none", "full"])
def test_gradients_err_no_more_than_pefts(policy: str) -> None:
    ours = Slice(text_of("4B"), CUDA, torch.bfloat16, kernels=True, dora=True)
    assert ours.chosen is not None
    assert "reference" not in ours.chosen.backends.values(), ours.chosen.lines()
    move_magnitudes(ours)
    case = Case()
    found = our_gradients(ours, case, policy)
    expected = pefts_gradients(ours, case, torch.float32)
    theirs = pefts_gradients(ours, case, torch.bfloat16)
    assert found.keys() == expected.keys() == theirs.keys()
    errors = {side: (error(found, expected, side), error(theirs, expected, side)) for side in SIDES}
    print(f"\n{policy}: relative error (ours, PEFT's in bfloat16):", errors)
    for mine, peer in errors.values():
        assert mine <= max(1.25 * peer, 0.005)


def test_float32_gradients_are_pefts() -> None:
    ours = Slice(text_of("0.8B"), CUDA, torch.float32, kernels=False, dora=True)
    move_magnitudes(ours)
    found = our_gradients(ours, Case(), "full")
    expected = pefts_gradients(ours, Case(), torch.float32)
    errors = {side: error(found, expected, side) for side in SIDES}
    print("\nfloat32, relative error:", errors)
    assert max(errors.values()) <= 1e-3


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize("tokens", [2048, 8192])
def test_a_step_takes_at_most_1_3_times(tokens: int, policy: str) -> None:
    plain, dora = (
        Slice(text_of("4B"), CUDA, torch.bfloat16, kernels=True, dora=with_dora)
        for with_dora in (False, True)
    )
    seconds = [seconds_of_steps(one, tokens, policy) for one in (plain, dora, plain, dora)]
    one, two = min(seconds[::2]), min(seconds[1::2])
    print(f"\n{tokens} tokens, {policy}: {one:.4f} s, with DoRA {two:.4f} s, {two / one:.3f} times")
    assert two <= RATIO * one


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_plan_is_within_7_percent(tmp_path: Path, recompute: str, use_dora: bool) -> None:
    base = tmp_path / "base"
    sizes = DENSE_4B | {"num_hidden_layers": 8, "max_position_embeddings": 32768}
    write_tiny(base, **{key: value for key, value in sizes.items() if key != "vocab_size"})
    data = write_rows(tmp_path / "rows.jsonl", conversations(160))
    settings = Settings(
        max_steps=5, max_length=2048, per_device_train_batch_size=16,
        gradient_accumulation_steps=2, recompute=recompute, use_dora=use_dora,
        gradient_checkpointing=recompute != "none", join_micro_batches=False,
    )  # fmt: skip
    report = train(str(base), data, tmp_path / "adapter", settings, device="cuda")
    assert report.last_loss < report.first_loss
    planned, measured = report.plan["peak_bytes"], report.measured["peak_bytes"]
    print(f"\n{recompute}, DoRA {use_dora}: {planned / 1e9:.3f} GB, {measured / 1e9:.3f} measured")
    assert abs(measured / planned - 1) <= PLAN
