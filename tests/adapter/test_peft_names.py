"""Adapters that stock PEFT made, read by us; ours, loaded by stock PEFT; and forty faults."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from support.model_kit import edit_json, write_json
from support.peer_kit import CLASSES, VOCAB, adapted, layers, logits, saved, stock
from torch import Tensor

from qcore.adapter import number_patterns
from qcore.adapter.delta import Deltas
from qcore.adapter.peft_config import ACTIVE, DESCRIPTIVE, REFUSED
from qcore.adapter.peft_names import Adapter, stems
from qcore.adapter.reader import read_adapter
from qcore.adapter.written_config import choose_class, peft_config
from qcore.api.parameters import Table
from qcore.checkpoint.checkpoint import Checkpoint
from qcore.checkpoint.layout import Layout, locate
from qcore.errors import InputError, QcoreError, TrustError, UsageError
from qcore.io.artifact import publish
from qcore.nn.qlora.lora_layer import Lora
from qcore_qwen35.table import parts

PREFIX = {"text": "model.", "vl": "model.language_model."}
ROOT = "model.language_model."


def layout_of(folder: Path) -> Layout:
    checkpoint = Checkpoint.open(folder)
    return locate(Table(list(parts(checkpoint.config))), checkpoint)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base of either class, saved by transformers."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in CLASSES}
    for kind, folder in folders.items():
        stock(kind, dtype=torch.bfloat16).save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def layouts(bases: dict[str, Path]) -> dict[str, Layout]:
    return {kind: layout_of(folder) for kind, folder in bases.items()}


def read(path: Path, layout: Layout) -> Adapter:
    return read_adapter(path, layout, trust_base=True)


# -- stock PEFT's adapters

RECIPES: dict[str, dict[str, Any]] = {
    "two names": {},
    "every group": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z",
                           "out_proj", "gate_proj", "up_proj", "down_proj"],
    },
    "rslora": {"use_rslora": True, "r": 8},
    "rank pattern": {"rank_pattern": {"q_proj": 2, "v_proj": 9}},
    "rank pattern of one layer": {
        "target_modules": ["up_proj", "down_proj"],
        "rank_pattern": {"layers.1.mlp.up_proj": 7, "up_proj": 3},
    },
    "alpha pattern": {"alpha_pattern": {"v_proj": 1}},
    "both patterns and rslora": {
        "target_modules": ["q_proj", "gate_proj"],
        "rank_pattern": {"gate_proj": 2}, "alpha_pattern": {"q_proj": 11}, "use_rslora": True,
    },
    "some layers": {"target_modules": ["gate_proj", "in_proj_z"], "layers_to_transform": [0, 3]},
    "one layer": {"target_modules": ["gate_proj"], "layers_to_transform": 2},
    "layers and their pattern": {
        "target_modules": ["gate_proj"], "layers_to_transform": [1], "layers_pattern": "layers",
    },
    "excluded names": {
        "target_modules": ["q_proj", "k_proj", "gate_proj"],
        "exclude_modules": ["k_proj", "layers.2.mlp.gate_proj"],
    },
    "excluded by expression": {
        "target_modules": ["q_proj", "gate_proj"], "exclude_modules": r".*layers\.2\.mlp.*",
    },
    "targets by expression": {"target_modules": r".*\.self_attn\.(q|k)_proj"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "dropout": {"lora_dropout": 0.1},
    "no initialisation": {"init_lora_weights": False},
}  # fmt: skip


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_peft_saves_is_read(
    tmp_path: Path, layouts: dict[str, Layout], kind: str, recipe: str
):
    wrapped = adapted(stock(kind), **RECIPES[recipe])
    told = read(saved(tmp_path, wrapped), layouts[kind])
    peer = layers(wrapped)
    assert told.namespace.name == kind
    canonical = {
        f"{ROOT}{name.removeprefix(PREFIX[kind])}.weight": layer for name, layer in peer.items()
    }
    assert told.pairs.keys() == canonical.keys()
    for name, pair in told.pairs.items():
        layer: Any = canonical[name]
        assert pair.tensor.name == name
        assert pair.r == layer.r["default"]
        assert pair.scaling == pytest.approx(layer.scaling["default"], rel=1e-12)
        assert pair.pieces[0].a.shape == tuple(layer.lora_A["default"].weight.shape)
        assert pair.pieces[0].b.shape == tuple(layer.lora_B["default"].weight.shape)
    assert dict(told.meta) == {}
    assert told.fingerprints == {}


@pytest.mark.parametrize("kind", CLASSES)
def test_w_plus_scaling_b_a_is_pefts_own_merge(
    tmp_path: Path, layouts: dict[str, Layout], kind: str
):
    recipe = RECIPES["both patterns and rslora"]
    wrapped = adapted(stock(kind), **recipe)
    told = read(saved(tmp_path, wrapped), layouts[kind])
    deltas = Deltas(told)
    for name, layer in layers(wrapped).items():
        canonical = f"{ROOT}{name.removeprefix(PREFIX[kind])}.weight"
        base: Tensor = layer.get_base_layer().weight.detach()  # type: ignore[operator]
        expected = base.double() + layer.get_delta_weight("default").detach().double()  # type: ignore[operator]
        whole = tuple(slice(0, size) for size in base.shape)
        found = torch.cat([total for _, total in deltas.add(canonical, base, whole)])
        assert float((found - expected).abs().max()) < 1e-6
        assert float((found - base).abs().max()) > 1e-3


def test_all_linear_of_the_text_class(tmp_path: Path, layouts: dict[str, Layout]):
    wrapped = adapted(stock("text"), target_modules="all-linear")
    told = read(saved(tmp_path, wrapped), layouts["text"])
    assert len(told.pairs) == len(layers(wrapped)) == 3 * 5 + 4 + 4 * 3


def test_all_linear_of_the_vision_class_trains_a_tower_that_nobody_here_knows(
    tmp_path: Path, layouts: dict[str, Layout]
):
    wrapped = adapted(stock("vl"), target_modules="all-linear")
    with pytest.raises(InputError) as caught:
        read(saved(tmp_path, wrapped), layouts["vl"])
    assert caught.value.code == "QC-ADAPTER-005"
    assert "model.visual" in caught.value.message


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("base", CLASSES)
def test_either_class_is_read_on_either_base(
    tmp_path: Path, layouts: dict[str, Layout], kind: str, base: str
):
    told = read(saved(tmp_path, adapted(stock(kind))), layouts[base])
    assert told.namespace.name == kind
    assert set(told.pairs) == {f"{ROOT}layers.3.self_attn.{n}_proj.weight" for n in "qv"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_adapters_in_other_float_dtypes(
    tmp_path: Path, layouts: dict[str, Layout], dtype: torch.dtype
):
    folder = saved(tmp_path, adapted(stock("text")))
    file = folder / "adapter_model.safetensors"
    tensors = {name: value.to(dtype) for name, value in load_file(file).items()}
    save_file(tensors, file)
    told = read(folder, layouts["text"])
    a, b = Deltas(told).sides(f"{ROOT}layers.3.self_attn.q_proj.weight")
    assert a.dtype == b.dtype == torch.float32
    name = "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"
    assert torch.equal(a, tensors[name].float())


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(peft.LoraConfig)])
def test_every_field_of_lora_config_is_applied_ignored_or_refused(field: str):
    """A new field of PEFT fails here until someone decides what qcore does with it."""
    assert (field in ACTIVE) + (field in DESCRIPTIVE) + (field in REFUSED) == 1


def test_no_field_is_known_that_peft_does_not_have():
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert (ACTIVE | DESCRIPTIVE | REFUSED) - fields == set()


@pytest.mark.parametrize("pattern", [
    {r".*layers\.[0-1]\..*": 2, "up_proj": 3}, {r"mlp\.(up|gate)_proj": 7}, {"^q_proj": 5},
    {r"layers\.\d\.mlp\.\w+": 2, "q_proj": 5}, {"q_proj|up_proj": 6}, {"self.attn.q_proj": 3},
])  # fmt: skip
@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_match_as_in_peft(
    tmp_path: Path, layouts: dict[str, Layout], pattern: dict[str, int], rslora: bool
):
    wrapped = adapted(
        stock("vl"), target_modules=["q_proj", "up_proj", "gate_proj"], rank_pattern=pattern,
        alpha_pattern={key: value * 3 for key, value in pattern.items()}, use_rslora=rslora,
    )  # fmt: skip
    told = read(saved(tmp_path, wrapped), layouts["vl"])
    peer: dict[str, Any] = dict(layers(wrapped))
    numbers = {name.removesuffix(".weight"): p for name, p in told.pairs.items()}
    assert numbers.keys() == peer.keys()
    for name, layer in peer.items():
        assert numbers[name].r == layer.r["default"]
        assert numbers[name].scaling == pytest.approx(layer.scaling["default"], rel=1e-12)


def test_a_target_that_matches_nothing_is_a_warning(tmp_path: Path, layouts: dict[str, Layout]):
    folder = saved(tmp_path, adapted(stock("vl"), target_modules=["q_proj", "absent_proj"]))
    notes = read(folder, layouts["vl"]).notes
    assert "warning: target_modules: absent_proj matches no weight of this base" in notes


def test_every_field_of_a_stock_config_is_known(layouts: dict[str, Layout], tmp_path: Path):
    """A new PEFT with a new field that is switched off must not make its adapters unreadable."""
    folder = saved(tmp_path, adapted(stock("text")))
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written.keys() == {*peft.LoraConfig().to_dict()} - {"runtime_config"}
    edit_json(folder / "adapter_config.json", lambda c: c.update(use_the_next_idea=False))
    assert read(folder, layouts["text"]).pairs


# -- our adapters in stock PEFT


def write_ours(
    folder: Path, layout: Layout, kind: str, names: list[str] | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """An adapter as training writes it, with random values; A and B by canonical name."""
    entries = [
        entry
        for entry in layout.table
        if entry.row.kind and entry.part.loaded and (names is None or entry.name in names)
    ]
    lora = Lora(r=4, lora_alpha=6, lora_dropout=0.1)
    (namespace,) = (n for n in layout.table.part("text").namespaces if n.name == kind)
    generator = torch.Generator().manual_seed(2)
    values, tensors, found = {}, {}, stems(entries, namespace)
    for entry in entries:
        a = 0.1 * torch.randn(4, entry.shape[1], generator=generator)
        b = 0.1 * torch.randn(entry.shape[0], 4, generator=generator)
        values[entry.name] = a, b
        tensors[f"{found[entry.name]}.lora_A.weight"] = a
        tensors[f"{found[entry.name]}.lora_B.weight"] = b
    folder.mkdir(exist_ok=True)
    config = peft_config(
        dict.fromkeys(values, lora), layout, r=4, lora_alpha=6, lora_dropout=0.1, base="org/base",
        revision="abc", namespace=namespace,
    )  # fmt: skip
    write_json(folder / "adapter_config.json", config)
    save_file(tensors, folder / "adapter_model.safetensors")
    return values


SUBSETS: dict[str, list[str] | None] = {
    "every linear map": None,
    "one module": [f"{ROOT}layers.1.mlp.up_proj.weight"],
    "one layer's and another's": [
        f"{ROOT}layers.0.linear_attn.out_proj.weight",
        f"{ROOT}layers.3.self_attn.o_proj.weight",
        f"{ROOT}layers.3.mlp.down_proj.weight",
    ],
    "the gates": [
        f"{ROOT}layers.{n}.linear_attn.in_proj_{x}.weight" for n in range(3) for x in "ab"
    ],
}


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("subset", SUBSETS)
def test_stock_peft_loads_ours_with_the_same_effect(
    tmp_path: Path, layouts: dict[str, Layout], kind: str, subset: str
):
    values = write_ours(tmp_path, layouts[kind], kind, SUBSETS[subset])
    ids = torch.randint(VOCAB - 10, (1, 11), generator=torch.Generator().manual_seed(4))
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(config, peft.LoraConfig)
    assert (config.base_model_name_or_path, config.revision) == ("org/base", "abc")
    shell = peft.get_peft_model(stock(kind), config)
    state = load_file(tmp_path / "adapter_model.safetensors")
    result = set_peft_model_state_dict(shell, dict(state))
    assert result.unexpected_keys == []
    assert [name for name in result.missing_keys if "lora_" in name] == []
    assert len(layers(shell)) == len(values)

    loaded = peft.PeftModel.from_pretrained(stock(kind), str(tmp_path)).eval()
    plain = stock(kind)
    before = logits(plain, ids)
    modules = dict(plain.named_modules())
    with torch.no_grad():
        for name, (a, b) in values.items():
            stock_name = PREFIX[kind] + name.removeprefix(ROOT).removesuffix(".weight")
            modules[stock_name].weight.add_(6 / 4 * b @ a)
    expected = logits(plain, ids)
    assert float((logits(loaded, ids) - expected).abs().max()) < 1e-5
    assert float((expected - before).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", CLASSES)
def test_ours_is_read_back(tmp_path: Path, layouts: dict[str, Layout], kind: str):
    values = write_ours(tmp_path, layouts[kind], kind)
    told = read(tmp_path, layouts[kind])
    assert told.pairs.keys() == values.keys()
    assert {pair.scaling for pair in told.pairs.values()} == {1.5}


def test_targets_are_full_names_which_the_other_class_lacks(
    layouts: dict[str, Layout], tmp_path: Path
):
    write_ours(tmp_path, layouts["vl"], "vl", SUBSETS["one module"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.language_model.layers.1.mlp.up_proj"]


# -- which class


def test_the_class_of_the_config_decides_and_can_be_asked_for(layouts: dict[str, Layout]):
    layout = layouts["vl"]
    vl, text = "Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"
    assert choose_class(layout, ["text"], [vl], "").name == "vl"
    assert choose_class(layout, ["text"], [text], "").name == "text"
    assert choose_class(layout, ["text"], [vl], "text").name == "text"
    with pytest.raises(UsageError) as usage:
        choose_class(layout, ["text"], [vl], "vision")
    assert (usage.value.code, usage.value.exit_code) == ("QC-ADAPTER-001", 2)
    for classes in ([], ["SomethingElse"]):
        with pytest.raises(InputError) as caught:
            choose_class(layout, ["text"], classes, "")
        assert caught.value.code == "QC-ADAPTER-002"
        assert "--adapter-class vl|text" in (caught.value.fix or "")


# -- faults

Change = Callable[[dict[str, Any], dict[str, Tensor]], object]
Q = "base_model.model.model.layers.3.self_attn.q_proj"
GATE = "base_model.model.model.layers.{}.mlp.gate_proj"


def setting(**values: Any) -> Change:
    return lambda config, tensors: config.update(values)


def without(*names: str) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name in names:
            (tensors if name in tensors else config).pop(name)

    return change


def replaced(name: str, value: Callable[[Tensor], Tensor]) -> Change:
    return lambda config, tensors: tensors.update({name: value(tensors[name])})


def renamed(old: str, new: str) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def added(name: str, *shape: int) -> Change:
    return lambda config, tensors: tensors.update({name: torch.zeros(shape)})


FAULTS: dict[str, tuple[Change, str, str]] = {
    # tensors
    "A is missing": (without(f"{Q}.lora_A.weight"), "006", f"{Q}.lora_A.weight: is missing"),
    "B is missing": (without(f"{Q}.lora_B.weight"), "006", f"{Q}.lora_B.weight: is missing"),
    "both of a module are missing": (
        without(f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"), "006", "without tensors"
    ),
    "half of the targets": (
        without(*(f"{GATE.format(n)}.lora_{s}.weight" for n in (1, 3) for s in "AB")),
        "006", "layers.1.mlp.gate_proj: is a declared target without tensors",
    ),
    "no tensors at all": (lambda config, tensors: tensors.clear(), "006", "without tensors"),
    "no tensors and an expression": (
        lambda config, tensors: (tensors.clear(), config.update(target_modules=".*q_proj")),
        "006", "has no tensor for this base",
    ),
    "an extra tensor": (added("base_model.model.model.foo.lora_A.weight", 4, 4), "005", "foo"),
    "a tensor of a layer that is not there": (
        renamed("layers.3.mlp", "layers.4.mlp"), "005", "layers.4.mlp"
    ),
    "renamed": (renamed("q_proj", "query"), "005", "self_attn.query.lora_"),
    "another prefix for some": (
        renamed("model.model.layers.0.", "model.model.language_model.layers.0."),
        "005", "language_model.layers.0",
    ),
    "LoRA on the embedding": (
        added("base_model.model.model.embed_tokens.lora_embedding_A", 4, 96), "006", "is missing"
    ),
    "LoRA on the head": (
        added("base_model.model.lm_head.lora_A.weight", 4, 24), "006", "lm_head.lora_B.weight"
    ),
    "a saved module of another size": (
        added("base_model.model.model.norm.weight", 23), "007", "model.norm.weight"
    ),
    "a dora magnitude": (
        added(f"{Q}.lora_magnitude_vector", 128), "005", "lora_magnitude_vector"
    ),
    "a bias of B": (added(f"{Q}.lora_B.bias", 128), "005", "lora_B.bias"),
    "A of another width": (replaced(f"{Q}.lora_A.weight", lambda t: t[:, :-1]), "007",
                           "found [4, 23], expected [4, 24]"),
    "B of another height": (replaced(f"{Q}.lora_B.weight", lambda t: t[:-1]), "007",
                            "found [127, 4], expected [128, 4]"),
    "A turned": (replaced(f"{Q}.lora_A.weight", lambda t: t.T), "007", "found [24, 4]"),
    "A flat": (replaced(f"{Q}.lora_A.weight", lambda t: t.flatten()), "007", "found [96]"),
    "A and B swapped": (
        lambda c, t: t.update({f"{Q}.lora_A.weight": t[f"{Q}.lora_B.weight"],
                               f"{Q}.lora_B.weight": t[f"{Q}.lora_A.weight"]}),
        "007", "has the wrong shape",
    ),
    "integers": (replaced(f"{Q}.lora_A.weight", lambda t: t.to(torch.int32)), "007", "found I32"),
    "eight bit": (
        replaced(f"{Q}.lora_A.weight", lambda t: t.to(torch.float8_e4m3fn)), "007", "found F8_E4M3"
    ),
    # the config
    "r is missing": (without("r"), "004", ": r: is not a rank: found 'nothing'"),
    "r is zero": (setting(r=0), "004", "found 0"),
    "r is negative": (setting(r=-4), "004", "found -4"),
    "r is true": (setting(r=True), "004", "found True"),
    "r is text": (setting(r="4"), "004", "found '4'"),
    "r is another": (setting(r=8), "007", "expected [8, 24]"),
    "alpha is missing": (without("lora_alpha"), "004", "lora_alpha: is not a number"),
    "alpha is 0": (setting(lora_alpha=0), "004", "lora_alpha: switches the adapter off"),
    "a broken expression": (setting(target_modules="("), "004", "target_modules: is not a valid"),
    "what is excluded is there": (setting(exclude_modules=["q_proj"]), "006", "is not a declared"),
    "a layer beyond those named": (setting(layers_to_transform=[99]), "006", "is not a declared"),
    "alpha is null": (setting(lora_alpha=None), "004", "lora_alpha"),
    "alpha is not finite": (setting(lora_alpha=float("inf")), "004", "lora_alpha"),
    "alpha is NaN": (setting(lora_alpha=float("nan")), "004", "lora_alpha"),
    "alpha is beyond any float": (setting(lora_alpha=10**400), "004", "lora_alpha"),
    "rslora is text": (setting(use_rslora="yes"), "004", "use_rslora"),
    "another method": (setting(peft_type="IA3"), "004", "found 'IA3', expected LORA"),
    "no method": (without("peft_type"), "004", "peft_type"),
    "dora without magnitudes": (setting(use_dora=True), "006", "use_dora is true"),
    "dora is text": (setting(use_dora="yes"), "004", "use_dora"),
    "bias": (setting(bias="lora_only"), "004", "bias"),
    "a bias on B": (setting(lora_bias=True), "004", "lora_bias"),
    "modules_to_save": (setting(modules_to_save=["lm_head"]), "006", "lm_head: is declared"),
    "trained tokens": (setting(trainable_token_indices=[1, 2]), "006", "tokens"),
    "transposed weights": (setting(fan_in_fan_out=True), "004", "fan_in_fan_out"),
    "layers repeated": (setting(layer_replication=[[0, 2], [1, 3]]), "004", "layer_replication"),
    "a parameter of no list": (
        setting(target_parameters="experts"), "004", "target_parameters: is not a list of names"
    ),
    "a parameter that is no name": (setting(target_parameters=[3]), "004", "target_parameters"),
    "activated by tokens": (setting(alora_invocation_tokens=[1]), "004", "alora_invocation_tokens"),
    "pissa": (setting(init_lora_weights="pissa"), "004", "changes the base"),
    "pissa in a few steps": (setting(init_lora_weights="pissa_niter_4"), "004", "changes the base"),
    "olora": (setting(init_lora_weights="olora"), "004", "changes the base"),
    "loftq": (setting(init_lora_weights="loftq"), "004", "changes the base"),
    "corda": (setting(init_lora_weights="corda"), "004", "changes the base"),
    "an init that is a list": (setting(init_lora_weights=["x"]), "004", "init_lora_weights"),
    "a field of a later PEFT": (setting(use_the_next_idea=True), "004", "use_the_next_idea"),
    "rank by expression": (
        setting(rank_pattern={r".*layers\.[0-2]\..*": 8}), "007", "expected [8, 24]"
    ),
    "a broken expression for ranks": (setting(rank_pattern={"q_(": 8}), "004", "rank_pattern"),
    "a long expression": (setting(alpha_pattern={"q" * 501: 8}), "004", "alpha_pattern"),
    "an expression in exponential time": (
        setting(alpha_pattern={r"((\w|\.)*)*!": 8}), "004", "takes too long to match"
    ),
    "targets by an expression in exponential time": (
        setting(target_modules="(.*)*x"), "004", "takes too long to match"
    ),
    "rank pattern a list": (setting(rank_pattern=["q_proj"]), "004", "rank_pattern"),
    "rank pattern of text": (setting(rank_pattern={"q_proj": "4"}), "004", "rank_pattern"),
    "rank pattern of nothing": (setting(rank_pattern={"q_proj": 0}), "004", "rank_pattern"),
    "rank pattern of a half": (setting(rank_pattern={"q_proj": 0.5}), "004", "rank_pattern"),
    "rank pattern that is not so": (setting(rank_pattern={"q_proj": 3}), "007", "[3, 24]"),
    "alpha pattern not finite": (
        setting(alpha_pattern={"q_proj": float("nan")}), "004", "alpha_pattern"
    ),
    "layers of text": (setting(layers_to_transform="0,1"), "004", "layers_to_transform"),
    "layers true": (setting(layers_to_transform=True), "004", "layers_to_transform"),
    "layers of lists": (setting(layers_to_transform=[[0]]), "004", "layers_to_transform"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound stock adapter on q_proj (one layer) and gate_proj (four)."""
    folder = tmp_path_factory.mktemp("adapter")
    return saved(folder, adapted(stock("text"), target_modules=["q_proj", "gate_proj"]))


