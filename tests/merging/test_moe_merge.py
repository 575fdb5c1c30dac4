"""Merging an adapter of experts: which tensors change, in every layout, and what proves it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.conversations import conversations, write_rows
from support.e2e_kit import (
    ROOT,
    documents,
    figure,
    loaded_adapter,
    ours,
    resave,
    stock,
    stock_logits,
    write_stock,
)
from support.moe_kit import INDEX, canonical, exact, rewrite, tensors_of
from torch import Tensor

from qcore.adapter.delta import Deltas
from qcore.checkpoint.fingerprint import fingerprints
from qcore.config.settings import Settings
from qcore.errors import InputError, NumericError, QcoreError
from qcore.io.artifact import read_manifest, verify
from qcore.merging.merge import MergeReport, merge
from qcore.merging.rewrite import MergePass
from qcore.nn.load import load
from qcore.nn.model import Model
from qcore.nn.moe.experts import Experts
from qcore.plugins.resolve_model import identify
from qcore.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
LAYOUTS = ("fused", "apart", "mixed")
LAYERS: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
EXPERTS = 6
#: Linear maps that training hits by default: 4 of attention, 3 of each of two delta nets, and
#: the shared expert's 3 in each of three layers.
LINEAR = 4 + 2 * 3 + 3 * 3


@pytest.fixture(scope="module")
def bases(once: Callable[..., Path]) -> dict[str, Path]:
    """One set of weights with a tower and mtp, in several files, in each layout."""

    def write(home: Path) -> None:
        written = write_stock(
            home / "stock", "vl", tied=False, mtp=True, moe=True, dtype=torch.bfloat16, **LAYERS
        )
        (written / "README.md").write_text("a card\n")
        for layout in LAYOUTS:
            rewrite(written, home / layout, layout, shards=4)

    home = once("moe-merge-bases", write)
    return {layout: home / layout for layout in LAYOUTS}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", conversations(12))


def trained(base: Path, rows: Path, out: Path, **settings: Any) -> Path:
    options: dict[str, Any] = {
        "max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "r": 4,
        "lora_alpha": 12, "learning_rate": 5e-2, "dtype": "fp32", "save_steps": 0,
        "group_r": {"experts": 3},
    }  # fmt: skip
    train(str(base), rows, out, Settings(**(options | settings)), device="cpu")
    return out


@pytest.fixture(scope="module")
def adapter(bases: dict[str, Path], rows: Path, once: Callable[..., Path]) -> Path:
    made = once("moe-merge-adapter", lambda home: trained(bases["mixed"], rows, home / "adapter"))
    return made / "adapter"


@pytest.fixture(scope="module")
def merged(
    bases: dict[str, Path], adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, MergeReport]]:
    """The same adapter, bound to one fingerprint, merged into every layout."""
    home, found = tmp_path_factory.mktemp("merged"), {}
    for layout, base in bases.items():
        found[layout] = home / layout, merge(str(base), adapter, home / layout)
    return found


def headers(folder: Path) -> dict[str, Any]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                view = opened.get_slice(name)
                found[name] = (view.get_dtype(), tuple(view.get_shape()), file.name)
    return found


def changed(base: Path, out: Path) -> set[str]:
    before, after = tensors_of(base), tensors_of(out)
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


# -- the contract, in every layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exactly_the_expected_tensors_change(
    bases: dict[str, Path], merged: dict[str, tuple[Path, MergeReport]], layout: str
) -> None:
    base, (out, report) = bases[layout], merged[layout]
    touched = changed(base, out)
    experts = {name for name in touched if ".mlp.experts." in name}
    assert all(name.startswith(f"{ROOT}layers.") for name in touched)
    one_by_one = layout == "apart"
    assert len(experts) == (3 * EXPERTS * 3 if one_by_one else 3 * 2)
    assert len(touched - experts) == LINEAR
    assert report.changed == len(touched)
    assert report.unchanged == ()
    assert report.pairs == LINEAR + 3 * 2
    assert report.tensors == len(headers(base))
    assert report.proof is not None
    figure(
        f"{layout}: {report.changed} of {report.tensors} tensors changed ({len(experts)} of "
        f"experts), {report.pairs} pairs; proof {dict(report.proof)}"
    )
    assert report.proof["difference"] <= 1e-4
    assert report.proof["effect"] > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_is_kept(
    bases: dict[str, Path], merged: dict[str, tuple[Path, MergeReport]], layout: str
) -> None:
    base, (out, _) = bases[layout], merged[layout]
    assert verify(out).ok
    assert headers(out) == headers(base)
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in out.iterdir()} == names | {"MANIFEST.json"}
    for name in names:
        if not name.endswith(".safetensors"):
            assert (out / name).read_bytes() == (base / name).read_bytes(), name
    kept = [name for name in headers(out) if name.startswith("mtp.") and ".experts." in name]
    assert len(kept) == (2 if layout == "fused" else 3 * EXPERTS)
    trunk = [n for n in headers(out) if n.startswith(ROOT) and ".experts." in n]
    assert len(trunk) == (3 * EXPERTS * 3 if layout == "apart" else 3 * 2)


def test_all_layouts_hold_the_same_function(
    merged: dict[str, tuple[Path, MergeReport]], bases: dict[str, Path], adapter: Path
) -> None:
    """Tensor for tensor, by hand; and the stock class says the same from each, bit for bit."""
    truth = exact(bases["fused"], adapter)
    assert len(truth) == LINEAR + 6
    values = {layout: canonical(tensors_of(out)) for layout, (out, _) in merged.items()}
    for layout in LAYOUTS:
        for name, value in truth.items():
            assert torch.equal(values[layout][name], value.to(torch.bfloat16)), (layout, name)
    docs = documents((33, 70))
    logits = [stock_logits(stock(out, "vl", moe=True), docs) for out, _ in merged.values()]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_one_fingerprint_for_all_layouts(bases: dict[str, Path], adapter: Path) -> None:
    recorded = read_manifest(adapter).meta
    for base in bases.values():
        found = identify(str(base))
        model = Model(
            found.decision.architecture, found.checkpoint.config, found.layout, torch.float32, {}
        )
        digests = load(
            model, found.layout, found.checkpoint, device=torch.device("cpu"), quantize=False
        )
        assert fingerprints(found.layout, digests) == recorded["fingerprints"]
        assert digests == recorded["tensors"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_bit_of_one_expert_is_another_base(
    bases: dict[str, Path], adapter: Path, tmp_path: Path, layout: str
) -> None:
    copy = shutil.copytree(bases[layout], tmp_path / "base")
    name = f"{ROOT}layers.1.mlp.experts." + (
        "4.up_proj.weight" if layout == "apart" else "gate_up_proj"
    )
    shard = json.loads((copy / INDEX).read_text())["weight_map"][name]
    found = load_file(copy / shard)
    # The last value of expert 4, in the rows of up.
    value = found[name] if layout == "apart" else found[name][4]
    value[-1, -1] = -value[-1, -1]
    resave(copy, found, shard)
    with pytest.raises(InputError) as error:
        merge(str(copy), adapter, tmp_path / "out")
    assert error.value.code == "QC-MERGE-001"
    assert (error.value.field or "").startswith(f"{ROOT}layers.1.mlp.experts.")
    assert not (tmp_path / "out").exists()


# -- experts that training never reached


@pytest.fixture(scope="module")
def idle(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter with B zero for experts 1 and 4, as for ones that no token was routed to."""
    folder = tmp_path_factory.mktemp("idle")
    found = load_file(adapter / "adapter_model.safetensors")
    for name, value in found.items():
        if ".experts." in name and ".lora_B." in name:
            for k in range(3):
                value[:, [k * EXPERTS + 1, k * EXPERTS + 4]] = 0
    save_file(found, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(adapter / "adapter_config.json", folder / "adapter_config.json")
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_without_tokens_stay_as_they_were_and_are_named(
    bases: dict[str, Path], idle: Path, tmp_path: Path, layout: str
) -> None:
    base, out = bases[layout], tmp_path / "out"
    report = merge(str(base), idle, out, trust_base=True)
    before, after = (canonical(tensors_of(folder)) for folder in (base, out))
    for name in before:
        if name.startswith(ROOT) and ".mlp.experts." in name:
            same = [torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True)]
            assert same == [n in (1, 4) for n in range(EXPERTS)], name
    if layout != "apart":
        assert (report.changed, report.unchanged) == (LINEAR + 6, ())
        return
    assert report.changed == LINEAR + 3 * 4 * 3
    assert set(report.unchanged) == {
        f"{ROOT}layers.{layer}.mlp.experts.{n}.{leaf}_proj.weight"
        for layer in range(3) for n in (1, 4) for leaf in ("gate", "up", "down")
    }  # fmt: skip
    assert read_manifest(out).meta["merged"][0]["tensors_unchanged"] == list(report.unchanged)


