"""The whole model with its tower against the stock vision-language classes, from one folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.blocks_kit import relative
from support.e2e_kit import figure, ours, pairs, random_b, wanted, wrapped
from support.vision_kit import Row, ours_from, packed, row_of, stock_of, stock_vl, tiny_vl
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from qcore.api.blocks import Packed
from qcore.nn.model import Model
from qcore.nn.qlora.lora_layer import Lora
from qcore.plugins.resolve_model import identify

KINDS = ("dense", "moe")
#: What the groups `vision` and `merger` are to stock PEFT.
TARGETS = r".*visual\.(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.linear_fc[12])|merger\.linear_fc[12])"
#: Text alone; an image; several of different sizes with text between; videos, odd and even.
SAID: list[list[Any]] = [
    [33],
    [3, (1, (1, 4, 6)), 9],
    [(1, (1, 2, 2)), 1, (1, (1, 8, 4)), 5, (1, (1, 2, 10)), 2],
    [4, (2, (3, 4, 2)), 6, (1, (1, 6, 6)), 3, (2, (2, 2, 2)), 1],
]


#: Two float32 computations differ by the rounding of both: on one processor with AVX-512 ours was
#: 7.3e-6 off float64 and transformers' 6.9e-6, in opposite directions.
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a kind, written once."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = stock_vl(tmp_path_factory.mktemp(kind), moe=kind == "moe")
        return made[kind]

    return get


def rows_of(folder: Path, said: Sequence[list[Any]] = SAID) -> list[Row]:
    config = json.loads((folder / "config.json").read_text())
    return [row_of(config, one, seed) for seed, one in enumerate(said)]


def gap(mine: Tensor, theirs: Tensor) -> float:
    return float((mine - theirs).detach().abs().max())


def stock_logits(model: Any, rows: Sequence[Row], positions: Any) -> list[Tensor]:
    """Each row alone."""
    return [model(**row.stock(positions), use_cache=False).logits[0] for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_logits(base: Callable[[str], Path], kind: str) -> None:
    folder = base(kind)
    stock, model, rows = stock_of(folder, moe=kind == "moe"), ours_from(folder), rows_of(base(kind))
    with torch.no_grad():
        theirs = torch.cat(stock_logits(stock, rows, stock.model))
        alone = torch.cat([model.logits(packed([row], stock.model)) for row in rows])
        together = model.logits(packed(rows, stock.model))
    figure(f"{kind}: logits {gap(together, theirs):.1e} of {float(theirs.abs().max()):.2f}")
    assert 0.3 < float(theirs.abs().max()) < 1
    assert gap(alone, theirs) <= ROUNDING
    assert gap(together, theirs) <= ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_logits_depend_on_what_is_seen(base: Callable[[str], Path], kind: str) -> None:
    folder = base(kind)
    stock, model = stock_of(folder, moe=kind == "moe"), ours_from(folder)
    (row,) = rows_of(folder, [SAID[1]])
    pack = packed([row], stock.model)
    with torch.no_grad():
        seen = model.logits(pack)
        assert pack.media is not None
        pack.media.values = -pack.media.values
        other = model.logits(pack)
    first = int(pack.media.where[0])
    assert gap(seen[:first], other[:first]) <= 1e-6
    assert gap(seen[-1], other[-1]) > 1e-3


def stock_loss(logits: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    every = zip(logits, targets, strict=True)
    losses = [F.cross_entropy(x, y, ignore_index=-100, reduction="sum") for x, y in every]
    return torch.stack(losses).sum()


def targets_of(rows: Sequence[Row]) -> list[Tensor]:
    """About half of the text, no placeholder."""
    found = wanted([row.ids for row in rows])
    for row, target in zip(rows, found, strict=True):
        target[:-1][row.kinds[1:] > 0] = -100
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_what_the_tower_gives(base: Callable[[str], Path], kind: str) -> None:
    folder = base(kind)
    stock, model, rows = stock_of(folder, moe=kind == "moe"), ours_from(folder), rows_of(folder)
    given: list[tuple[int, Tensor]] = []

    def keep(_: Any, args: Any, out: Any) -> None:
        out.pooler_output.retain_grad()
        given.append((len(given), out.pooler_output))

    targets = targets_of(rows)
    stock.model.visual.register_forward_hook(keep)
    stock_loss(stock_logits(stock, rows, stock.model), targets).backward()
    pack = packed(rows, stock.model, targets)
    assert pack.media is not None
    with torch.no_grad():
        features = model.media(pack.media)
    pack.media.features = features.requires_grad_()
    model.loss(pack).backward()
    # The stock class computes the images of a row, then its videos; row 3 has both.
    gradients = [one.grad for _, one in given]
    images, videos = gradients[2], gradients[3]
    assert len(gradients) == 4
    assert images is not None
    assert videos is not None
    theirs = torch.cat([gradients[0], gradients[1], videos[:6], images, videos[6:]])  # type: ignore[list-item]
    assert features.grad is not None
    assert float(theirs.abs().max()) > 1e-3
    figure(f"{kind}: gradient of embeddings {relative(features.grad, theirs):.1e} relative")
    assert relative(features.grad, theirs) <= 1e-4


def both_adapted(folder: Path, kind: str) -> tuple[Any, Model, dict[str, tuple[Tensor, Tensor]]]:
    """Stock PEFT and ours with the same A and B; PEFT's by the weight's canonical name."""
    stock = stock_of(folder, moe=kind == "moe")
    reference = wrapped(stock, r=4, lora_alpha=6, target_modules=TARGETS)
    model = ours_from(folder, lora=Lora(r=4, lora_alpha=6), groups=("vision", "merger"))
    assert model.trains_tower
    random_b(model)
    adapters = dict(model.adapters())
    theirs: dict[str, tuple[Tensor, Tensor]] = {n: (a, b) for n, a, b in pairs(reference, "vl")}
    assert theirs.keys() == adapters.keys()
    assert len(theirs) == 4 + 2
    with torch.no_grad():
        for name, (a, b) in theirs.items():
            a.copy_(adapters[name].lora_A)
            b.copy_(adapters[name].lora_B)
    return reference, model, theirs


def worst_gradient(model: Model, theirs: dict[str, tuple[Tensor, Tensor]]) -> float:
    adapters, worst = dict(model.adapters()), 0.0
    for name, sides in theirs.items():
        module = adapters[name]
        for mine, parameter in zip((module.lora_A, module.lora_B), sides, strict=True):
            assert mine is not None
            assert mine.grad is not None, name
            assert parameter.grad is not None
            assert float(parameter.grad.abs().max()) > 0, name
            worst = max(worst, relative(mine.grad, parameter.grad))
    return worst


@pytest.mark.parametrize("policy", ["none", "elementwise", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_lora_of_the_tower_against_peft(
    base: Callable[[str], Path], kind: str, policy: str
) -> None:
    """The tower alone, so that nothing of the text's rounding is in its gradients."""
    folder = base(kind)
    reference, model, theirs = both_adapted(folder, kind)
    pack = packed(rows_of(folder), reference.base_model.model.model)
    assert pack.media is not None
    visual = reference.base_model.model.model.visual
    expected = visual(pack.media.values, grid_thw=torch.tensor(pack.media.grids)).pooler_output
    found = model.train().media(pack.media, recompute=policy)
    assert relative(found, expected) <= 1e-5
    factor = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    (expected * factor).sum().backward()
    (found * factor).sum().backward()
    worst = worst_gradient(model, theirs)
    figure(f"{kind} {policy}: tower {relative(found, expected):.1e}, gradients {worst:.1e}")
    assert worst <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_lora_of_the_model_against_peft(base: Callable[[str], Path], kind: str) -> None:
    """Through the text to the tower: logits, loss and the gradient of every pair."""
    folder = base(kind)
    reference, model, theirs = both_adapted(folder, kind)
    plain, rows = reference.base_model.model.model, rows_of(folder)
    targets = targets_of(rows)
    logits = stock_logits(reference, rows, plain)
    expected = stock_loss(logits, targets)
    expected.backward()
    pack = packed(rows, plain, targets)
    with torch.no_grad():
        assert gap(model.logits(pack), torch.cat(logits)) <= ROUNDING
    found = model.train().loss(packed(rows, plain, targets), recompute="full")
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    worst = worst_gradient(model, theirs)
    figure(f"{kind}: {len(theirs)} pairs, gradients {worst:.1e} relative")
    assert worst <= 1e-4


