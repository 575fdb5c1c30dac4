"""Several adapters in one merge: against PEFT's own sum, and what cannot be added."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.change_kit import assert_merged, on_disk, step, vocabulary_weights, written
from support.cli_kit import here
from support.e2e_kit import documents, our_logits, stock, stock_logits, write_stock
from support.model_kit import edit_json
from support.moe_kit import rewrite

from qcore.adapter.combined import Weighted, combined
from qcore.adapter.delta import Deltas
from qcore.adapter.evidence import read_for
from qcore.errors import QcoreError
from qcore.inference.generate import Generator
from qcore.io.artifact import read_manifest
from qcore.merging.merge import merge
from qcore.merging.several import prove_parts
from qcore.plugins.resolve_model import identify

pytestmark = pytest.mark.usefixtures("one_thread")
A: dict[str, Any] = {"target_modules": ["q_proj", "in_proj_qkv", "down_proj"], "r": 4}
B: dict[str, Any] = {
    "target_modules": ["q_proj", "in_proj_z", "down_proj"], "r": 6, "lora_alpha": 5,
    "use_rslora": True, "rank_pattern": {"down_proj": 3},
}  # fmt: skip
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two adapters of stock PEFT."""
    folder = tmp_path_factory.mktemp("several")
    write_stock(folder / "base", dtype=torch.bfloat16)
    written(folder / "base", folder / "a", A, seed=2)
    written(folder / "base", folder / "b", B, seed=3)
    return folder


def pefts(base: Path, a: Path, b: Path, weights: tuple[float, float]) -> Any:
    """The sum of two adapters by PEFT, exact: matrices side by side."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(stock(base, "vl", torch.float32), a, "a")
        model.load_adapter(b, "b")
        model.add_weighted_adapter(["a", "b"], [*weights], "sum", combination_type="cat")
        model.set_adapter("sum")
    return model


@pytest.mark.parametrize(
    "weights", [(1.0, 0.5), pytest.param((-0.25, 2.0), marks=pytest.mark.slow)]
)
def test_the_sum_is_pefts(home: Path, tmp_path: Path, weights: tuple[float, float]) -> None:
    wanted = {str(home / "a"): weights[0], str(home / "b"): weights[1]}
    report = merge(str(home / "base"), wanted, tmp_path / "out", trust_base=True)
    peer = pefts(home / "base", home / "a", home / "b", weights)
    assert len(assert_merged(peer, home / "base", tmp_path / "out")) == report.pairs
    assert report.proof is not None
    assert report.proof["effect"] > 0.1
    assert [(part.adapter, part.weight) for part in report.adapters] == [*wanted.items()]
    meta = read_manifest(tmp_path / "out").meta
    entries = [(e["adapter"], e["weight"], len(e["sha256"])) for e in meta["merged"]]
    assert entries == [(name, weight, 64) for name, weight in wanted.items()]
    with pytest.raises(QcoreError) as caught:  # each of them counts as merged
        merge(str(tmp_path / "out"), home / "b", tmp_path / "twice", trust_base=True)
    assert caught.value.code == "QC-MERGE-002"


def test_one_with_a_weight_is_scaled(home: Path, tmp_path: Path) -> None:
    merge(str(home / "base"), {str(home / "a"): 0.5}, tmp_path / "half", trust_base=True)
    scaled = shutil.copytree(home / "a", tmp_path / "scaled")
    edit_json(scaled / "adapter_config.json", lambda c: c.update(lora_alpha=c["lora_alpha"] / 2))
    merge(str(home / "base"), scaled, tmp_path / "out", trust_base=True)
    half, out = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "out"))
    assert all(torch.equal(half[name], out[name]) for name in out)


def test_experts_and_another_layout(tmp_path: Path) -> None:
    """One in PEFT's layout, one with a module for each expert; the sum by hand."""
    stored = write_stock(tmp_path / "stock", moe=True, dtype=torch.bfloat16)
    base = rewrite(stored, tmp_path / "base", "fused")
    merged = []
    for number, (name, r) in enumerate((("a", 4), ("b", 2))):
        recipe = {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "r": r}
        peer = written(base, tmp_path / name, recipe, moe=True, seed=5 + number)
        merged.append(peer.merge_and_unload().state_dict())
    tensors, apart = load_file(tmp_path / "b" / "adapter_model.safetensors"), {}
    for name, a in tensors.items():
        if "experts" not in name or "lora_B" in name:
            apart |= {} if "experts" in name else {name: a}
            continue
        b, experts = tensors[name.replace("lora_A", "lora_B")], len(a) // 2
        root = name.split(".base_layer")[0].removesuffix(".lora_A.weight")
        by_expert = b.view(len(b), 2, experts).permute(2, 0, 1)
        half = len(b) // 2
        sides = (("gate_proj", slice(0, half)), ("up_proj", slice(half, None)))
        for word, rows in sides if ".base_layer" in name else (("down_proj", slice(None)),):
            for e in range(experts):
                apart[f"{root}.{e}.{word}.lora_A.weight"] = a[2 * e : 2 * e + 2].clone()
                apart[f"{root}.{e}.{word}.lora_B.weight"] = by_expert[e, rows].contiguous()
    save_file(apart, tmp_path / "b" / "adapter_model.safetensors")
    edit_json(
        tmp_path / "b" / "adapter_config.json",
        lambda c: c.update(target_parameters=None, target_modules="all-linear"),
    )
    wanted = {str(tmp_path / "a"): 1.0, str(tmp_path / "b"): -0.5}
    report = merge(str(base), wanted, tmp_path / "out", trust_base=True)
    before, after, changed = on_disk(base), on_disk(tmp_path / "out"), 0
    for name, value in before.items():
        w = value.float()
        if name in merged[0]:
            sums = w + (merged[0][name] - w) - 0.5 * (merged[1][name] - w)
            assert bool(((after[name].float() - sums).abs() <= step(sums) + 1e-6).all()), name
            changed += not torch.equal(after[name], value)
    assert changed == report.pairs


