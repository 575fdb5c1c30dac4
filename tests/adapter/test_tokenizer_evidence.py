"""The tokenizer and template that an adapter folder brings, compared with those of its base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.e2e_kit import tiny_folder
from support.model_kit import edit_json, write_json
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from qcore.adapter.tokenizer_evidence import TokenizerDifference, compare_tokenizers
from qcore.checkpoint.tokenizer_files import TokenizerFiles, named_templates

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
Change = Callable[[Path], object]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter folder with the tokenizer files of its base."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in FILES:
        shutil.copy(tiny_folder() / name, folder)
    return folder


def compare(adapter: Path) -> TokenizerDifference | None:
    return compare_tokenizers(adapter, tiny_folder())


def tokens(change: Callable[[dict[str, Any]], object]) -> Change:
    return lambda folder: edit_json(folder / "tokenizer.json", change)


def merges_as_text(content: dict[str, Any]) -> None:
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]


def without_defaults(content: dict[str, Any]) -> None:
    content["model"] = {k: v for k, v in content["model"].items() if v not in (None, False)}
    del content["padding"], content["truncation"]
    content["pre_tokenizer"].pop("use_regex")  # true where it is absent


def padded(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(length=8)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))


def newline(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + "\n")


def in_the_config(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    text = path.read_text()
    path.unlink()
    edit_json(folder / "tokenizer_config.json", lambda c: c.update(chat_template=text))


SAME: dict[str, Change] = {
    "the same files": lambda folder: None,
    "no files": lambda folder: [(folder / name).unlink() for name in FILES],
    "a post-processor of offsets": tokens(
        lambda c: c.update(post_processor={"type": "ByteLevel", "trim_offsets": False})
    ),
    # `save_pretrained` of transformers 5.23 changes nothing else of a published tokenizer.json.
    "offsets": tokens(lambda c: c["pre_tokenizer"].update(trim_offsets=False)),
    "merges as text": tokens(merges_as_text),
    "defaults left out": tokens(without_defaults),
    "padding and truncation": padded,
    "a newline after the template": newline,
    "the template in tokenizer_config.json": in_the_config,
    "another token for padding": lambda folder: edit_json(
        folder / "tokenizer_config.json", lambda c: c.update(pad_token="<|im_start|>")
    ),
    "an eos token with flags": lambda folder: edit_json(
        folder / "tokenizer_config.json",
        lambda c: c.update(eos_token={"content": "<|im_end|>", "special": True}),
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_no_difference(adapter: Path, case: str):
    SAME[case](adapter)
    assert compare(adapter) is None


def add(*names: str, special: bool = True) -> Change:
    def change(folder: Path) -> None:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_tokens([AddedToken(name, special=special) for name in names])
        tokenizer.save(str(folder / "tokenizer.json"))

    return change


def size() -> int:
    return Tokenizer.from_file(str(tiny_folder() / "tokenizer.json")).get_vocab_size()


def added_file(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    write_json(folder / "added_tokens.json", {"<doc>": size(), "<|im_end|>": 257})


def shifted(content: dict[str, Any]) -> None:
    for token in content["added_tokens"]:
        token["id"] += 1


DIFFERENT: dict[str, tuple[Change, tuple[str, ...]]] = {
    "added special tokens": (
        add("<doc_ids>", "</doc_ids>"), ("2 tokens that the base's lacks", "'<doc_ids>'")
    ),
    "added plain tokens": (add("kilobyte", special=False), ("1 token that", "'kilobyte'")),
    "many added tokens": (add(*(f"<t{n}>" for n in range(9))), ("9 tokens", "'<t3>'", "...")),
    "added tokens in their own file": (added_file, ("1 token that the base's lacks", "'<doc>'")),
    "other ids": (tokens(shifted), ("with another id",)),
    "a token is missing": (
        tokens(lambda c: c["added_tokens"].pop()), ("1 token of the base's missing",)
    ),
    "another pre_tokenizer": (
        tokens(lambda c: c["pre_tokenizer"].update(add_prefix_space=True)),
        ("another pre_tokenizer",),
    ),
    "another normalizer": (
        tokens(lambda c: c.update(normalizer={"type": "NFKC"})), ("another normalizer",)
    ),
    "merges are missing": (tokens(lambda c: c["model"]["merges"].pop()), ("another model",)),
    "an added token that takes the space before it": (
        tokens(lambda c: c["added_tokens"][0].update(lstrip=True)), ("flags of added tokens",)
    ),
    "another eos token": (
        lambda folder: edit_json(
            folder / "tokenizer_config.json", lambda c: c.update(eos_token="<|endoftext|>")
        ),
        ("eos_token is <|endoftext|>", "and <|im_end|> in"),
    ),
    "an eos token in special_tokens_map.json": (
        lambda folder: [
            (folder / "tokenizer_config.json").unlink(),
            write_json(folder / "special_tokens_map.json", {"eos_token": "<|endoftext|>"}),
        ],
        ("eos_token is <|endoftext|>",),
    ),
    "another template": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        ("another chat template (sha256 ", "chat_template.jinja with"),
    ),
    "another template in tokenizer_config.json": (
        lambda folder: [
            (folder / "chat_template.jinja").unlink(),
            edit_json(folder / "tokenizer_config.json", lambda c: c.update(chat_template="x")),
        ],
        ("another chat template (sha256 2d711642b726", "tokenizer_config.json with"),
    ),
    "a tokenizer that is not JSON": (
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        ("not compared", "tokenizer.json: cannot be read as a JSON object"),
    ),
    "a tokenizer without tokens": (
        lambda folder: write_json(folder / "tokenizer.json", {"model": 7}),
        ("not compared", "cannot be read as a tokenizer"),
    ),
    "a tokenizer with tokens of another kind": (
        tokens(lambda c: c["added_tokens"].append("text")), ("not compared",)
    ),
    "a link out of the folder": (
        lambda folder: [
            (folder / "chat_template.jinja").unlink(),
            (folder / "chat_template.jinja").symlink_to("/etc/hostname"),
        ],
        ("not compared", "leaves the"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DIFFERENT)
def test_a_difference_is_a_warning(adapter: Path, case: str):
    change, says = DIFFERENT[case]
    change(adapter)
    found = compare(adapter)
    assert found is not None
    lines = list(found.lines())
    assert all(line.startswith("warning: ") for line in lines)
    for part in says:
        assert part in " ".join(lines), lines
    if "not compared" not in says:
        assert str(adapter) in " ".join(lines)
        assert str(tiny_folder()) in " ".join(lines)


def test_the_ids_of_added_tokens(adapter: Path):
    add("<a>", "<b>")(adapter)
    found = compare(adapter)
    assert found is not None
    own = Tokenizer.from_file(str(adapter / "tokenizer.json"))
    assert found.added == {"<a>": own.token_to_id("<a>"), "<b>": own.token_to_id("<b>")}
    assert found.tokens
    assert json.dumps(found.special) == "{}"


# -- named templates


def saved_by_transformers(folder: Path, **templates: str) -> None:
    """Write a list of named templates as transformers saves it without files of their own."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    listed = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    assert {entry["name"] for entry in listed} == templates.keys()


