"""The names of `qcore`: lazy, callable whatever was imported before, with results as JSON."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli_kit import here
from support.conversations import conversations, write_rows
from support.e2e_kit import tiny_folder
from support.sinks import Heard
from support.tiers import fast

import qcore
from qcore.adapter.open import LoraDelta
from qcore.config.settings import Settings
from qcore.errors import InputError, QcoreError, UsageError
from qcore.reporting import CheckpointSaved, Evaluation, Finished, RunStarted

VERBS = ("generate", "inspect", "merge", "plan", "train", "verify")
FUNCTIONS = (*VERBS, "open_adapter", "open_model", "publish")
#: Importing these first must not hide a function behind a module of its name.
ROOMS = (
    "qcore.training.train", "qcore.merging.merge", "qcore.merging.plan", "qcore.merging.verify",
    "qcore.inference.generate", "qcore.preflight.plan", "qcore.preflight.inspect",
    "qcore.planning.run", "qcore.demo", "qcore.cli.train", "qcore.cli.merge", "qcore.cli.plan",
    "qcore.cli.generate", "qcore.cli.inspect", "qcore.cli.verify",
)  # fmt: skip
RUN: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "r": 2,
    "lora_alpha": 4, "learning_rate": 5e-3, "dtype": "fp32", "save_steps": 1, "max_length": 512,
    "eval_fraction": 0.25, "eval_steps": 1,
}  # fmt: skip


def process(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_importing_qcore_imports_no_torch_and_no_room() -> None:
    code = "import sys, qcore; print(*[m for m in sys.modules if m.startswith(('qcore', 'torch'))])"
    assert set(process(code)) == {"qcore", "qcore.io", "qcore.io.version"}


@pytest.mark.parametrize("rooms", fast(["before", "after", "between"], "between"))
def test_verbs_are_callables_before_and_after_their_rooms(rooms: str) -> None:
    names = ", ".join(FUNCTIONS)
    take = f"from qcore import {names}"
    load = "\n".join(f"import {room}" for room in ROOMS)
    code = {"before": f"{load}\n{take}", "after": f"{take}\n{load}\n{take}",
            "between": f"{take}\n{load}"}[rooms]  # fmt: skip
    code += f"\nimport types\nfor f in ({names}):\n    print(f.__name__, type(f).__name__)"
    assert process(code) == [word for name in FUNCTIONS for word in (name, "function")]


@pytest.mark.parametrize("name", ["hookimpl", "Reporter", "verify", "publish", "inspect", "plan"])
def test_light_names_import_no_torch(name: str) -> None:
    code = f"import sys; from qcore import {name}; print('torch' in sys.modules)"
    assert process(code) == ["False"]


def test_the_names_are_sorted_listed_and_typed() -> None:
    assert list(qcore.__all__) == sorted(qcore.__all__)
    assert set(qcore.__all__) <= set(dir(qcore))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qcore.nothing
    source = ast.parse(Path(qcore.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in source.body if isinstance(node, ast.If)]
    typed = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == qcore._MODULES


# -- results


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", conversations(8))


@pytest.fixture(scope="module")
def trained(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Heard]:
    heard, output = Heard(), tmp_path_factory.mktemp("trained") / "out"
    report = qcore.train(
        str(tiny_folder()), rows, output, Settings(**RUN), device="cpu", reporter=heard.reporter
    )
    return output, report, heard


def test_train_reports_events_and_a_result(trained: tuple[Path, Any, Heard]) -> None:
    output, report, heard = trained
    assert heard.events[-1] == Finished(verb="train", output=output, result=report.as_json())
    (started,) = heard.all(RunStarted)
    assert (started.verb, started.output) == ("train", output)
    assert [step.step for step in heard.steps] == [1, 2]
    evaluations = heard.all(Evaluation)
    assert [(event.step, event.final) for event in evaluations] == [(1, False), (2, True)]
    assert evaluations[0].eval_loss == heard.steps[0].eval_loss
    assert evaluations[1].eval_loss == report.eval_loss
    assert [event.step for event in heard.all(CheckpointSaved)] == [1]
    log = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    last = {"step": 2, "eval_loss": report.eval_loss}
    assert log == [*(step.row() for step in heard.steps), last]
    assert json.loads(json.dumps(report.as_json()))["output"] == str(output)


def test_a_sink_that_raises_stops_no_run(rows: Path, tmp_path: Path) -> None:
    class Broken:
        def handle(self, event: object, /) -> None:
            raise RuntimeError("no connection")

    heard = Heard()
    reporter = qcore.Reporter(Broken(), heard, rank=0)
    short = {"max_steps": 1, "save_steps": 0, "eval_fraction": 0.0, "eval_steps": 0}
    settings = Settings(**(RUN | short))
    qcore.train(
        str(tiny_folder()), rows, tmp_path / "out", settings, device="cpu", reporter=reporter
    )
    assert heard.said("Broken failed and receives no more events: RuntimeError: no connection")
    assert qcore.verify(tmp_path / "out").ok


def test_merge_and_generate(trained: tuple[Path, Any, Heard], tmp_path: Path) -> None:
    heard = Heard()
    merged = qcore.merge(
        str(tiny_folder()), trained[0], tmp_path / "merged", reporter=heard.reporter
    )
    assert heard.events[-1] == Finished(
        verb="merge", output=tmp_path / "merged", result=merged.as_json()
    )
    assert json.loads(json.dumps(merged.as_json()))["pairs"] == merged.pairs
    adapted = qcore.generate(
        str(tiny_folder()), "Hi", adapter=trained[0], device="cpu", dtype="fp32", max_new_tokens=2
    )
    assert adapted.as_json()["tokens"] == adapted.tokens <= 2


def test_inspect_plan_and_verify_give_what_the_command_line_prints(
    capsys: pytest.CaptureFixture[str], trained: tuple[Path, Any, Heard]
) -> None:
    folder = tiny_folder()
    assert here(capsys, "inspect", folder, "--json").json == qcore.inspect(str(folder)).as_json()
    printed = here(capsys, "plan", folder, "--gpu", "H200", "--json").json
    report = qcore.plan(str(folder), gpus=["H200"])
    assert printed == json.loads(json.dumps(report.as_json()))
    printed = here(capsys, "verify", trained[0], "--json").json
    assert printed == qcore.verify(trained[0]).as_json()


# -- tensors


def test_open_model_reads_tensors_by_canonical_name() -> None:
    from safetensors.torch import load_file

    model = qcore.open_model(tiny_folder())
    files = load_file(tiny_folder() / "model.safetensors")
    assert (model.architecture, len(model)) == ("qwen3_5", len(list(model)))
    name = "model.language_model.layers.3.self_attn.q_proj.weight"
    assert torch.equal(model[name], files[name])
    assert model.shape(name) == tuple(files[name].shape)
    with pytest.raises(KeyError):
        model["model.nothing.weight"]


def test_open_adapter_gives_the_delta_of_each_weight(
    trained: tuple[Path, Any, Heard], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    adapter = qcore.open_adapter(trained[0], qcore.open_model(tiny_folder()))
    assert len(adapter) == 25
    weights = load_file(trained[0] / "adapter_model.safetensors")
    model = qcore.open_model(tiny_folder())
    for name, delta in adapter.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = weights[f"{stem}.lora_A.weight"], weights[f"{stem}.lora_B.weight"]
        assert isinstance(delta, LoraDelta)
        assert (delta.r, delta.scaling) == (2, 2.0)
        expected = (2.0 * b.double() @ a.double()).float()
        assert torch.equal(delta.dense(), expected)
        assert delta.dense().shape == model.shape(name)


def test_open_raises_the_errors_of_the_tree(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        qcore.open_model(tmp_path)
    with pytest.raises(QcoreError):
        qcore.open_adapter(tmp_path, tiny_folder())
    with pytest.raises(UsageError):
        qcore.plan(str(tiny_folder()), gpus=["T9000"])
