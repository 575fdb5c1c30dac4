"""Adapters over several parts: one class for all, each part's own names, what a run is bound to.

The tower here is a toy whose rows are chosen to be confused with the trunk's; its part comes
before the trunk's, as plugins' names may order them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.model_kit import small_config, small_shapes, write_json
from torch import Tensor, nn

from qcore.adapter.peft_names import Adapter, stems, target_name, trunk_part
from qcore.adapter.reader import read_adapter
from qcore.adapter.written_config import choose_class, peft_config
from qcore.api.parameters import LINEAR, Aim, Namespace, Part, Row, Table
from qcore.checkpoint.checkpoint import Checkpoint
from qcore.checkpoint.layout import Layout, locate
from qcore.errors import InputError, PreflightError, UsageError
from qcore.io.artifact import publish
from qcore.nn.qlora.lora_layer import Lora
from qcore.preflight.settings_checks import unsuitable
from qcore.testing import write_sparse_checkpoint
from qcore_qwen35.table import parts

ROOT = "model.language_model."
VL, TEXT = "Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"
EYE = "model.eye"
#: On disk and in the class ``vl`` the toy's names differ, as a class may rename modules.
PREFIX = "model.tower.eye"


def eye(**changes: Any) -> Part:
    """A tower: two layers, a last map, a convolution whose module is called like a map."""
    rows = (
        Row(f"{EYE}.stem.proj.weight", "wide 3 2", "eye_rest"),
        Row(f"{EYE}.blocks.{{block}}.attn.proj.weight", "wide wide", "eye", kind=LINEAR),
        Row(f"{EYE}.blocks.{{block}}.attn.q_proj.weight", "wide wide", "eye_q", kind=LINEAR),
        Row(f"{EYE}.out.weight", "hidden wide", "lens", kind=LINEAR),
    )
    options: dict[str, Any] = {
        "name": "sight", "owner": "qcore-sight", "rows": rows, "dims": {"wide": 6, "hidden": 24},
        "axes": {"block": (0, 1)}, "optional": True, "section": "eye_config",
        "groups": {"eye": Aim.ASKED, "eye_q": Aim.ASKED, "lens": Aim.ASKED},
        "namespaces": (
            Namespace(name="hub"),
            Namespace(name="vl", prefixes=((f"{EYE}.", f"{PREFIX}."),)),
        ),
    }  # fmt: skip
    return Part(**(options | changes))


EYE_SHAPES = {
    f"{EYE}.stem.proj.weight": (6, 3, 2),
    **{f"{EYE}.blocks.{n}.attn.{m}.weight": (6, 6) for n in (0, 1) for m in ("proj", "q_proj")},
    f"{EYE}.out.weight": (24, 6),
}


def layout_of(folder: Path, *towers: Part, sight: bool = True, **config: Any) -> Layout:
    shapes = small_shapes(vision=False) | (EYE_SHAPES if sight else {})
    write_sparse_checkpoint(
        folder, small_config(vision=False) | {"eye_config": {}} | config, shapes
    )
    checkpoint = Checkpoint.open(folder)
    layout = locate(Table([*towers, *parts(checkpoint.config)]), checkpoint)
    return replace(layout, idle=frozenset(tower.name for tower in towers))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return layout_of(tmp_path / "base", eye())


@pytest.fixture
def bare(tmp_path: Path) -> Layout:
    """The same checkpoint where no plugin knows the tower: it is carried."""
    return layout_of(tmp_path / "base")


def namespace(layout: Layout, name: str) -> Namespace:
    return next(one for one in trunk_part(layout.table).namespaces if one.name == name)


def names_in(layout: Layout, *groups: str) -> list[str]:
    return [t.name for t in layout.table if t.row.kind and t.row.group in groups]


def written(
    folder: Path,
    layout: Layout,
    kind: str,
    names: Sequence[str],
    ranks: Mapping[str, int] | None = None,
) -> Path:
    """An adapter in the form that training writes."""
    lora = {name: Lora(r=(ranks or {}).get(name, 3), lora_alpha=6) for name in names}
    one, tensors = namespace(layout, kind), {}
    for name, stem in stems((layout.table[name] for name in names), one).items():
        out, into = layout.table[name].shape
        tensors[f"{stem}.lora_A.weight"] = torch.ones(lora[name].r, into)
        tensors[f"{stem}.lora_B.weight"] = torch.ones(out, lora[name].r)
    folder.mkdir(parents=True)
    config = peft_config(
        lora, layout, r=3, lora_alpha=6, lora_dropout=0, base="b", revision=None, namespace=one
    )
    write_json(folder / "adapter_config.json", config)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def read(folder: Path, layout: Layout) -> Adapter:
    return read_adapter(folder, layout, trust_base=True)


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


# -- names


def test_the_trunk_is_the_part_with_the_head(layout: Layout) -> None:
    assert [part.name for part in layout.table.parts] == ["sight", "text", "mtp"]
    assert trunk_part(layout.table).name == "text"


def test_each_part_spells_its_own(layout: Layout) -> None:
    table = layout.table
    q, look = f"{ROOT}layers.3.self_attn.q_proj.weight", f"{EYE}.blocks.1.attn.proj.weight"
    vl, text = namespace(layout, "vl"), namespace(layout, "text")
    found = stems([table[look], table[q]], vl)
    assert found == {
        look: f"base_model.model.{PREFIX}.blocks.1.attn.proj",
        q: f"base_model.model.{ROOT}layers.3.self_attn.q_proj",
    }
    assert target_name(table[look], vl) == f"{PREFIX}.blocks.1.attn.proj"
    assert target_name(table[q], text) == "model.layers.3.self_attn.q_proj"


def test_ours_is_read_back_over_both_parts(layout: Layout, tmp_path: Path) -> None:
    names = names_in(layout, "eye", "lens", "attn")
    ranks = {f"{EYE}.blocks.0.attn.proj.weight": 2, f"{EYE}.out.weight": 5}
    told = read(written(tmp_path / "a", layout, "vl", names, ranks), layout)
    assert {name: pair.r for name, pair in told.pairs.items()} == {
        name: ranks.get(name, 3) for name in names
    }
    assert told.namespace is namespace(layout, "vl")
    assert told.parts == {"text", "sight"}
    assert told.trunk == "text"
    flags = {"kinds": [], "keys": {}, "tower_changed": True, "pairs": 3, "plugin": "qcore-sight"}
    assert told.modalities == {"sight": flags}


class Stock(nn.Module):
    """The modules of the class ``vl`` by the names that PEFT sees."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="toy", to_dict=dict)
        for tensor in layout.table:
            if tensor.part.loaded and tensor.name.endswith(".weight") and len(tensor.shape) > 1:
                own = next(n for n in tensor.part.namespaces if n.name == "vl")
                *path, leaf = own.spell(tensor.name).removesuffix(".weight").split(".")
                at: nn.Module = self
                for word in path:
                    if word not in at._modules:
                        at.add_module(word, nn.Module())
                    at = at.get_submodule(word)
                out, into, *kernel = tensor.shape
                built = nn.Conv1d(into, out, kernel[0]) if kernel else nn.Linear(into, out)
                if tensor.row.group != "conv":
                    at.add_module(leaf, built)


