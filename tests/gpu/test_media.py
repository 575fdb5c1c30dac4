"""Media on a CUDA device: a tower in 4 bit, decoding after pictures, and a real tower's plan."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.media_kit import picture
from support.real_shapes import write_real
from support.vision_kit import Row, row_of
from torch import Tensor

from qcore.adapter.targets import targets
from qcore.api.blocks import Media, Packed
from qcore.config.settings import Settings
from qcore.inference.decoder import Decoder, Way
from qcore.inference.generate import Generator
from qcore.merging.merge import merge
from qcore.nn.device import DTYPES
from qcore.nn.kernels.registry import choose, installed
from qcore.nn.load import load
from qcore.nn.model import Model, ops_of
from qcore.nn.qlora.linear import Linear
from qcore.nn.qlora.lora_layer import Lora
from qcore.plugins.resolve_model import identify
from qcore.training.train import train
from qcore_multimodal.plugin import VISION
from qcore_multimodal.tiny import add_tower
from qcore_qwen35.tiny import write as write_tiny

pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TOWER = ("vision", "merger")
ALL = ("attn", "gdn", "mlp", *TOWER)
#: Head sizes of the published models, few of everything else.
TEXT: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1024, "head_dim": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip
#: The 9B's tower. Its inner size is no multiple of a 4-bit block of 64.
VISION_9B = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
    "num_position_embeddings": 2304,
}  # fmt: skip
SAID: list[Any] = [[5, (1, (1, 8, 6)), 9, (2, (3, 4, 4)), 7], [33], [(1, (1, 22, 34)), 12]]


@pytest.fixture(autouse=True)
def _needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "base"
    write_tiny(folder, **TEXT)
    add_tower(folder, **VISION_9B)
    return folder


def model_of(folder: Path, device: torch.device, dtype: str, *, nf4: bool) -> Model:
    """The whole model with LoRA on everything; on a card with the kernels that it would choose."""
    found = identify(str(folder)).using(VISION)
    if nf4:
        found = found.quantizing(TOWER)
    architecture, config, layout = (
        found.decision.architecture,
        found.checkpoint.config,
        found.layout,
    )
    chosen = None
    if device.type == "cuda":
        used = ops_of(architecture, config, layout, VISION)
        chosen = choose(installed(found.plugins), device, {}, used)
    adapters = targets(layout, ALL, Lora(r=8, lora_alpha=16))
    model = Model(architecture, config, layout, DTYPES[dtype], adapters, chosen, modality=VISION)
    load(model, layout, found.checkpoint, device=device, quantize=nf4)
    draw = torch.Generator().manual_seed(3)
    for name, module in model.adapters():
        module.reset_lora(name, 0, device)
        assert module.lora_B is not None
        module.lora_B.data.copy_(0.02 * torch.randn(module.lora_B.shape, generator=draw))
    return model


def pack_of(folder: Path) -> Packed:
    """Pictures, a video and text in one pack; positions count on, which both sides are given."""
    config = json.loads((folder / "config.json").read_text())
    rows: list[Row] = [row_of(config, one, seed) for seed, one in enumerate(SAID)]
    labels = []
    for row in rows:
        label = torch.roll(row.ids, -1)
        label[torch.roll(row.kinds, -1) > 0] = -100
        label[-1] = -100
        labels.append(label)
    pack = Packed.of([row.ids for row in rows], labels)
    media = [one for row in rows for one in row.media]
    pack.media = Media(
        values=torch.cat([one[2] for one in media]),
        grids=tuple(one[1] for one in media),
        where=torch.cat([row.kinds for row in rows]).nonzero().squeeze(1),
    )
    return pack


def gradients(model: Model, pack: Packed, recompute: str = "full") -> dict[str, Tensor]:
    loss, count = model.train().loss(pack, recompute=recompute), len(pack.supervised())
    torch.autograd.backward(loss / count)
    found = {n: p.grad.double().cpu() for n, p in model.trainable() if p.grad is not None}
    for _, parameter in model.trainable():
        parameter.grad = None
    return found


def read_back(model: Model, held: Model) -> None:
    """Give `model` the weights that `held` has in 4 bit."""
    theirs = dict(held.named_modules())
    count = 0
    for name, module in model.named_modules():
        other = theirs[name]
        if isinstance(module, Linear) and isinstance(other, Linear) and other.four_bit:
            assert module.weight is not None
            module.weight.data.copy_(other.dense().to(module.weight.dtype))
            count += ".visual." in f".{name}." or name.startswith("tower.")
    assert count == 2 * 4 + 2, "every map of the tower is in 4 bit"


def error(found: dict[str, Tensor], wanted: dict[str, Tensor], part: str) -> float:
    names = [name for name in wanted if ("tower" in name or "visual" in name) == (part == "tower")]
    assert names
    one, two = (torch.cat([each[name].flatten() for name in names]) for each in (found, wanted))
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_tower_in_4_bit(base: Path, recompute: str, record_property: Any) -> None:
    """Kernels beside the same weights, read back, in float32 on the CPU, and in bf16 there."""
    pack = pack_of(base)
    held = model_of(base, CUDA, "bf16", nf4=True)
    exact, plain = (model_of(base, CPU, dtype, nf4=False) for dtype in ("fp32", "bf16"))
    for one in (exact, plain):
        read_back(one, held)
    wanted = gradients(exact, pack)
    found = gradients(held, pack.to(CUDA), recompute)
    usual = gradients(plain, pack)
    assert found.keys() == wanted.keys()
    for part in ("tower", "text"):
        mine, other = error(found, wanted, part), error(usual, wanted, part)
        print(f"\n{recompute}, {part}: on the card {mine:.4f}, bf16 of the CPU {other:.4f}")
        assert mine <= 1.25 * other + 2e-3
    assert all(bool(one.any()) for one in found.values())


def test_in_float32_the_card_agrees_with_the_cpu(base: Path) -> None:
    pack = pack_of(base)
    here, there = (model_of(base, device, "fp32", nf4=False) for device in (CPU, CUDA))
    with torch.no_grad():
        expected, found = here.eval().logits(pack), there.eval().logits(pack.to(CUDA)).cpu()
    assert float((found - expected).norm()) <= 1e-4 * float(expected.norm())
    wanted, mine = gradients(here, pack), gradients(there, pack.to(CUDA))
    assert mine.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert float((mine[name] - gradient).norm()) <= 2e-3 * float(gradient.norm()), name


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_decoding_after_media(base: Path, tmp_path: Path, quantization: str) -> None:
    """Captured steps give the tokens of held ones; in float32 those of the CPU."""
    picture("RGB", 200, 120).save(tmp_path / "one.png")
    picture("RGB", 64, 96, seed=2).save(tmp_path / "two.png")
    media = [("image", tmp_path / name) for name in ("one.png", "two.png")]

    def tokens(device: str, dtype: str, way: Way | None = None) -> tuple[str, ...]:
        generator = Generator(
            str(base), media=True, device=device, dtype=dtype, quantization=quantization
        )
        if way is not None:
            generator.decoder = Decoder(generator.model, CUDA, way)
        elif device == "cuda":
            assert generator.decoder.way is Way.CAPTURED
        asked = ("What is this?", "And what is that, and where?")
        return tuple(generator.prompt(q, media=media, max_new_tokens=40).text for q in asked)

    assert tokens("cuda", "bf16") == tokens("cuda", "bf16", Way.HELD)
    if quantization == "none":
        assert tokens("cuda", "fp32") == tokens("cpu", "fp32")


def written(folder: Path, count: int, sizes: list[tuple[int, int]]) -> Path:
    """Rows of a picture and a word that only the picture tells."""
    colours = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
    folder.mkdir()
    lines = []
    for number in range(count):
        word = list(colours)[number % 3]
        noise = picture("RGB", *sizes[number % len(sizes)], seed=number)
        flat = Image.new("RGB", noise.size, colours[word])
        Image.blend(noise, flat, 0.7).save(folder / f"{number}.png")
        parts = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "Colour?"}]
        said = [{"role": "user", "content": parts}, {"role": "assistant", "content": word}]
        lines.append(json.dumps({"messages": said}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def real(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 0.8B with the 9B's tower."""
    vision = VISION_9B | {"depth": 27, "out_hidden_size": 1024}
    return write_real(shared, tmp_path_factory.mktemp("real") / "base", vision=vision)


