"""Adapters that touch the tower: across tools on text and image, merged, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.conversations import conversations, write_rows
from support.e2e_kit import documents, figure, loaded_adapter, resave, stock_logits, write_stock
from support.tiers import fast, pairs
from support.tower_kit import (
    TOWER,
    adapted,
    changed,
    on_disk,
    ours_sees,
    peft_on,
    picture,
    positions_of,
    stock_sees,
    stock_vl,
    with_tower,
)
from torch import nn

from qcore.adapter.reader import read_adapter
from qcore.config.settings import Settings
from qcore.errors import InputError, NumericError, UsageError
from qcore.io.artifact import publish, read_manifest, verify
from qcore.merging.merge import merge
from qcore.merging.streams import Streams
from qcore.nn.load import read_tensor
from qcore.plugins.resolve_model import identify
from qcore.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = {"dense": False, "moe": True}


@pytest.fixture
def one_thread() -> Any:
    """Sums are added in one order, whatever ran before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype) -> dict[str, Path]:
    return {
        kind: write_stock(
            tmp_path_factory.mktemp(kind), tied=False, mtp=True, moe=moe, shard="60KB", dtype=dtype
        )
        for kind, moe in KINDS.items()
    }


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bases in float32, so that nothing is rounded."""
    return made(tmp_path_factory, torch.float32)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return made(tmp_path_factory, torch.bfloat16)


@pytest.fixture(scope="module")
def base(bases: dict[str, Path]) -> Path:
    return bases["dense"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", conversations(8))


# -- ours under stock PEFT, and merged by us

GROUPS: dict[str, dict[str, Any]] = {
    "tower, merger and attention": {"groups": ("vision", "merger", "attn")},
    "the tower alone": {"groups": ("vision",)},
    "merger of its own rank": {"groups": ("merger", "gdn"), "group_r": {"merger": 7}},
    "more names than PEFT lists": {"groups": ("vision", "merger", "attn", "gdn", "gdn_gates")},
    "ranks": {"groups": ("vision", "attn"), "group_r": {"vision": 2, "attn": 3}},
}


@pytest.mark.parametrize(
    ("kind", "case"),
    fast(
        [*pairs(KINDS, [*GROUPS]), ("moe", "tower, merger and attention")],
        ("dense", "tower, merger and attention"),
        ("moe", "the tower alone"),
        names=2,
    ),
)
def test_ours_under_stock_peft_and_merged(
    exact: dict[str, Path], tmp_path: Path, kind: str, case: str
) -> None:
    base, out, row = exact[kind], tmp_path / "adapter", picture(exact[kind])
    net = adapted(base, out, media={"image": 2}, **GROUPS[case])
    stock = stock_vl(base)
    plain, positions = stock_sees(stock, row), positions_of(stock, row)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        peer = loaded_adapter(stock, out)
    theirs, mine = stock_sees(peer, row), ours_sees(net, row, positions)
    report = merge(str(base), out, tmp_path / "merged")
    merged = stock_sees(stock_vl(tmp_path / "merged"), row)
    effect = float((theirs - plain).abs().max())
    gaps = [float((one - theirs).abs().max()) for one in (mine, merged)]
    figure(f"{kind}, {case}: ours {gaps[0]:.1e}, merged {gaps[1]:.1e} of an effect of {effect:.2f}")
    assert effect > 0.05
    assert max(gaps) <= 2e-5
    assert report.proof is not None
    assert report.proof["tower_effect"] > 0.01
    assert report.proof["effect"] > 0.01  # of the tower alone too: through the trunk
    assert report.pairs == len(changed(base, tmp_path / "merged"))


# -- stock PEFT's, read and merged by us

RECIPES: dict[str, dict[str, Any]] = {
    "names of both": {"target_modules": ["qkv", "linear_fc1", "q_proj", "down_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "the tower by expression": {"target_modules": r".*visual\.(blocks\.\d+\.attn|merger)\.[lpq].*"},
    "one layer of both": {"target_modules": ["qkv", "gate_proj"], "layers_to_transform": [0]},
    "a layer's number below one list": {
        "target_modules": ["linear_fc1", "gate_proj"], "layers_to_transform": [0],
        "layers_pattern": "layers",
    },
    "patterns": {
        "target_modules": ["attn.proj", "merger.linear_fc2", "v_proj"],
        "rank_pattern": {"attn.proj": 2}, "alpha_pattern": {"merger.linear_fc2": 9},
        "use_rslora": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("recipe", fast(RECIPES, *[*RECIPES][::3]))
def test_stock_pefts_read_and_merged(exact: dict[str, Path], tmp_path: Path, recipe: str) -> None:
    import peft

    base, out = exact["dense"], tmp_path / "adapter"
    peer, row = peft_on(stock_vl(base), **RECIPES[recipe]), picture(exact["dense"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer.save_pretrained(str(out), save_embedding_layers=False)
    expected = {
        f"{name.removeprefix('base_model.model.')}.weight"
        for name, module in peer.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    told = read_adapter(out, identify(str(base)).layout, trust_base=True)
    assert told.pairs.keys() == expected
    in_tower = {name for name in expected if name.startswith(TOWER)}
    flags = {"kinds": [], "keys": {}, "tower_changed": True, "pairs": len(in_tower)}
    if in_tower:
        assert told.modalities == {"vision": {**flags, "plugin": "qcore-multimodal"}}
    else:
        assert (recipe, told.modalities) == ("a layer's number below one list", {})
    merge(str(base), out, tmp_path / "merged", trust_base=True)
    assert changed(base, tmp_path / "merged") == expected
    gap = stock_sees(stock_vl(tmp_path / "merged"), row) - stock_sees(peer, row)
    figure(f"{recipe}: {len(expected)} maps, merged differs by {float(gap.abs().max()):.1e}")
    assert float(gap.abs().max()) <= 2e-5
    (entry,) = read_manifest(tmp_path / "merged").meta["merged"]
    assert entry["modalities"] == told.modalities


def test_a_convolution_that_peft_adapted_is_refused(base: Path, tmp_path: Path) -> None:
    peer = peft_on(stock_vl(base), target_modules=["proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    with pytest.raises(InputError, match="patch_embed") as error:
        merge(str(base), tmp_path / "adapter", tmp_path / "merged", trust_base=True)
    assert error.value.code == "QC-ADAPTER-005"
    assert not (tmp_path / "merged").exists()


# -- the bytes of a merge


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_tower_changes(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    base, out, merged = bases[kind], tmp_path / "adapter", tmp_path / "merged"
    adapted(base, out, ("vision", "merger"), media={"image": 5, "video": 1})
    report = merge(str(base), out, merged)
    maps = {f"{TOWER}merger.linear_fc{n}.weight" for n in (1, 2)}
    maps |= {f"{TOWER}blocks.0.attn.{name}.weight" for name in ("qkv", "proj")}
    maps |= {f"{TOWER}blocks.0.mlp.linear_fc{n}.weight" for n in (1, 2)}
    assert changed(base, merged) == maps
    assert report.changed == report.pairs == len(maps)
    before, after, lora = (
        on_disk(base),
        on_disk(merged),
        load_file(out / "adapter_model.safetensors"),
    )
    for name in maps:
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora"
        delta = lora[f"{stem}_B.weight"].double() @ lora[f"{stem}_A.weight"].double()
        assert torch.equal(after[name], (before[name].double() + 6 / 4 * delta).to(torch.bfloat16))
    assert verify(merged).ok
    flags = {"kinds": ["image", "video"], "keys": {}, "tower_changed": True, "pairs": 6}
    (entry,) = read_manifest(merged).meta["merged"]
    assert entry["modalities"] == {"vision": {**flags, "plugin": "qcore-multimodal"}}


def settings_of(**changes: Any) -> Settings:
    options: dict[str, Any] = {
        "max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "r": 4,
        "lora_alpha": 12, "learning_rate": 2e-2, "dtype": "fp32", "save_steps": 0,
    }  # fmt: skip
    return Settings(**(options | changes))


def read_by_the_proof(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that the proof reads from the base."""
    seen: list[str] = []

    def reading(checkpoint: Any, item: Any, *rows: Any) -> Any:
        seen.append(item.tensor.name)
        return read_tensor(checkpoint, item, *rows)

    monkeypatch.setattr("qcore.merging.disk_rows.read_tensor", reading)
    return seen