@pytest.mark.slow
def test_an_adapter_that_training_left_with_idle_experts(rows: Path, tmp_path: Path) -> None:
    """Many experts and one short step: training leaves B zero where no token came by."""
    base = write_stock(tmp_path / "base", "text", moe=True, num_experts=300, **LAYERS)
    few = tmp_path / "few.jsonl"
    few.write_text(rows.read_text().splitlines(keepends=True)[0])
    out = trained(
        base, few, tmp_path / "a", max_steps=1, per_device_train_batch_size=1, warmup_ratio=0.0
    )
    found = load_file(out / "adapter_model.safetensors")
    zero = sum(
        int((b.view(len(b), 3, 300).abs().amax((0, 1)) == 0).sum())
        for name, b in found.items()
        if name.endswith("experts.lora_B.weight")
    )
    report = merge(str(base), out, tmp_path / "merged")
    assert 0 < zero < 900
    assert len(report.unchanged) == 3 * zero
    figure(f"{zero} of 900 experts had no token; {len(report.unchanged)} tensors named unchanged")


# -- logits


def test_logits_of_the_merge(
    bases: dict[str, Path], merged: dict[str, tuple[Path, MergeReport]], adapter: Path
) -> None:
    """Unrounded equal to base + adapter; rounding may send a token to another expert."""
    docs = documents((33, 70, 130))
    model = stock(bases["mixed"], "vl", moe=True)
    plain = stock_logits(model, docs)
    peer = loaded_adapter(stock(bases["mixed"], "vl", moe=True), adapter)
    adapted, chosen = stock_logits(peer, docs), picks(peer, docs)
    with torch.no_grad():
        for name, value in exact(bases["mixed"], adapter).items():
            model.get_parameter(name).copy_(value)
    unrounded = stock_logits(model, docs)
    out, _ = merged["mixed"]
    cls = type(model)
    after, told = cls.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["mismatched_keys"]
    assert all(name.startswith("mtp.") for name in told["unexpected_keys"])
    rounded = stock_logits(after.eval(), docs)
    flips = float((picks(after, docs) != chosen).any(-1).float().mean())
    effect = float((adapted - plain).abs().max())
    before = float((unrounded - adapted).abs().max())
    off = (rounded - unrounded).abs().amax(-1)
    figure(
        f"effect {effect:.2f}; unrounded {before:.1e}; rounding {float(off.median()):.1e} in the "
        f"median, {float(off.max()):.1e} at most; tokens routed elsewhere {flips:.1%}"
    )
    assert effect > 0.1
    assert before <= 1e-4
    assert 0 < float(off.median()) <= 0.1 * effect
    assert flips < 0.05