def test_dora_beside_lora_of_other_weights_is_taken_as_it_is(home: Path, tmp_path: Path) -> None:
    recipe = {"target_modules": ["o_proj"], "use_dora": True}
    peer = written(home / "base", tmp_path / "dora", recipe, seed=7)
    theirs = peer.merge_and_unload().state_dict()
    wanted = {str(home / "a"): 1.0, str(tmp_path / "dora"): 1.0}
    merge(str(home / "base"), wanted, tmp_path / "out", trust_base=True)
    after = on_disk(tmp_path / "out")
    names = [name for name in after if name.endswith("o_proj.weight")]
    assert names
    for name in names:
        assert bool(((after[name].float() - theirs[name]).abs() <= step(theirs[name])).all())
    for weights in ({**wanted, str(tmp_path / "dora"): 0.5},):
        with pytest.raises(QcoreError) as caught:
            merge(str(home / "base"), weights, tmp_path / "other", trust_base=True)
        assert caught.value.code == "QC-ADAPTER-018"
        assert "DoRA" in caught.value.what


@pytest.mark.parametrize("ensured", [True, False])
def test_one_that_unties_beside_one_that_does_not(tmp_path: Path, ensured: bool) -> None:
    """The head gets the changes of both, as with PEFT: those of a tied pair, and trained rows."""
    base = write_stock(tmp_path / "base", tied=True, dtype=torch.bfloat16)
    unties = written(base, tmp_path / "unties", {"target_modules": ["lm_head"]}, seed=4)
    recipe: dict[str, Any] = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}
    if ensured:
        recipe = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    tied = written(base, tmp_path / "tied", recipe, seed=5)
    names = [str(tmp_path / "unties"), str(tmp_path / "tied")]
    for order in (names, names[::-1]):
        out = tmp_path / ("out-" + Path(order[0]).name)
        if not ensured:  # saved rows and LoRA on the head
            with pytest.raises(QcoreError) as caught:
                merge(str(base), dict.fromkeys(order, 1.0), out, trust_base=True)
            assert (caught.value.code, caught.value.field) == ("QC-ADAPTER-018", "lm_head.weight")
            continue
        merge(str(base), dict.fromkeys(order, 1.0), out, trust_base=True)
        after, before = on_disk(out), on_disk(base)
        embed = next(name for name in before if name.endswith("embed_tokens.weight"))
        plain = before[embed].float()
        one, two = vocabulary_weights(unties), vocabulary_weights(tied)
        for name in (embed, "lm_head.weight"):
            sums = one[name] + two[name] - plain
            assert bool(((after[name].float() - sums).abs() <= step(sums) + 1e-6).all()), name
            assert not torch.equal(after[name], before[embed])


