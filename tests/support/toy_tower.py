"""A modality that is no real one: a small tower, its plugin, and a tiny checkpoint that has it.

Units are rows of bytes; two residual layers read them, and the last layer makes one embedding of
`MERGE` units. It is as wide beside the tiny trunk as a tower must be for its share to be seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qcore import hookimpl
from qcore.api.blocks import BuildContext, Media
from qcore.api.parameters import LINEAR, NF4, Aim, Namespace, Part, Row, Table
from qcore.api.records import Modality

ROOT = "model.toy"
BYTES, WIDTH, INNER, MERGE = 48, 64, 2048, 16


class Layer(nn.Module):
    """``x + down(silu(up(x * (1 + norm) + place)))``."""

    def __init__(self, context: BuildContext, number: int) -> None:
        super().__init__()
        self.up = context.linear(f"layers.{number}.up")
        self.down = context.linear(f"layers.{number}.down")
        self.norm = context.tensor(f"layers.{number}.norm")

    def forward(self, x: Tensor, media: Media) -> Tensor:
        def places() -> Tensor:
            count = len(media.values)
            return torch.arange(count, device=x.device).unsqueeze(1).to(x.dtype) / count

        inner = x * (1 + self.norm.to(x.dtype)) + media.memo("places", places)
        return x + cast(Tensor, self.down(torch.nn.functional.silu(self.up(inner))))


class Join(nn.Module):
    """Every `MERGE` units as one embedding."""

    def __init__(self, context: BuildContext) -> None:
        super().__init__()
        self.map = context.linear("layers.2.map")

    def forward(self, x: Tensor, media: Media) -> Tensor:
        return cast(Tensor, self.map(x.view(-1, MERGE * WIDTH)))


class ToyTower(nn.Module):
    """The tower."""

    def __init__(self, context: BuildContext) -> None:
        super().__init__()
        self.dtype = context.dtype
        self.read = context.linear("read")
        self.layers = nn.ModuleList([Layer(context, 0), Layer(context, 1), Join(context)])

    def embed(self, media: Media) -> Tensor:
        return cast(Tensor, self.read(media.values.to(self.dtype) / 127.5 - 1))

    def sample(
        self, units: int, device: torch.device, generator: torch.Generator | None = None
    ) -> Media:
        units = -(-units // MERGE) * MERGE
        shape = (units, BYTES)
        if generator is None:
            values = torch.empty(shape, dtype=torch.uint8, device=device)
        else:
            values = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device)
        where = torch.arange(units // MERGE, device=device)
        return Media(values=values, grids=((units,),), where=where)


def _build(context: BuildContext) -> ToyTower:
    return ToyTower(context)


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One medium."""

    kind: str = "thing"
    digest: str
    units: int

    @property
    def tokens(self) -> int:
        return self.units // MERGE


class Reader:
    """Only what packs need of one."""

    def batch(self, media: Sequence[Thing], where: Tensor) -> Media:
        units = sum(one.units for one in media)
        values = torch.zeros(units, BYTES, dtype=torch.uint8)
        return Media(values=values, grids=tuple((one.units,) for one in media), where=where)


TOY = Modality(
    name="toy", section="toy_config", architectures=("qwen3_5",), root=ROOT, kinds=("thing",),
    build=cast(Any, _build), reader=cast(Any, lambda checkpoint, tell: Reader()),
)  # fmt: skip


def part(hidden: int) -> Part:
    """The tower's rows."""
    return Part(
        name="toy", optional=True, section="toy_config",
        rows=(
            Row(f"{ROOT}.read.weight", "toy_width toy_bytes", "toy", kind=LINEAR),
            Row(f"{ROOT}.layers.{{layer}}.up.weight", "toy_inner toy_width", "toy", kind=LINEAR),
            Row(f"{ROOT}.layers.{{layer}}.down.weight", "toy_width toy_inner", "toy", kind=LINEAR),
            Row(f"{ROOT}.layers.{{layer}}.norm", "toy_width", "norm"),
            Row(
                f"{ROOT}.layers.2.map.weight", "toy_hidden toy_merge*toy_width", "join", NF4,
                kind=LINEAR,
            ),
        ),
        dims={"toy_bytes": BYTES, "toy_width": WIDTH, "toy_inner": INNER, "toy_merge": MERGE,
              "toy_hidden": hidden},
        axes={"layer": (0, 1)},
        namespaces=(Namespace(name="vl", classes=("Qwen3_5ForConditionalGeneration",)),),
        groups={"toy": Aim.ASKED, "join": Aim.ASKED},
    )  # fmt: skip


@hookimpl
def qcore_describe() -> Iterator[Modality]:
    yield TOY


@hookimpl
def qcore_parameters(architecture: str, config: Mapping[str, Any]) -> Iterator[Part]:
    if config.get("toy_config") is not None:
        yield part(config["text_config"]["hidden_size"])


def install(folder: Path) -> Path:
    """The plugin's distribution, as an installer leaves it; the folder goes on `sys.path`."""
    info = folder / "qcore_toy-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: qcore-toy\nVersion: 1.0\n"
        "Requires-Dist: qcore-framework>=0.1,<0.2\n"
    )
    (info / "entry_points.txt").write_text(
        "[qcore.plugins]\ntoy = support.toy_tower\n"
        "[qcore.model_types]\nqwen3_5 = support.toy_tower\n"
    )
    return folder


def add(folder: Path) -> None:
    """Give a tiny checkpoint the tower."""
    config = json.loads((folder / "config.json").read_text())
    config["toy_config"] = {"width": WIDTH}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for entry in Table([part(config["text_config"]["hidden_size"])]):
        tensors[entry.name] = torch.randn(entry.shape, generator=generator).bfloat16() / 10
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
