"""Random packs, and the logits and gradients of a pack and of its rows alone.

This file decides which rows a pack holds (`rows_of`), builds a model with LoRA and a vision tower
(`model_of`), and computes relative errors (`errors`). Rows pass through `training.collate`, as in
a run. The bounds are up to the tests.

Rounding can decide which experts a token is routed to where two scores are close, and then the
gradients are those of another function. `Routes` records the experts of every token, and makes
another forward pass use the same experts.
"""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from support.gradient_cases import Routes
from support.gradient_slices import routed
from support.vision_kit import Grid, media_of
from torch import Tensor

from qcore.adapter.targets import targets
from qcore.api.blocks import Media
from qcore.api.media import Placed
from qcore.data.rendering.masking import IGNORED, Example
from qcore.nn.kernels.registry import choose, installed
from qcore.nn.load import load
from qcore.nn.model import Model, ops_of
from qcore.nn.qlora.lora_layer import Lora
from qcore.plugins.resolve_model import identify
from qcore.training.collate import Batches
from qcore_multimodal.plugin import VISION

PACKS = 200
VOCABULARY = 400
GROUPS = {
    "dense": ("attn", "gdn", "mlp", "vision", "merger"),
    "moe": ("attn", "gdn", "shared_expert", "experts", "vision", "merger"),
}
#: Around the tile and the chunk of 64 tokens, where a boundary is easily off by one.
BORDERS = (1, 2, 3, 4, 5, 63, 64, 65, 127, 128, 129, 191, 193)


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A `Medium` with random values: ``t x h x w`` units, and an embedding for every four."""

    grid: Grid
    seed: int
    kind: str = "image"

    @property
    def digest(self) -> str:
        return f"{self.grid} {self.seed}"

    @property
    def units(self) -> int:
        t, h, w = self.grid
        return t * h * w

    @property
    def tokens(self) -> int:
        return self.units // 4


class Images:
    """The part of a media reader that `Batches` uses."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.section = config["vision_config"]

    def batch(self, media: Sequence[Image], where: Tensor) -> Media:
        values = [media_of(self.section, [image.grid], image.seed).values for image in media]
        grids = tuple(image.grid for image in media)
        return Media(values=torch.cat(values), grids=grids, where=where)


# -- rows


