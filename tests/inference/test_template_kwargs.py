"""Template variables from training to generation: recorded, rendered with again, overridden."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cli_kit import here
from support.conversations import conversations, write_rows
from support.e2e_kit import tiny_folder
from support.sinks import Heard

from qcore.config.settings import Settings
from qcore.errors import InputError, PreflightError, QcoreError, UsageError
from qcore.inference.generate import Generator
from qcore.io.manifest import read_manifest
from qcore.merging.merge import merge
from qcore.training.train import train

THINK, NO_THINK = "<think>\n", "<think>\n\n</think>\n\n"
SETTINGS: dict[str, Any] = {
    "max_steps": 1, "gradient_accumulation_steps": 1, "r": 2, "lora_alpha": 4, "save_steps": 0,
    "quantization": "none",
}  # fmt: skip


@pytest.fixture(scope="module")
def adapters(once: Callable[..., Path]) -> dict[str, Path]:
    """Adapters trained without a variable and with thinking on, which is not the default here."""

    def write(home: Path) -> None:
        rows = write_rows(home / "rows.jsonl", conversations(12))
        for name, given in (("plain", {}), ("thinking", {"enable_thinking": True})):
            settings = Settings(**SETTINGS, chat_template_kwargs=given)
            train(str(tiny_folder()), rows, home / name, settings, device="cpu")

    home = once("template-kwargs", write)
    return {name: home / name for name in ("plain", "thinking")}


def prompted(**options: Any) -> tuple[str, list[str]]:
    """How a prompt ends, and what was said of the template's variables."""
    heard = Heard()
    generator = Generator(str(tiny_folder()), device="cpu", reporter=heard.reporter, **options)
    prompt = generator.prompt("Hi", max_new_tokens=1).prompt
    said = [line for line in heard.notes if line.startswith("the chat template is rendered")]
    return prompt.rpartition("assistant\n")[2], said


def test_the_manifest_records_them(adapters: dict[str, Path]) -> None:
    recorded = {
        name: read_manifest(path).meta["identity"]["settings"]["chat_template_kwargs"]
        for name, path in adapters.items()
    }
    assert recorded == {"plain": {}, "thinking": {"enable_thinking": True}}


def test_generation_renders_as_training_did(adapters: dict[str, Path]) -> None:
    assert prompted() == (NO_THINK, [])
    assert prompted(adapter=adapters["plain"]) == (NO_THINK, [])
    assert prompted(adapter=adapters["thinking"]) == (
        THINK,
        ["the chat template is rendered with {enable_thinking: true} (as the adapter was trained)"],
    )


def test_an_override_wins_and_is_told(adapters: dict[str, Path]) -> None:
    tail, (line,) = prompted(
        adapter=adapters["thinking"], chat_template_kwargs={"enable_thinking": False}
    )
    assert tail == NO_THINK
    assert "{enable_thinking: false} (--chat-template-kwargs, over" in line
    tail, (line,) = prompted(chat_template_kwargs={"enable_thinking": True})
    assert tail == THINK
    assert line.endswith("(--chat-template-kwargs)")


def refused(code: str, **options: Any) -> QcoreError:
    with pytest.raises(QcoreError) as caught:
        Generator(str(tiny_folder()), device="cpu", **options)
    error = caught.value
    if isinstance(error, PreflightError):
        (error,) = error.errors
    assert error.code == code
    return error


def test_what_would_do_nothing_is_refused(adapters: dict[str, Path]) -> None:
    unread = refused("QC-CONFIG-008", chat_template_kwargs={"preserve_thinking": True})
    assert isinstance(unread, UsageError)
    refused("QC-CONFIG-009", chat_template_kwargs={"messages": True})
    refused("QC-QWEN35-020", chat_template_kwargs={"enable_thinking": "false"})


def test_training_refuses_it_too(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", conversations(6))
    for given, code in (
        ({"preserve_thinking": True}, "QC-CONFIG-008"),
        ({"tools": "x"}, "QC-CONFIG-009"),
        ({"enable_thinking": "false"}, "QC-QWEN35-020"),
    ):
        settings = Settings(**SETTINGS, chat_template_kwargs=given)  # type: ignore[arg-type]
        with pytest.raises(QcoreError) as caught:
            train(str(tiny_folder()), rows, tmp_path / "out", settings, device="cpu")
        error = caught.value
        if isinstance(error, PreflightError):
            (error,) = error.errors
        assert error.code == code
        assert not (tmp_path / "out").exists()


def test_a_template_without_the_variable_is_another_base(
    adapters: dict[str, Path], tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_folder(), tmp_path / "base")
    path = base / "chat_template.jinja"
    old = "enable_thinking is defined and enable_thinking is true"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, "true"))
    with pytest.raises(InputError) as caught:
        Generator(str(base), adapter=adapters["thinking"], device="cpu", generation="3.5")
    assert caught.value.code == "QC-GENERATE-004"
    assert "enable_thinking" in caught.value.message


def test_on_the_command_line(adapters: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("generate", tiny_folder(), "--prompt", "Hi", "--max-new-tokens", 1, "--json")
    given = "--chat-template-kwargs"
    ended = here(capsys, *flags, "--adapter", adapters["thinking"])
    assert ended.json["prompt"].endswith(f"assistant\n{THINK}")
    ended = here(capsys, *flags, "--adapter", adapters["thinking"], given, "enable_thinking=false")
    assert ended.json["prompt"].endswith(f"assistant\n{NO_THINK}")
    for bad, code in (
        ("enable_thinking", "QC-CONFIG-006"),
        ("enable_thinking=no", "QC-CONFIG-002"),
        ("xyzzy=true", "QC-CONFIG-008"),
    ):
        ended = here(capsys, *flags, given, bad)
        assert ended.code == 2
        assert ended.json["error"]["code"] == code
    twice = here(capsys, *flags, given, "enable_thinking=true", given, "enable_thinking=true")
    assert twice.json["error"]["code"] == "QC-CONFIG-005"


def test_a_merge_says_how_the_rows_were_rendered(adapters: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_folder(), base)
    said = merge(str(base), adapters["thinking"], tmp_path / "one").warnings
    assert [line for line in said if "enable_thinking=true" in line]
    assert not [line for line in said if "another chat template" in line]
    template = base / "chat_template.jinja"
    template.write_text(template.read_text() + "{# changed #}")
    said = merge(str(base), adapters["plain"], tmp_path / "two").warnings
    (merged,) = (line for line in said if "another chat template" in line)
    words = merged.partition(" was trained")[2].partition("; compare ")[0]
    # Generation warns in the same words, with the adapter and on the merge.
    for model, options in ((base, {"adapter": adapters["plain"]}), (tmp_path / "two", {})):
        heard = Heard()
        Generator(str(model), device="cpu", reporter=heard.reporter, **options)
        (line,) = (line for line in heard.notes if "another chat template" in line)
        assert line.partition(" was trained")[2].partition("; compare ")[0] == words
    heard = Heard()
    Generator(str(tmp_path / "one"), device="cpu", reporter=heard.reporter)
    assert not [line for line in heard.notes if "another chat template" in line]
