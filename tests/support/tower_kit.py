"""Checkpoints with a tower, one picture in a document, and adapters that touch the tower."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from safetensors.torch import load_file
from support.e2e_kit import CPU, MOE_STOCK, STOCK, random_b
from torch import Tensor

from qcore.adapter.targets import targets
from qcore.adapter.written_config import choose_class
from qcore.api.blocks import Media, Packed
from qcore.config.settings import Settings
from qcore.data.rejects import Rejects
from qcore.data.rendering.chat_record import ChatRecord
from qcore.nn.kernels.registry import Chosen
from qcore.nn.load import load
from qcore.nn.model import Model
from qcore.nn.qlora.lora_layer import Lora
from qcore.plugins.resolve_model import Identified, classes_of, identify
from qcore.reporting import Reporter
from qcore.training.checkpoints import RunFiles
from qcore.training.run import Run
from qcore_multimodal.plugin import VISION

TOWER = "model.visual."
GRID = (1, 4, 6)  # 24 patches, 6 tokens
PATCH = 3 * 2 * 4 * 4  # numbers of a patch, with the sizes of `write_stock`
_BEFORE, _AFTER = 5, 9  # tokens of text around the picture


def picture(folder: Path, seed: int = 4) -> dict[str, Tensor]:
    """A row of text with a picture, as the stock class takes it."""
    config = json.loads((folder / "config.json").read_text())
    generator = torch.Generator().manual_seed(seed)
    count = GRID[0] * GRID[1] * GRID[2]
    text = torch.randint(config["image_token_id"], (_BEFORE + _AFTER,), generator=generator)
    ids = [
        text[:_BEFORE],
        torch.tensor([config["vision_start_token_id"]]),
        torch.full((count // 4,), config["image_token_id"]),
        torch.tensor([config["vision_end_token_id"]]),
        text[_BEFORE:],
    ]
    row = torch.cat(ids)[None]
    return {
        "input_ids": row,
        "mm_token_type_ids": (row == config["image_token_id"]).int(),
        "pixel_values": torch.rand(count, PATCH, generator=generator) * 2 - 1,
        "image_grid_thw": torch.tensor([GRID]),
    }


def stock_sees(model: Any, row: Mapping[str, Tensor]) -> Tensor:
    """Logits ``[T, V]`` of the stock class."""
    with torch.no_grad():
        found: Tensor = model(**row, use_cache=False).logits[0]
    return found


def ours_sees(model: Model, row: Mapping[str, Tensor], positions: Tensor) -> Tensor:
    """Logits ``[T, V]`` of ours; positions ``[3, T]`` are the stock class's own."""
    ids = row["input_ids"][0]
    where = row["mm_token_type_ids"][0].nonzero().squeeze(1)
    grids = tuple((int(t), int(h), int(w)) for t, h, w in row["image_grid_thw"].tolist())
    media = Media(values=row["pixel_values"], grids=grids, where=where)
    batch = Packed(ids=ids, cu_seqlens=(0, len(ids)), positions=positions, media=media)
    with torch.no_grad():
        return model.eval().logits(batch)


def positions_of(model: Any, row: Mapping[str, Tensor]) -> Tensor:
    """The stock class's positions ``[3, T]`` of a row."""
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
    found: Tensor = model.model.get_rope_index(**{name: row[name] for name in names})[0]
    return found[:, 0]


def stock_vl(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The stock vision-language class of a folder."""
    moe = "moe" in json.loads((folder / "config.json").read_text())["model_type"]
    built = (MOE_STOCK if moe else STOCK)["vl"]
    return built.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def with_tower(folder: Path) -> Identified:
    """The base as a run that loads the tower has it."""
    found = identify(str(folder))
    assert found.modality is not None
    assert found.modality.name == VISION.name
    return found.using(found.modality)


def adapted(
    folder: Path,
    out: Path,
    groups: Sequence[str],
    *,
    media: Mapping[str, int] | None = None,
    group_r: Mapping[str, int] | None = None,
    asked: str = "",
) -> Model:
    """An adapter with random values as training publishes it, and the model that it is of."""
    found = with_tower(folder)
    settings = Settings(r=4, lora_alpha=6, target_groups=tuple(groups), dtype="fp32")
    chosen = targets(found.layout, groups, Lora(r=4, lora_alpha=6), group_r=group_r)
    config, table = found.checkpoint.config, found.layout.table
    net = Model(
        found.decision.architecture, config, found.layout, torch.float32, chosen, modality=VISION
    )
    digests = load(net, found.layout, found.checkpoint, device=CPU, quantize=False)
    for name, module in net.adapters():
        module.reset_lora(name, 42, CPU)
    random_b(net, size=0.3)
    files = RunFiles(
        run=Run(
            model=found,
            data=cast(
                Any, SimpleNamespace(chat=ChatRecord(template_sha256="2" * 64), rejects=Rejects())
            ),
            summary={
                "sha256": "0" * 64,
                "samples_sha256": "3" * 64,
                "media": dict(media or {}),
                "train_media": dict(media or {}),
                "media_sha256": "1" * 64,
            },
            settings=settings,
            device=CPU,
            kernels=Chosen(device="cpu", table=(), functions={}),
            reader=None,
            target=out,
            folder=out,
            reporter=Reporter(),
        ),
        model=net,
        namespace=choose_class(
            found.layout, {table[name].part.name for name in chosen}, classes_of(config), asked
        ),
        digests=digests,
        coverage=(),
    )
    metrics = out.with_name(f"{out.name}.jsonl")
    metrics.write_text("")
    files.publish(out, metrics, {})
    return net


def peft_on(base: Any, **lora: Any) -> Any:
    """Stock LoRA on a stock model, A and B random."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(base, peft.LoraConfig(**({"r": 4, "lora_alpha": 6} | lora)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


def on_disk(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def changed(before: Path, after: Path) -> set[str]:
    """Names of tensors whose bytes differ; names, shapes and dtypes must not."""
    one, two = on_disk(before), on_disk(after)
    assert [(n, v.shape, v.dtype) for n, v in one.items()] == [
        (n, v.shape, v.dtype) for n, v in two.items()
    ]
    return {
        name
        for name, value in one.items()
        if value.view(torch.uint8).tolist() != two[name].view(torch.uint8).tolist()
    }