@pytest.mark.parametrize("held_as", ["16 bit", "4 bit"])
@pytest.mark.parametrize("groups", [ALL[:3], ALL], ids=["frozen", "trained"])
def test_a_real_tower(real: Path, tmp_path: Path, groups: tuple[str, ...], held_as: str) -> None:
    """Trains, as much memory as planned; what is merged answers as base and adapter do."""
    gc.collect()
    torch.cuda.empty_cache()
    stray = torch.cuda.memory_allocated() / 1e9
    data = written(tmp_path / "rows", 24, [(640, 480), (1024, 1024), (300, 500)])
    settings = Settings(
        max_steps=12, per_device_train_batch_size=4, gradient_accumulation_steps=1,
        learning_rate=1e-3, max_length=2048, target_groups=groups, warmup_ratio=0.0,
        quantize_groups=TOWER if held_as == "4 bit" else (), media_cache_gb=0.0,
    )  # fmt: skip
    report = train(str(real), data, tmp_path / "adapter", settings, device="cuda")
    steps = [json.loads(line) for line in (tmp_path / "adapter/metrics.jsonl").open()]
    plan = report.plan
    took = max(step["memory_gb"] for step in steps) - stray
    planned = plan["peak_bytes"] / 1e9
    print(f"\n{held_as}, {len(groups)} groups: {planned:.3f} GB planned, {took:.3f} GB;")
    print(f"loss {report.first_loss:.3f} to {report.last_loss:.3f}; {steps[-1]['seconds']:.3f} s")
    assert report.last_loss < 0.7 * report.first_loss
    assert planned == pytest.approx(took, rel=0.1)
    merge(str(real), tmp_path / "adapter", tmp_path / "merged")
    seen = [("image", tmp_path / "rows" / "0.png")]
    one = Generator(
        str(real), adapter=tmp_path / "adapter", media=True, device="cuda", dtype="fp32"
    )
    two = Generator(str(tmp_path / "merged"), media=True, device="cuda", dtype="fp32")
    said = [g.prompt("Colour?", media=seen, max_new_tokens=6).text for g in (one, two)]
    print(said)
    assert said[0] == said[1]