def picks(model: Any, docs: list[Tensor]) -> Tensor:
    """Which experts each token gets in each layer, ``[layers T, E]``."""
    found = []
    routers = [m for name, m in model.named_modules() if name.endswith("mlp.gate")]
    hooks = [
        router.register_forward_hook(lambda module, given, out: found.append(out[2]))
        for router in routers
    ]
    for ids in docs:
        with torch.no_grad():
            model(input_ids=ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.nn.functional.one_hot(torch.cat(found), EXPERTS).sum(-2)


# -- the checks can fail


def refused(error: pytest.ExceptionInfo[QcoreError], code: str) -> None:
    assert (error.value.code, error.value.exit_code) == (code, 76), error.value


REAL_MATRICES, REAL_ADD, REAL_CHANGE = Deltas._matrices, Deltas.add, MergePass._change


def rank_major_a(self: Deltas, name: str, number: int | None) -> tuple[Tensor, Tensor]:
    """A read as B is: row ``k E + e``."""
    a, b = self.sides(name)
    if number is None:
        return a, b
    return a[number :: self.pairs[name].tensor.shape[0]], REAL_MATRICES(self, name, number)[1]


def expert_major_b(self: Deltas, name: str, number: int | None) -> tuple[Tensor, Tensor]:
    """B read as A is: column ``e r + k``."""
    a, b = self.sides(name)
    if number is None:
        return a, b
    r = self.pairs[name].r
    return REAL_MATRICES(self, name, number)[0], b[:, number * r : (number + 1) * r]


def neighbour(self: Deltas, name: str, number: int | None) -> tuple[Tensor, Tensor]:
    """The adapter of the next expert."""
    if number is None:
        return REAL_MATRICES(self, name, number)
    return REAL_MATRICES(self, name, (number + 1) % EXPERTS)


@pytest.mark.parametrize("layout", ["fused", "apart"])
@pytest.mark.parametrize("broken", [rank_major_a, expert_major_b, neighbour])
def test_another_order_of_experts_is_caught(
    bases: dict[str, Path], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    broken: Callable[..., Any], layout: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(Deltas, "_matrices", broken)
    with pytest.raises(NumericError) as error:
        merge(str(bases[layout]), adapter, tmp_path / "out")
    refused(error, "QC-MERGE-005")
    assert list(tmp_path.iterdir()) == []


def experts_swapped(self: MergePass, path: Path, cut: Any) -> Any:
    """The merged experts written in another order."""
    done = REAL_CHANGE(self, path, cut)
    if cut.header.name.endswith("layers.1.mlp.experts.down_proj"):
        done = done._replace(weight=done.weight.roll(1, 0))
    return done


def one_unchanged(self: MergePass, path: Path, cut: Any) -> Any:
    """One expert's delta lost."""
    with_it = REAL_CHANGE(self, path, cut)
    name = cut.header.name
    if name.endswith("layers.2.mlp.experts.gate_up_proj"):
        with_it.weight[3] -= with_it.weight[3] / 2
    if name.endswith("layers.2.mlp.experts.3.up_proj.weight"):
        with_it.weight.mul_(0.5)
    return with_it


@pytest.mark.parametrize(
    ("broken", "layout"),
    [(experts_swapped, "fused"), (one_unchanged, "fused"), (one_unchanged, "apart")],
)
def test_a_wrong_expert_in_the_files_is_caught(
    bases: dict[str, Path], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    broken: Callable[..., Any], layout: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(MergePass, "_change", broken)
    with pytest.raises(NumericError, match="experts") as error:
        merge(str(bases[layout]), adapter, tmp_path / "out")
    refused(error, "QC-MERGE-007")
    assert list(tmp_path.iterdir()) == []


def test_a_fault_where_several_experts_are_added_in_one_go_is_caught(
    bases: dict[str, Path], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits see experts one by one: what they prove must be what the files are met with."""

    def reversed_(self: Deltas, name: str, weight: Tensor, region: Any) -> Iterator[Any]:
        count = region[0].stop - region[0].start
        if len(region) == 3 and count > 1:
            each = weight.view([part.stop - part.start for part in region])
            for number in range(count):
                one = (slice(count - 1 - number, count - number), *region[1:])
                yield from REAL_ADD(self, name, each[number], one)
        else:
            yield from REAL_ADD(self, name, weight, region)

    monkeypatch.setattr(Deltas, "add", reversed_)
    with pytest.raises(NumericError) as error:
        merge(str(bases["fused"]), adapter, tmp_path / "out")
    refused(error, "QC-MERGE-007")


def test_experts_computed_by_another_s_weights_are_caught(
    bases: dict[str, Path], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Had training applied each expert's LoRA to its neighbour's rows, the proof would show it."""
    from qcore.nn.moe import experts

    real = experts._by_expert

    def rolled(*given: Any) -> Any:
        by_a, by_b = real(*given)
        return by_a.roll(1, 0), by_b.roll(1, 0)

    monkeypatch.setattr(experts, "_by_expert", rolled)
    with pytest.raises(NumericError) as error:
        merge(str(bases["fused"]), adapter, tmp_path / "out")
    refused(error, "QC-MERGE-005")


# -- the router


@pytest.mark.slow
def test_a_router_s_adapter_is_merged_and_proved(
    bases: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    base = bases["mixed"]
    adapter = trained(
        base, rows, tmp_path / "a", target_groups=("router",), group_r={}, max_steps=4
    )
    report = merge(str(base), adapter, tmp_path / "out")
    assert changed(base, tmp_path / "out") == {
        f"{ROOT}layers.{n}.mlp.{leaf}.weight"
        for n in range(3) for leaf in ("gate", "shared_expert_gate")
    }  # fmt: skip
    truth, mine = exact(base, adapter), tensors_of(tmp_path / "out")
    assert all(torch.equal(mine[n], value.to(torch.bfloat16)) for n, value in truth.items())
    assert report.proof is not None
    figure(f"router: proof {dict(report.proof)}")


@pytest.mark.slow
def test_a_merged_base_trains_on(
    merged: dict[str, tuple[Path, MergeReport]], rows: Path, tmp_path: Path
) -> None:
    """A merge is a base like any other, and its own adapter is refused a second time."""
    out, _ = merged["apart"]
    second = trained(out, rows, tmp_path / "second", seed=5)
    report = merge(str(out), second, tmp_path / "two")
    assert len(read_manifest(tmp_path / "two").meta["merged"]) == 2
    assert report.pairs == LINEAR + 6
    with pytest.raises(InputError, match="already holds") as error:
        merge(str(tmp_path / "two"), second, tmp_path / "three")
    assert error.value.code == "QC-MERGE-002"
    model = ours(tmp_path / "two")
    assert sum(isinstance(m, Experts) for m in model.lora_layers.values()) == 6
