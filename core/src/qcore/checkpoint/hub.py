"""Where a model comes from: a folder, or an id on the hub.

This file decides what ``--model`` may say (a folder that exists, else ``ORG/NAME`` or
``ORG/NAME@REVISION``) and which files are fetched: config, tokenizer, chat template, processor,
generation config, safetensors and its index; never a pickle; and of the safetensors only the
headers where no tensor will be read. It leaves the fetching and its failures to
`qcore.checkpoint.hub_client`, what a folder must hold to `qcore.checkpoint.checkpoint`.

Codes: ``QC-HUB-001`` neither a folder nor an id, ``-002`` a file, ``-003`` not on the hub,
``-004`` no access, ``-005`` no such revision, ``-006`` offline and not cached, ``-007`` the
hub cannot be reached, ``-008`` the download failed, ``-009`` nothing that qcore reads;
``QC-WRITE-*`` where the cache cannot be written.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import InputError
from .hub_client import RemoteWeights, download, near

_SMALL: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "*processor_config.json",
    "*.safetensors.index.json",
)
FILES: Final = (*_SMALL, "*.safetensors")
_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION: Final = re.compile(r"[A-Za-z0-9_](?!.*\.\.)[\w./+-]*", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """A model's folder on this machine.

    Attributes:
        path: the folder.
        source: what the user named.
        revision: the commit on the hub; ``None`` for a folder of the user's.
        remote: where the safetensors files are; ``None`` where they are in the folder.
    """

    path: Path
    source: str
    revision: str | None = None
    remote: RemoteWeights | None = None


def resolve_model(model: str | Path, *, headers_only: bool = False) -> ResolvedModel:
    """The folder of a model, fetched from the hub where it is not one already.

    Args:
        model: a folder, or ``ORG/NAME[@REVISION]``; a folder of that name wins.
        headers_only: leave the safetensors files of a hub id where they are.

    Raises:
        InputError: ``QC-HUB-*``.
        TrustError: ``QC-HUB-004``, when the hub wants a token or an accepted licence.
        WriteError: the hub's cache cannot be written.
    """
    source = str(model)
    path = Path(source).expanduser()
    if path.is_dir():
        return ResolvedModel(path=path, source=source)
    if os.path.lexists(path):
        fix = f"name the folder: {path.parent}"
        raise InputError("QC-HUB-002", "is not a folder", file=source, fix=fix)
    name, at, revision = source.partition("@")
    if not _ID.fullmatch(name) or (at and not _REVISION.fullmatch(revision)):
        raise InputError(
            "QC-HUB-001",
            "is neither a folder nor a hub id",
            file=source,
            expected="a folder, or ORG/NAME[@REVISION]",
            fix=near(source, path) or "name a folder that exists",
        )
    folder = download(name, revision or None, source, _SMALL if headers_only else FILES)
    if not folder.is_dir():
        read = (
            "config and no tokenizer file"
            if headers_only
            else "config, tokenizer or safetensors file"
        )
        raise InputError(
            "QC-HUB-009", f"holds no {read}", file=source, fix="name a model repository"
        )
    remote = RemoteWeights(name, folder.name, source) if headers_only else None
    return ResolvedModel(path=folder, source=source, revision=folder.name, remote=remote)
