"""`qcore verify --against stock`: what agrees, and five sabotaged folders that must be caught."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.child import in_child
from support.cli_kit import here
from support.e2e_kit import STOCK, stock, tiny_folder, wrapped, write_stock
from support.moe_kit import rewrite
from support.tiers import fast
from torch import Tensor

from qcore.config.settings import Settings
from qcore.errors import InputError, NumericError, QcoreError, UsageError
from qcore.io.artifact import MANIFEST, read_manifest
from qcore.io.manifest import FileEntry
from qcore.merging import stock_prompts
from qcore.merging.against_stock import verify_against_stock
from qcore.merging.combine import combine
from qcore.merging.merge import merge
from qcore.merging.stock_compare import Pass
from qcore.merging.stock_report import StockReport
from qcore.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS: dict[str, Any] = {
    "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
VL = "AutoModelForImageTextToText"
SHARDS = "*.safetensors"
TRUNK = "model.language_model.layers."


class Made:
    """A base, an adapter of either class and a merge, made by the real writers when asked for."""

    def __init__(self, home: Path, rows: Path, *, moe: bool) -> None:
        self.home, self.rows, self.moe = home, rows, moe

    @property
    def base(self) -> Path:
        folder = self.home / "base"
        if not folder.exists():
            write_stock(folder, "vl", tied=True, moe=self.moe, dtype=torch.bfloat16, **LAYERS)
        return folder

    def adapter(self, kind: str = "text") -> Path:
        folder = self.home / f"adapter-{kind}"
        if not folder.exists():
            settings = Settings(
                max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=1, r=4,
                lora_alpha=12, learning_rate=2e-2, dtype="fp32", quantization="none", save_steps=0,
                adapter_class=kind,
            )  # fmt: skip
            train(str(self.base), self.rows, folder, settings, device="cpu")
        return folder

    @property
    def merged(self) -> Path:
        folder = self.home / "merged"
        if not folder.exists():
            merge(str(self.base), self.adapter(), folder, prove=False)
        return folder

    def copy(self, of: Path, to: Path) -> Path:
        return shutil.copytree(of, to)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Made:
    return Made(tmp_path_factory.mktemp("dense"), rows, moe=False)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Made:
    return Made(tmp_path_factory.mktemp("moe"), rows, moe=True)


def agrees(report: StockReport) -> None:
    assert report.problems == ()
    assert 0 < report.layers["worst"] < 1
    for prompt in report.prompts:
        assert prompt.difference <= prompt.bound
        assert prompt.kl < 1e-4


# -- what agrees


@pytest.mark.parametrize(
    ("kind", "mixture", "layout", "whole"),
    fast(
        [
            (*case, whole)
            for case in (
                ("vl", False, ""),
                ("text", False, ""),
                ("vl", True, "fused"),
                ("text", True, "apart"),
                ("vl", True, "apart"),
            )
            for whole in (True, False)
        ],
        names=4,
    ),
)
def test_a_base(tmp_path: Path, kind: str, mixture: bool, layout: str, whole: bool) -> None:
    """Either class, tied or not; experts as the hub has them and one by one; two shards."""
    base = write_stock(
        tmp_path / "base", kind, tied=kind == "vl", moe=mixture, dtype=torch.bfloat16, mtp=True
    )
    if layout:
        base = rewrite(base, tmp_path / layout, layout, shards=2)
    report = verify_against_stock(base, whole=whole)
    agrees(report)
    assert (report.kind, report.whole) == ("base", whole)
    assert all(p.difference < 1e-4 and p.effect is None for p in report.prompts)


@pytest.mark.parametrize(
    ("model", "kind", "whole"),
    fast(
        [
            (model, kind, whole)
            for model in ("dense", "moe")
            for kind in ("text", "vl")
            for whole in (True, False)
        ],
        ("dense", "text", False),
        names=3,
    ),
)
def test_an_adapter(request: pytest.FixtureRequest, model: str, kind: str, whole: bool) -> None:
    made: Made = request.getfixturevalue(model)
    report = verify_against_stock(made.adapter(kind), model=str(made.base), whole=whole)
    agrees(report)
    assert report.kind == "adapter"
    assert ("ForCausalLM" in report.stock_class) == (kind == "text")
    for prompt in report.prompts:
        assert prompt.effect is not None
        assert prompt.effect > 0.01
        assert prompt.effect_ratio == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("model", "whole"), fast([(m, w) for m in ("dense", "moe") for w in (True, False)], names=2)
)
def test_a_merge(request: pytest.FixtureRequest, model: str, whole: bool) -> None:
    """Against PEFT on the base: equal but for the rounding of the merged weights."""
    made: Made = request.getfixturevalue(model)
    report = verify_against_stock(made.merged, model=str(made.base), whole=whole)
    agrees(report)
    assert report.kind == "merged"
    assert not report.notes
    for prompt in report.prompts:
        assert prompt.effect_ratio == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_a_merge_without_its_base_is_compared_with_itself(dense: Made) -> None:
    report = verify_against_stock(dense.merged)
    agrees(report)
    assert report.notes == ("the effect of the merge is not compared: pass --model BASE",)


# -- sabotage: files that the real writer made, edited, and the manifest signed again


def sign(folder: Path) -> None:
    """Write the manifest of the files as they are now, so that no digest gives them away."""
    import hashlib

    manifest = read_manifest(folder)
    files = {
        name: FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name in manifest.files
        for data in [(folder / name).read_bytes()]
    }
    (folder / MANIFEST).write_bytes(replace(manifest, files=files).to_bytes())


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a folder with one safetensors file."""
    (file,) = folder.glob(SHARDS)
    tensors = load_file(file)
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, metadata={"format": "pt"})
    sign(folder)


