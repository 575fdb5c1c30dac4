"""Small faults that make a careful tool look careless, a test each, through the command line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.cli_kit import here
from support.model_kit import snapshot

from qcore_qwen35.tiny import write

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
        (folder / name).write_text("{}")
    before = snapshot(folder)
    line = _refused(capsys, base, rows, verb, folder / "runs" / "merged")
    assert f"lies inside {folder}" in line
    assert f"such as {folder}-merged" in line
    assert snapshot(folder) == before
