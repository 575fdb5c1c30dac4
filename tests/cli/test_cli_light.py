"""The command line stays light, its surface stays what it is, and its JSON keeps its shape."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import click
import pytest
from support.cli_kit import Ended, apart, here, modules_after
from support.model_kit import edit_json, key_list, small_config, small_shapes, snapshot

from qcore.cli.main import VERBS, cli
from qcore.io.artifact import publish
from qcore.testing import write_sparse_checkpoint

HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "safetensors", "numpy", "tokenizers"}
UNUSED = {"rich", "yaml", "jinja2", "huggingface_hub", "packaging", "accelerate"}
SCRIPT = Path(sysconfig.get_path("scripts")) / "qcore"


def tops(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


# -- what is imported


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("--version",), ("no-such-verb",)])
def test_help_imports_neither_torch_nor_a_plugin_nor_what_it_does_not_draw_with(
    arguments: tuple[str, ...],
):
    _, modules = modules_after(*arguments)
    assert "qcore.cli.main" in modules
    assert not tops(modules) & (HEAVY | UNUSED | {"pluggy", "qcore_qwen35"})
    assert (
        not {
            "qcore.training.train",
            "qcore.merging.merge",
            "qcore.plugins",
            "qcore.config.settings",
        }
        & modules
    )


@pytest.mark.parametrize("verb", [name for name in VERBS if name not in ("plugins", "presets")])
def test_help_of_a_verb_is_as_light(verb: str):
    ended, modules = modules_after(verb, "--help")
    assert ended.code == 0
    assert not tops(modules) & (HEAVY | UNUSED | {"qcore_qwen35"})


@pytest.mark.parametrize("arguments", [("plugins", "list"), ("plugins", "list", "--json")])
def test_plugins_list_imports_neither_torch_nor_a_plugin(arguments: tuple[str, ...]):
    ended, modules = modules_after(*arguments)
    assert ended.code == 0
    assert not tops(modules) & (HEAVY | {"rich", "yaml", "jinja2", "huggingface_hub"})
    assert "qcore_qwen35" not in tops(modules)


def test_inspect_imports_its_plugin_and_no_torch(tmp_path: Path):
    folder = write_sparse_checkpoint(tmp_path, small_config(), small_shapes())
    ended, modules = modules_after("inspect", folder, "--json")
    assert ended.code == 0
    assert "qcore_qwen35" in modules
    assert "yaml" in modules, "the records of SKUs are read"
    assert not tops(modules) & (HEAVY | {"rich"})


@pytest.mark.parametrize("verb", ["verify", "presets"])
def test_other_reporting_verbs_import_no_torch(tmp_path: Path, verb: str):
    arguments = {"verify": ("verify", tmp_path), "presets": ("presets", "list")}[verb]
    _, modules = modules_after(*arguments)
    assert not tops(modules) & {"torch", "transformers", "peft"}


def test_adapter_show_imports_neither_torch_nor_a_plugin(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    header = json.dumps({"base_model.model.q_proj.lora_A.weight": {
        "dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()  # fmt: skip
    (tmp_path / "adapter_model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(24)
    )
    ended, modules = modules_after("adapter", "show", tmp_path, "--json")
    assert ended.code == 0, ended.err
    assert not tops(modules) & (HEAVY | {"rich", "jinja2", "huggingface_hub", "qcore_qwen35"})


# -- how long it takes: five times what is asked for, so that a busy machine does not fail


def median_seconds(*command: object, rounds: int = 5) -> float:
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        ended = apart(*command[1:], command=(str(command[0]),))
        found.append(time.perf_counter() - began)
        assert ended.code == 0, ended.err
    return statistics.median(found)


@pytest.mark.timing
@pytest.mark.skipif(not SCRIPT.exists(), reason="the script is not installed")
@pytest.mark.parametrize(
    ("arguments", "bound"), [(("--help",), 0.15), (("plugins", "list"), 0.2)], ids=str
)
def test_start_up_time(arguments: tuple[str, ...], bound: float):
    assert median_seconds(SCRIPT, *arguments) < 5 * bound


@pytest.mark.timing
@pytest.mark.skipif(not SCRIPT.exists(), reason="the script is not installed")
def test_inspect_time_on_the_header_of_27b(shared: Path, tmp_path: Path):
    source = shared / "skus" / "qwen3.5" / "Qwen3.5-27B"
    shapes = key_list(source / "weight_keys.txt")
    folder = tmp_path / "Qwen3.5-27B"
    write_sparse_checkpoint(
        folder, json.loads((source / "config.json").read_text()), shapes, shards=11
    )
    (folder / "chat_template.jinja").write_bytes((source / "chat_template.jinja").read_bytes())
    assert median_seconds(SCRIPT, "inspect", folder, "--json") < 5 * 0.5
    ended, modules = modules_after("inspect", folder, "--json")
    assert "torch" not in modules
    assert ended.json["parameters"] == 27_781_427_952
    assert ended.json["tensors"] == 1199
    assert ended.json["carried"] == {}
    assert ended.json["groups"]["vision"]["tensors"] == 4 * 27
    assert (ended.json["unaccounted"], ended.json["differences"]) == ([], [])
    assert ended.json["generation"] == "3.5"


# -- the surface

#: What verbs on rows share.
ROWS = ["--config", "--debug", "--format", "--generation", "--json", "--media-root", "--preset",
        "--set"]  # fmt: skip

OPTIONS: dict[str, list[str]] = {
    "inspect": ["MODEL", "--debug", "--for", "--generation", "--json"],
    "plan": [
        "MODEL", "--budget", "--config", "--debug", "--generation", "--gpu", "--gpus", "--groups",
        "--json", "--link", "--max-length", "--media", "--network", "--nodes", "--preset", "--r",
        "--rows", "--set",
    ],
    "train": [
        "--adapter", "--adapter-class", "--auto-resume", "--config", "--data", "--debug",
        "--device", "--eval-data", "--format", "--generation", "--gpus", "--init-adapter", "--json",
        "--kernels", "--media-root", "--model", "--output", "--preset", "--resume", "--set",
        "--trust-base", "--trust-generation", "--verify-data",
    ],
    "merge": [
        "--adapter", "--allow-large-change", "--debug", "--dequantize", "--generation", "--json",
        "--model", "--no-proof", "--output", "--requantize", "--take-tokenizer", "--trust-base",
        "--trust-generation",
    ],
    "generate": [
        "MODEL", "--adapter", "--chat-template-kwargs", "--debug", "--device", "--dtype",
        "--frequency-penalty", "--generation", "--json", "--max-new-tokens", "--min-p",
        "--presence-penalty", "--prompt", "--quantization", "--repetition-penalty", "--seed",
        "--system", "--take-tokenizer", "--temperature", "--top-k", "--top-p", "--trust-base",
        "--trust-generation",
    ],
    "verify": [
        "FOLDER", "--adapter", "--against", "--debug", "--generation", "--json", "--model",
        "--prompts", "--stock-class",
    ],
    "adapter combine": [
        "ADAPTER[=WEIGHT]...", "--adapter-class", "--debug", "--generation", "--json", "--model",
        "--output", "--rank", "--trust-generation",
    ],
    "adapter diff": ["A", "B", "--debug", "--json"],
    "adapter extract": [
        "--adapter-class", "--base", "--debug", "--generation", "--json", "--model", "--output",
        "--partial", "--rank",
    ],
    "adapter show": ["ADAPTER", "--debug", "--generation", "--json", "--model", "--norms"],
    "plugins list": ["--debug", "--json"],
    "presets list": ["--debug", "--json"],
    "presets show": ["NAME", "--debug", "--json"],
    "skus list": ["--debug", "--json"],
    "skus show": ["ID", "--debug", "--json"],
    "data check": ["FILES", *sorted([*ROWS, "--model"])],
    "data show": ["FILES", *sorted([*ROWS, "--model", "--row", "--search", "--html"])],
    "data diff": ["FILES", *sorted([*ROWS, "--model"])],
    "data parity": ["FILES", *sorted([*ROWS, "--model"])],
    "data convert": ["FILES", "--debug", "--format", "--json", "--media-root", "--output", "--set"],
    "data schema": ["--debug"],
    "doctor": ["--debug", "--json", "--kernels", "--model"],
    "demo": ["--architecture", "--debug", "--json", "--output"],
}  # fmt: skip

#: What the contract of the command line promises, whatever else is added.
PROMISED = {
    "train": {"--model", "--data", "--output", "--preset", "--config", "--set", "--device",
              "--resume", "--adapter-class", "--json"},
    "merge": {"--model", "--adapter", "--output", "--trust-base", "--json"},
    "generate": {"MODEL", "--adapter", "--prompt", "--json"},
    "inspect": {"MODEL", "--json"},
    "verify": {"FOLDER", "--json"},
    "demo": {"--architecture", "--output"},
    "data show": {"FILES", "--model", "--json"},
    "data check": {"FILES", "--model", "--json"},
}  # fmt: skip


def _walk(command: click.Command, name: str, found: dict[str, list[str]]) -> None:
    context = click.Context(command, info_name=name)
    if isinstance(command, click.Group):
        for sub in command.list_commands(context):
            child = command.get_command(context, sub)
            assert child is not None
            _walk(child, f"{name} {sub}".strip(), found)
        return
    arguments = [p.human_readable_name for p in command.params if isinstance(p, click.Argument)]
    options = [o for p in command.params if isinstance(p, click.Option) for o in p.opts]
    found[name] = arguments + sorted(options)


def surface() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for verb in VERBS:  # commands of plugins are theirs to change
        command = cli.get_command(click.Context(cli), verb)
        assert command is not None
        _walk(command, verb, found)
    return found


def test_the_surface_is_frozen():
    assert surface() == OPTIONS


def test_the_surface_holds_what_was_promised():
    for name, options in PROMISED.items():
        assert options <= set(OPTIONS[name])


def test_every_verb_and_option_has_a_line_of_help():
    for verb, (_, text) in VERBS.items():
        assert text
        command = cli.get_command(click.Context(cli), verb)
        assert command is not None
        assert command.help
    ended = apart("--help")
    assert ended.code == 0
    for verb, (_, text) in VERBS.items():
        assert re.search(rf"^  {verb} +{re.escape(text)}$", ended.out, re.MULTILINE)


@pytest.mark.skipif(not SCRIPT.exists(), reason="the script is not installed")
def test_the_script_and_the_module_are_the_same():
    for arguments in (("--help",), ("--version",), ("plugins", "list", "--json"), ("nope",)):
        script, module = apart(*arguments, command=(str(SCRIPT),)), apart(*arguments)
        assert script == module


# -- JSON


def test_inspect_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write_sparse_checkpoint(tmp_path / "m", small_config(), small_shapes())
    ended = here(capsys, "inspect", folder, "--json")
    assert (ended.code, ended.err) == (0, "")
    told = ended.json
    assert told["architecture"] == "qwen3_5"
    assert told["generation"] == "3.5"
    assert told["plugin"] == "qwen35"
    assert told["modalities"] == ["text"]  # its section describes no tower
    assert told["parameters"] == sum(math.prod(shape) for shape in small_shapes().values())
    assert told["tensors"] == len(small_shapes())
    assert told["unaccounted"] == told["differences"] == []
    assert told["evidence"]
    assert all(isinstance(line, str) for line in told["evidence"])
    assert told["carried"] == {"model.visual": 3}


def test_inspect_tells_a_text_save_that_mtp_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shapes = {n: s for n, s in small_shapes(vision=False).items() if not n.startswith("mtp.")}
    ended = here(
        capsys,
        "inspect",
        write_sparse_checkpoint(tmp_path, small_config(vision=False), shapes),
        "--json",
    )
    assert ended.code == 0
    (difference,) = ended.json["differences"]
    assert "mtp" in difference


def test_inspect_json_of_a_checkpoint_that_is_not_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shapes = small_shapes()
    lost = "model.language_model.layers.1.linear_attn.A_log"
    wrong = "model.language_model.layers.3.self_attn.q_norm.weight"
    del shapes[lost]
    shapes |= {"model.foo.weight": (3,), wrong: (17,)}
    folder = write_sparse_checkpoint(tmp_path, small_config(vision=False), {
        n: s for n, s in shapes.items() if ".visual." not in n})  # fmt: skip
    ended = here(capsys, "inspect", folder, "--json")
    assert ended.code == 65
    assert set(ended.json["unaccounted"]) == {lost, "model.foo.weight"}
    (difference,) = ended.json["differences"]
    assert wrong in difference
    people = here(capsys, "inspect", folder)
    assert people.code == 65
    assert [line[: len("error[QC-KEY-00")] for line in people.err.splitlines()] == [
        "error[QC-KEY-00"
    ] * 2
    assert "every tensor is accounted for" not in people.out


def test_plugins_list_json(capsys: pytest.CaptureFixture[str]):
    ended = here(capsys, "plugins", "list", "--json")
    assert (ended.code, ended.err) == (0, "")
    (row,) = [row for row in ended.json["plugins"] if row["name"] == "qwen35"]
    assert row.keys() == {"name", "distribution", "version", "status", "reason"}
    assert (row["distribution"], row["status"], row["reason"]) == (
        "qcore-qwen35", "available", None
    )  # fmt: skip


@pytest.fixture
def result(tmp_path: Path) -> Path:
    with publish(tmp_path / "result", kind="adapter") as out:
        out.write_bytes("a.bin", b"abc")
        out.write_bytes("b.bin", b"xyz")
    return tmp_path / "result"


def test_verify_json(result: Path, capsys: pytest.CaptureFixture[str]):
    ended = here(capsys, "verify", result, "--json")
    assert ended.code == 0
    assert ended.json == {"ok": True, "files": 2, "problems": [], "notes": []}
    (result / "b.bin").write_bytes(b"xyZ")
    ended = here(capsys, "verify", result, "--json")
    assert ended.code == 65
    assert ended.json["ok"] is False
    assert ended.json["files"] == 2
    (problem,) = ended.json["problems"]
    assert "b.bin" in problem


def test_verify_for_people(result: Path, capsys: pytest.CaptureFixture[str]):
    assert here(capsys, "verify", result).code == 0
    (result / "b.bin").unlink()
    ended = here(capsys, "verify", result)
    assert ended.code == 65
    assert "b.bin" in ended.err
    assert "QC-VERIFY-001" in ended.err


def test_verify_of_what_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for path in (tmp_path, tmp_path / "none"):
        ended = here(capsys, "verify", path)
        assert ended.code == 65
        assert "Traceback" not in ended.err


def error_of(ended: Ended) -> dict[str, Any]:
    told = ended.json
    assert told.keys() == {"error"}
    error: dict[str, Any] = told["error"]
    assert {"code", "message", "file", "field", "fix"} <= error.keys()
    assert re.fullmatch(r"QC-[A-Z0-9]+-\d{3}", error["code"])
    assert "\n" not in error["message"]
    assert ended.err == ""
    return error


BAD: dict[str, tuple[tuple[str, ...], int, str]] = {
    "no such folder": (("inspect", "./none"), 65, "QC-HUB-001"),
    "an empty folder": (("inspect", "{tmp}"), 65, "QC-CKPT-001"),
    "no such command": (("trian",), 2, "QC-CLI-001"),
    "no such option": (("inspect", "x", "--no-such"), 2, "QC-CLI-001"),
    "a missing option": (("train", "--data", "x"), 2, "QC-CLI-001"),
    "a missing argument": (("inspect",), 2, "QC-CLI-001"),
    "a bad choice": (
        ("train", "--model", "x", "--data", "x", "--output", "x", "--device", "tpu"),
        2, "QC-CLI-001",
    ),
    "no model": (("train", "--data", "x", "--output", "x"), 2, "QC-CLI-002"),
    "no such preset": (("presets", "show", "stnadard"), 2, "QC-PRESET-001"),
    "no such setting": (
        ("train", "--model", "x", "--data", "x", "--output", "x", "--set", "max_step=3"),
        2, "QC-CONFIG-001",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors_in_json_and_for_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    arguments, status, code = BAD[case]
    arguments = tuple(argument.format(tmp=tmp_path) for argument in arguments)
    as_json = here(capsys, *arguments, "--json")
    error = error_of(as_json)
    assert (as_json.code, error["code"]) == (status, code)
    people = here(capsys, *arguments)
    assert people.code == status
    line = people.error(code)
    assert error["message"] in line
    assert f"Fix: {error['fix']}" in line
    assert list(snapshot(tmp_path)) == []


def test_a_typo_in_a_command_or_an_option_is_answered_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
):
    assert "Did you mean 'train'? Fix: " in here(capsys, "trian").err
    ended = here(capsys, "train", "--modle", "x")
    assert "--model" in ended.error("QC-CLI-001")
    assert ended.code == 2


def test_no_arguments_is_help_and_says_that_nothing_was_done(capsys: pytest.CaptureFixture[str]):
    ended = here(capsys)
    assert "Commands:" in ended.out + ended.err
    assert ended.code in (0, 2)


@pytest.mark.parametrize(("flags", "env"), [(("--debug",), {}), ((), {"QCORE_DEBUG": "1"})])
def test_debug_shows_the_traceback_and_keeps_the_status(
    tmp_path: Path, flags: tuple[str, ...], env: dict[str, str]
):
    ended = apart("inspect", tmp_path, *flags, env=env)
    assert "Traceback" in ended.err
    assert ended.err.splitlines()[-1].startswith("error[QC-CKPT-001]")
    assert ended.code == 65


def test_a_defect_of_ours_is_one_line_too(tmp_path: Path):
    code = (
        "import sys, qcore.cli.main, qcore.plugins.resolve_model\n"
        "def broken(*a, **k): raise RuntimeError('two\\nlines')\n"
        "qcore.plugins.resolve_model.identify = broken\n"
        "qcore.cli.main.main()\n"
    )
    command = (sys.executable, "-c", code)
    ended = apart("inspect", tmp_path, command=command)
    assert ended.code == 1
    assert "RuntimeError: two lines" in ended.error("QC-INTERNAL-001")
    ended = apart("inspect", tmp_path, "--json", command=command)
    assert (ended.code, error_of(ended)["code"]) == (1, "QC-INTERNAL-001")


def test_a_closed_pipe_is_no_traceback(tmp_path: Path):
    read, write = os.pipe()
    os.close(read)
    folder = write_sparse_checkpoint(tmp_path, small_config(), small_shapes())
    done = subprocess.run(
        [sys.executable, "-m", "qcore", "inspect", str(folder)],
        stdout=write, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(write)
    assert "Traceback" not in done.stderr


def test_a_model_type_that_nobody_builds(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write_sparse_checkpoint(tmp_path, small_config(), small_shapes())
    edit_json(folder / "config.json", lambda config: config.update(model_type="nobodys"))
    ended = here(capsys, "inspect", folder)
    assert "'nobodys'" in ended.error("QC-DETECT-001")
    assert ended.code == 69
