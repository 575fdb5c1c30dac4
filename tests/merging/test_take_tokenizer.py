"""An adapter folder with its own tokenizer and template: a warning, or --take-tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.cli_kit import here
from support.e2e_kit import tiny_folder
from support.model_kit import edit_json, snapshot, write_json
from support.sinks import Heard
from tokenizers import AddedToken, Tokenizer

from qcore.errors import QcoreError, UsageError
from qcore.inference.generate import Generator
from qcore.io.artifact import read_manifest, verify
from qcore.merging.merge import MergeReport, merge
from qcore.plugins.resolve_model import identify

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Q_PROJ = "base_model.model.model.language_model.layers.3.self_attn.q_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder(), tmp_path / "base"))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of another tool, with the tokenizer, two more tokens, and another template."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    save_file(
        {
            f"{Q_PROJ}.lora_A.weight": 0.1 * torch.randn(2, 128, generator=generator),
            f"{Q_PROJ}.lora_B.weight": 0.1 * torch.randn(256, 2, generator=generator),
        },
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    write_json(folder / "adapter_config.json", config)
    with_tokens(folder, "<doc_ids>", "</doc_ids>")
    shutil.copy(tiny_folder() / "tokenizer_config.json", folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def with_tokens(folder: Path, *names: str) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_folder() / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))


def merged(base: Path, adapter: Path, out: Path, *, take: bool = True) -> MergeReport:
    return merge(str(base), adapter, out, trust_base=True, prove=False, take_tokenizer=take)


def ids(folder: Path, text: str) -> list[int]:
    found: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    return found


# -- without the option


def test_a_merge_warns_of_both_files(base: Path, adapter: Path, tmp_path: Path):
    report = merged(base, adapter, tmp_path / "out", take=False)
    warned = [line for line in report.warnings if line.startswith("warning: ")]
    assert len(warned) == 2
    tokens, template = warned
    for part in (adapter, base):
        assert f"{part / 'tokenizer.json'}" in tokens
        assert f"{part / 'chat_template.jinja'}" in template
    size = Tokenizer.from_file(str(base / "tokenizer.json")).get_vocab_size()
    assert f"'<doc_ids>' {size}, '</doc_ids>' {size + 1}" in tokens
    assert any("--take-tokenizer" in line for line in report.warnings)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_generation_warns_in_the_same_words(base: Path, adapter: Path, tmp_path: Path):
    said = merged(base, adapter, tmp_path / "out", take=False).warnings
    heard = Heard()
    Generator(str(base), adapter=adapter, trust_base=True, device="cpu", reporter=heard.reporter)
    for line in said:
        if "tokenizer" in line or "template" in line:
            assert line in heard.notes
    heard = Heard()
    Generator(str(tmp_path / "out"), device="cpu", reporter=heard.reporter)
    (line,) = (line for line in heard.notes if "another chat template" in line)
    assert "the merged checkpoint was trained under" in line


def test_the_base_s_own_files_are_no_difference(base: Path, adapter: Path, tmp_path: Path):
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(base / name, adapter)
    report = merged(base, adapter, tmp_path / "out", take=False)
    assert not [line for line in report.warnings if "token" in line or "template" in line]


# -- with it


def test_the_adapter_s_files_are_written(base: Path, adapter: Path, tmp_path: Path):
    report = merged(base, adapter, tmp_path / "out")
    assert not [line for line in report.warnings if line.startswith("warning: ")]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (adapter / name).read_bytes()
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert len(ids(tmp_path / "out", "<doc_ids>")) == 1
    assert len(ids(base, "<doc_ids>")) > 1
    assert verify(tmp_path / "out").ok
    (entry,) = read_manifest(tmp_path / "out").meta["merged"]
    assert "tokenizer.json" in entry["tokenizer"]["files"]
    heard = Heard()
    answer = Generator(str(tmp_path / "out"), device="cpu", reporter=heard.reporter)
    assert answer.base.decision.generation.name == "3.5"
    assert any("recorded by the merge" in line for line in answer.base.decision.evidence)
    assert not [line for line in heard.notes if "another chat template" in line]
    assert answer.prompt("hi", max_new_tokens=1).prompt == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_alone(base: Path, adapter: Path, tmp_path: Path):
    (adapter / "tokenizer.json").unlink()
    merged(base, adapter, tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "chat_template.jinja").read_text() == CHATML
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()


def test_a_template_in_tokenizer_config(base: Path, adapter: Path, tmp_path: Path):
    """transformers prefers chat_template.jinja, so that of the base must not stay."""
    (adapter / "chat_template.jinja").unlink()
    edit_json(adapter / "tokenizer_config.json", lambda c: c.update(chat_template=CHATML))
    merged(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHATML


def test_a_tokenizer_without_a_template_keeps_the_base_s(base: Path, adapter: Path, tmp_path: Path):
    text = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    edit_json(base / "tokenizer_config.json", lambda c: c.update(chat_template=text))
    (adapter / "chat_template.jinja").unlink()
    merged(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == text
    assert len(ids(tmp_path / "out", "<doc_ids>")) == 1


def test_a_template_over_one_in_the_base_s_tokenizer_config(
    base: Path, adapter: Path, tmp_path: Path
):
    """Older readers know tokenizer_config.json alone: it must not hold the base's template."""
    text = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    edit_json(base / "tokenizer_config.json", lambda c: c.update(chat_template=text))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).unlink()
    merged(base, adapter, tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "chat_template.jinja").read_text() == CHATML
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert "chat_template" not in config
    assert config["eos_token"] == "<|im_end|>"


