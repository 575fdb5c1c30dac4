"""LoRA on experts and routers: stock PEFT's adapters read by us, ours loaded by stock PEFT."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from support.expert_kit import (
    BOTH,
    CLASSES,
    LAYERS,
    PREFIX,
    ROOT,
    SIZES,
    E,
    by_weight,
    layout_of,
    moe,
)
from support.model_kit import edit_json, write_json
from support.peer_kit import adapted, logits, saved
from torch import Tensor

from qcore.adapter.delta import Deltas
from qcore.adapter.peft_names import Adapter, stems
from qcore.adapter.reader import read_adapter
from qcore.adapter.written_config import peft_config
from qcore.api.parameters import Kind, Region
from qcore.checkpoint.layout import Layout
from qcore.errors import QcoreError
from qcore.nn.qlora.lora_layer import Lora


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, str], Layout]:
    """By class and size; the folders are transformers' own saves."""
    found = {}
    for kind, size in itertools.product(CLASSES, SIZES):
        folder = tmp_path_factory.mktemp("base")
        moe(kind, size).save_pretrained(folder)
        found[kind, size] = layout_of(folder)
    return found


@pytest.fixture
def layout(layouts: Mapping[tuple[str, str], Layout]) -> Layout:
    return layouts["text", "oblong"]


def read(path: Path, layout: Layout) -> Adapter:
    return read_adapter(path, layout, trust_base=True)


RECIPES: dict[str, dict[str, Any]] = {
    "both": {},
    "both, the other way round": {"target_parameters": BOTH[::-1]},
    "both, no list of modules": {"target_modules": None},
    "gate_up alone": {"target_parameters": BOTH[:1]},
    "down alone": {"target_parameters": BOTH[1:]},
    "rank 1": {"r": 1},
    "short names": {"target_parameters": ["experts.down_proj", "gate_up_proj"]},
    "router": {"target_parameters": ["mlp.gate.weight"]},
    "router and experts": {"target_parameters": [*BOTH, "gate.weight"]},
    "with modules": {
        "target_modules": ["q_proj", "v_proj", "in_proj_qkv", "gate_proj", "up_proj", "down_proj",
                           "shared_expert_gate"],
    },
    "all of it": {
        "target_modules": ["q_proj", "o_proj", "down_proj"],
        "target_parameters": [*BOTH, "mlp.gate.weight"],
    },
    "rslora": {"use_rslora": True, "r": 3},
    "rank of one stack": {"rank_pattern": {"experts.gate_up_proj": 2}},
    "ranks of both": {"rank_pattern": {"mlp.experts.gate_up_proj": 2, "experts.down_proj": 7}},
    "a rank that hits two kinds": {
        "target_modules": ["up_proj", "down_proj"], "rank_pattern": {"down_proj": 3},
    },
    "a rank that hits nothing": {"rank_pattern": {"experts": 2}},
    "rank of one layer": {"rank_pattern": {"layers.1.mlp.experts.down_proj": 2}},
    "alpha of one stack": {"alpha_pattern": {"down_proj": 5}},
    "ranks and alphas and rslora": {
        "target_parameters": [*BOTH, "mlp.gate.weight"], "use_rslora": True,
        "rank_pattern": {"mlp.gate.weight": 2}, "alpha_pattern": {"gate_up_proj": 11},
    },
    "one layer": {"target_parameters": [f"layers.1.{name}" for name in BOTH]},
    "one stack in one layer": {
        "target_parameters": ["layers.0.mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "modules of one layer, experts of all": {
        "target_modules": ["gate_proj"], "layers_to_transform": [1],
    },
    "modules excluded": {
        "target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj", "gate_up_proj"],
    },
}  # fmt: skip


def wrap(kind: str, size: str, recipe: Mapping[str, Any]) -> Any:
    given = {"target_modules": [], "target_parameters": BOTH} | dict(recipe)
    return adapted(moe(kind, size), **given)