def codes(report: StockReport) -> set[str]:
    """Codes of the problems; each message is one line that names the folder."""
    for problem in report.problems:
        assert "\n" not in problem.message
        assert problem.fix
        assert isinstance(problem, QcoreError)
    return {problem.code for problem in report.problems}


def test_a_scale_is_caught(dense: Made, tmp_path: Path) -> None:
    """One LoRA delta of 19 with half of its scaling."""
    folder, name = dense.copy(dense.merged, tmp_path / "m"), f"{TRUNK}1.self_attn.q_proj.weight"
    (file,) = dense.base.glob(SHARDS)
    before = load_file(file)[name]

    def halve(tensors: dict[str, Tensor]) -> None:
        tensors[name] = ((tensors[name].float() + before.float()) / 2).to(before.dtype)

    edit(folder, halve)
    report = verify_against_stock(folder, model=str(dense.base))
    assert codes(report) >= {"QC-STOCK-005"}
    (problem,) = [p for p in report.problems if p.code == "QC-STOCK-005"]
    assert problem.field == f"{TRUNK}1"
    assert problem.exit_code == 76


def test_a_swapped_projection_is_caught(dense: Made, tmp_path: Path) -> None:
    folder = dense.copy(dense.merged, tmp_path / "m")

    def swap(tensors: dict[str, Tensor]) -> None:
        gate, up = (f"{TRUNK}0.mlp.{name}_proj.weight" for name in ("gate", "up"))
        tensors[gate], tensors[up] = tensors[up], tensors[gate]

    edit(folder, swap)
    report = verify_against_stock(folder, model=str(dense.base), whole=False)
    assert codes(report) >= {"QC-STOCK-005", "QC-STOCK-006"}


@pytest.mark.slow
def test_a_dropped_expert_is_caught(moe: Made, tmp_path: Path) -> None:
    """The delta of one of six experts is missing in one stack of one layer."""
    folder = moe.copy(moe.merged, tmp_path / "m")
    (file,) = moe.base.glob(SHARDS)
    before = load_file(file)

    def drop(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if f"{TRUNK}1.mlp.experts.3." in name:
                tensors[name] = before[name]

    edit(folder, drop)
    report = verify_against_stock(folder, model=str(moe.base))
    assert codes(report) >= {"QC-STOCK-005"}


def test_another_template_is_caught(dense: Made, tmp_path: Path) -> None:
    folder = dense.copy(dense.merged, tmp_path / "m")
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + "{{- ' ' if add_generation_prompt }}")
    sign(folder)
    report = verify_against_stock(folder, model=str(dense.base))
    assert codes(report) == {"QC-STOCK-008"}
    assert "the base" in report.problems[0].message