def test_text_alone_leaves_a_trained_tower_out(base: Callable[[str], Path]) -> None:
    """A batch without media runs; what the tower's adapters then have is for the loop to say."""
    folder = base("dense")
    model = ours_from(folder, lora=Lora(r=2, lora_alpha=4), groups=("vision", "merger", "attn"))
    ids = torch.arange(20)
    loss = model.train().loss(Packed.of([ids], [ids.roll(-1)]))
    loss.backward()
    given = {name: module.lora_B for name, module in model.adapters()}
    assert all(b is not None and b.grad is None for n, b in given.items() if "visual" in n)
    assert all(b is not None and b.grad is not None for n, b in given.items() if "visual" not in n)


def test_a_frozen_tower_builds_no_graph(base: Callable[[str], Path]) -> None:
    folder = base("dense")
    model = ours_from(folder, lora=Lora(r=2, lora_alpha=4), groups=("attn",))
    assert not model.trains_tower
    stock = stock_of(folder)
    pack = packed(rows_of(folder, SAID[1:2]), stock.model)
    assert pack.media is not None
    assert model.media(pack.media).grad_fn is None


def test_a_run_of_text_holds_no_tower(base: Callable[[str], Path]) -> None:
    model = ours(base("dense"))
    assert model.tower is None
    assert not [name for name, _ in model.named_parameters() if "visual" in name]


@pytest.mark.parametrize("kind", KINDS)
def test_the_tiny_checkpoint(tmp_path: Path, kind: str) -> None:
    """Every tensor is explained, its token ids are its tokenizer's, its template shows media."""
    folder = tiny_vl(tmp_path, moe=kind == "moe")
    found = identify(str(folder))
    assert not found.layout.carried
    assert not found.layout.absent
    assert found.decision.generation.name == "3.5"
    config = AutoConfig.from_pretrained(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.token_to_id("<|image_pad|>") == config.image_token_id
    assert tokenizer.token_to_id("<|video_pad|>") == config.video_token_id
    assert tokenizer.token_to_id("<|vision_start|>") == config.vision_start_token_id
    assert tokenizer.token_to_id("<|vision_end|>") == config.vision_end_token_id
    assert config.vision_end_token_id < config.text_config.vocab_size
    content = [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "and"},
        {"type": "video", "video": "b.mp4"},
    ]
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False
    )
    assert text == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>and"
        "<|vision_start|><|video_pad|><|vision_end|><|im_end|>\n"
    )
    for name, key in (("preprocessor", "image"), ("video_preprocessor", "video")):
        written = json.loads((folder / f"{name}_config.json").read_text())
        assert written[f"{key}_processor_type"]
        assert written["merge_size"] == config.vision_config.spatial_merge_size