# -- stock PEFT's adapters


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_peft_saves_is_read(
    tmp_path: Path, layouts: Mapping[tuple[str, str], Layout], kind: str, recipe: str
):
    layout = layouts[kind, "oblong"]
    wrapped = wrap(kind, "oblong", RECIPES[recipe])
    told = read(saved(tmp_path, wrapped), layout)
    peer = by_weight(wrapped, kind)
    assert told.namespace.name == kind
    assert told.pairs.keys() == peer.keys()
    deltas = Deltas(told)
    for name, pair in told.pairs.items():
        layer = peer[name]
        assert pair.r == layer.r["default"]
        assert pair.scaling == pytest.approx(layer.scaling["default"], rel=1e-12)
        a, b = deltas.sides(name)
        assert torch.equal(a, layer.lora_A["default"].weight)
        assert torch.equal(b, layer.lora_B["default"].weight)


def test_patterns_count_in_the_order_of_the_file(tmp_path: Path, layout: Layout):
    """PEFT sorts them when it saves, and the first that fits counts when it loads."""
    recipe = {
        "target_modules": ["down_proj"],
        "alpha_pattern": {"shared_expert.down_proj": 1, "down_proj": 9},
    }
    told = read(saved(tmp_path, wrap("text", "oblong", recipe)), layout)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(moe("text"), str(tmp_path))
    peer = by_weight(loaded, "text")
    assert told.pairs.keys() == peer.keys()
    for name, pair in told.pairs.items():
        assert pair.scaling == pytest.approx(peer[name].scaling["default"], rel=1e-12)


@pytest.mark.parametrize("base", CLASSES)
@pytest.mark.parametrize("kind", CLASSES)
def test_either_class_is_read_on_either_base(
    tmp_path: Path, layouts: Mapping[tuple[str, str], Layout], kind: str, base: str
):
    told = read(saved(tmp_path, wrap(kind, "oblong", {})), layouts[base, "oblong"])
    assert told.namespace.name == kind
    assert {pair.tensor.row.group for pair in told.pairs.values()} == {"experts"}
    assert len(told.pairs) == 2 * LAYERS


def changed(deltas: Deltas, name: str, weight: Tensor, regions: Iterable[Region]) -> Tensor:
    """The sum, put together from what `add` yields for each region."""
    made = torch.full(weight.shape, torch.nan, dtype=torch.float64)
    for region in regions:
        piece = weight[region].contiguous()
        totals = [total for _, total in deltas.add(name, piece, region)]
        made[region] = torch.cat(totals).view(piece.shape)
    return made


def cuts(shape: tuple[int, ...]) -> dict[str, list[Region]]:
    """Ways to cut a weight: whole, and a stack as files and slabs have it."""
    whole = tuple(slice(0, n) for n in shape)
    if len(shape) == 2:
        rows = [(slice(a, a + 1), whole[1]) for a in range(shape[0])]
        return {"whole": [whole], "row by row": rows}
    half = shape[1] // 2
    experts = range(shape[0])
    return {
        "fused": [whole],
        "slabs": [(slice(0, 1), *whole[1:]), (slice(1, 4), *whole[1:]), (slice(4, 5), *whole[1:])],
        "one by one": [(slice(e, e + 1), *whole[1:]) for e in experts],
        "gate and up": [
            (slice(e, e + 1), rows, whole[2])
            for e in reversed(experts)
            for rows in (slice(half, shape[1]), slice(0, half))
        ],
        "columns": [(*whole[:2], slice(0, 3)), (*whole[:2], slice(3, shape[2]))],
    }


