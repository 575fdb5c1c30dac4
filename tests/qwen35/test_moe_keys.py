"""Every key list in every layout and namespace: each tensor explained once, both ways.

Key lists are those of the reference folder, and lists derived from published dimensions; the
layouts are made from them by hand.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.e2e_kit import figure
from support.model_kit import as_text_class, edit_json, write_json
from support.moe_kit import as_layout, rewrite, tensors_of
from support.sku_kit import DERIVED, config_of, shapes_of
from support.tiers import fast

from qcore.api.parameters import Table
from qcore.checkpoint.checkpoint import Checkpoint
from qcore.checkpoint.layout import Layout, survey
from qcore.errors import InputError
from qcore.nn.load import read_tensor
from qcore.plugins.resolve_model import identify
from qcore.testing import write_sparse_checkpoint
from qcore_qwen35.table import parts
from qcore_qwen35.tiny import write

Shapes = dict[str, tuple[int, ...]]
#: Parameters by the table in the facts of these models.
TOTALS = {
    "Qwen3.5-0.8B": 873_438_784,
    "Qwen3.5-2B": 2_274_069_824,
    "Qwen3.5-4B": 4_659_865_088,
    "Qwen3.5-9B": 9_653_104_368,
    "Qwen3.5-27B": 27_781_427_952,
    "Qwen3.6-27B": 27_781_427_952,
    "Qwen3.5-35B-A3B": 35_951_822_704,
    "Qwen3.6-35B-A3B": 35_951_822_704,
    "Qwen3.5-122B-A10B": 125_086_497_008,
    "Qwen3.5-397B-A17B": 403_397_928_944,
}
MOE = [sku for sku in TOTALS if "-A" in sku]
DENSE = [sku for sku in TOTALS if "-A" not in sku]
#: Layout of the trunk and of the prediction layer.
LAYOUTS = {"fused": (True, True), "apart": (False, False), "mixed": (True, False),
           "mixed the other way": (False, True)}  # fmt: skip
_STACK = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$")
_ONE = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")


def in_layout(shapes: Mapping[str, tuple[int, ...]], layout: str) -> Shapes:
    """A key list with its experts stacked or one by one, trunk and prediction layer apart."""
    trunk, mtp = LAYOUTS[layout]
    experts = 1 + max(int(m[2]) for m in map(_ONE.match, apart(shapes)) if m)
    return {
        name: shape
        for source in (True, False)
        for name, shape in (fused(shapes, experts) if source else apart(shapes)).items()
        if source == (mtp if name.startswith("mtp.") else trunk)
    }


def apart(shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    out: Shapes = {}
    for name, shape in shapes.items():
        found = _STACK.match(name)
        if found is None:
            out[name] = shape
            continue
        for number in range(shape[0]):
            at = f"{found[1]}.{number}"
            if found[2] == "down_proj":
                out[f"{at}.down_proj.weight"] = shape[1:]
            else:
                half = (shape[1] // 2, shape[2])
                out[f"{at}.gate_proj.weight"] = out[f"{at}.up_proj.weight"] = half
    return out


def fused(shapes: Mapping[str, tuple[int, ...]], experts: int) -> Shapes:
    out: Shapes = {}
    for name, shape in shapes.items():
        found = _ONE.match(name)
        if found is None:
            out[name] = shape
        elif found[3] == "down_proj":
            out[f"{found[1]}.down_proj"] = (experts, *shape)
        elif found[3] == "gate_proj":
            out[f"{found[1]}.gate_up_proj"] = (experts, 2 * shape[0], shape[1])
    return out


def explained(folder: Path, config: Mapping[str, Any], shapes: Shapes, **more: Any) -> Layout:
    """A header-only checkpoint met with the table; no problem is left."""
    write_sparse_checkpoint(folder, config, shapes, **more)
    table = Table(list(parts(config, moe="num_experts" in config.get("text_config", config))))
    layout, problems = survey(table, Checkpoint.open(folder))
    assert not problems, [error.message for error in problems[:3]]
    return layout


def check_total(layout: Layout, shapes: Shapes) -> None:
    """Each tensor on disk is one region of one canonical tensor; regions tile each of them."""
    carried = {header.name for header in layout.carried}
    assert layout.by_disk.keys() | carried == shapes.keys()
    assert not layout.by_disk.keys() & carried
    seen: set[str] = set()
    for name, item in layout.located.items():
        assert item.tensor.name == name
        if item.tied is not None:
            assert not item.places
            continue
        for place in item.places:
            found, region = layout.by_disk[place.header.name]
            assert found is item.tensor
            assert region == place.region
            assert place.header.name not in seen
            seen.add(place.header.name)
            assert math.prod(shapes[place.header.name]) == math.prod(
                part.stop - part.start for part in region
            )
        assert sum(math.prod(shapes[p.header.name]) for p in item.places) == item.tensor.numel
        check_tiles(item.tensor.shape, [place.region for place in item.places])
    assert seen == layout.by_disk.keys()


def check_tiles(shape: tuple[int, ...], regions: list[tuple[slice, ...]]) -> None:
    """No two regions meet: with the sum of their sizes that is a tiling."""
    ordered = sorted(tuple((part.start, part.stop) for part in region) for region in regions)
    for region in ordered:
        assert all(0 <= start < stop <= size
                   for (start, stop), size in zip(region, shape, strict=True))  # fmt: skip
    for one, other in itertools.pairwise(ordered):
        # Sorted by their corners, neighbours are apart in the first dimension that differs.
        first = next(n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
        assert one[first][1] <= other[first][0]


def row(sku: str, way: str, layout: Layout, shapes: Shapes) -> None:
    tied = sum(item.tied is not None for item in layout.located.values())
    figure(
        f"{sku:18} {way:26} {len(shapes):6} on disk, {len(layout.located):5} canonical "
        f"({tied} tied), {len(layout.carried):3} carried, {layout.parameters:,} parameters"
    )


@pytest.mark.parametrize("sku", DENSE)
@pytest.mark.parametrize("namespace", ["vl", "text"])
def test_dense(shared: Path, tmp_path: Path, sku: str, namespace: str) -> None:
    config, shapes = config_of(shared, sku), shapes_of(shared, sku)
    total = sum(map(math.prod, shapes.values()))
    assert total == TOTALS[sku]
    if namespace == "text":
        config, shapes = as_text(config), as_text_class(shapes)
    layout = explained(tmp_path, config, shapes)
    check_total(layout, shapes)
    assert layout.namespaces["text"].name == namespace
    assert layout.parameters == sum(map(math.prod, shapes.values()))
    assert layout.absent == (() if namespace == "vl" else ("mtp",))
    row(sku, namespace, layout, shapes)


@pytest.mark.parametrize("sku", fast(MOE))
@pytest.mark.parametrize(
    ("namespace", "layout"),  # a save of the text class has no prediction layer
    [*(("vl", layout) for layout in LAYOUTS), ("text", "fused"), ("text", "apart")],
)
def test_experts(shared: Path, tmp_path: Path, sku: str, layout: str, namespace: str) -> None:
    config = config_of(shared, sku)
    shapes = in_layout(shapes_of(shared, sku), layout)
    assert sum(map(math.prod, shapes.values())) == TOTALS[sku]
    if namespace == "text":
        config, shapes = as_text(config), as_text_class(shapes)
    found = explained(tmp_path, config, shapes)
    check_total(found, shapes)
    assert found.namespaces["text"].name == namespace
    assert found.parameters == sum(map(math.prod, shapes.values()))
    assert len(found.carried) == (333 if namespace == "vl" else 0)
    stacks = [
        i for i in found.located.values() if i.tensor.name.endswith(("_up_proj", ".down_proj"))
    ]
    of_trunk, of_mtp = LAYOUTS[layout]
    for item in stacks:
        of = of_mtp if item.tensor.part.name == "mtp" else of_trunk
        experts = item.tensor.shape[0]
        halves = 2 if item.tensor.name.endswith("gate_up_proj") else 1
        assert len(item.places) == (1 if of else halves * experts)
    row(sku, f"{namespace}, {layout}", found, shapes)


@pytest.mark.parametrize("sku", ["Qwen3.5-35B-A3B", "Qwen3.6-35B-A3B"])
def test_block_fp8(shared: Path, tmp_path: Path, sku: str) -> None:
    """Experts one by one with block scales, as the FP8 repositories have them."""
    config = config_of(shared, sku) | {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}
    }
    shapes = in_layout(shapes_of(shared, sku), "apart")
    names = [name for name in shapes if is_eight_bit(name)]
    scales = {f"{n}_scale_inv": tuple(-(-size // 128) for size in shapes[n]) for n in names}
    eight = set(names)
    layout = explained(
        tmp_path, config, shapes | scales,
        dtype=lambda name: "F8_E4M3" if name in eight else "F32" if name in scales else "BF16",
    )  # fmt: skip
    check_total(Strip(layout, scales), shapes)  # type: ignore[arg-type]
    assert layout.scales.keys() == scales.keys()
    assert all(f"{weight}_scale_inv" == name for name, weight in layout.scales.items())
    assert layout.parameters == TOTALS[sku]
    row(sku, "vl, block FP8", layout, shapes | scales)


def is_eight_bit(name: str) -> bool:
    leaf = name.split(".")[-2]
    return name.startswith("model.language_model.layers.") and leaf in (
        "q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj",
        "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip


class Strip:
    """A layout without its scales, which are no tensors of the model."""

    def __init__(self, layout: Layout, scales: Mapping[str, object]) -> None:
        self.by_disk = {n: v for n, v in layout.by_disk.items() if n not in scales}
        self.carried, self.located = layout.carried, layout.located


def as_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a save of the text class: its section is the file."""
    text: dict[str, Any] = dict(config["text_config"])
    kind = "Moe" if "num_experts" in text else ""
    return text | {
        "architectures": [f"Qwen3_5{kind}ForCausalLM"],
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
    }