def foreign(made: Made, to: Path) -> Path:
    """An adapter of the vision-language class as stock PEFT leaves it, for ``CAUSAL_LM``."""
    model = wrapped(
        stock(made.base, "vl"), r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM",
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(to)
    return to


def test_the_wrong_class_is_caught(dense: Made, tmp_path: Path) -> None:
    """The commonest call of PEFT takes the text class, and binds nothing without an error."""
    folder = foreign(dense, tmp_path / "a")
    report = verify_against_stock(folder, model=str(dense.base))
    assert codes(report) >= {"QC-STOCK-007"}
    problem = report.problems[0]
    assert (problem.code, problem.found) == ("QC-STOCK-007", "6 of 6")
    assert problem.field is not None
    assert problem.field.startswith(f"base_model.model.{TRUNK}0.")
    assert all(prompt.effect_ratio is None for prompt in report.prompts)  # no effect there
    # The fix works.
    assert verify_against_stock(folder, model=str(dense.base), stock_class=VL).ok


def test_a_class_that_the_adapter_is_not_for_is_caught(dense: Made, tmp_path: Path) -> None:
    """Our own adapter, whose config names the other class: PEFT refuses it."""
    folder = dense.copy(dense.adapter(), tmp_path / "a")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["auto_mapping"]["base_model_class"] = STOCK["vl"].__name__
    path.write_text(json.dumps(config))
    sign(folder)
    with pytest.raises(NumericError) as caught:
        verify_against_stock(folder, model=str(dense.base))
    assert caught.value.code == "QC-STOCK-007"
    assert "Target modules" in str(caught.value.found)


@pytest.mark.slow
def test_another_base_is_caught(dense: Made) -> None:
    """Both programs add the adapter to any base of the same shapes, and compute the same."""
    report = verify_against_stock(dense.adapter(), model=str(dense.merged))
    (problem,) = report.problems
    assert isinstance(problem, InputError)
    assert problem.code == "QC-MERGE-001"
    assert problem.field in read_manifest(dense.adapter()).meta["tensors"]


@pytest.mark.slow
def test_a_changed_file_is_found_beside_what_was_computed(dense: Made, tmp_path: Path) -> None:
    folder = dense.copy(dense.merged, tmp_path / "m")
    (folder / "generation_config.json").write_text("{}")
    report = verify_against_stock(folder, model=str(dense.base))
    assert codes(report) == {"QC-VERIFY-001"}


@pytest.mark.parametrize(("whole", "code"), [(True, "QC-STOCK-009"), (False, "QC-STOCK-004")])
def test_a_class_that_does_not_fit_the_folder(dense: Made, whole: bool, code: str) -> None:
    """Its own head would stay at random values."""
    with pytest.raises(QcoreError) as caught:
        verify_against_stock(
            dense.base, stock_class="AutoModelForSequenceClassification", whole=whole
        )
    assert caught.value.code == code


@pytest.mark.parametrize("name", ["AutoModelForImageClassification", "NoSuchClass"])
def test_a_class_that_is_none(dense: Made, name: str) -> None:
    with pytest.raises(InputError) as caught:
        verify_against_stock(dense.base, stock_class=name)
    assert (caught.value.code, caught.value.found) == ("QC-STOCK-004", name)
    assert caught.value.field == "--stock-class"


def test_values_that_are_not_finite_are_a_difference() -> None:
    """NaN on both sides is NaN as a share, which compares as false with every bound."""
    done = Pass()
    done.judge("layer", torch.tensor([torch.nan, 0.0]), torch.tensor([torch.nan, 1e-6]))
    assert (done.worst, done.layer) == (torch.inf, "layer")
    done = Pass()
    done.judge("layer", torch.tensor([0.0, 5.0]), torch.tensor([torch.nan, torch.nan]))
    assert done.worst > 1


def test_a_layer_without_a_compared_token_is_named() -> None:
    done = Pass()
    done.judge("one", torch.tensor([1.0, 1.0]), torch.ones(2), torch.tensor([True, False]))
    assert done.skipped == []
    done.judge("two", torch.tensor([9.0, 9.0]), torch.ones(2), torch.tensor([True, True]))
    assert (done.skipped, done.layer) == (["two"], "one")


# -- what is never run


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_folder_that_names_code_is_refused(dense: Made, tmp_path: Path, name: str) -> None:
    folder, ran = dense.copy(dense.base, tmp_path / "m"), tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    path = folder / name
    classes = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C", "AutoTokenizer": "evil.C"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": classes}))
    with pytest.raises(InputError) as caught:
        verify_against_stock(folder)
    assert (caught.value.code, caught.value.field) == ("QC-STOCK-004", "auto_map")
    assert not ran.exists()