@pytest.mark.parametrize("block", [7, 2**18])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("recipe", ["ranks and alphas and rslora", "down alone", "rank 1"])
def test_every_cut_of_the_sum_is_pefts_merge(
    tmp_path: Path, layouts: Mapping[tuple[str, str], Layout], recipe: str, size: str, block: int,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr("qcore.adapter.delta.BLOCK", block)
    wrapped = wrap("text", size, RECIPES[recipe])
    deltas = Deltas(read(saved(tmp_path, wrapped), layouts["text", size]))
    peer = by_weight(wrapped, "text")
    own = {
        name: layer.get_delta_weight("default").detach().double() for name, layer in peer.items()
    }
    merged = dict(copy.deepcopy(wrapped).merge_and_unload().named_parameters())
    base = dict(moe("text", size).named_parameters())
    assert own.keys() == deltas.pairs.keys()
    for name in own:
        stock = f"{PREFIX['text']}{name.removeprefix(ROOT)}"
        weight = base[stock].detach()
        assert own[name].shape == weight.shape
        for regions in cuts(tuple(weight.shape)).values():
            found = changed(deltas, name, weight, regions)
            assert float((found - weight - own[name]).abs().max()) < 1e-6
            assert float((found - merged[stock].detach()).abs().max()) < 1e-6
        assert float((found - weight).abs().max()) > 1e-3


# -- our adapters in stock PEFT

R, ALPHA = 4, 6.0
#: Numbers of a group, where they are not the run's.
OWN = {"experts": Lora(r=2, lora_alpha=3), "router": Lora(r=1, lora_alpha=5)}
ALL = ("attn", "gdn", "experts", "shared_expert", "gdn_gates", "router")


def write_ours(
    folder: Path, layout: Layout, kind: str, wanted: Callable[[str], bool], own: Mapping[str, Lora]
) -> dict[str, tuple[Tensor, Tensor, Lora]]:
    """An adapter as training writes it, with random values; A, B and numbers by weight."""
    (namespace,) = (n for n in layout.table.part("text").namespaces if n.name == kind)
    lora = Lora(r=R, lora_alpha=ALPHA)
    entries = [t for t in layout.table if t.row.kind and t.part.loaded and wanted(t.name)]
    found = stems(entries, namespace)
    generator = torch.Generator().manual_seed(2)
    values, tensors = {}, {}
    for entry in entries:
        numbers = own.get(entry.row.group, lora)
        *stack, out, into = entry.shape
        rank = numbers.r * (stack[0] if stack else 1)
        a = 0.1 * torch.randn(rank, into, generator=generator)
        b = 0.1 * torch.randn(out, rank, generator=generator)
        values[entry.name] = a, b, numbers
        tensors[f"{found[entry.name]}.lora_A.weight"] = a
        tensors[f"{found[entry.name]}.lora_B.weight"] = b
    config = peft_config(
        {name: numbers for name, (_, _, numbers) in values.items()}, layout, r=R,
        lora_alpha=ALPHA, lora_dropout=0.0, base="org/base", revision=None, namespace=namespace,
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    write_json(folder / "adapter_config.json", config)
    save_file(tensors, folder / "adapter_model.safetensors")
    return values


def by_hand(a: Tensor, b: Tensor, numbers: Lora, experts: int | None) -> Tensor:
    """``s B A``; of experts row ``e r + k`` of A and column ``k E + e`` of B are expert e's."""
    scaling = numbers.lora_alpha / numbers.r
    if experts is None:
        return scaling * b @ a
    each = []
    for e in range(experts):
        columns = torch.stack([b[:, k * experts + e] for k in range(numbers.r)], 1)
        each.append(scaling * columns @ a[e * numbers.r : (e + 1) * numbers.r])
    return torch.stack(each)


SUBSETS: dict[str, Callable[[str], bool]] = {
    "everything": lambda name: True,
    "experts": lambda name: ".experts." in name,
    "gate_up": lambda name: name.endswith("gate_up_proj"),
    "down of experts": lambda name: name.endswith("experts.down_proj"),
    "router and its like": lambda name: name.endswith(("mlp.gate.weight", "expert_gate.weight")),
    "attention and experts": lambda name: "self_attn" in name or ".experts." in name,
    "experts of the last layer": lambda name: "layers.1.mlp.experts." in name,
    "one stack here, another there": lambda name: name.endswith(
        ("layers.0.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj")
    ),
}


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("own", [{}, OWN], ids=["one rank", "ranks by group"])
def test_stock_peft_loads_ours_with_the_same_effect(
    tmp_path: Path, layouts: Mapping[tuple[str, str], Layout], kind: str, subset: str,
    own: Mapping[str, Lora],
):  # fmt: skip
    layout = layouts[kind, "oblong"]
    values = write_ours(tmp_path, layout, kind, SUBSETS[subset], own)
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shell = peft.get_peft_model(moe(kind), config)
        result = set_peft_model_state_dict(shell, load_file(tmp_path / "adapter_model.safetensors"))
        loaded = peft.PeftModel.from_pretrained(moe(kind), str(tmp_path)).eval()
    assert result.unexpected_keys == []
    assert [name for name in result.missing_keys if "lora_" in name] == []
    peer = by_weight(loaded, kind)
    assert peer.keys() == values.keys()
    plain = moe(kind)
    ids = torch.randint(90, (1, 11), generator=torch.Generator().manual_seed(4))
    before = logits(plain, ids)
    for name, (a, b, numbers) in values.items():
        entry = layout.table[name]
        experts = entry.shape[0] if entry.row.kind is Kind.EXPERTS else None
        delta = by_hand(a, b, numbers, experts)
        assert torch.allclose(peer[name].get_delta_weight("default"), delta, rtol=0, atol=1e-6)
        stock = f"{PREFIX[kind]}{name.removeprefix(ROOT)}"
        with torch.no_grad():
            plain.get_parameter(stock).add_(delta)
    expected = logits(plain, ids)
    assert float((logits(loaded, ids) - expected).abs().max()) < 1e-4
    assert float((expected - before).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("subset", SUBSETS)
def test_ours_is_read_back(
    tmp_path: Path, layouts: Mapping[tuple[str, str], Layout], kind: str, subset: str
):
    layout = layouts[kind, "oblong"]
    values = write_ours(tmp_path, layout, kind, SUBSETS[subset], OWN)
    told = read(tmp_path, layout)
    assert told.pairs.keys() == values.keys()
    for name, (a, b, numbers) in values.items():
        assert (told.pairs[name].r, told.pairs[name].scaling) == (numbers.r, numbers.scaling)
        found = Deltas(told).sides(name)
        assert torch.equal(found[0], a)
        assert torch.equal(found[1], b)


def test_what_the_config_says_of_ours(tmp_path: Path, layout: Layout):
    write_ours(tmp_path, layout, "text", SUBSETS["everything"], OWN)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"]
    layers = [f"model.layers.{n}" for n in range(LAYERS)]
    assert config["target_parameters"] == [f"{p}.{name}" for p in layers for name in expected]
    assert "model.layers.0.mlp.shared_expert.down_proj" in config["target_modules"]
    assert config["rank_pattern"] == {
        "mlp.experts.gate_up_proj": 2, "mlp.experts.down_proj": 2, "mlp.gate.weight": 1,
        "mlp.shared_expert_gate": 1,
    }  # fmt: skip
    write_ours(tmp_path, layout, "text", SUBSETS["experts"], {})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == []
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    names = sorted(load_file(tmp_path / "adapter_model.safetensors"))
    experts = "base_model.model.model.layers.0.mlp.experts"
    assert names[: len(names) // LAYERS] == [
        f"{experts}.base_layer.lora_A.weight", f"{experts}.base_layer.lora_B.weight",
        f"{experts}.lora_A.weight", f"{experts}.lora_B.weight",
    ]  # fmt: skip


# -- faults

Change = Callable[[dict[str, Any], dict[str, Tensor]], object]
X = "base_model.model.model.layers.1.mlp.experts"
INNER, OUTER = f"{X}.base_layer.lora_{{}}.weight", f"{X}.lora_{{}}.weight"


def setting(**values: Any) -> Change:
    return lambda config, tensors: config.update(values)


def without(*names: str) -> Change:
    return lambda config, tensors: [tensors.pop(name) for name in names]


def transposed(name: str, out: int, into: int) -> Change:
    """In and out of one stack changed over: the other stacks show that it is wrong."""

    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        r = config["r"]
        tensors[name.format("A")] = torch.ones(E * r, out)
        tensors[name.format("B")] = torch.ones(into, r * E)

    return change


def swapped(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Inner and outer changed over."""
    for side in "AB":
        one, two = INNER.format(side), OUTER.format(side)
        tensors[one], tensors[two] = tensors[two], tensors[one]


FAULTS: dict[str, tuple[Change, str, str]] = {
    "the module instead of its parameters": (
        setting(target_parameters=["mlp.experts"]), "005", "target_parameters: mlp.experts: is a"
    ),
    "the router is declared and not there": (
        setting(target_parameters=[*BOTH, "mlp.gate.weight"]), "006",
        "model.layers.0.mlp.gate.weight: is a declared target without tensors",
    ),
    "nothing is declared": (setting(target_parameters=None), "005", "matches no weight"),
    "one of two is declared": (
        setting(target_parameters=BOTH[:1]), "007", "base_layer.lora_A.weight: matches no weight"
    ),
    "declared as modules": (
        setting(target_parameters=None, target_modules=["gate_up_proj", "down_proj"]), "005",
        "target_modules: gate_up_proj: is a declared target that matches no weight",
    ),
    "A of the inner is missing": (without(INNER.format("A")), "006", "base_layer.lora_A.weight"),
    "B of the outer is missing": (without(OUTER.format("B")), "006", "experts.lora_B.weight"),
    "one stack of a layer is missing": (
        without(INNER.format("A"), INNER.format("B")), "006",
        "layers.1.mlp.experts.gate_up_proj: is a declared target without tensors",
    ),
    "a layer is missing": (
        without(*(n.format(s) for n in (INNER, OUTER) for s in "AB")), "006",
        "layers.1.mlp.experts.gate_up_proj: is a declared target without tensors",
    ),
    "a layer is missing, and another is named": (
        lambda c, t: (
            c.update(layers_to_transform=[0], exclude_modules=["gate_up_proj"]),
            [t.pop(n.format(s)) for n in (INNER, OUTER) for s in "AB"],
        ),
        "006", "layers.1.mlp.experts.gate_up_proj: is a declared target without tensors",
    ),
    "gate_up transposed": (transposed(INNER, 48, 32), "014", "[20, 48]"),
    "down transposed": (transposed(OUTER, 32, 24), "014", "[20, 32]"),
    "inner and outer changed over": (swapped, "007", "expected [20, 32]"),
    "r is that of all experts": (setting(r=4 * E), "007", "expected [100, 32]"),
    "one expert too few": (
        lambda c, t: t.update({OUTER.format("A"): t[OUTER.format("A")][:-4]}), "007", "[16, 24]"
    ),
    "A of one expert alone": (
        lambda c, t: t.update({OUTER.format("A"): t[OUTER.format("A")][:4]}), "007", "[4, 24]"
    ),
    "a stack of matrices": (
        lambda c, t: t.update({OUTER.format("A"): t[OUTER.format("A")].view(E, 4, 24)}),
        "007", "found [5, 4, 24]",
    ),
    "a third wrapper": (
        lambda c, t: t.update({f"{X}.base_layer.base_layer.lora_A.weight": torch.ones(20, 32)}),
        "005", "base_layer.base_layer",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("adapter"), wrap("text", "oblong", {}))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused(tmp_path: Path, sound: Path, layout: Layout, fault: str):
    change, code, says = FAULTS[fault]
    config = json.loads((sound / "adapter_config.json").read_text())
    tensors = load_file(sound / "adapter_model.safetensors")
    change(config, tensors)
    write_json(tmp_path / "adapter_config.json", config)
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(QcoreError) as caught:
        read(tmp_path, layout)
    messages = [one.message for one in getattr(caught.value, "errors", (caught.value,))]
    assert any(says in message for message in messages), messages
    assert caught.value.code == f"QC-ADAPTER-{code}", messages
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("stack", ["gate_up_proj", "down_proj"])
def test_one_stack_is_what_the_config_names_it(
    tmp_path: Path, layouts: Mapping[tuple[str, str], Layout], stack: str
):
    """The key of a lone stack does not say which one it is; A's shape may fit both."""
    layout = layouts["text", "square down"]
    wrapped = wrap("text", "square down", {"target_parameters": [f"mlp.experts.{stack}"]})
    folder = saved(tmp_path, wrapped)
    assert f"{X}.lora_A.weight" in load_file(folder / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in read(folder, layout).pairs} == {stack}
    other = "down_proj" if stack == "gate_up_proj" else "gate_up_proj"
    edit_json(
        folder / "adapter_config.json",
        lambda config: config.update(target_parameters=[f"mlp.experts.{other}"]),
    )
    with pytest.raises(QcoreError) as caught:
        read(folder, layout)
    assert caught.value.code == "QC-ADAPTER-007"