@pytest.fixture
def adapter(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "adapter"))


def refused(folder: Path, layout: Layout, *, trust: bool = True) -> QcoreError:
    with pytest.raises(QcoreError) as caught:
        read_adapter(folder, layout, trust_base=trust)
    error = caught.value
    assert "\n" not in error.message
    assert error.fix
    return error


def test_the_sound_adapter_is_sound(adapter: Path, layouts: dict[str, Layout]):
    assert len(read(adapter, layouts["text"]).pairs) == 5


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused(
    adapter: Path, layouts: dict[str, Layout], fault: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(number_patterns, "_CPU_SECONDS", 1)  # of its own processor time
    monkeypatch.setattr(number_patterns, "_SECONDS", 300)
    change, code, says = FAULTS[fault]
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(config, tensors)
    write_json(adapter / "adapter_config.json", config)
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    error = refused(adapter, layouts["text"])
    messages = [one.message for one in getattr(error, "errors", (error,))]
    assert any(says in message for message in messages), messages
    assert error.code == f"QC-ADAPTER-{code}", messages
    assert error.exit_code == 65


def test_problems_are_told_together_and_in_order(adapter: Path, layouts: dict[str, Layout]):
    edit_json(adapter / "adapter_config.json", lambda c: c.update(r=0, bias="all"))
    error = refused(adapter, layouts["text"])
    assert {one.field for one in error.errors} == {"r", "bias"}  # type: ignore[attr-defined]


FOLDERS: dict[str, tuple[Callable[[Path], object], str, int]] = {
    "no such folder": (lambda f: shutil.rmtree(f), "QC-ADAPTER-003", 65),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "QC-ADAPTER-003", 65),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "QC-ADAPTER-003", 65),
    "a pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "QC-CKPT-007", 65,
    ),
    "config is not JSON": (
        lambda f: (f / "adapter_config.json").write_text("{"), "QC-CKPT-002", 65
    ),
    "config is a list": (
        lambda f: (f / "adapter_config.json").write_text("[]"), "QC-CKPT-002", 65
    ),
    "weights are cut": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(
            (f / "adapter_model.safetensors").read_bytes()[:-5]),
        "QC-CKPT-005", 65,
    ),
    "weights are no safetensors": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"PK\x03\x04" + bytes(99)),
        "QC-CKPT-005", 65,
    ),
    "weights are a link out": (
        lambda f: ((f / "adapter_model.safetensors").rename(f.parent / "w"),
                   (f / "adapter_model.safetensors").symlink_to(f.parent / "w")),
        "QC-CKPT-003", 65,
    ),
    "a manifest that does not parse": (
        lambda f: (f / "MANIFEST.json").write_text("{"), "QC-ADAPTER-008", 65
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_none(adapter: Path, layouts: dict[str, Layout], case: str):
    change, code, status = FOLDERS[case]
    change(adapter)
    error = refused(adapter, layouts["text"])
    assert (error.code, error.exit_code) == (code, status)


def test_a_foreign_adapter_needs_consent(adapter: Path, layouts: dict[str, Layout]):
    error = refused(adapter, layouts["text"], trust=False)
    assert isinstance(error, TrustError)
    assert (error.code, error.exit_code) == ("QC-ADAPTER-009", 77)
    assert "--trust-base" in (error.fix or "")


def published(folder: Path, source: Path, **meta: Any) -> Path:
    with publish(folder, kind="adapter") as out:
        for file in source.iterdir():
            out.copy(file.name, file)
        out.meta.update(meta)
    return folder


def test_our_manifest_stands_for_consent(adapter: Path, tmp_path: Path, layouts: dict[str, Layout]):
    ours = published(tmp_path / "ours", adapter, fingerprints={"text": "ab"})
    told = read_adapter(ours, layouts["text"])
    assert told.fingerprints == {"text": "ab"}
    bare = published(tmp_path / "bare", adapter)
    assert refused(bare, layouts["text"], trust=False).exit_code == 77
    assert read(bare, layouts["text"]).fingerprints == {}


def test_a_folder_that_was_changed_after_training(
    adapter: Path, tmp_path: Path, layouts: dict[str, Layout]
):
    ours = published(tmp_path / "ours", adapter, fingerprints={"text": "ab"})
    edit_json(ours / "adapter_config.json", lambda config: config.update(lora_alpha=600))
    error = refused(ours, layouts["text"])
    assert (error.code, error.exit_code) == ("QC-ADAPTER-008", 65)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", "AB")
def test_a_value_that_is_not_finite_is_found_when_values_are_read(
    adapter: Path, layouts: dict[str, Layout], value: float, side: str
):
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[f"{Q}.lora_{side}.weight"][-1, -1] = value
    save_file(tensors, adapter / "adapter_model.safetensors")
    told = read(adapter, layouts["text"])  # headers alone do not show it
    with pytest.raises(QcoreError) as caught:
        Deltas(told)
    assert (caught.value.code, caught.value.exit_code) == ("QC-MERGE-003", 76)
    assert f"{Q}.lora_{side}.weight" in caught.value.message
