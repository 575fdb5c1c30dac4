"""On a CUDA device: the same numbers as on the CPU, and the whole way on a real shape."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.conversations import conversations, write_rows
from support.real_shapes import write_real

from qcore.adapter.targets import targets
from qcore.api.blocks import Packed
from qcore.config.settings import Settings
from qcore.inference.generate import Generator
from qcore.merging.merge import merge
from qcore.nn.device import DTYPES
from qcore.nn.load import load
from qcore.nn.model import Model
from qcore.nn.qlora.lora_layer import Lora
from qcore.nn.qlora.nf4 import NF4
from qcore.plugins.resolve_model import identify
from qcore.training.train import train
from qcore_qwen35.tiny import write as write_tiny

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "base"
    write_tiny(folder)
    return folder


def _model(folder: Path, device: str, dtype: str = "fp32", *, quantize: bool = False) -> Model:
    found = identify(str(folder))
    architecture = found.decision.architecture
    chosen = targets(found.layout, (), Lora(r=4, lora_alpha=8))
    model = Model(architecture, found.checkpoint.config, found.layout, DTYPES[dtype], chosen)
    load(model, found.layout, found.checkpoint, device=torch.device(device), quantize=quantize)
    generator = torch.Generator().manual_seed(3)
    for name, module in model.adapters():
        module.reset_lora(name, 0, torch.device(device))
        assert module.lora_B is not None
        values = 0.1 * torch.randn(module.lora_B.shape, generator=generator)
        module.lora_B.data.copy_(values)
    return model


def _batch(lengths: tuple[int, ...] = (1, 63, 130, 65)) -> Packed:
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(0, 500, (n,), generator=generator) for n in lengths]
    return Packed.of(ids, [torch.roll(row, -1) for row in ids])


def _gradients(model: Model, batch: Packed) -> dict[str, torch.Tensor]:
    loss, count = model.loss(batch, recompute="full"), len(batch.supervised())
    torch.autograd.backward(loss / count)
    return {name: p.grad.float().cpu() for name, p in model.trainable() if p.grad is not None}


def test_logits_and_gradients_equal_the_cpu(tiny: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    batch = _batch()
    here, there = _model(tiny, "cpu"), _model(tiny, "cuda")
    cuda = torch.device("cuda")
    with torch.no_grad():
        expected, found = here.logits(batch), there.logits(batch.to(cuda)).cpu()
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    expected_grads = _gradients(here, batch)
    found_grads = _gradients(there, batch.to(cuda))
    assert expected_grads.keys() == found_grads.keys()
    for name, gradient in expected_grads.items():
        assert (found_grads[name] - gradient).norm() <= 1e-3 * gradient.norm(), name


def _error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative error over all gradients together."""
    one, two = (torch.cat([g[name].flatten() for name in expected]) for g in (found, expected))
    return float((one - two).norm() / two.norm())


def test_bf16_gradients_are_no_further_off_than_on_the_cpu(tiny: Path) -> None:
    batch = _batch()
    expected = _gradients(_model(tiny, "cpu"), batch)
    here = _error(_gradients(_model(tiny, "cpu", "bf16"), batch), expected)
    cuda = batch.to(torch.device("cuda"))
    there = _error(_gradients(_model(tiny, "cuda", "bf16"), cuda), expected)
    print(f"\nbf16 gradients, relative error: cpu {here:.4f}, cuda {there:.4f}")
    assert there <= 1.25 * here


def test_nf4_agrees_with_the_cpu() -> None:
    """bitsandbytes rounds the nested scales of CPU and CUDA differently, by one code."""
    weight = torch.randn(384, 320, generator=torch.Generator().manual_seed(0))
    here, there = NF4(weight, torch.float32).dense(), NF4(weight.cuda(), torch.float32).dense()
    assert (there.cpu() - here).norm() <= 0.01 * here.norm()
    assert (here - weight).norm() <= 0.1 * weight.norm()


def test_resume_gives_the_same_adapter(tiny: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", conversations(24))
    settings = Settings(max_steps=8, gradient_accumulation_steps=2, save_steps=4)
    train(str(tiny), data, tmp_path / "whole", settings, device="cuda")
    kept = tmp_path / "whole.run" / "checkpoint-4"
    (tmp_path / "again.run").mkdir()
    kept.rename(tmp_path / "again.run" / "checkpoint-4")
    train(str(tiny), data, tmp_path / "again", settings, device="cuda", resume=True)
    one, two = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "again")
    )
    assert one == two


def test_real_shape_trains_merges_and_answers(
    shared: Path, tmp_path: Path, record_property: Any
) -> None:
    base = write_real(shared, tmp_path / "base")
    data = write_rows(tmp_path / "rows.jsonl", conversations(240))
    settings = Settings(
        max_steps=20,
        max_length=2048,
        per_device_train_batch_size=20,
        gradient_accumulation_steps=1,
        learning_rate=1e-3,
    )
    began = time.perf_counter()
    report = train(str(base), data, tmp_path / "adapter", settings, device="cuda")
    seconds = time.perf_counter() - began
    rows = [json.loads(line) for line in (tmp_path / "adapter/metrics.jsonl").open()]
    print(f"\n{torch.cuda.get_device_name()}: whole run {seconds:.1f} s")
    for row in rows:
        print({key: row[key] for key in ("step", "loss", "tokens", "seconds", "memory_gb")})
    assert report.last_loss < 0.9 * report.first_loss
    merged = merge(str(base), tmp_path / "adapter", tmp_path / "merged")
    print(merged)
    adapted = Generator(str(base), adapter=tmp_path / "adapter", device="cuda", dtype="fp32")
    plain = Generator(str(base), device="cuda", dtype="fp32")
    question = "Where is Oslo?"
    answers = [g.prompt(question, max_new_tokens=12).text for g in (plain, adapted)]
    print(answers)
    assert answers[0] != answers[1]