def test_matrices_that_weights_have_in_common_are_rearranged_once(tmp_path: Path) -> None:
    base = write_stock(tmp_path / "base", tied=True, dtype=torch.bfloat16)
    recipe = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    written(base, tmp_path / "a", recipe)
    identified = identify(str(base))
    own = read_for(identified, tmp_path / "a", trust_base=True)
    (name,) = own.changes
    head = identified.layout.table["lm_head.weight"]
    both = replace(own, changes={**own.changes, head.name: replace(own.pairs[name], tensor=head)})
    sides = Deltas(both)
    for mine, other in zip(sides.sides(name), sides.sides(head.name), strict=True):
        assert torch.equal(mine, other)
    for mine, other in zip(sides.sides(name), Deltas(own).sides(name), strict=True):
        assert torch.equal(mine, other)


def test_one_folder_under_two_names_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(home / "a")
    wanted = {str(home / "a"): 0.5, str(tmp_path / "link"): 0.5}
    with pytest.raises(QcoreError, match="named twice") as caught:
        merge(str(home / "base"), wanted, tmp_path / "out", trust_base=True)
    assert caught.value.code == "QC-ADAPTER-019"


def test_dora_and_lora_of_one_weight_are_refused(home: Path, tmp_path: Path) -> None:
    written(home / "base", tmp_path / "dora", {"target_modules": ["q_proj"], "use_dora": True})
    for first, second in (("a", "dora"), ("dora", "a")):
        where = {"a": home / "a", "dora": tmp_path / "dora"}
        with pytest.raises(QcoreError) as caught:
            merge(
                str(home / "base"), {str(where[first]): 1.0, str(where[second]): 1.0},
                tmp_path / "out", trust_base=True,
            )  # fmt: skip
        assert caught.value.code == "QC-ADAPTER-018"
        assert not (tmp_path / "out").exists()


def test_a_part_that_is_not_in_the_sum_is_seen(home: Path) -> None:
    """The proof of each adapter fails if the merged matrices are not their sum."""
    base = identify(str(home / "base"))
    one, two = (read_for(base, home / name, trust_base=True) for name in "ab")
    with pytest.raises(QcoreError) as caught:
        prove_parts([Weighted(adapter=one), Weighted(adapter=one)], Deltas(one))
    assert caught.value.code == "QC-MERGE-005"
    assert prove_parts([Weighted(adapter=two)], Deltas(two))[0].norm > 0


DORA: dict[str, Any] = {"target_modules": ["o_proj"], "use_dora": True}
#: Changes that are not products of matrices.
ALONE: dict[str, dict[str, Any]] = {
    "DoRA": DORA,
    "saved norm": {"target_modules": ["in_proj_a"], "modules_to_save": ["language_model.norm"]},
    "rows": {"target_modules": ["in_proj_a"], "trainable_token_indices": [3, 5]},
}


@pytest.mark.parametrize("recipe", ALONE)
def test_another_change_that_is_not_a_product_is_seen(
    home: Path, tmp_path: Path, recipe: str
) -> None:
    base = identify(str(home / "base"))
    for name, seed in (("one", 7), ("two", 8)):
        written(home / "base", tmp_path / name, ALONE[recipe], seed=seed)
    lora = read_for(base, home / "a", trust_base=True)
    one, two = (read_for(base, tmp_path / name, trust_base=True) for name in ("one", "two"))
    own = [Weighted(adapter=lora), Weighted(adapter=one)]
    assert len(prove_parts(own, Deltas(combined(own)), one.changes)) == 2
    other = Deltas(combined([Weighted(adapter=lora), Weighted(adapter=two)]))
    with pytest.raises(QcoreError, match="not the change of the adapter") as caught:
        prove_parts(own, other, one.changes)
    assert caught.value.code == "QC-MERGE-005"


