"""Tokenizer and chat template files of a folder: a checkpoint, or an adapter with its own.

This file decides which files are a tokenizer and a chat template, in which order a template is
looked for, and how the tokens of a tokenizer.json are listed. Trainers save these files beside an
adapter. It opens no file outside the folder and loads no tokenizer.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from ..errors import InputError
from ..io.atomic import reading
from .folder import read_json, refuse_special, safe_file

if TYPE_CHECKING:
    from .chat_template import Template

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
#: Where processors of older versions of transformers keep the template.
LEGACY_TEMPLATE = "chat_template.json"
_DEFAULT: Final = "default"  # name of the template that applies where no other does
#: Files of a tokenizer beside tokenizer.json.
COMPANIONS = (
    TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip


class Files(Protocol):
    """A folder whose files are opened by name."""

    @property
    def path(self) -> Path:
        """The folder."""
        ...

    @property
    def sidecars(self) -> Collection[str]:
        """Names of the files."""
        ...

    def file(self, name: str) -> Path:
        """Return the path of a file, after checking that it lies inside the folder."""
        ...


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer and chat template files of an adapter folder.

    Attributes:
        path: the folder.
        sidecars: names of those of its files that belong to a tokenizer or a template.
    """

    path: Path
    sidecars: frozenset[str]

    @classmethod
    def of(cls, folder: Path) -> TokenizerFiles:
        """List the files of a folder."""
        known = {TOKENIZER, TEMPLATE, LEGACY_TEMPLATE, *COMPANIONS}
        with reading(folder):
            entries = list(os.scandir(folder))
            names = {entry.name for entry in entries if entry.is_file()}
        refuse_special(folder, known & {entry.name for entry in entries} - names)
        return cls(folder, frozenset(names & known))

    def file(self, name: str) -> Path:
        """Return the path of a file, after checking that it lies inside the folder.

        Raises:
            InputError: ``QC-CKPT-003`` an unsafe path, ``-006`` no such file.
        """
        return safe_file(self.path, name)

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """Content of tokenizer_config.json, then special_tokens_map.json; empty without them."""
        merged: dict[str, Any] = {}
        for name in ("special_tokens_map.json", TOKENIZER_CONFIG):
            merged |= optional_json(self, name)
        return merged

    @cached_property
    def template(self) -> Template | None:
        """The chat template, or ``None``. The caller closes it after rendering."""
        return read_template(self)


def optional_json(files: Files, name: str) -> dict[str, Any]:
    """Return the content of a JSON file; empty if the file does not exist."""
    return read_json(files.file(name)) if name in files.sidecars else {}


def read_template(files: Files) -> Template | None:
    """Return the chat template of a folder, or ``None`` if it has none.

    Several named templates that differ give ``None``: which one applies depends on the row.

    Raises:
        InputError: as `named_templates`.
    """
    named = [*named_templates(files).values()]
    return named[0] if len({template.sha256 for template in named}) == 1 else None


def named_templates(files: Files) -> dict[str, Template]:
    """Return the chat templates of a folder by name; a single one is ``default``.

    They are read from chat_template.jinja, then tokenizer_config.json, then chat_template.json. In
    JSON they may be a list of ``{"name": ..., "template": ...}``, of which transformers renders
    ``tool_use`` where a conversation has tools.

    Raises:
        InputError: ``QC-CKPT-002`` a file is not UTF-8 or not JSON.
    """
    from .chat_template import Template

    if TEMPLATE in files.sidecars:
        path = files.file(TEMPLATE)
        try:
            with reading(path):
                return {_DEFAULT: Template(path.read_text(encoding="utf-8"), str(path))}
        except UnicodeDecodeError as error:
            raise InputError(
                "QC-CKPT-002", "is not UTF-8", file=path, found=error.reason,
                fix="use the template that came with the weights",
            ) from None  # fmt: skip
    for name in (TOKENIZER_CONFIG, LEGACY_TEMPLATE):
        value = optional_json(files, name).get("chat_template")
        entries = [{"name": _DEFAULT, "template": value}] if isinstance(value, str) else value
        texts = {
            entry["name"]: entry["template"]
            for entry in (entries if isinstance(entries, list) else ())
            if isinstance(entry, dict)
            and isinstance(entry.get("name"), str)
            and isinstance(entry.get("template"), str)
        }
        if texts:
            where = str(files.file(name))
            names = sorted(texts, key=lambda each: (each != _DEFAULT, each))
            return {each: Template(texts[each], where) for each in names}
    return {}


def read_tokens(files: Files) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the ids by token, added ones included, and the content of tokenizer.json.

    Raises:
        InputError: ``QC-CKPT-002`` not JSON, ``QC-TOKENIZER-001`` not a tokenizer.
    """
    path = files.file(TOKENIZER)
    content = read_json(path)
    model, added = content.get("model"), content.get("added_tokens") or []
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    try:
        if isinstance(vocab, Mapping):
            tokens = {str(token): int(number) for token, number in vocab.items()}
        else:  # a unigram model lists (token, score), and the id is the index
            tokens = {str(token): number for number, (token, *_) in enumerate(vocab or ())}
        tokens |= {str(token["content"]): int(token["id"]) for token in added}
    except (TypeError, ValueError, KeyError):
        tokens = {}
    if not tokens:
        raise InputError(
            "QC-TOKENIZER-001",
            "cannot be read as a tokenizer",
            file=path,
            expected="model.vocab and added_tokens, as the tokenizers library writes them",
            fix="save the tokenizer again with the tokenizers library",
        )
    return tokens, content