def test_named_templates_equal_to_the_bases_are_no_difference(adapter: Path) -> None:
    text = (adapter / "chat_template.jinja").read_text()
    saved_by_transformers(adapter, default=text, tool_use=text)
    found = compare(adapter)
    assert found is None or found.template is None
    template = TokenizerFiles.of(adapter).template
    assert template is not None
    assert template.text == text


@pytest.mark.parametrize("name", ["default", "tool_use"])
def test_a_named_template_that_differs_is_named(adapter: Path, name: str) -> None:
    text = (adapter / "chat_template.jinja").read_text()
    saved_by_transformers(adapter, **{"default": text, "tool_use": text, name: text + "!"})
    found = compare(adapter)
    assert found is not None
    assert found.template is not None
    assert found.template_name == ("" if name == "default" else name)
    (line,) = [line for line in found.lines() if "chat template" in line]
    assert ("'tool_use'" in line) == (name == "tool_use")
    files = TokenizerFiles.of(adapter)
    assert [*named_templates(files)] == ["default", "tool_use"]
    assert files.template is None, "which one applies depends on the row"


@pytest.mark.parametrize("value", [[], [{"name": "default"}], ["text"], {"default": "x"}, 3, None])
def test_a_list_without_templates_is_none(adapter: Path, value: object) -> None:
    (adapter / "chat_template.jinja").unlink()
    edit_json(adapter / "tokenizer_config.json", lambda c: c.update(chat_template=value))
    assert named_templates(TokenizerFiles.of(adapter)) == {}
