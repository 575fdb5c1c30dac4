"""A trunk whose residual stream is wider than what the head reads: planned, trained, merged."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.cli_kit import here
from support.run_kit import SHORT, start
from support.wide_arch import HIDDEN, STREAMS, checkpoint, install

from qcore.adapter.targets import targets
from qcore.api.blocks import Packed
from qcore.config.settings import Settings
from qcore.merging.merge import merge
from qcore.nn.load import load
from qcore.nn.model import Model
from qcore.nn.qlora.lora_layer import Lora
from qcore.planning.gpus import CARDS
from qcore.planning.planner import Planner
from qcore.planning.trace import Trace
from qcore.plugins.resolve_model import identify

CPU = torch.device("cpu")
EVERY = ("none", "elementwise", "full")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(install(tmp_path_factory.mktemp("site"))))
        yield checkpoint(tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = ("red", "green and blue", "a b c", "the end")
    path.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": f"say {text}"},
                                     {"role": "assistant", "content": text}]}) + "\n"
            for text in texts
        )
    )  # fmt: skip
    return path


def measured(folder: Path, settings: Settings, lengths: tuple[int, ...], policy: str) -> int:
    """The most that tensors of a forward and backward take, over what was there before."""
    found = identify(str(folder))
    lora = targets(found.layout, settings.target_groups, Lora(r=settings.r, lora_alpha=8))
    model = Model(
        found.decision.architecture, found.checkpoint.config, found.layout, torch.float32, lora
    )
    load(model, found.layout, found.checkpoint, device=CPU, quantize=True)
    for name, module in model.adapters():
        module.reset_lora(name, 0, CPU)
    for _, parameter in model.trainable():
        parameter.grad = torch.zeros_like(parameter)
    model.train()
    with Trace("cpu") as trace:
        ids = [torch.arange(length) for length in lengths]
        batch = Packed.of(ids, ids)
        gc.collect()
        trace.mark()
        loss = model.loss(batch, recompute=policy)
        torch.autograd.backward(loss / batch.supervised().numel())
    return trace.peak


@pytest.mark.parametrize("policy", EVERY)
def test_the_plan_is_what_a_step_takes(folder: Path, policy: str) -> None:
    settings, lengths = Settings(r=4, dtype="fp32"), (200, 57)
    found = identify(str(folder))
    planner = Planner(found, settings, None)
    assert planner.measure.width == STREAMS * HIDDEN
    plan = planner.plan(lengths, (policy,) * len(planner.measure.kinds))
    predicted = sum(plan.memory.get(term, 0) for term in ("batch", "activations", "workspace"))
    taken = measured(folder, settings, lengths, policy)
    assert abs(predicted - taken) <= 0.02 * taken + 4096


def test_offload_counts_the_stream_s_bytes(folder: Path) -> None:
    planner = Planner(identify(str(folder)), Settings(r=4), CARDS[0])
    assert planner._input((64,)) == 64 * STREAMS * HIDDEN * 2


def test_it_is_planned_trained_and_merged(
    folder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = here(capsys, "plan", folder, "--max-length", 64, "--gpu", "H100", "--json")
    assert planned.code == 0, planned.err
    report = start(folder, rows, tmp_path / "out", SHORT | {"max_steps": 2, "recompute": "full"})
    assert report.steps == 2
    merge(str(folder), tmp_path / "out", tmp_path / "merged")
    before, after = (
        load_file(path / "model.safetensors") for path in (folder, tmp_path / "merged")
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".up." in name or ".down." in name}
