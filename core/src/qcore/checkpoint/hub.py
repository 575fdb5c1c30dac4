"""Resolves ``--model`` to a folder: a local path or ``ORG/NAME@REVISION``, and what is downloaded.

This file decides which values ``--model`` accepts: an existing folder, else ``ORG/NAME`` or
``ORG/NAME@REVISION``. It also decides which files are downloaded: config, tokenizer, chat
template, processor, generation config, safetensors and their index, but never a pickle. If the
caller reads no tensor, the safetensors files are not downloaded, only their headers.
`qcore.checkpoint.hub_client` downloads and reports failures; `qcore.checkpoint.checkpoint` checks
what a folder must contain.

Codes: ``QC-HUB-001`` neither a folder nor an id, ``-002`` a file, ``-003`` not on the hub,
``-004`` no access, ``-005`` no such revision, ``-006`` offline and not cached, ``-007`` the
hub cannot be reached, ``-008`` the download failed, ``-009`` no file that qcore reads;
``QC-WRITE-*`` the cache cannot be written.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import InputError
from ..io.manifest import MANIFEST
from ..io.safe_path import name_problem
from .hub_client import RemoteWeights, download
from .suggest import suggest_folder

#: Patterns of the files of a tokenizer and its chat template.
TOKENIZER_FILES: Final = (
    "tokenizer*.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_SMALL: Final = (
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
    "*processor_config.json",
    "*.safetensors.index.json",
    MANIFEST,
)
FILES: Final = (*_SMALL, "*.safetensors")
_DEEPEST: Final = 16  # folders in a hub id
_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION: Final = re.compile(r"[A-Za-z0-9_](?!.*\.\.)[\w./+-]*", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """The local folder of a model.

    Attributes:
        path: the folder.
        source: the folder or hub id that the user passed.
        revision: the commit on the hub; ``None`` for a local folder.
        remote: source of the safetensors files; ``None`` if they are in the folder.
    """

    path: Path
    source: str
    revision: str | None = None
    remote: RemoteWeights | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HubId:
    """A place on the hub: ``ORG/NAME[/FOLDER][@REVISION]``.

    Attributes:
        name: ``ORG/NAME``.
        folder: path in the repository; empty for the top.
        revision: branch, tag or commit; ``None`` for the default branch.
    """

    name: str
    folder: str
    revision: str | None


def parse_id(source: str) -> HubId | None:
    """Split a hub id, which may name a folder; ``None`` if the value is not one."""
    path, separator, revision = source.partition("@")
    org, _, rest = path.partition("/")
    name, _, folder = rest.partition("/")
    if not _ID.fullmatch(f"{org}/{name}") or (separator and not _REVISION.fullmatch(revision)):
        return None
    folder = folder.rstrip("/")
    if folder and name_problem(folder, depth=_DEEPEST) is not None:
        return None
    return HubId(name=f"{org}/{name}", folder=folder, revision=revision or None)


def resolve_model(model: str | Path, *, headers_only: bool = False) -> ResolvedModel:
    """Return the folder of a model, downloading it from the hub if it is not local.

    Args:
        model: a folder, or ``ORG/NAME[@REVISION]``. A local folder of that name takes precedence.
        headers_only: do not download the safetensors files of a hub id.

    Raises:
        InputError: ``QC-HUB-*``.
        TrustError: ``QC-HUB-004``, if the hub requires a token or an accepted license.
        WriteError: the hub's cache cannot be written.
    """
    source = str(model)
    path = Path(source).expanduser()
    if path.is_dir():
        return ResolvedModel(path=path, source=source)
    if os.path.lexists(path):
        beside = (path.parent / "config.json").is_file()
        fix = f"name the folder: {path.parent}" if beside else "name a model folder or a hub id"
        raise InputError("QC-HUB-002", "is not a folder", file=source, fix=fix)
    name, separator, revision = source.partition("@")
    if not _ID.fullmatch(name) or (separator and not _REVISION.fullmatch(revision)):
        raise InputError(
            "QC-HUB-001",
            "is neither a folder nor a hub id",
            file=source,
            expected="a folder, or ORG/NAME[@REVISION]",
            fix=suggest_folder(source, path) or "name a folder that exists",
        )
    folder = download(name, revision or None, source, _SMALL if headers_only else FILES)
    if not folder.is_dir():
        files = (
            "config or tokenizer file" if headers_only else "config, tokenizer or safetensors file"
        )
        raise InputError(
            "QC-HUB-009", f"contains no {files}", file=source, fix="name a model repository"
        )
    remote = RemoteWeights(name, folder.name, source) if headers_only else None
    return ResolvedModel(path=folder, source=source, revision=folder.name, remote=remote)


def public_source(source: str, path: Path, revision: str | None) -> tuple[str, str | None]:
    """Return the name under which others find a base, and its commit on the hub.

    Args:
        source: the folder or hub id that the user passed.
        path: the folder.
        revision: commit that the hub id resolved to; ``None`` for a folder.

    Returns:
        A hub id and a commit, also for a folder of the hub's cache; else the absolute path and
        ``None``.
    """
    if revision is not None:
        return source.partition("@")[0], revision
    return _cached_id(path) or (str(path.expanduser().absolute()), None)


def _cached_id(path: Path) -> tuple[str, str] | None:
    """Return hub id and commit of a snapshot folder in the hub's cache; ``None`` for another."""
    snapshot = Path(os.path.abspath(path.expanduser()))
    entry = snapshot.parent.parent.name.split("--")
    if snapshot.parent.name != "snapshots" or entry[0] != "models" or len(entry) < 3:
        return None
    name = f"{entry[1]}/{'--'.join(entry[2:])}"
    return (name, snapshot.name) if _ID.fullmatch(name) else None
