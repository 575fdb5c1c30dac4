"""`qcore adapter combine` against PEFT's add_weighted_adapter: cat, svd, and linear."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.change_kit import written
from support.cli_kit import here
from support.e2e_kit import loaded_adapter, stock, write_stock
from torch import Tensor

from qcore.adapter.combined import Weighted
from qcore.adapter.evidence import read_for
from qcore.config.settings import Settings
from qcore.errors import QcoreError
from qcore.inference.generate import Generator
from qcore.io.artifact import read_manifest, verify
from qcore.merging.combine import combine
from qcore.merging.merge import merge
from qcore.plugins.resolve_model import identify
from qcore.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
A: dict[str, Any] = {"target_modules": ["q_proj", "in_proj_qkv", "down_proj"], "r": 4}
B: dict[str, Any] = {
    "target_modules": ["q_proj", "in_proj_z", "down_proj"], "r": 6, "lora_alpha": 5,
    "use_rslora": True, "rank_pattern": {"down_proj": 3},
}  # fmt: skip
SAME: dict[str, Any] = {"target_modules": ["q_proj", "in_proj_qkv", "down_proj"], "r": 4}
EXPERTS: dict[str, Any] = {
    "target_modules": ["o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and adapters of stock PEFT."""
    folder = tmp_path_factory.mktemp("combine")
    write_stock(folder / "base", dtype=torch.bfloat16)
    for seed, (name, recipe) in enumerate((("a", A), ("b", B), ("c", SAME))):
        written(folder / "base", folder / name, recipe, seed=seed)
    return folder


def deltas(model: Any, name: str) -> dict[str, Tensor]:
    """The deltas of an adapter in PEFT, float32, by module."""
    return {
        path: layer.get_delta_weight(name).detach()
        for path, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight") and name in getattr(layer, "lora_A", {})
    }


def pefts(home: Path, names: str, weights: list[float], way: str, **more: Any) -> dict[str, Tensor]:
    """PEFT's sum of adapters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = stock(home / "base", "vl", torch.float32)
        model = peft.PeftModel.from_pretrained(base, home / names[0], names[0])
        for name in names[1:]:
            model.load_adapter(home / name, name)
        model.add_weighted_adapter([*names], weights, "sum", combination_type=way, **more)
    return deltas(model, "sum")


def ours(base: Path, folder: Path, *, moe: bool = False) -> dict[str, Tensor]:
    """The deltas of a folder as stock PEFT loads it; a warning of missing keys is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")
        peer = loaded_adapter(stock(base, "vl", torch.float32, moe=moe), folder)
    return deltas(peer, "default")


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor], most: float) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert float((mine[name] - value).norm()) <= most * float(value.norm()), name


@pytest.mark.parametrize(
    "weights", [[1.0, 0.5], pytest.param([-0.25, 2.0], marks=pytest.mark.slow)]
)
def test_the_exact_sum_is_pefts_cat(home: Path, tmp_path: Path, weights: list[float]) -> None:
    wanted = dict(zip((str(home / "a"), str(home / "b")), weights, strict=True))
    report = combine(wanted, tmp_path / "out")  # the adapters name their base
    assert report.relative_error == 0.0
    assert_same(ours(home / "base", tmp_path / "out"), pefts(home, "ab", weights, "cat"), 1e-6)
    assert {weight.r for weight in report.weights.values()} == {4, 6, 10, 7}
    assert verify(tmp_path / "out").ok
    meta = read_manifest(tmp_path / "out").meta
    assert [(e["adapter"], e["weight"]) for e in meta["combined"]] == [*wanted.items()]
    assert "fingerprints" not in meta
    merge(str(home / "base"), tmp_path / "out", tmp_path / "merged", trust_base=True)
    with pytest.raises(QcoreError) as caught:
        merge(str(home / "base"), tmp_path / "out", tmp_path / "no", trust_base=False)
    assert caught.value.code == "QC-ADAPTER-009"


def test_a_rank_is_pefts_svd(home: Path, tmp_path: Path) -> None:
    wanted = {str(home / "a"): 1.0, str(home / "c"): 0.7}
    report = combine(wanted, tmp_path / "out", rank=3)
    theirs = pefts(home, "ac", [1.0, 0.7], "svd", svd_rank=3)
    assert_same(ours(home / "base", tmp_path / "out"), theirs, 1e-4)
    exact = pefts(home, "ac", [1.0, 0.7], "cat")
    for name, weight in report.weights.items():
        key = next(key for key in exact if key.endswith(name.removesuffix(".weight")))
        error = float((theirs[key] - exact[key]).norm() / exact[key].norm())
        assert weight.relative_error == pytest.approx(error, rel=1e-3)
    assert 0 < report.relative_error < 1


def test_a_rank_that_suffices_is_exact(home: Path, tmp_path: Path) -> None:
    wanted = {str(home / "a"): 1.0, str(home / "c"): -1.5}
    report = combine(wanted, tmp_path / "out", rank=64)
    assert report.relative_error <= 1e-7
    theirs = pefts(home, "ac", [1.0, -1.5], "cat")
    assert_same(ours(home / "base", tmp_path / "out"), theirs, 1e-5)