def test_dora_without_an_effect_is_refused(home: Path, tmp_path: Path) -> None:
    """B of 0 and the norms of the rows: base + adapter is the base."""
    written(home / "base", tmp_path / "dora", DORA)
    file, before = tmp_path / "dora" / "adapter_model.safetensors", on_disk(home / "base")
    tensors = load_file(file)
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()
        elif "magnitude" in name:
            module = name.removeprefix("base_model.model.").partition(".lora_")[0]
            norms = torch.linalg.vector_norm(before[f"{module}.weight"].double(), dim=1)
            tensors[name] = norms.float()
    save_file(tensors, file)
    wanted = {str(home / "a"): 1.0, str(tmp_path / "dora"): 1.0}
    with pytest.raises(QcoreError, match="has no effect") as caught:
        merge(str(home / "base"), wanted, tmp_path / "out", trust_base=True)
    assert caught.value.code == "QC-MERGE-005"
    assert "dora" in caught.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_media_of_all_adapters_are_recorded(home: Path, order: tuple[int, int]) -> None:
    base = identify(str(home / "base"))
    records = [
        {"kinds": ["image"], "keys": {"image": ["max_pixels"]}, "tower_changed": False, "pairs": 0},
        {"kinds": ["video"], "keys": {"image": ["min_pixels"]}, "tower_changed": True, "pairs": 0},
    ]
    adapters = [
        replace(read_for(base, home / name, trust_base=True), meta={"modalities": {"sight": one}})
        for name, one in zip("ab", records, strict=True)
    ]
    total = combined([Weighted(adapter=adapters[number]) for number in order])
    (record,) = total.modalities.values()
    assert sorted(record["kinds"]) == ["image", "video"]
    assert total.keys_of("image") == ["max_pixels", "min_pixels"]
    assert record["tower_changed"] is True


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["a=0"], "QC-ADAPTER-019"),
        (["a=nan"], "QC-ADAPTER-019"),
        (["a=half"], "QC-ADAPTER-019"),
        (["a", "a=0.5"], "QC-ADAPTER-019"),
        (["a", "b", "--take-tokenizer"], "QC-MERGE-013"),
    ],
)
def test_words_that_are_wrong(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: str
) -> None:
    options: list[object] = []
    for word in words:
        options += [word] if word.startswith("--") else ["--adapter", home / word]
    ended = here(
        capsys, "merge", "--model", home / "base", "--output", tmp_path / "out", "--trust-base",
        *options,
    )  # fmt: skip
    assert ended.code == 2
    assert code in ended.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_command(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = shutil.copytree(home / "b", tmp_path / "b=2")
    ended = here(
        capsys, "merge", "--model", home / "base", "--output", tmp_path / "out", "--trust-base",
        "--json", "--adapter", home / "a", "--adapter", odd, "--adapter", f"{home / 'b'}=-1",
    )  # fmt: skip
    assert ended.code == 0
    assert [part["weight"] for part in ended.json["adapters"]] == [1.0, 1.0, -1.0]


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_generate_adds_adapters_with_weights(home: Path, names: tuple[str, str]) -> None:
    weights = dict.fromkeys(names, 1.0) | {"b": 0.5}
    generator = Generator(
        str(home / "base"), adapter={str(home / name): weights[name] for name in names},
        trust_base=True, device="cpu", dtype="fp32",
    )  # fmt: skip
    peer = pefts(home / "base", home / "a", home / "b", (1.0, 0.5)).eval()
    docs = documents((17, 5))
    gap = (our_logits(generator.model, docs) - stock_logits(peer, docs)).abs().max()
    assert float(gap) <= 1e-4