@pytest.mark.parametrize(
    "groups",
    [("eye",), ("eye", "lens", "attn"), ("eye_q",), ("eye_q", "attn"), ("attn", "gdn", "mlp")],
    ids=" ".join,
)
def test_stock_peft_hits_the_same_modules(
    layout: Layout, tmp_path: Path, groups: tuple[str, ...]
) -> None:
    """``proj`` is a convolution too, ``q_proj`` is in both parts."""
    names = names_in(layout, *groups)
    folder = written(tmp_path / "a", layout, "vl", names)
    config = peft.LoraConfig.from_pretrained(str(folder))
    wrapped = peft.LoraModel(Stock(layout), config, "default")
    hit = {
        name.removeprefix("model.")
        for name, module in wrapped.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert hit == {target_name(layout.table[name], namespace(layout, "vl")) for name in names}


@pytest.mark.parametrize("kind", ["vl", "text"])
@pytest.mark.parametrize(
    "groups", [("attn",), ("mlp", "gdn"), ("attn", "gdn", "mlp")], ids=" ".join
)
def test_text_alone_is_the_same_whoever_knows_the_tower(
    layout: Layout, bare: Layout, tmp_path: Path, kind: str, groups: tuple[str, ...]
) -> None:
    names = names_in(bare, *groups)
    one, two = (
        written(tmp_path / kind / word, base, kind, names)
        for word, base in (("known", layout), ("carried", bare))
    )
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (one / file).read_bytes() == (two / file).read_bytes()
    # q_proj alone would hit the tower's map of that name.
    assert len(config_of(one)["target_modules"]) == len(names)
    for folder in (one, two):
        for base in (layout, bare):
            told = read(folder, base)
            assert (set(told.pairs), told.namespace.name) == (set(names), kind)
            assert told.modalities == {}


# -- one class


def test_a_class_has_every_part_that_is_touched(layout: Layout) -> None:
    for touched in (["text"], ["text", "sight"], ["sight"], []):
        assert choose_class(layout, touched, [VL], "").name == "vl"
        assert choose_class(layout, touched, [TEXT], "vl").name == "vl"
    assert choose_class(layout, ["text"], [TEXT], "").name == "text"
    for touched in (["text", "sight"], ["sight"]):
        with pytest.raises(UsageError, match="sight") as asked:
            choose_class(layout, touched, [VL], "text")
        told = asked.value
        assert (told.code, told.expected, told.fix) == ("QC-ADAPTER-001", "vl", "name one of vl")
        # A checkpoint of the text class that has a tower all the same.
        with pytest.raises(InputError) as config:
            choose_class(layout, touched, [TEXT], "")
        assert config.value.code == "QC-ADAPTER-002"
    with pytest.raises(UsageError, match="is not a class") as unknown:
        choose_class(layout, ["text"], [VL], "hub")  # the tower's alone
    assert unknown.value.code == "QC-ADAPTER-001"


@pytest.mark.parametrize(
    ("groups", "refused"),
    [((), False), (("attn",), False), (("eye", "attn"), True), (("lens",), True)],
    ids=str,
)
def test_settings_are_judged_by_the_parts_of_their_groups(
    layout: Layout, groups: tuple[str, ...], refused: bool
) -> None:
    checkpoint = SimpleNamespace(config={"architectures": [VL]}, template=None)
    found: Any = SimpleNamespace(layout=layout, checkpoint=checkpoint)
    told = list(unsuitable(found, {"adapter_class": "text", "target_groups": groups}))
    assert [error.code for error in told] == ["QC-ADAPTER-001"] * refused
    assert not list(unsuitable(found, {"adapter_class": "vl", "target_groups": groups}))


# -- stock PEFT's rule for layers


@pytest.mark.parametrize(
    ("pattern", "hit"),
    [
        (None, ["text", "eye"]),
        ("layers", ["text"]),
        (["layers"], ["text"]),
        (["blocks"], ["eye"]),
        (["layers", "blocks"], ["text", "eye"]),
    ],
    ids=str,
)
def test_layers_are_numbers_below_their_pattern(
    tmp_path: Path, pattern: Any, hit: list[str]
) -> None:
    row = Row(f"{EYE}.blocks.{{block}}.q_proj.weight", "wide wide", "eye", kind=LINEAR)
    sight = eye(rows=(row,), axes={"block": (2, 3)})
    base = replace(layout_of(tmp_path / "base", sight, sight=False), absent=())
    config = peft.LoraConfig(
        r=3, target_modules=["q_proj"], layers_to_transform=[3], layers_pattern=pattern
    )
    wrapped = peft.LoraModel(Stock(base), config, "default")
    tensors: dict[str, Tensor] = {}
    for name, value in wrapped.state_dict().items():
        if "lora_" in name:
            tensors[f"base_model.{name.replace('.default', '')}"] = value.contiguous()
    folder = tmp_path / "a"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA", "r": 3, "lora_alpha": 8, "target_modules": ["q_proj"],
            "layers_to_transform": [3], "layers_pattern": pattern,
        },
    )  # fmt: skip
    names = {
        "text": f"{ROOT}layers.3.self_attn.q_proj.weight",
        "eye": f"{EYE}.blocks.3.q_proj.weight",
    }
    assert set(read(folder, base).pairs) == {names[one] for one in hit}


