"""Towers of transformers and ours on the same random weights, and media of generated layouts."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from support.blocks_kit import GivenWeights
from support.e2e_kit import CPU, MOE_STOCK, STOCK, resave, write_stock
from torch import Tensor, nn
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5VisionConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeVisionConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeVisionModel

from qcore.adapter.targets import targets
from qcore.api.blocks import Media, Packed
from qcore.nn.load import load
from qcore.nn.model import Model
from qcore.nn.qlora.lora_layer import Lora
from qcore.plugins.resolve_model import identify
from qcore_multimodal.plugin import VISION
from qcore_multimodal.tiny import add_tower
from qcore_multimodal.tower import Tower
from qcore_qwen35.tiny import write

Grid = tuple[int, int, int]
CLASSES = {
    "dense": (Qwen3_5VisionConfig, Qwen3_5VisionModel),
    "moe": (Qwen3_5MoeVisionConfig, Qwen3_5MoeVisionModel),
}
#: No two sizes alike; the square of positions is smaller than some frames, larger than others.
SECTION: dict[str, Any] = {
    "depth": 2, "hidden_size": 48, "intermediate_size": 88, "num_heads": 4, "in_channels": 3,
    "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 40,
    "num_position_embeddings": 36, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip


class Bare(nn.Module):
    """A map without a bias of its own, whose weight is trained."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


class Given(GivenWeights):
    """A `BuildContext` over the state dict of a tower; everything is trainable."""

    def linear(self, name: str) -> nn.Module:
        return Bare(self.weights[f"{name}.weight"])


@dataclass
class Towers:
    """The reference and ours; they share the memory of the weights, not the gradients."""

    theirs: nn.Module
    ours: Tower
    section: Mapping[str, Any]

    def reference(self, media: Media) -> Tensor:
        """``[n, H]``, all media in one call, as the stock class does it."""
        values = media.values.to(self.ours.dtype)
        out = self.theirs(values, grid_thw=torch.tensor(media.grids))
        found: Tensor = out.pooler_output
        return found

    def media(self, grids: Sequence[Grid], seed: int = 0) -> Media:
        """Random numbers in a layout."""
        return media_of(self.section, grids, seed)


def towers(
    kind: str = "dense", *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Towers:
    """Both on random weights, no norm or bias at its initial value."""
    section = SECTION | changes
    config_class, model_class = CLASSES[kind]
    config = config_class(**section)
    config._attn_implementation = "eager"
    theirs = model_class(config).eval()
    randomise(theirs, seed)
    theirs.to(dtype)
    # Its frequencies are no weights: `from_pretrained` leaves them in float32.
    theirs.rotary_pos_emb = type(theirs.rotary_pos_emb)(config)
    context = Given({"vision_config": section}, theirs.state_dict(), dtype)
    return Towers(theirs, Tower(context), section)


def randomise(tower: nn.Module, seed: int = 0) -> None:
    """Values on which every rule of the tower matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            fill(name, parameter, generator)


def fill(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Random values of one tensor, by its name."""
    if parameter.dim() == 1:
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.normal_(centre, 0.3, generator=generator)
    elif "pos_embed" in name:
        parameter.normal_(0, 0.5, generator=generator)
    else:
        parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)