def test_the_layouts_here_are_those_of_the_published_lists(shared: Path) -> None:
    """3.5 is mixed and 3.6 fused; either way back and forth gives the list again."""
    for sku in MOE:
        shapes = shapes_of(shared, sku)
        way = "fused" if sku.startswith("Qwen3.6") else "mixed"
        assert in_layout(shapes, way) == shapes
        assert in_layout(in_layout(shapes, "apart"), way) == shapes
    assert set(DERIVED) < set(TOTALS)


# -- one tensor too few, too many, another shape: named


def faulty(tmp_path: Path, shared: Path, change: Any) -> list[str]:
    config = config_of(shared, "Qwen3.5-35B-A3B")
    shapes = in_layout(shapes_of(shared, "Qwen3.5-35B-A3B"), "apart")
    change(shapes)
    write_sparse_checkpoint(tmp_path, config, shapes)
    _, problems = survey(Table(list(parts(config, moe=True))), Checkpoint.open(tmp_path))
    return [f"{error.code} {error.field}" for error in problems]


def test_one_tensor_of_one_expert_that_is_not_as_it_must_be(shared: Path, tmp_path: Path) -> None:
    at = "model.language_model.layers.7.mlp.experts.200"

    def without(shapes: Shapes) -> None:
        del shapes[f"{at}.up_proj.weight"]

    def turned(shapes: Shapes) -> None:
        name = f"{at}.down_proj.weight"
        shapes[name] = shapes[name][::-1]

    def more(shapes: Shapes) -> None:
        shapes[f"{at[:-3]}256.up_proj.weight"] = shapes[f"{at}.up_proj.weight"]

    cases = {
        without: f"QC-KEY-004 {at}.up_proj.weight",
        turned: f"QC-KEY-003 {at}.down_proj.weight",
        more: f"QC-KEY-002 {at[:-3]}256.up_proj.weight",
    }
    for number, (change, wanted) in enumerate(cases.items()):
        assert faulty(tmp_path / str(number), shared, change) == [wanted]


