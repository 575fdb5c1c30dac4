"""LoRA on experts as PEFT before 0.19.1 laid it out: read right, or refused.

PEFT 0.21 keeps that layout for modules that say ``is_transposed``, so stock PEFT writes and merges
it here; one file is of PEFT 0.18.1 itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.expert_kit import BOTH, SIZES, by_weight, layout_of, moe
from support.model_kit import edit_json, write_json
from support.peer_kit import adapted, saved
from torch import Tensor

from qcore.adapter.delta import Deltas
from qcore.adapter.expert_layout import NEWER, OLDER, statements
from qcore.adapter.open import _by_expert
from qcore.adapter.peft_names import Adapter
from qcore.adapter.reader import read_adapter
from qcore.checkpoint.layout import Layout
from qcore.errors import QcoreError

GOLDEN = Path(__file__).with_name("peft_0_18_1_experts.safetensors")


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Layout]:
    found = {}
    for size in SIZES:
        folder = tmp_path_factory.mktemp("base")
        moe("text", size).save_pretrained(folder)
        found[size] = layout_of(folder)
    return found


def old(size: str, **recipe: Any) -> Any:
    """A model that PEFT wraps as before 0.19.1."""
    model = moe("text", size)
    for layer in model.model.layers:
        layer.mlp.experts.is_transposed = True
    return adapted(model, **({"target_modules": [], "target_parameters": BOTH} | recipe))


def version(folder: Path, value: str | None) -> Path:
    def change(config: dict[str, Any]) -> None:
        config.pop("peft_version")
        if value is not None:
            config["peft_version"] = value

    edit_json(folder / "adapter_config.json", change)
    return folder


def read(folder: Path, layout: Layout) -> Adapter:
    return read_adapter(folder, layout, trust_base=True)


def check(adapter: Adapter, wrapped: Any) -> None:
    """Each delta is the one that stock PEFT merges."""
    deltas, peer = Deltas(adapter), by_weight(wrapped, "text")
    assert adapter.pairs.keys() == peer.keys()
    for name, pair in adapter.pairs.items():
        expected = peer[name].get_delta_weight("default").detach()
        whole = tuple(slice(0, n) for n in pair.tensor.shape)
        rows = [t for _, t in deltas.add(name, torch.zeros(pair.tensor.shape), whole)]
        found = torch.cat(rows).view(pair.tensor.shape).float()
        assert torch.allclose(found, expected, rtol=0, atol=1e-6)
        if len(whole) == 3:  # the view that scripts get
            a, b = _by_expert(pair, *deltas.sides(name))
            assert torch.allclose(pair.scaling * b @ a, expected, rtol=0, atol=1e-6)


OLD_VERSIONS = ("0.17.0", "0.17.1", "0.18.0", "0.18.1", "0.18.2.dev0", "0.19.0", "0.19.0.dev0@a1b2")
SAVES: dict[str, dict[str, Any]] = {
    "both": {},
    "the other way round": {"target_parameters": BOTH[::-1]},
    "gate_up alone": {"target_parameters": BOTH[:1]},
    "down alone": {"target_parameters": BOTH[1:]},
    "rank 1": {"r": 1},
    "with modules": {"target_modules": ["q_proj", "in_proj_qkv", "down_proj"]},
    "ranks, alphas, router, rslora": {
        "target_parameters": [*BOTH, "mlp.gate.weight"],
        "use_rslora": True,
        "rank_pattern": {"mlp.gate.weight": 2},
        "alpha_pattern": {"gate_up_proj": 11},
    },
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("recipe", SAVES)
def test_an_older_layout_is_translated(
    tmp_path: Path, layouts: Mapping[str, Layout], size: str, recipe: str
):
    wrapped = old(size, **SAVES[recipe])
    adapter = read(version(saved(tmp_path, wrapped), "0.18.1"), layouts[size])
    check(adapter, wrapped)
    (note,) = adapter.notes
    assert "PEFT before 0.19.1" in note


@pytest.mark.parametrize("number", OLD_VERSIONS)
def test_versions_with_the_older_layout(tmp_path: Path, layouts: Mapping[str, Layout], number: str):
    wrapped = old("square gate_up", target_parameters=BOTH[:1])
    adapter = read(version(saved(tmp_path, wrapped), number), layouts["square gate_up"])
    check(adapter, wrapped)


@pytest.mark.parametrize("number", ["0.19.1", "0.20.0", "0.21.2", "0.22.0.dev0", "1.0"])
@pytest.mark.parametrize("size", SIZES)
def test_versions_with_the_newer_layout(
    tmp_path: Path, layouts: Mapping[str, Layout], number: str, size: str
):
    wrapped = adapted(moe("text", size), target_modules=[], target_parameters=BOTH)
    adapter = read(version(saved(tmp_path, wrapped), number), layouts[size])
    check(adapter, wrapped)
    assert adapter.notes == ()


def test_a_file_of_peft_0_18_1(tmp_path: Path, layouts: Mapping[str, Layout]):
    tensors = load_file(GOLDEN)
    matrices = {name: value for name, value in tensors.items() if name.startswith("base_model.")}
    save_file(matrices, tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "peft_version": "0.18.1", "r": 2, "lora_alpha": 6,
        "target_modules": [], "target_parameters": [f"layers.0.{name}" for name in BOTH],
    }  # fmt: skip
    write_json(tmp_path / "adapter_config.json", config)
    deltas = Deltas(read(tmp_path, layouts["square gate_up"]))
    assert len(deltas.pairs) == 2
    for name, pair in deltas.pairs.items():
        expected = tensors[f"delta.{name.rpartition('.')[2]}"]
        whole = tuple(slice(0, n) for n in pair.tensor.shape)
        rows = [t for _, t in deltas.add(name, torch.zeros(pair.tensor.shape), whole)]
        found = torch.cat(rows).view(pair.tensor.shape).float()
        assert float(expected.abs().max()) > 0.01
        assert torch.allclose(found, expected, rtol=0, atol=1e-6)


# -- shapes decide where they can


@pytest.mark.parametrize("number", [None, "0.19.1.dev0", "unknown"])
def test_shapes_decide_without_a_version(
    tmp_path: Path, layouts: Mapping[str, Layout], number: str | None
):
    wrapped = old("oblong")
    check(read(version(saved(tmp_path, wrapped), number), layouts["oblong"]), wrapped)


@pytest.mark.parametrize("older", [True, False])
def test_an_oblong_stack_decides_for_a_square_one(
    tmp_path: Path, layouts: Mapping[str, Layout], older: bool
):
    size = "square gate_up"
    model = adapted(moe("text", size), target_modules=[], target_parameters=BOTH)
    wrapped = old(size) if older else model
    adapter = read(version(saved(tmp_path, wrapped), None), layouts[size])
    check(adapter, wrapped)
    if older:
        (note,) = adapter.notes
        assert note.endswith(", by the shapes of the other experts")


@pytest.mark.parametrize(("older", "number"), [(True, "0.21.2"), (False, "0.18.1")])
def test_shapes_against_the_version_are_a_warning(
    tmp_path: Path, layouts: Mapping[str, Layout], older: bool, number: str
):
    model = adapted(moe("text"), target_modules=[], target_parameters=BOTH)
    wrapped = old("oblong") if older else model
    adapter = read(version(saved(tmp_path, wrapped), number), layouts["oblong"])
    check(adapter, wrapped)
    (note,) = adapter.notes
    assert note.startswith("warning: ")
    assert f"peft_version {number}" in note


@pytest.mark.parametrize("stamp", ["peft-0.18", "peft-0.19.1"])
def test_the_stamp_of_automodel(tmp_path: Path, layouts: Mapping[str, Layout], stamp: str):
    size = "square gate_up"
    one = {"target_modules": [], "target_parameters": BOTH[:1]}
    wrapped = old(size, **one) if stamp == "peft-0.18" else adapted(moe("text", size), **one)
    version(saved(tmp_path, wrapped), None)
    metadata = {"moe_rank_scaling": False, "paramwrapper_layout": stamp}
    write_json(tmp_path / "automodel_peft_config.json", metadata)
    check(read(tmp_path, layouts[size]), wrapped)


# -- and are never guessed


def refused(folder: Path, layout: Layout, *says: str) -> None:
    with pytest.raises(QcoreError) as caught:
        read(folder, layout)
    error = caught.value
    assert (error.code, error.exit_code) == ("QC-ADAPTER-014", 65)
    assert "peft_version" in str(error.fix)
    for part in says:
        assert part in error.message


@pytest.mark.parametrize("number", [None, "", "0.19.1.dev0", "0.19.1.dev0@0123abc", "main"])
@pytest.mark.parametrize("size", ["square gate_up", "square down"])
def test_a_square_stack_without_evidence(
    tmp_path: Path, layouts: Mapping[str, Layout], number: str | None, size: str
):
    one = BOTH[:1] if size == "square gate_up" else BOTH[1:]
    version(saved(tmp_path, old(size, target_parameters=one)), number)
    refused(tmp_path, layouts[size], "is square", number or "no peft_version")


def test_a_square_stack_whose_sibling_contradicts(tmp_path: Path, layouts: Mapping[str, Layout]):
    version(saved(tmp_path, old("square gate_up")), "0.21.2")
    refused(tmp_path, layouts["square gate_up"], "is square", "contradicts", "0.21.2")


def test_a_version_and_a_stamp_that_contradict(tmp_path: Path, layouts: Mapping[str, Layout]):
    size = "square gate_up"
    version(saved(tmp_path, old(size, target_parameters=BOTH[:1])), "0.18.1")
    write_json(tmp_path / "automodel_peft_config.json", {"paramwrapper_layout": "peft-0.19.1"})
    refused(tmp_path, layouts[size], "contradicts", "peft-0.19.1", "0.18.1")


def test_both_layouts_in_one_file(tmp_path: Path, layouts: Mapping[str, Layout]):
    saved(tmp_path / "old", old("oblong"))
    new = adapted(moe("text"), target_modules=[], target_parameters=BOTH)
    saved(tmp_path / "new", new)
    weights = "adapter_model.safetensors"
    mixed: dict[str, Tensor] = load_file(tmp_path / "new" / weights)
    mixed |= {k: v for k, v in load_file(tmp_path / "old" / weights).items() if ".layers.1." in k}
    save_file(mixed, tmp_path / "new" / weights)
    refused(tmp_path / "new", layouts["oblong"], "other experts")


READ: dict[str, tuple[str | None, str | None]] = {
    "0.18": ("0.18", OLDER), "v0.18.1": ("v0.18.1", OLDER), "0.9.0": ("0.9.0", OLDER),
    "0.19.1rc1": ("0.19.1rc1", None), "0.19.1.post1": ("0.19.1.post1", NEWER),
    "none": (None, None), "a number": ("19", None),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_how_a_version_is_read(tmp_path: Path, case: str):
    number, expected = READ[case]
    found = statements(tmp_path, {"peft_version": number})
    assert [statement.layout for statement in found] == ([] if number is None else [expected])
