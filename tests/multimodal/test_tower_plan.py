"""The tower on the meta device: it runs there, and what it is said to take is what it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.vision_kit import ours_from, tiny_vl

from qcore.adapter.targets import targets
from qcore.api.blocks import Media, Tower
from qcore.nn.kernels.launch import PlannedDevice, planning
from qcore.nn.model import Model
from qcore.nn.qlora.lora_layer import Lora
from qcore.planning.meta_model import PlannedBackends, meta_model
from qcore.planning.trace import Trace
from qcore.plugins.resolve_model import identify
from qcore_multimodal.media_batch import PixelBatch

META, CPU = torch.device("meta"), torch.device("cpu")
LORA = Lora(r=4, lora_alpha=8)
GROUPS = ("vision", "merger")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vl(tmp_path_factory.mktemp("vl"))


def planned_model(folder: Path, groups: tuple[str, ...] = GROUPS) -> Model:
    found = identify(str(folder))
    assert found.modality is not None
    found = found.using(found.modality)
    model, _ = meta_model(
        found, torch.bfloat16, targets(found.layout, groups, LORA), PlannedBackends({}, {}, ()),
        quantize=True, device="cuda",
    )  # fmt: skip
    return model


@pytest.mark.parametrize("policy", ["none", "elementwise", "full"])
def test_forward_and_backward_on_meta(folder: Path, policy: str) -> None:
    kernels: list[str] = []
    model = planned_model(folder)
    planned = PlannedDevice(device="cuda", record=lambda name, args, flops: kernels.append(name))
    with planning(planned), torch.device("meta"):
        tower = model.tower
        assert tower is not None
        media = tower.sample(1000, META)
        assert media.values.is_meta
        assert media.values.dtype == torch.uint8
        out = model.media(media, recompute=policy)
        assert out.shape == (len(media.where), 128)
        out.backward(torch.empty_like(out))
    assert kernels.count("frame_attention") == (4 if policy == "full" else 2)
    assert kernels.count("frame_attention_backward") == 2


def saved(model: Model, media: Media, device: str) -> tuple[int, int]:
    """Bytes that a forward keeps, and the most that forward and backward take at once."""
    with Trace(device) as trace:
        out = model.media(media)
        kept = trace.live
        out.backward(torch.ones_like(out))
    return kept, trace.peak


def test_what_is_kept_on_meta_is_what_is_kept(folder: Path) -> None:
    """Against the same tower on the CPU, whose fused kernel keeps as much."""
    real = ours_from(folder, lora=LORA, groups=GROUPS, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    plan = planned_model(folder)
    tower: Tower | None = real.tower
    assert tower is not None
    here, there = tower.sample(700, CPU, generator), tower.sample(700, META)
    assert here.values.shape == there.values.shape
    kept, peak = saved(real.train(), here, "cpu")
    meta_kept, meta_peak = saved(plan.train(), there, "meta")
    assert meta_kept == pytest.approx(kept, rel=0.03)
    assert meta_peak == pytest.approx(peak, rel=0.15)


def test_memory_of_a_large_picture_is_linear(folder: Path) -> None:
    """65,536 patches in one frame: no tensor of it is U x U, planned or counted."""
    model = planned_model(folder)
    tower = model.tower
    assert tower is not None
    peaks = []
    for units in (16384, 65536):
        media = tower.sample(units, META)
        assert media.grids == ((1, units**0.5, units**0.5),)
        peaks.append(saved(model, media, "meta")[1] / units)
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[1] < 65536


@pytest.mark.parametrize("units", [1, 4, 5, 100, 1001])
def test_a_sample(folder: Path, units: int) -> None:
    model = ours_from(folder)
    tower = model.tower
    assert tower is not None
    first, second = (tower.sample(units, CPU, torch.Generator().manual_seed(7)) for _ in range(2))
    assert isinstance(first, PixelBatch)
    assert torch.equal(first.values, second.values)
    (grid,) = first.grids
    assert units <= len(first.values) == grid[1] * grid[2] <= 1.5 * units + 3
    assert grid[1] % 2 == grid[2] % 2 == 0
    assert len(first.where) * 4 == len(first.values)
    with torch.no_grad():
        out = model.media(first)
    assert out.shape == (len(first.where), 128)
    assert bool(out.isfinite().all())
    assert len(tower.sample(units, CPU).values) == len(first.values)