def test_files_that_describe_the_base_s_tokenizer_are_left_out(
    base: Path, adapter: Path, tmp_path: Path
):
    write_json(base / "special_tokens_map.json", {"eos_token": "<|im_end|>"})
    write_json(base / "added_tokens.json", {"<|im_end|>": 1})
    write_json(base / "vocab.json", {"a": 1})
    write_json(base / "chat_template.json", {"chat_template": "old"})
    report = merged(base, adapter, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"special_tokens_map.json", "added_tokens.json", "chat_template.json"}
    assert "vocab.json" in names  # the vocabulary is the same: only added tokens differ
    assert any("left out: added_tokens.json" in line for line in report.warnings)


def test_an_eos_token_that_generation_does_not_stop_at(base: Path, adapter: Path, tmp_path: Path):
    edit_json(adapter / "tokenizer_config.json", lambda c: c.update(eos_token="<doc_ids>"))
    report = merged(base, adapter, tmp_path / "out")
    (line,) = (line for line in report.warnings if "generation_config.json stops at" in line)
    assert "<doc_ids>" in line


def test_the_recorded_generation_is_that_of_the_published_config(
    base: Path, adapter: Path, tmp_path: Path
):
    """A folder that was changed, or whose manifest is gone, has no record."""
    merged(base, adapter, tmp_path / "out")
    assert identify(str(tmp_path / "out")).decision.generation.name == "3.5"
    for name, change in {
        "config": lambda folder: edit_json(folder / "config.json", lambda c: c.update(note=1)),
        "manifest": lambda folder: (folder / "MANIFEST.json").unlink(),
        "broken": lambda folder: (folder / "MANIFEST.json").write_text("{}"),
    }.items():
        copy = Path(shutil.copytree(tmp_path / "out", tmp_path / name))
        change(copy)
        with pytest.raises(QcoreError) as caught:
            identify(str(copy))
        assert caught.value.code == "QC-DETECT-003"
        assert identify(str(copy), generation="3.5").decision.forced


# -- what is refused, before anything is written


def no_files(base: Path, adapter: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja"):
        (adapter / name).unlink()


def rows_missing(base: Path, adapter: Path) -> None:
    with_tokens(adapter, *(f"<t{number}>" for number in range(200)))


def broken(base: Path, adapter: Path) -> None:
    (adapter / "tokenizer.json").write_text('{"model": {"vocab": {"a": 1}}}')


def no_turns(base: Path, adapter: Path) -> None:
    path = adapter / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_start|>", "<|other|>"))


def bad_template(base: Path, adapter: Path) -> None:
    (adapter / "chat_template.jinja").write_text("{% if %}")


def later_template(base: Path, adapter: Path) -> None:
    """It reads a variable that the base's generation does not have."""
    text = CHATML + "{% if preserve_thinking %}{% endif %}"
    (adapter / "chat_template.jinja").write_text(text)


def several_templates(base: Path, adapter: Path) -> None:
    """A list of named templates, as transformers writes it into tokenizer_config.json."""
    (adapter / "chat_template.jinja").unlink()
    named = [{"name": n, "template": CHATML + n} for n in ("default", "tool_use")]
    edit_json(adapter / "tokenizer_config.json", lambda c: c.update(chat_template=named))


REFUSED: dict[str, tuple[Callable[[Path, Path], None], str, int]] = {
    "no files": (no_files, "QC-MERGE-010", 2),
    "tokens without rows": (rows_missing, "QC-PRE-002", 65),
    "a tokenizer that does not load": (broken, "QC-TOKENIZER-001", 65),
    "no tokens of the chat format": (no_turns, "QC-PRE-003", 65),
    "a template of another generation": (later_template, "QC-MERGE-011", 65),
    "several templates": (several_templates, "QC-MERGE-011", 65),
    "a template that does not parse": (bad_template, "QC-TEMPLATE-001", 65),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal(base: Path, adapter: Path, tmp_path: Path, case: str):
    change, code, status = REFUSED[case]
    change(base, adapter)
    before = snapshot(tmp_path)
    with pytest.raises(QcoreError) as caught:
        merged(base, adapter, tmp_path / "out")
    assert (caught.value.code, caught.value.exit_code) == (code, status)
    assert isinstance(caught.value, UsageError) == (status == 2)
    assert snapshot(tmp_path) == before


def test_on_the_command_line(base: Path, adapter: Path, tmp_path: Path, capsys: Any):
    flags = ("--model", base, "--adapter", adapter, "--trust-base", "--no-proof", "--json")
    ended = here(capsys, "merge", *flags, "--take-tokenizer", "--output", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert any("taken from the adapter" in line for line in ended.json["warnings"])
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHATML


# -- generate


def test_generate_renders_and_encodes_as_the_adapter_was_trained(base: Path, adapter: Path):
    heard = Heard()
    generator = Generator(
        str(base), adapter=adapter, trust_base=True, take_tokenizer=True, device="cpu",
        reporter=heard.reporter,
    )  # fmt: skip
    answer = generator.prompt("hi", max_new_tokens=1)
    assert answer.prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert len(generator.tokenizer.encode("<doc_ids>").ids) == 1
    assert not [line for line in heard.notes if "chat template" in line and "warning" in line]


def test_generate_takes_the_tokenizer_of_one_adapter(base: Path, adapter: Path, tmp_path: Path):
    other = shutil.copytree(adapter, tmp_path / "other")
    with pytest.raises(UsageError) as caught:
        Generator(
            str(base), adapter={str(adapter): 1.0, str(other): 0.5}, trust_base=True,
            take_tokenizer=True, device="cpu",
        )  # fmt: skip
    assert caught.value.code == "QC-MERGE-013"
    with pytest.raises(UsageError) as caught:
        Generator(str(base), take_tokenizer=True, device="cpu")
    assert caught.value.code == "QC-MERGE-010"
