"""Safe file access in a model folder: refuses paths that leave it; reads config.json and index.

This file decides that no file outside the folder is ever opened. A file name must be a single
path component whose real path lies in the folder, in the ``blobs`` folder of the same hub cache
entry, or in a folder that the user trusts. It reads config.json and the index;
`qcore.checkpoint.checkpoint` decides what else a checkpoint needs.

Codes: ``QC-CKPT-001`` no folder or no config.json, ``-002`` invalid JSON, ``-003`` an unsafe path,
``-006`` a referenced file does not exist; ``QC-READ-001`` a file cannot be read.
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from ..errors import InputError
from ..io import strict_json
from ..io.atomic import reading
from ..io.plain_file import other_kind
from ..io.safe_path import cache_blobs, dangling_target, name_problem
from .safetensors_header import Header, read_headers

INDEX: Final = "model.safetensors.index.json"
#: Suffixes of the files that a checkpoint consists of.
_READ: Final = (".json", ".jinja", ".model", ".txt", ".safetensors")
#: Folders (as in ``PATH``) into which links of a model folder may lead.
TRUST_LINKS: Final = "QCORE_TRUST_LINKS"
_MAX_JSON: Final = 64 * 2**20


class Folder:
    """The files of a local folder; implements `qcore.checkpoint.checkpoint.Weights`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with reading(folder):
            entries = list(os.scandir(folder))
            self._names = {entry.name for entry in entries if entry.is_file()}
        refuse_special(folder, (entry.name for entry in entries if not entry.is_file()))
        # Without its target a file would count as absent, and another would be read in its place.
        for name in sorted(entry.name for entry in entries if entry.is_symlink()):
            if name not in self._names and name.endswith(_READ):
                refuse_dangling(folder / name)

    def names(self) -> set[str]:
        """Return the names of all files."""
        return self._names

    def where(self, name: str) -> Path:
        """Return the path of a file, for errors."""
        return self._folder / name

    def headers(self, shards: Sequence[str]) -> Iterator[list[Header]]:
        """Read the headers of each shard.

        Raises:
            InputError: ``QC-CKPT-003``, ``-005``, ``-006``.
        """
        return (read_headers(safe_file(self._folder, shard)) for shard in shards)


def safe_file(folder: Path, name: str) -> Path:
    """Return the path of `name` in `folder`, after checking that it lies inside.

    Raises:
        InputError: ``QC-CKPT-003`` the name has a separator, a drive or a NUL, or the file is a
            link out of the folder or not a regular file; ``-006`` the file does not exist.
    """
    check_name(folder, name)
    path = folder / name
    if stat.S_ISREG(_mode(path, links=False)):
        return path  # not a link, so its real path is in the folder
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if real.parent not in (home, cache_blobs(home)) and not _trusted(real):
        raise _outside(path, real)
    mode = _mode(real)
    if not mode:
        raise InputError(
            "QC-CKPT-006",
            "is referenced but does not exist",
            file=path,
            fix="download the checkpoint again",
        )
    if (kind := other_kind(mode)) is not None:
        raise _special(path, kind)
    return path


def _trusted(real: Path) -> bool:
    """Whether the user allows links into the folder of a file (`TRUST_LINKS`)."""
    named = [name for name in os.environ.get(TRUST_LINKS, "").split(os.pathsep) if name]
    return any(Path(os.path.realpath(name)) in real.parents for name in named)


def _outside(path: Path, real: Path) -> InputError:
    return InputError(
        "QC-CKPT-003",
        "is a link that leaves the model folder",
        file=path,
        found=real,
        expected="a file inside the folder",
        fix=f"if you made this link, allow it with {TRUST_LINKS}={shlex.quote(str(real.parent))}; "
        "otherwise do not use this checkpoint unless you know who wrote it",
    )


def refuse_special(folder: Path, names: Iterable[str]) -> None:
    """Refuse a pipe, a device or a socket with the name of a file that is read.

    Such a file would count as absent, and another would be read in its place.

    Raises:
        InputError: ``QC-CKPT-003``.
    """
    for name in sorted(names):
        kind = other_kind(_mode(folder / name))
        if kind is not None and kind != "a folder" and name.endswith(_READ):
            raise _special(folder / name, kind)


