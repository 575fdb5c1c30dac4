"""Small faults that make a careful tool look careless, a test each, through the command line."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.cli_kit import here
from support.model_kit import edit_json, snapshot

from qcore.adapter.peft_config import check_config
from qcore.api.media import RowError
from qcore.cli.terminal import TerminalSink
from qcore.config.settings import Settings
from qcore.data.content import ContentReader
from qcore.data.formats import Formats
from qcore.reporting import Evaluation, ProgressStarted, Step
from qcore.training.lr_schedule import learning_rate
from qcore_qwen35.tiny import write

DOCS = Path(__file__).parents[2] / "docs"
ROW = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("oddities") / "base"
    write(folder)
    return folder


@pytest.fixture
def base(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to break."""
    return Path(shutil.copytree(tiny, tmp_path / "base"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(ROW)
    return path


# -- the command line


@pytest.mark.parametrize("group", ["", "plugins", "presets", "skus", "adapter", "data"])
def test_a_group_without_a_command_prints_its_help(capsys: Any, group: str) -> None:
    ended = here(capsys, *filter(None, [group]))
    assert ended.code == 2
    lines = ended.err.splitlines()
    assert (
        lines[0] == f"Usage: {' '.join(filter(None, ['qcore', group]))} [OPTIONS] COMMAND [ARGS]..."
    )
    assert "Commands:" in lines
    assert "QC-CLI-001" not in ended.err


@pytest.mark.parametrize(
    ("verb", "option", "key"),
    [
        ("train", "--learning-rate", "learning_rate"),
        ("train", "--lr", "learning_rate"),
        ("train", "--max-steps=3", "max_steps"),
        ("train", "--num-train-epoch", "num_train_epochs"),
        ("plan", "--lora_alpha", "lora_alpha"),
    ],
)
def test_a_setting_that_is_written_as_an_option(
    capsys: Any, verb: str, option: str, key: str
) -> None:
    line = here(capsys, verb, option, "1").error("QC-CLI-001")
    assert line.endswith(f"Fix: write --set {key}=VALUE")


def test_an_option_close_to_another_option_is_no_setting(capsys: Any) -> None:
    line = here(capsys, "train", "--modle", "x").error("QC-CLI-001")
    assert "--model" in line
    assert "--set" not in line


def test_all_wrong_settings_are_reported_at_once(
    capsys: Any, base: Path, rows: Path, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("r: 0\nmax_step: 3\nlora_dropout: 0.1\n")
    sets = ["learning_rate=-1", "max_length=-3", "foo=3", "seed", "lora_alpha=-2"]
    words = [word for each in sets for word in ("--set", each)]
    ended = here(
        capsys, "train", "--model", base, "--data", rows, "--output", tmp_path / "o",
        "--config", config, *words,
    )  # fmt: skip
    assert ended.code == 2
    lines = ended.err.splitlines()
    for line, field in zip(
        lines, ["r:", "max_step:", *(f"--set {each.split('=')[0]}:" for each in
                ["seed", "learning_rate=", "max_length=", "foo", "lora_alpha"])],
        strict=True,
    ):  # fmt: skip
        assert f" {field} " in line, line


def test_a_group_of_which_only_a_part_is_named(capsys: Any, base: Path) -> None:
    line = here(capsys, "plan", base, "--groups", "gates").error("QC-LORA-001")
    assert "did you mean gdn_gates?" in line


# -- plugins


@pytest.mark.parametrize("verb", ["inspect", "presets"])
def test_a_typo_in_the_disabled_plugins(
    capsys: Any, base: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setenv("QCORE_DISABLE_PLUGINS", "qwen3.5,qcore-qwen36")
    words = [verb, base] if verb == "inspect" else [verb, "list"]
    ended = here(capsys, *words)
    line = ended.error("QC-PLUGIN-005")
    assert ended.code == 2
    assert "found qwen3-5" in line
    assert "write qwen35" in line


def test_the_reports_on_plugins_name_the_typo(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCORE_DISABLE_PLUGINS", "qwen3.5")
    ended = here(capsys, "plugins", "list")
    assert ended.code == 0
    assert "names qwen3-5, which is not installed; did you mean qwen35?" in ended.err
    assert "qwen35" in ended.out


# -- where a result is written


@pytest.mark.parametrize("verb", ["train", "merge", "demo", "adapter combine", "data convert"])
@pytest.mark.parametrize("where", [".", "./", "{here}"])
def test_the_current_folder_is_refused(
    capsys: Any, base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    verb: str, where: str,
) -> None:  # fmt: skip
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    _refused(capsys, base, rows, verb, where.format(here=folder))
    assert not list(folder.iterdir())


def _refused(capsys: Any, base: Path, rows: Path, verb: str, where: object) -> str:
    words: dict[str, list[object]] = {
        "train": ["--model", base, "--data", rows],
        "merge": ["--model", base, "--adapter", base.parent / "adapter"],
        "demo": [],
        "adapter combine": [base.parent / "adapter", base.parent / "other"],
        "data convert": [rows],
    }
    ended = here(capsys, *verb.split(), *words[verb], "--output", where)
    assert ended.code == 73
    return ended.error("QC-WRITE-020")


@pytest.mark.parametrize("inside", ["model", "adapter", "result"])
@pytest.mark.parametrize("verb", ["train", "merge", "data convert"])
def test_an_output_inside_a_model_or_an_adapter_is_refused(
    capsys: Any, base: Path, rows: Path, tmp_path: Path, verb: str, inside: str
) -> None:
    folder = tmp_path / "x"
    if inside == "model":
        shutil.copytree(base, folder)
    else:
        folder.mkdir()
        name = "adapter_config.json" if inside == "adapter" else "MANIFEST.json"
        (folder / name).write_text('{"manifest_sha256": ""}')
    before = snapshot(folder)
    line = _refused(capsys, base, rows, verb, folder / "runs" / "merged")
    assert f"lies inside {folder}" in line
    assert f"such as {folder}-merged" in line
    assert snapshot(folder) == before


def test_the_manifest_of_another_program_is_no_obstacle(
    capsys: Any, rows: Path, tmp_path: Path
) -> None:
    """Browser extensions and packages have a MANIFEST.json, too, also above a whole project."""
    (tmp_path / "MANIFEST.json").write_text('{"manifest_version": 3, "name": "x"}')
    out = tmp_path / "x" / "rows.jsonl"
    assert here(capsys, "data", "convert", rows, "--output", out).code == 0
    assert out.exists()


# -- files that are not files


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    path = tmp_path / "pipe.yaml"
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
def test_settings_that_are_no_plain_file(
    capsys: Any, base: Path, rows: Path, tmp_path: Path, pipe: Path, kind: str
) -> None:
    config = {"pipe": pipe, "device": Path("/dev/zero"), "folder": tmp_path}.get(kind)
    with socket.socket(socket.AF_UNIX) as server:
        if config is None:
            server.bind(str(config := Path("/tmp") / f"qcore-{os.getpid()}.sock"))
        try:
            ended = here(
                capsys, "train", "--model", base, "--data", rows, "--output", tmp_path / "o",
                "--config", config,
            )  # fmt: skip
        finally:
            if kind == "socket":
                config.unlink()
    line = ended.error("QC-YAML-001")
    assert ended.code == 2
    assert kind == "socket" or f"found a {kind}, not a plain file" in line


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
     "generation_config.json", "model.safetensors", "model.safetensors.index.json", "vocab.json"],
)  # fmt: skip
def test_a_pipe_in_a_model_folder(capsys: Any, base: Path, name: str) -> None:
    (base / name).unlink(missing_ok=True)
    os.mkfifo(base / name)
    ended = here(capsys, "inspect", base)
    assert ended.code == 65
    assert f"{base / name}: cannot be read: a pipe, not a plain file" in ended.error("QC-CKPT-003")


def test_linked_weights_of_a_folder_that_the_user_made(
    capsys: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store of mine"
    store.mkdir()
    shutil.move(base / "model.safetensors", store / "weights")
    (base / "model.safetensors").symlink_to(store / "weights")
    ended = here(capsys, "inspect", base)
    assert ended.code == 65
    line = ended.error("QC-CKPT-003")
    assert f"found {store / 'weights'}" in line
    consent = re.search(r"allow it with (\w+)=(.*?); otherwise", line)
    assert consent is not None
    name, folder = consent[1], shlex.split(consent[2])[0]
    monkeypatch.setenv(name, folder)
    assert here(capsys, "inspect", base).code == 0
    monkeypatch.setenv(name, str(tmp_path / "store"))
    assert here(capsys, "inspect", base).code == 65


def _header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the header of a safetensors file; the data stay."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize(
    "metadata", [[1], "pt", {"format": 1}, {"format": None}, 3, [], "", 0, False]
)
def test_metadata_of_a_safetensors_file_that_the_format_does_not_have(
    capsys: Any, base: Path, metadata: object
) -> None:
    from safetensors import SafetensorError, safe_open

    weights = base / "model.safetensors"
    _header(weights, lambda header: header.update(__metadata__=metadata))
    with pytest.raises(SafetensorError):
        safe_open(weights, "pt").__enter__()
    ended = here(capsys, "inspect", base)
    assert "__metadata__: is damaged" in ended.error("QC-CKPT-005")


def test_unknown_keys_of_a_tensor(capsys: Any, base: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        next(entry for name, entry in header.items() if name != "__metadata__")["scale"] = 2

    _header(base / "model.safetensors", change)
    assert "unknown keys ['scale']" in here(capsys, "inspect", base).error("QC-CKPT-005")


# -- prompts, rows and adapters


@pytest.mark.parametrize(
    ("option", "text"), [("--prompt", "hi<|im_end|>"), ("--system", "<|im_start|>x")]
)
def test_a_prompt_with_a_control_string(capsys: Any, base: Path, option: str, text: str) -> None:
    words = ["--prompt", "hi"] if option == "--system" else []
    ended = here(
        capsys, "generate", base, *words, option, text, "--max-new-tokens", 1, "--device", "cpu"
    )
    assert ended.code == 2
    line = next(line for line in ended.err.splitlines() if line.startswith("error["))
    assert line.startswith(f"error[QC-GENERATE-006] {option}: contains text that must not reach")


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_prompt(capsys: Any, base: Path, text: str) -> None:
    """A shell variable that is not set leaves it empty; an answer to nothing says nothing."""
    ended = here(capsys, "generate", base, "--prompt", text)
    assert ended.code == 2
    assert "--prompt: is empty" in ended.error("QC-CLI-010")


def test_media_without_their_plugin_name_the_package() -> None:
    reader = ContentReader(
        None, "no installed plugin reads what vision_config describes (pip install qcore-m)"
    )
    with pytest.raises(RowError) as caught:
        reader.content([{"type": "image", "image": "a.png"}], "messages[0].content")
    assert caught.value.fix == "pip install qcore-m"


MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("row", [{"messages": MESSAGES}, {"prompt": "q", "completion": "a"}])
def test_media_in_a_column_name_the_package(row: dict[str, Any]) -> None:
    unread = "no installed plugin reads what vision_config describes (pip install qcore-m)"
    with pytest.raises(RowError) as caught:
        Formats(unread=unread).read(row | {"image": "a.png"})
    assert caught.value.code == "QC-DATA-009"
    assert str(caught.value.fix).startswith("pip install qcore-m; if it is metadata")


def test_a_negative_alpha_is_refused(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": -8, "target_modules": ["q_proj"]}
    (problem,) = check_config(tmp_path, config)
    assert (problem.code, problem.field, problem.found) == ("QC-ADAPTER-004", "lora_alpha", "-8")


@pytest.mark.parametrize("names", [5, [5], {"q_proj": 1}])
def test_targets_that_are_no_names(tmp_path: Path, names: object) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": names}
    (problem,) = check_config(tmp_path, config)
    assert (problem.code, problem.field) == ("QC-ADAPTER-004", "target_modules")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"alpha_pattern": {"nope": 3}}, "alpha_pattern: 'nope' matches no weight of this base"),
        ({"rank_pattern": {"q_projx": 3}}, "rank_pattern: 'q_projx' matches no weight"),
        ({"target_modules": r".*\.nope"}, r"the expression '.*\.nope' matches no weight"),
        ({"target_modules": r".*\.q_proj"}, ""),
    ],
)
def test_a_pattern_that_matches_nothing_is_named(
    capsys: Any, base: Path, tmp_path: Path, change: dict[str, Any], line: str
) -> None:
    module = "base_model.model.model.language_model.layers.3.self_attn.q_proj"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    matrices = {"lora_A": torch.ones(2, 128), "lora_B": torch.ones(256, 2)}
    save_file(
        {f"{module}.{side}.weight": value for side, value in matrices.items()},
        adapter / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    ended = here(capsys, "adapter", "show", adapter, "--model", base)
    assert ended.code == 0, ended.err
    warnings = [each for each in ended.out.splitlines() if "matches no weight" in each]
    assert len(warnings) == bool(line)
    assert line in "".join(warnings)


# -- what an unattended run says


def test_a_piped_log_has_the_evaluations_and_the_last_step(capsys: Any) -> None:
    step = Step(
        step=1, total=9, loss=1.5, grad_norm=1, learning_rate=1, tokens=1, supervised_tokens=1,
        seconds=1, tokens_per_second=1, memory_gb=1,
    )  # fmt: skip
    sink = TerminalSink()
    sink.handle(ProgressStarted(label="training", total=9, unit="steps"))
    for number in range(1, 10):
        eval_loss = 2.25 if number == 4 else None
        sink.handle(replace(step, step=number, eval_loss=eval_loss))
    sink.handle(Evaluation(step=9, eval_loss=2.125, final=True))
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["step 1", "step 4", "step 9", "step 9"]
    assert "eval 2.2500" in lines[1]
    assert "eval 2.1250" in lines[3]


@pytest.mark.parametrize("step", [0, 2, 3, 40, 99])
def test_the_documented_learning_rate_is_the_one_that_is_used(step: int) -> None:
    """The formula of docs/training.md, evaluated as it is written there."""
    text = " ".join((DOCS / "training.md").read_text(encoding="utf-8").split())
    warm, cosine = (
        re.search(pattern, text)[1]  # type: ignore[index]
        for pattern in (r"has `([^`]*)` for n < W", r"else `([^`]*)`; W is")
    )
    settings = Settings(learning_rate=1e-3, warmup_ratio=0.03)
    names = {"learning_rate": 1e-3, "n": step, "W": 3, "S": 100, "pi": math.pi, "cos": math.cos}
    expected = eval(warm if step < 3 else cosine, {}, names)
    assert math.isclose(learning_rate(settings, step, 100), expected)


# -- what a checkpoint is fit for


def _no_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").unlink()


def _empty_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").write_text("{}")


def _no_template(base: Path) -> None:
    (base / "chat_template.jinja").unlink()


def _other_eos(base: Path) -> None:
    (base / "generation_config.json").write_text('{"eos_token_id": 1}')


def _lowercased(base: Path) -> None:
    steps = [{"type": "NFC"}, {"type": "Lowercase"}]
    edit_json(
        base / "tokenizer.json",
        lambda c: c.update(normalizer={"type": "Sequence", "normalizers": steps}),
    )


def _moved_ids(base: Path) -> None:
    """Two control tokens have each other's ids in one of two files, as after a bad conversion."""
    tokens = json.loads((base / "tokenizer.json").read_text())["added_tokens"]
    texts = [token["content"] for token in tokens]
    a, b = texts.index("<|im_start|>"), texts.index("<|vision_start|>")
    texts[a], texts[b] = texts[b], texts[a]
    listed = {str(t["id"]): {"content": text} for t, text in zip(tokens, texts, strict=True)}
    edit_json(base / "tokenizer_config.json", lambda c: c.update(added_tokens_decoder=listed))


@pytest.mark.parametrize(
    ("damage", "severity", "code", "status"),
    [
        (_lowercased, "warning", "QC-PRE-006", 0),
        (_moved_ids, "warning", "QC-PRE-005", 0),
        (_no_tokenizer, "error", "QC-TOKENIZER-001", 65),
        (_empty_tokenizer, "error", "QC-TOKENIZER-001", 65),
        (_no_template, "error", "QC-PRE-001", 65),
        (_other_eos, "warning", "QC-PRE-004", 0),
    ],
)
def test_inspect_names_what_train_would_refuse(
    capsys: Any, base: Path, damage: Callable[[Path], None], severity: str, code: str, status: int
) -> None:
    damage(base)
    words = ("inspect", base, "--generation", "3.5")
    plain = here(capsys, *words)
    assert plain.code == 0
    assert f"finding     {severity} for train, serve: [{code}]" in plain.out
    assert here(capsys, *words, "--for", "train").code == status
    assert here(capsys, *words, "--for", "serve", "--json").code == status
    assert here(capsys, *words, "--for", "merge").code == 0
    (finding,) = here(capsys, *words, "--json").json["findings"]
    assert (finding["for"], finding["severity"], finding["code"]) == (
        ["train", "serve"], severity, code,
    )  # fmt: skip


def test_rows_that_a_tokenizer_changes(capsys: Any, base: Path, tmp_path: Path) -> None:
    """Serving loses the same letters, so that the tokens are equal; the message is not."""
    rows = tmp_path / "capitals.jsonl"
    rows.write_text(json.dumps({"messages": [MESSAGES[0], {**MESSAGES[1], "content": "Paris"}]}))
    words = ("--model", base, "--generation", "3.5")
    assert "0 differ from serving" in here(capsys, "data", "parity", rows, *words).out
    _lowercased(base)
    checked = here(capsys, "data", "check", rows, *words)
    assert checked.code == 0
    assert "QC-PRE-006" in checked.err or "removes capital letters" in checked.err
    ended = here(capsys, "data", "parity", rows, *words, "--json")
    assert ended.code == 0
    kinds = {(one["kind"], one["cause"]) for one in ended.json["notes"]}
    assert kinds == {("message", "the tokenizer changes the text")}


def test_fields_are_folded_on_a_terminal(
    capsys: Any, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _other_eos(base)
    words = ("inspect", base, "--generation", "3.5")
    piped = here(capsys, *words).out
    assert max(map(len, piped.splitlines())) > 80
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    shown = here(capsys, *words).out
    lines = shown.replace(str(base), "base").splitlines()
    assert max(map(len, lines)) <= 80
    assert shown.split() == piped.split()
    assert "Fix: add it" in " ".join(shown.split())


def test_a_whole_checkpoint_has_no_findings(capsys: Any, base: Path) -> None:
    ended = here(capsys, "inspect", base, "--for", "train", "--for", "serve", "--json")
    assert ended.code == 0
    assert ended.json["findings"] == []