# -- what must be there


def published(folder: Path, adapter: Path, **meta: Any) -> Path:
    with publish(folder, kind="adapter") as out:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            out.copy(name, adapter / name)
        out.meta.update(meta)
    return folder


def flags(pairs: int, plugin: str | None = "qcore-sight") -> dict[str, Any]:
    one = {"kinds": ["picture"], "tower_changed": pairs > 0, "pairs": pairs, "plugin": plugin}
    return {"modalities": {"sight": one}, "fingerprints": {"text": "ab", "sight": "cd"}}


def test_flags_are_read_back(layout: Layout, tmp_path: Path) -> None:
    adapter = written(tmp_path / "a", layout, "vl", names_in(layout, "eye", "attn"))
    told = read_adapter(published(tmp_path / "ours", adapter, **flags(2)), layout)
    assert told.modalities == flags(2)["modalities"]


@pytest.mark.parametrize("recorded", [1, 3])
def test_another_number_of_pairs(layout: Layout, tmp_path: Path, recorded: int) -> None:
    adapter = written(tmp_path / "a", layout, "vl", names_in(layout, "eye", "attn"))
    with pytest.raises(InputError, match="sight") as error:
        read_adapter(published(tmp_path / "ours", adapter, **flags(recorded)), layout)
    told = error.value
    assert (told.code, told.found, told.expected) == ("QC-ADAPTER-013", 2, recorded)