@pytest.mark.slow
def test_text_alone_leaves_the_tower_with_and_without_the_plugin(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the adapter or of the merge tells whether the plugin was there."""
    read = read_by_the_proof(monkeypatch)
    for where in ("with", "without"):
        if where == "without":
            monkeypatch.setenv("QCORE_DISABLE_PLUGINS", "multimodal")
        found = identify(str(base))
        assert (found.modality is None) == (where == "without")
        train(str(base), rows, tmp_path / where, settings_of(), device="cpu")
        merge(str(base), tmp_path / where, tmp_path / f"merged {where}")
    one, two = tmp_path / "with", tmp_path / "without"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    metas = [read_manifest(folder).meta for folder in (one, two)]
    for key in ("fingerprints", "tensors", "modalities", "adapter_class"):
        assert metas[0][key] == metas[1][key]
    assert (set(metas[0]["fingerprints"]), metas[0]["modalities"]) == ({"text"}, {})
    assert not [name for name in read if name.startswith(TOWER)]
    touched = changed(base, tmp_path / "merged with")
    assert touched
    assert not [name for name in touched if not name.startswith("model.language_model.")]
    assert not changed(tmp_path / "merged with", tmp_path / "merged without")
    # And across: trained with it, merged without it.
    merge(str(base), one, tmp_path / "across")
    assert not changed(tmp_path / "merged with", tmp_path / "across")


def test_a_frozen_tower_that_saw_media_is_bound_too(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    adapted(base, out, ("attn",), media={"video": 4})
    told = read_adapter(out, identify(str(base)).layout)
    flags = {
        "kinds": ["video"],
        "keys": {},
        "tower_changed": False,
        "pairs": 0,
        "plugin": "qcore-multimodal",
    }
    assert told.modalities == {"vision": flags}
    assert set(told.fingerprints) == {"text", "vision"}
    # Text alone runs without the tower, media with it.
    assert set(told.binding(identify(str(base)).layout)) == {"text"}
    assert set(told.binding(with_tower(base).layout)) == {"text", "vision"}
    merge(str(base), out, tmp_path / "merged")
    assert not [name for name in changed(base, tmp_path / "merged") if name.startswith(TOWER)]
    # One bit of the tower is another base.
    other = shutil.copytree(base, tmp_path / "other")
    name = f"{TOWER}pos_embed.weight"
    (file,) = (f for f in other.glob("*.safetensors") if name in load_file(f))
    tensors = load_file(file)
    tensors[name].view(torch.int16)[3, 5] ^= 1
    resave(other, tensors, file.name)
    with pytest.raises(InputError, match="pos_embed") as error:
        merge(str(other), out, tmp_path / "never")
    assert error.value.code == "QC-MERGE-001"


# -- what is refused


def text_only(base: Path, folder: Path) -> Path:
    """The same weights without the tower, as a text-only save leaves them."""
    folder.mkdir()
    for path in base.iterdir():
        if path.suffix not in (".safetensors", ".json") or path.name == "tokenizer.json":
            shutil.copyfile(path, folder / path.name)
    for name in ("tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(base / name, folder / name)
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: value for name, value in on_disk(base).items() if not name.startswith(TOWER)},
        folder / "model.safetensors",
    )
    return folder


@pytest.mark.parametrize("groups", [("vision", "attn"), ("attn",)], ids=["changed", "seen"])
@pytest.mark.parametrize("how", ["no plugin", "no tower"])
def test_a_base_without_the_part(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, groups: tuple[str, ...]
) -> None:
    out, where = tmp_path / "adapter", base
    adapted(base, out, groups, media={"image": 1})
    if how == "no plugin":
        monkeypatch.setenv("QCORE_DISABLE_PLUGINS", "multimodal")
    else:
        where = text_only(base, tmp_path / "text only")
    with pytest.raises(InputError) as error:
        merge(str(where), out, tmp_path / "merged")
    told = error.value
    assert (told.code, told.exit_code, told.field) == ("QC-ADAPTER-012", 65, "part 'vision'")
    assert "install qcore-multimodal" in (told.fix or "")
    assert ("4 pairs" in str(told.found)) == ("vision" in groups)
    assert not (tmp_path / "merged").exists()


def again(out: Path, folder: Path, change: Callable[[dict[str, Any]], object], **meta: Any) -> Path:
    """The adapter published anew by a tool that keeps manifests sound, and changes tensors."""
    tensors = load_file(out / "adapter_model.safetensors")
    change(tensors)
    config = json.loads((out / "adapter_config.json").read_text())
    left = {re.sub(r"\.lora_[AB]\.weight$", "", name) for name in tensors}
    config["target_modules"] = sorted(name.removeprefix("base_model.model.") for name in left)
    with publish(folder, kind="adapter") as to:
        to.write_json("adapter_config.json", config)
        save_file(tensors, folder.parent / "cut.safetensors", metadata={"format": "pt"})
        to.copy("adapter_model.safetensors", folder.parent / "cut.safetensors")
        to.meta.update(read_manifest(out).meta | meta)
    return folder


def without(*words: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if any(word in name for word in words)]:
            del tensors[name]

    return change


CUTS: dict[str, tuple[str, ...]] = {
    "the whole tower": ("visual",),
    "the merger": ("merger",),
    "one map": ("attn.qkv",),
}


@pytest.mark.parametrize("cut", CUTS)
def test_an_adapter_whose_tower_is_cut(base: Path, tmp_path: Path, cut: str) -> None:
    adapted(base, tmp_path / "whole", ("vision", "merger", "attn"), media={"image": 1})
    sound = again(tmp_path / "whole", tmp_path / "sound", without())
    assert merge(str(base), sound, tmp_path / "merged").pairs == 10
    out = again(tmp_path / "whole", tmp_path / "cut", without(*CUTS[cut]))
    with pytest.raises(InputError, match="vision") as error:
        merge(str(base), out, tmp_path / "never")
    told = error.value
    assert (told.code, told.exit_code) == ("QC-ADAPTER-013", 65)
    left = {"the whole tower": 0, "the merger": 4, "one map": 5}[cut]
    assert (told.found, told.expected) == (left, 6)


def test_a_foreign_adapter_whose_tower_is_cut(base: Path, tmp_path: Path) -> None:
    """Without flags the config declares what must be there."""
    adapted(base, tmp_path / "whole", ("vision", "attn"))
    folder = tmp_path / "foreign"
    folder.mkdir()
    tensors = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    without("attn.qkv")(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    shutil.copyfile(tmp_path / "whole" / "adapter_config.json", folder / "adapter_config.json")
    with pytest.raises(InputError, match=r"attn\.qkv") as error:
        merge(str(base), folder, tmp_path / "never", trust_base=True)
    assert error.value.code == "QC-ADAPTER-006"


def test_the_text_class_has_no_tower(base: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="vision") as error:
        adapted(base, tmp_path / "adapter", ("vision", "attn"), asked="text")
    assert (error.value.code, error.value.expected) == ("QC-ADAPTER-001", "vl")
    told = settings_of(adapter_class="text", target_groups=("merger", "attn"))
    with pytest.raises(UsageError, match="vision") as error:
        train(str(base), rows, tmp_path / "out", told, device="cpu")
    assert error.value.code == "QC-ADAPTER-001"


# -- the proof sees the tower


def broken(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """The proof's merge adds a hundredth too much to some maps."""
    real = Streams._merge

    def wrong(self: Streams, name: str, module: Any) -> None:
        real(self, name, module)
        if part in name:
            assert isinstance(module, nn.Module)
            module.weight.data.mul_(1.01)  # type: ignore[operator, union-attr]

    monkeypatch.setattr(Streams, "_merge", wrong)


@pytest.mark.parametrize("part", ["attn.qkv", "attn.proj", "mlp.linear_fc2", "merger.linear_fc1"])
def test_a_wrong_sum_in_the_tower_is_caught(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    out = tmp_path / "adapter"
    adapted(base, out, ("vision", "merger"))
    broken(monkeypatch, part)
    with pytest.raises(NumericError) as error:
        merge(str(base), out, tmp_path / "merged")
    where = "merger" if "merger" in part else "blocks.0"
    assert (error.value.code, error.value.field) == ("QC-MERGE-005", f"{TOWER}{where}")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_the_tower_without_effect(base: Path, tmp_path: Path) -> None:
    """Its B is so small that float32 takes none of it, and the weights round back."""
    out = tmp_path / "adapter"
    adapted(base, out, ("merger",))

    def shrink(tensors: dict[str, Any]) -> None:
        for name, value in tensors.items():
            if "lora_B" in name:
                value.mul_(1e-12)

    small = again(out, tmp_path / "small", shrink)
    with pytest.raises(NumericError) as error:
        merge(str(base), small, tmp_path / "merged")
    assert error.value.code == "QC-MERGE-004"


def test_text_logits_of_a_tower_adapter_are_the_bases(base: Path, tmp_path: Path) -> None:
    """Why the effect of a tower is looked for where media are."""
    adapted(base, tmp_path / "adapter", ("vision", "merger"))
    report = merge(str(base), tmp_path / "adapter", tmp_path / "merged")
    docs = documents((9, 5))
    row: Mapping[str, Any] = picture(base)
    plain, merged = stock_vl(base), stock_vl(tmp_path / "merged")
    assert torch.equal(stock_logits(plain, docs), stock_logits(merged, docs))
    assert float((stock_sees(plain, row) - stock_sees(merged, row)).abs().max()) > 0.01
    assert report.proof is not None
    assert report.proof["tower_effect"] > 0