def _special(path: Path, kind: str) -> InputError:
    return InputError(
        "QC-CKPT-003", f"cannot be read: {kind}, not a plain file", file=path,
        fix="put the file that it stands for in its place",
    )  # fmt: skip


def refuse_dangling(path: Path) -> None:
    """Refuse a link to a file that does not exist.

    Raises:
        InputError: ``QC-CKPT-006``.
    """
    if (target := dangling_target(path)) is not None:
        raise InputError(
            "QC-CKPT-006",
            f"is a link to {target}, which does not exist",
            file=path,
            fix="copy the folder again with the files that its links lead to (cp -rL), or "
            "download it again",
        )


def check_name(folder: Path, name: str) -> None:
    """Check that a file name is a single plain path component.

    Raises:
        InputError: ``QC-CKPT-003``.
    """
    if name_problem(name) is not None:
        raise _unsafe(folder, name)


def _unsafe(folder: Path, name: str) -> InputError:
    return InputError(
        "QC-CKPT-003",
        "leaves the model folder",
        file=folder,
        field=repr(name[:100]),
        expected="the plain name of a file inside the folder",
        fix="do not use this checkpoint unless you know who wrote it",
    )


def _mode(path: Path, *, links: bool = True) -> int:
    """Return the mode of a file, or 0 if there is no such file."""
    try:
        return (os.stat if links else os.lstat)(path).st_mode
    except OSError:
        return 0


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        InputError: ``QC-CKPT-002`` the file is too large, is not one JSON object or has duplicate
            keys; ``QC-READ-001`` it cannot be read.
    """
    try:
        with reading(path):
            if path.stat().st_size > _MAX_JSON:
                raise ValueError(f"larger than {_MAX_JSON} bytes")
            text = path.read_text(encoding="utf-8")
        value = strict_json.loads(text)
        if not isinstance(value, dict):
            raise ValueError(f"a JSON {type(value).__name__}")
    except (ValueError, RecursionError) as error:
        raise InputError(
            "QC-CKPT-002",
            "cannot be read as a JSON object",
            file=path,
            found=str(error),
            fix="restore the file that came with the weights",
        ) from None
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a model folder.

    Raises:
        InputError: ``QC-CKPT-001`` no folder or no config.json, ``-002`` invalid JSON or
            ``model_type``, ``-003`` an unsafe path.
    """
    if not folder.is_dir():
        raise InputError(
            "QC-CKPT-001", "is not a model folder", file=folder, fix="name a folder or a hub id"
        )
    refuse_dangling(folder / "config.json")
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise InputError(
            "QC-CKPT-001",
            "is an adapter, not a model",
            file=folder,
            expected="a Hugging Face model folder",
            fix=f"see what it holds with qcore adapter show {shlex.quote(str(folder))}, or name "
            "the base as the model and pass this folder as --adapter",
        )
    if not (folder / "config.json").exists():
        raise InputError(
            "QC-CKPT-001",
            "has no config.json",
            file=folder,
            expected="a Hugging Face model folder",
            fix="name the folder that holds config.json and the safetensors files",
        )
    config = read_json(safe_file(folder, "config.json"))
    if not isinstance(config.get("model_type"), str):
        raise InputError(
            "QC-CKPT-002",
            "is not a valid model type",
            file=folder / "config.json",
            field="model_type",
            found=repr(config.get("model_type")),
            expected="a string",
            fix="use the config.json that came with the weights",
        )
    return config


def read_index(folder: Folder) -> dict[str, Any] | None:
    """Read the index file; ``None`` if the folder has none.

    Raises:
        InputError: ``QC-CKPT-002`` invalid JSON or ``weight_map``, ``-003`` an unsafe path.
    """
    path = folder.where(INDEX)
    if not path.exists():
        return None
    index = read_json(safe_file(path.parent, INDEX))
    weight_map = index.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) for shard in weight_map.values())
    ):
        raise InputError(
            "QC-CKPT-002",
            "is not a mapping of tensor names to files",
            file=path,
            field="weight_map",
            fix="download the checkpoint again",
        )
    return index