def test_adapters_that_cancel_each_other(home: Path, tmp_path: Path) -> None:
    """The sum is zero up to rounding, which is compared with the matrices and not with the sum."""
    copy = shutil.copytree(home / "a", tmp_path / "copy")
    combine({str(home / "a"): 1.0, str(copy): -1.0}, tmp_path / "out")
    assert all(float(d.abs().max()) <= 1e-6 for d in ours(home / "base", tmp_path / "out").values())


def test_pefts_linear_is_another_sum(home: Path, tmp_path: Path) -> None:
    """PEFT's linear adds A and B separately: equal for one adapter, not for several."""
    combine({str(home / "a"): 0.5}, tmp_path / "one")
    one = ours(home / "base", tmp_path / "one")
    assert_same(one, pefts(home, "a", [0.5], "linear"), 1e-6)
    combine({str(home / "a"): 1.0, str(home / "c"): 1.0}, tmp_path / "two")
    two, theirs = ours(home / "base", tmp_path / "two"), pefts(home, "ac", [1.0, 1.0], "linear")
    assert all(float((two[n] - theirs[n]).norm()) > 0.1 * float(two[n].norm()) for n in two)


@pytest.mark.parametrize("rank", [None, 2])
def test_experts(tmp_path: Path, rank: int | None) -> None:
    base = write_stock(tmp_path / "base", moe=True, dtype=torch.bfloat16)
    for seed, name in enumerate("ab"):
        written(base, tmp_path / name, EXPERTS, moe=True, seed=seed)
    wanted = {str(tmp_path / "a"): 1.0, str(tmp_path / "b"): 0.5}
    report = combine(wanted, tmp_path / "out", rank=rank)
    mine = ours(base, tmp_path / "out", moe=True)
    each = [ours(base, tmp_path / name, moe=True) for name in "ab"]
    for name, value in mine.items():
        total = each[0][name] + 0.5 * each[1][name]
        if rank is None:
            wanted_delta = total
        else:
            u, s, v = torch.linalg.svd(total.double(), full_matrices=False)
            # PEFT's delta of a stack has the shape of the weight: [E, out, in].
            wanted_delta = (u[..., :rank] * s[..., None, :rank] @ v[..., :rank, :]).float()
        assert float((value - wanted_delta).norm()) <= 1e-5 * float(total.norm()), name
    assert (report.relative_error == 0) == (rank is None)


@pytest.mark.parametrize(
    ("recipe", "word"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "DoRA"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "saved values"),
        ({"target_modules": ["q_proj", "lm_head"]}, "the head"),
    ],
)
def test_what_a_sum_cannot_hold_is_refused(
    home: Path, tmp_path: Path, recipe: dict[str, Any], word: str
) -> None:
    written(home / "base", tmp_path / "x", recipe)
    with pytest.raises(QcoreError) as caught:
        combine({str(home / "a"): 1.0, str(tmp_path / "x"): 1.0}, tmp_path / "out")
    assert caught.value.code == "QC-ADAPTER-021"
    assert word in caught.value.what
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_adapters_of_qcore_keep_their_base(home: Path, rows: Path, tmp_path: Path) -> None:
    """Two trained adapters: their sum is bound to the base, and generates without consent."""
    settings = Settings(
        max_steps=2, r=2, quantization="none", dtype="fp32", save_steps=0, learning_rate=1e-2,
        per_device_train_batch_size=2, gradient_accumulation_steps=1, gradient_checkpointing=False,
    )  # fmt: skip
    base = str(home / "base")
    for name in "xy":
        train(base, rows, tmp_path / name, settings, device="cpu")
    combine({str(tmp_path / "x"): 0.5, str(tmp_path / "y"): 0.5}, tmp_path / "out", rank=2)
    read = read_for(identify(base), tmp_path / "out")
    assert read.fingerprints == read_for(identify(base), tmp_path / "x").fingerprints
    assert Generator(base, adapter=tmp_path / "out", device="cpu", dtype="fp32").model
    again = {str(tmp_path / "out"): 1.0, str(home / "a"): 1.0}
    combine(again, tmp_path / "more", model=base)
    assert Weighted(adapter=read_for(identify(base), tmp_path / "more", trust_base=True)).weight


def test_the_command(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["adapter", "combine", home / "a", f"{home / 'b'}=0.5", "--output"]
    ended = here(capsys, *words, tmp_path / "one", "--rank", 2)
    assert ended.code == 0
    assert "relative error" in ended.out
    ended = here(capsys, *words, tmp_path / "two", "--json")
    assert ended.json["relative_error"] == 0.0
    assert len(ended.json["tensors"]) == ended.json["pairs"]
    ended = here(capsys, *words, tmp_path / "two")
    assert ended.code == 73
    ended = here(capsys, "adapter", "combine", f"{home / 'a'}=x", "--output", tmp_path / "three")
    assert ended.code == 2
    assert "QC-ADAPTER-019" in ended.err