def test_pickled_weights_of_an_adapter_are_refused(dense: Made, tmp_path: Path) -> None:
    folder = foreign(dense, tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError) as caught:
        verify_against_stock(folder, model=str(dense.base))
    assert caught.value.code in ("QC-CKPT-007", "QC-ADAPTER-003")


# -- prompts, options, the command line


def test_the_prompts_of_the_user(dense: Made, tmp_path: Path, capsys: Any) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "Name a river."}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"text": "It was a dark and stormy night."},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    ended = here(
        capsys, "verify", dense.adapter(), "--against", "stock", "--model", dense.base,
        "--prompts", file, "--json",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert (report["ok"], report["kind"], report["dtype"]) == (True, "adapter", "float32")
    assert [prompt["name"] for prompt in report["prompts"]] == ["line 1", "line 2", "line 3"]


def test_status_76_and_each_problem_in_json(dense: Made, tmp_path: Path, capsys: Any) -> None:
    folder = foreign(dense, tmp_path / "a")
    ended = here(capsys, "verify", folder, "--against", "stock", "--model", dense.base, "--json")
    assert ended.code == 76
    report = json.loads(ended.out)
    assert report["error"]["code"] == "QC-STOCK-007"
    assert not report["ok"]


def test_plain_text_and_a_table(dense: Made, tmp_path: Path, capsys: Any) -> None:
    plain = tmp_path / "prompts.txt"
    plain.write_text("It was a dark\n\nand stormy night.\n")
    ended = here(capsys, "verify", dense.base, "--against", "stock", "--prompts", plain)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[1].split()[:3] == ["prompt", "tokens", "difference"]
    assert [line.split()[:2] for line in lines[2:4]] == [["line", "1"], ["line", "3"]]
    assert lines[-1] == "the same as stock"


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [("p.jsonl", '{"prompt": "a"}', 1), ("p.jsonl", '{"text": "a"}\n{', 2), ("p.txt", "\n", None)],
)
def test_prompts_that_are_none(
    dense: Made, tmp_path: Path, name: str, text: str, line: int | None
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        verify_against_stock(dense.base, prompts=tmp_path / name)
    assert caught.value.code == "QC-STOCK-003"
    assert caught.value.field == (None if line is None else f"line {line}")


def test_prompts_beyond_the_limits_are_noted(
    dense: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stock_prompts, "MOST", 2)
    monkeypatch.setattr(stock_prompts, "LONGEST", 4)
    file = tmp_path / "prompts.txt"
    file.write_text("a\nIt was a dark and stormy night.\nc\n")
    report = verify_against_stock(dense.base, prompts=file)
    assert [prompt.tokens for prompt in report.prompts][1] == 4
    assert report.notes == (
        "the first 2 prompts are compared, and 1 are not",
        "1 prompts are compared up to token 4",
    )


def test_conversations_for_a_model_without_a_template(dense: Made, tmp_path: Path) -> None:
    folder = dense.copy(dense.base, tmp_path / "m")
    (folder / "chat_template.jinja").unlink()
    file = tmp_path / "prompts.jsonl"
    talk = json.dumps({"messages": [{"role": "user", "content": "Name a river."}]})
    file.write_text(talk)
    generation = {"generation": "3.5"}
    with pytest.raises(InputError) as caught:
        verify_against_stock(folder, prompts=file, **generation)
    assert caught.value.code == "QC-STOCK-003"
    assert '"text"' in str(caught.value.fix)
    file.write_text(talk + '\n{"text": "A river."}')
    report = verify_against_stock(folder, prompts=file, **generation)
    assert [prompt.name for prompt in report.prompts] == ["line 2"]
    assert "1 conversations are not compared: the model has no chat template" in report.notes


def test_the_template_of_an_adapter_is_bounded(dense: Made, tmp_path: Path) -> None:
    """transformers renders in this process, so what never ends is refused before."""
    folder = dense.copy(dense.adapter(), tmp_path / "a")
    loop = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(dense.base / name, folder / name)
    (folder / "chat_template.jinja").write_text(loop)
    with pytest.raises(InputError) as caught:
        verify_against_stock(folder, model=str(dense.base))
    assert caught.value.code.startswith("QC-TEMPLATE-")


def test_what_an_adapter_says_of_itself_is_noted(dense: Made, tmp_path: Path) -> None:
    """Nothing is merged, so that no consent is needed; the reader sees what it would be for."""
    folder = foreign(dense, tmp_path / "a")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": "Qwen/Qwen3.6-27B"}
    path.write_text(json.dumps(config))
    report = verify_against_stock(folder, model=str(dense.base), stock_class=VL)
    assert any("of generation 3.6" in note for note in report.notes)


def test_options_that_need_others(dense: Made, capsys: Any) -> None:
    with pytest.raises(UsageError) as caught:
        verify_against_stock(dense.adapter())
    assert (caught.value.code, caught.value.field) == ("QC-STOCK-002", "--model")
    ended = here(capsys, "verify", dense.base, "--model", "x")
    assert (ended.code, "QC-STOCK-002" in ended.err) == (2, True)


def test_without_the_extra_one_line_says_how_to_install_it(
    dense: Made, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "peft" else find(name)
    )
    ended = here(capsys, "verify", dense.base, "--against", "stock")
    assert ended.code == 2
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error")]
    assert 'Fix: pip install "qcore-framework[interop]"' in line


# -- memory


@pytest.mark.slow
def test_memory_stays_within_eight_of_the_largest_layer(tmp_path: Path) -> None:
    """A model of 16 layers of which eight would not fit; the whole of it is read once or more."""
    base = write_stock(
        tmp_path / "base", "text", tied=True, dtype=torch.bfloat16, num_hidden_layers=16,
        layer_types=["linear_attention", "full_attention"] * 8, hidden_size=512,
        intermediate_size=8192, head_dim=64,
    )  # fmt: skip
    small = write_stock(tmp_path / "small", "text", dtype=torch.bfloat16, **LAYERS)
    in_child(_bounded)(base, small)


def _bounded(base: Path, small: Path) -> None:
    from qcore.merging.layer_stream import LayerStream
    from qcore.plugins.resolve_model import identify

    stream = LayerStream(identify(str(base)))
    assert stream.total() > 12 * stream.largest()
    assert verify_against_stock(small, whole=False).ok  # imports, and what a process needs anyway
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _memory("VmRSS")
    assert verify_against_stock(base, whole=False).ok
    assert _memory("VmHWM") - before < 8 * stream.largest()


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


# -- what stock does not load, or leaves at random values


@pytest.mark.parametrize("whole", fast([True, False], False))
def test_a_base_without_its_tower(whole: bool) -> None:
    """The plugin's tiny checkpoint, as `qcore demo` writes it: its class has a tower."""
    report = verify_against_stock(tiny_folder(), whole=whole)
    agrees(report)
    notes = [note for note in report.notes if "text does not run them" in note]
    assert len(notes) == whole
    assert not whole or "model.visual" in notes[0]


def test_names_of_wrappers_are_refused_with_the_way(dense: Made, tmp_path: Path) -> None:
    folder = dense.copy(dense.adapter(), tmp_path / "a")
    (folder / MANIFEST).unlink()
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    save_file({n.replace("lora_A", "lora_A.default"): v for n, v in tensors.items()}, file)
    with pytest.raises(QcoreError, match="words of wrappers") as caught:
        verify_against_stock(folder, model=str(dense.base))
    assert caught.value.code == "QC-STOCK-004"
    assert "adapter combine" in str(caught.value.fix)
    combine({str(folder): 1.0}, tmp_path / "plain", model=str(dense.base))
    agrees(verify_against_stock(tmp_path / "plain", model=str(dense.base)))