def media_of(section: Mapping[str, Any], grids: Sequence[Grid], seed: int = 0) -> Media:
    """Numbers between -1 and 1, as the processor makes them, for some grids."""
    generator = torch.Generator().manual_seed(seed)
    units = sum(t * h * w for t, h, w in grids)
    size = section["in_channels"] * section["temporal_patch_size"] * section["patch_size"] ** 2
    return Media(
        values=torch.rand(units, size, generator=generator) * 2 - 1,
        grids=tuple(grids),
        where=torch.arange(units // section["spatial_merge_size"] ** 2),
    )


def run(tower: Tower, media: Media) -> Tensor:
    """What core does, without recompute."""
    x = tower.embed(media)
    for layer in tower.layers:
        x = layer(x, media)
    return x


#: The smallest, thin ones, a large one; then what the generator draws.
_CHOSEN: list[list[Grid]] = [
    [(1, 2, 2)],
    [(1, 2, 2), (1, 2, 2)],
    [(1, 2, 60)],
    [(1, 60, 2)],
    [(1, 40, 46)],
    [(5, 4, 6)],
    [(4, 6, 4), (1, 4, 6)],
    [(1, 4, 6), (1, 8, 2), (1, 6, 4), (1, 2, 2), (1, 4, 4)],
    [(3, 2, 2), (1, 12, 14), (2, 4, 4)],
    [(1, 6, 6)],
]


def layouts(count: int = 30, seed: int = 6) -> list[list[Grid]]:
    """Grids of some media each, generated beyond the first ten."""
    draw = random.Random(seed)
    found = list(_CHOSEN)
    while len(found) < count:
        found.append(
            [
                (
                    draw.choice((1, 1, 2, 3, 7)),
                    2 * draw.randint(1, 7),
                    2 * draw.randint(1, 7),
                )
                for _ in range(draw.randint(1, 6))
            ]
        )
    return found


def ours_from(
    folder: Path,
    *,
    lora: Lora | None = None,
    groups: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    quantize: bool = False,
    seed: int = 42,
) -> Model:
    """Our model with its tower, as a run that uses media loads it."""
    found = identify(str(folder))
    assert found.modality is not None
    assert found.modality.name == VISION.name
    found = found.using(found.modality)
    chosen = targets(found.layout, groups, lora) if lora else {}
    architecture, config = found.decision.architecture, found.checkpoint.config
    model = Model(architecture, config, found.layout, dtype, chosen, modality=VISION)
    load(model, found.layout, found.checkpoint, device=CPU, quantize=quantize)
    for name, module in model.adapters():
        module.reset_lora(name, seed, CPU)
    return model


def stock_of(folder: Path, *, moe: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """The stock vision-language class from the folder."""
    built = (MOE_STOCK if moe else STOCK)["vl"]
    return built.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def tiny_vl(folder: Path, *, moe: bool = False, seed: int = 0, **vision: Any) -> Path:
    """The architecture's tiny checkpoint with the plugin's tiny tower."""
    write(folder, moe=moe, seed=seed)
    add_tower(folder, seed=seed, **vision)
    return folder


@dataclass
class Row:
    """One document of text, images and videos, as the stock class and as a pack have it.

    Attributes:
        ids: ``[T]``, a placeholder for every embedding of a medium.
        kinds: ``[T]``, 0 text, 1 image, 2 video.
        media: (kind, grid, values) in the order of the text.
    """

    ids: Tensor
    kinds: Tensor
    media: list[tuple[int, Grid, Tensor]]

    def stock(self, model: Any) -> dict[str, Tensor]:
        """Arguments of the stock class; positions are its own."""
        given: dict[str, Any] = {"input_ids": self.ids[None], "mm_token_type_ids": self.kinds[None]}
        for kind, values, grids in (
            (1, "pixel_values", "image_grid_thw"),
            (2, "pixel_values_videos", "video_grid_thw"),
        ):
            mine = [one for one in self.media if one[0] == kind]
            if mine:
                given[values] = torch.cat([one[2] for one in mine])
                given[grids] = torch.tensor([one[1] for one in mine])
        keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
        asked = {key: given[key] for key in keys if key in given}
        given["position_ids"] = model.get_rope_index(**asked)[0]
        return given

    def positions(self, model: Any) -> Tensor:
        """``[3, T]`` of the stock class."""
        return self.stock(model)["position_ids"][:, 0]


def row_of(config: Mapping[str, Any], said: Sequence[int | tuple[int, Grid]], seed: int = 0) -> Row:
    """A document.

    Args:
        config: config.json.
        said: a number of text tokens, or (1 or 2, grid) for an image or a video; every patch in
            time of a video stands between its own start and end, a token of text before it.
        seed: of text and values.
    """
    generator = torch.Generator().manual_seed(seed)
    start, end = config["vision_start_token_id"], config["vision_end_token_id"]
    pads = {1: config["image_token_id"], 2: config["video_token_id"]}
    vision = config["vision_config"]
    ids: list[int] = []
    kinds: list[int] = []
    media: list[tuple[int, Grid, Tensor]] = []

    def text(count: int) -> None:
        ids.extend(torch.randint(250, (count,), generator=generator).tolist())
        kinds.extend([0] * count)

    for one in said:
        if isinstance(one, int):
            text(one)
            continue
        kind, grid = one
        media.append((kind, grid, media_of(vision, [grid], seed + len(media)).values))
        count = grid[1] * grid[2] // vision["spatial_merge_size"] ** 2
        for frame in range(grid[0]):
            if frame:
                text(1)
            ids.extend([start, *[pads[kind]] * count, end])
            kinds.extend([0, *[kind] * count, 0])
    return Row(torch.tensor(ids), torch.tensor(kinds, dtype=torch.int32), media)


def packed(rows: Sequence[Row], stock: Any, targets: Sequence[Tensor] | None = None) -> Packed:
    """The rows as one pack, with the positions of the stock class."""
    pack = Packed.of([row.ids for row in rows], targets)
    pack.positions = torch.cat([row.positions(stock) for row in rows], 1)
    media = [one for row in rows for one in row.media]
    if media:
        where = torch.cat([row.kinds for row in rows]).nonzero().squeeze(1)
        values, grids = torch.cat([one[2] for one in media]), tuple(one[1] for one in media)
        pack.media = Media(values=values, grids=grids, where=where)
    return pack


def stock_vl(folder: Path, *, moe: bool = False) -> Path:
    """A small checkpoint as the stock class saves it, its tower away from initial values.

    Logits are below 1, where float32 tells a rule from rounding.
    """
    write_stock(folder, "vl", moe=moe)
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    generator = torch.Generator().manual_seed(9)
    for name, value in tensors.items():
        if name.startswith("model.visual."):
            fill(name, value, generator)
    resave(folder, tensors)
    return folder