@pytest.mark.parametrize("how", ["nobody knows it", "a save without it"])
@pytest.mark.parametrize("plugin", ["qcore-sight", None])
def test_a_part_that_is_not_there(
    layout: Layout, bare: Layout, tmp_path: Path, how: str, plugin: str | None
) -> None:
    adapter = written(tmp_path / "a", layout, "vl", names_in(layout, "eye", "attn"))
    ours = published(tmp_path / "ours", adapter, **flags(2, plugin))
    blind = layout_of(tmp_path / "blind", eye(), sight=False)
    base = bare if how == "nobody knows it" else blind
    with pytest.raises(InputError) as error:
        read_adapter(ours, base)
    told = error.value
    assert (told.code, told.field) == ("QC-ADAPTER-012", "part 'sight'")
    assert ("install qcore-sight, or" in str(told.fix)) == (plugin is not None)
    # Without flags its tensors fit nothing, and the config's names hit nothing.
    with pytest.raises((InputError, PreflightError)) as foreign:
        read(adapter, base)
    assert "QC-ADAPTER-005" in str(foreign.value.code) + str(foreign.value)


@pytest.mark.parametrize("value", [None, [], "sight", {"sight": 3}, {"sight": {"pairs": "two"}}])
def test_flags_of_another_form_bind_nothing(layout: Layout, tmp_path: Path, value: Any) -> None:
    """A manifest that another tool wrote: what cannot be read is not guessed at."""
    adapter = written(tmp_path / "a", layout, "vl", names_in(layout, "attn"))
    meta = {"fingerprints": {"text": "ab"}, "modalities": value}
    told = read_adapter(published(tmp_path / "ours", adapter, **meta), layout)
    assert all(isinstance(one, dict) for one in told.modalities.values())


def test_a_run_is_bound_to_what_it_computes_with(layout: Layout, tmp_path: Path) -> None:
    text, both = (
        written(tmp_path / word, layout, "vl", names_in(layout, *groups))
        for word, groups in (("text", ("attn",)), ("both", ("lens", "attn")))
    )
    seen = read_adapter(published(tmp_path / "seen", text, **flags(0)), layout)
    touched = read_adapter(published(tmp_path / "touched", both, **flags(1)), layout)
    assert seen.binding(layout) == {"text": "ab"}
    assert seen.binding(layout.using("sight")) == {"text": "ab", "sight": "cd"}
    for base in (layout, layout.using("sight")):
        assert touched.binding(base) == {"text": "ab", "sight": "cd"}
    assert load_file(both / "adapter_model.safetensors").keys() >= {
        f"base_model.model.{PREFIX}.out.lora_A.weight"
    }