# -- bit-exact there and back


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint in every layout, and as the text class has it."""
    home = tmp_path_factory.mktemp("tiny")
    write(home / "as written", moe=True)
    found = {
        name: rewrite(home / "as written", home / name, name, shards=3)
        for name in ("fused", "apart", "mixed")
    }
    for layout in ("fused", "apart"):
        source = found[layout]
        text = home / f"text {layout}"
        text.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (text / name).write_bytes((source / name).read_bytes())
        write_json(text / "config.json", as_text(json.loads((source / "config.json").read_text())))
        save_file(
            {
                name.replace("model.language_model.", "model."): value
                for name, value in tensors_of(source).items()
                if not name.startswith("mtp.")
            },
            text / "model.safetensors",
            metadata={"format": "pt"},
        )
        found[f"text {layout}"] = text
    return found


def canonical_values(folder: Path) -> dict[str, torch.Tensor]:
    found = identify(str(folder))
    return {
        name: read_tensor(found.checkpoint, item)
        for name, item in found.layout.located.items()
        if item.tied is None
    }


def test_canonical_tensors_are_the_same_from_every_layout(tiny: dict[str, Path]) -> None:
    values = {name: canonical_values(folder) for name, folder in tiny.items()}
    by_hand = as_layout(tensors_of(tiny["apart"]), "fused")
    assert values["fused"].keys() == by_hand.keys()
    for name, value in by_hand.items():
        for layout in values:
            if not (layout.startswith("text") and name.startswith("mtp.")):
                assert torch.equal(values[layout][name], value), (layout, name)


def test_written_back_they_are_the_bytes_on_disk(tiny: dict[str, Path]) -> None:
    """``canonical[region]`` is the tensor on disk, for each of them."""
    for folder in tiny.values():
        layout, values = identify(str(folder)).layout, canonical_values(folder)
        on_disk = tensors_of(folder)
        assert layout.by_disk.keys() == on_disk.keys()
        for name, (tensor, region) in layout.by_disk.items():
            back = values[tensor.name][region].reshape(on_disk[name].shape).contiguous()
            assert torch.equal(back.view(torch.uint8), on_disk[name].view(torch.uint8)), name


@pytest.mark.parametrize("rows", [slice(0, 1), slice(2, 5), slice(5, 8)])
def test_some_experts_alone(tiny: dict[str, Path], rows: slice) -> None:
    """What is streamed a few experts at a time is what is read whole."""
    for folder in tiny.values():
        found = identify(str(folder))
        for item in found.layout.located.values():
            if item.tensor.name.endswith((".gate_up_proj", ".experts.down_proj")):
                whole = read_tensor(found.checkpoint, item)
                assert torch.equal(read_tensor(found.checkpoint, item, rows), whole[rows])


def test_experts_of_another_number_are_told_in_one_line(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    for layout in ("fused", "apart"):
        copy = shutil.copytree(tiny[layout], tmp_path / layout)
        edit_json(copy / "config.json", lambda c: c["text_config"].update(num_experts=16))
        with pytest.raises(InputError) as error:
            identify(str(copy))
        assert "\n" not in str(error.value)
        figure(str(error.value))