def rows_of(pack: int) -> list[Example]:
    """The rows of a pack; two of five packs have rows with images."""
    draw = random.Random(f"pack {pack}")
    images = (pack + pack // 5) % 5 in (1, 3)
    return [
        _row(draw, length, images and draw.random() < 0.5, 1000 * pack + number)
        for number, length in enumerate(_lengths(draw, pack % 5))
    ]


def _lengths(draw: random.Random, shape: int) -> list[int]:
    """Text tokens of each row: few rows, tile borders, many rows, single tokens, or a mixture."""
    if shape == 0:
        return [draw.randint(1, 300) for _ in range(draw.randint(2, 4))]
    if shape == 1:
        return [draw.choice(BORDERS) for _ in range(draw.randint(2, 6))]
    if shape == 2:
        return [draw.randint(1, 24) for _ in range(draw.randint(12, 32))]
    if shape == 3:
        singles = [1] * draw.randint(1, 5)
        return [*singles, draw.randint(150, 400), *singles, draw.randint(2, 40), 1]
    mixed = [draw.choice((1, draw.randint(2, 9), draw.randint(10, 120))) for _ in range(7)]
    return mixed[: draw.randint(2, 7)]


def _row(draw: random.Random, length: int, images: bool, seed: int) -> Example:
    """Random tokens; about two in three have a label, placeholders of images never."""
    ids = [draw.randrange(VOCABULARY) for _ in range(length)]
    trained = [draw.random() < 0.67 for _ in range(length)]
    media: tuple[Image, ...] = ()
    placed = None
    if images:
        grids = [_grid(draw) for _ in range(draw.randint(1, 2))]
        media = tuple(Image(grid=grid, seed=seed + 17 * n) for n, grid in enumerate(grids))
        at = sorted(draw.randint(0, length) for _ in media)
        ids, trained, placed = _placed(ids, trained, media, at)
    labels = [n if supervised else IGNORED for n, supervised in zip(ids, trained, strict=True)]
    return Example(
        ids=array("i", ids), labels=array("i", labels), line=1, turns=1,
        supervised=sum(trained[1:]), media=media, placed=placed,
    )  # fmt: skip


def _grid(draw: random.Random) -> Grid:
    return draw.choice((1, 1, 2)), 2 * draw.randint(1, 4), 2 * draw.randint(1, 4)


def _placed(
    ids: Sequence[int], trained: Sequence[bool], media: Sequence[Image], at: Sequence[int]
) -> tuple[list[int], list[bool], Placed]:
    """Insert the placeholders of each image before the text token `at`."""
    out_ids: list[int] = []
    out_trained: list[bool] = []
    where: list[int] = []
    positions: list[tuple[int, int, int]] = []
    begin = 0
    for end, image in zip((*at, len(ids)), (*media, None), strict=True):
        out_ids += ids[begin:end]
        out_trained += trained[begin:end]
        first = _next(positions)
        positions += [(first + n,) * 3 for n in range(end - begin)]
        begin = end
        if image is not None:
            where += range(len(out_ids), len(out_ids) + image.tokens)
            out_ids += [VOCABULARY] * image.tokens
            out_trained += [False] * image.tokens
            positions += _within(image.grid, _next(positions))
    axes = tuple(array("i", axis) for axis in zip(*positions, strict=True))
    return out_ids, out_trained, Placed(where=array("i", where), positions=axes)


def _next(positions: Sequence[tuple[int, int, int]]) -> int:
    return 1 + max(map(max, positions), default=-1)


def _within(grid: Grid, first: int) -> Iterator[tuple[int, int, int]]:
    t, h, w = grid[0], grid[1] // 2, grid[2] // 2
    return ((first + a, first + b, first + c) for a in range(t) for b in range(h) for c in range(w))


# -- models


def model_of(
    folder: Path,
    kind: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device = torch.device("cpu"),  # noqa: B008  # immutable
    quantize: bool = False,
) -> Model:
    """A model with its tower and LoRA on every group, B not zero; on a GPU with kernels."""
    text = identify(str(folder))
    model_and_tower = text.using(VISION)
    architecture, layout = model_and_tower.decision.architecture, model_and_tower.layout
    config = model_and_tower.checkpoint.config
    chosen = None
    if device.type == "cuda":
        used = ops_of(architecture, config, layout, VISION)
        chosen = choose(installed(model_and_tower.plugins), device, {}, used)
        of_text = ops_of(architecture, config, text.layout).ops
        assert all(chosen.backends[op] != "reference" for op in of_text), chosen.lines()
    lora = targets(layout, GROUPS[kind], Lora(r=8, lora_alpha=16))
    model = Model(architecture, config, layout, dtype, lora, chosen, modality=VISION)
    load(model, layout, model_and_tower.checkpoint, device=device, quantize=quantize)
    draw = torch.Generator().manual_seed(3)
    for name, module in model.adapters():
        module.reset_lora(name, 0, device)
        assert module.lora_B is not None
        module.lora_B.data.copy_(0.05 * torch.randn(module.lora_B.shape, generator=draw))
    return model.train()


# -- what is compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a model computes for some rows.

    Attributes:
        logits: ``[t, V]`` of each row.
        loss: the summed loss of all rows.
        gradients: of that loss, by name of the parameter; absent where autograd left ``None``.
    """

    logits: list[Tensor]
    loss: float
    gradients: dict[str, Tensor]


def together(batches: Batches, rows: Sequence[Example], routes: Routes | None = None) -> Outcome:
    """The rows as one pack."""
    return _outcome(batches, [rows], routes)


def alone(batches: Batches, rows: Sequence[Example], routes: Routes | None = None) -> Outcome:
    """Each row as its own pack; autograd sums the gradients."""
    return _outcome(batches, [[row] for row in rows], routes)


def _outcome(
    batches: Batches, packs: Sequence[Sequence[Example]], routes: Routes | None
) -> Outcome:
    """One forward pass for each pack: the logits come from the hidden states of the loss."""
    model = batches.model
    logits: list[Tensor] = []
    total = 0.0
    model.zero_grad(set_to_none=True)
    with routed(model, routes), recorded(model) as hidden:
        for rows in packs:
            batch = batches.of(rows)
            loss = model.loss(batch)
            if len(batch.supervised()):
                torch.autograd.backward(loss)
            total += float(loss.detach())
            scores = torch.nn.functional.linear(hidden.pop(), model.head).float()
            logits += scores.split([len(row.ids) for row in rows])
            if routes is not None:
                routes.at += len(batch.ids)
    gradients = {name: p.grad.float() for name, p in model.trainable() if p.grad is not None}
    return Outcome(logits=logits, loss=total, gradients=gradients)


class recorded:  # noqa: N801  # a context manager
    """Records the hidden states that the head reads, detached."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.states: list[Tensor] = []

    def __enter__(self) -> list[Tensor]:
        inner: Callable[..., Tensor] = self.model.hidden

        def hidden(*args: Any, **kwargs: Any) -> Tensor:
            state = inner(*args, **kwargs)
            self.states.append(state.detach())
            return state

        object.__setattr__(self.model, "hidden", hidden)
        return self.states

    def __exit__(self, *_: object) -> None:
        object.__delattr__(self.model, "hidden")


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Relative errors of an outcome.

    Attributes:
        logits: norm of the error of all logits.
        token: largest error of a logit, relative to the largest logit of its token; the maximum
            over tokens.
        loss: error of the loss.
        gradients: norm of the error of all gradients.
        worst: norm of the error of a parameter's gradient; the maximum over parameters. A norm
            below a thousandth of that of all gradients counts as this thousandth.
    """

    logits: float
    token: float
    loss: float
    gradients: float
    worst: float

    def __str__(self) -> str:
        return (
            f"logits {self.logits:.1e}, worst token {self.token:.1e}, loss {self.loss:.1e}, "
            f"gradients {self.gradients:.1e}, worst parameter {self.worst:.1e}"
        )


def errors(actual: Outcome, expected: Outcome) -> Errors:
    """Relative errors of `actual`; an absent gradient counts as zero.

    If the only row with images has no target, the pack computes zeros for the tower, and autograd
    leaves ``None`` for the row alone.
    """
    assert [len(row) for row in actual.logits] == [len(row) for row in expected.logits]
    logits, reference = torch.cat(actual.logits), torch.cat(expected.logits)
    tokens = (logits - reference).abs().amax(1) / reference.abs().amax(1)
    assert bool(tokens.isfinite().all())
    zero = torch.zeros((), device=logits.device)
    names = {*actual.gradients, *expected.gradients}
    pairs = [(actual.gradients.get(n, zero), expected.gradients.get(n, zero)) for n in names]
    off = torch.stack([(a - b).norm() for a, b in pairs] or [zero])
    norms = torch.stack([b.norm() for _, b in pairs] or [zero])
    whole = norms.norm().clamp_min(1e-9)
    return Errors(
        logits=float((logits - reference).norm() / reference.norm()),
        token=float(tokens.max()),
        loss=abs(actual.loss - expected.loss) / max(abs(expected.loss), 1e-6),
        gradients=float(off.norm() / whole),
        worst=float((off / norms.clamp_min(1e-3 * float(whole))).max()),
    )


def over(packs: Sequence[Errors], reduce: Callable[[list[float]], float]) -> Errors:
    """Each error reduced over packs, by ``max`` or by ``median``."""
    names = (field.name for field in fields(Errors))
    return Errors(**{name: reduce([getattr(pack, name) for pack in packs]) for name in names})


def differing(first: Routes, second: Routes) -> int:
    """In how many pairs of token and layer two forward passes chose different experts."""
    pairs = zip(first.by_layer(), second.by_layer(), strict=True)
    return sum(int((a.sort(1)[0] != b.sort(1)[0]).any(1).sum()) for a, b in pairs)
