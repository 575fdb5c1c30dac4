"""The safetensors files of an adapter: ``adapter_model.safetensors``, or numbered shards.

PEFT writes one file. Some exporters write ``adapter_model-00001-of-00003.safetensors`` and an index
(``adapter_model.safetensors.index.json``), as transformers does for models. This file decides which
files hold the tensors, and that shards are complete, disjoint and as their index says. Where the
one file of PEFT is present, only that is read, as PEFT does. It reads headers and imports no torch.

Codes: ``QC-ADAPTER-003`` a shard is missing; ``QC-CKPT-006`` shards and index contradict each
other; ``-003`` an unsafe path.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Final

from ..checkpoint.checkpoint import Header, read_headers, read_json, safe_file
from ..errors import InputError
from ..io.atomic import CHUNK, reading
from .peft_names import WEIGHTS

INDEX: Final = "adapter_model.safetensors.index.json"
_SHARD: Final = re.compile(r"adapter_model-(\d{1,6})-of-(\d{1,6})\.safetensors")
_MOST: Final = 10_000  # shards


def shards(names: Collection[str]) -> list[str]:
    """Return the names of the shards among the names of files, in their order."""
    return sorted(name for name in names if _SHARD.fullmatch(name))


def missing_shards(names: Collection[str]) -> list[str]:
    """Return the shards that are missing, by the numbers in the names of the others.

    Args:
        names: names of the files in the folder.
    """
    have = [match for name in shards(names) if (match := _SHARD.fullmatch(name))]
    wanted: set[str] = set()
    for match in have:
        digits, last = len(match[2]), int(match[2])
        if last <= _MOST:
            wanted |= {
                f"adapter_model-{n:0{digits}}-of-{match[2]}.safetensors" for n in range(1, last + 1)
            }
    return sorted(wanted - {*names})


def has_weights(folder: Path) -> bool:
    """Whether a folder has the file of PEFT, or a shard."""
    return (folder / WEIGHTS).is_file() or any(
        _SHARD.fullmatch(path.name) for path in folder.glob("adapter_model-*.safetensors")
    )


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the tensors of an adapter.

    Raises:
        InputError: ``QC-ADAPTER-003`` a shard is missing; ``QC-CKPT-003``, ``-006``.
    """
    if (folder / WEIGHTS).is_file() or not has_weights(folder):
        return [safe_file(folder, WEIGHTS)]
    names = {path.name for path in folder.iterdir()}
    if missing := missing_shards(names):
        raise InputError(
            "QC-ADAPTER-003",
            "lacks a file of its weights",
            file=folder,
            field=missing[0],
            found=f"{len(shards(names))} files, {len(missing)} missing",
            fix="download or copy the missing file from where the others came from",
        )
    return [safe_file(folder, name) for name in shards(names)]


def weights_place(folder: Path) -> Path:
    """Return where the tensors are, for errors: the file of PEFT, or the folder of the shards."""
    return folder / WEIGHTS if (folder / WEIGHTS).is_file() or not has_weights(folder) else folder


def adapter_headers(folder: Path) -> list[Header]:
    """Read the headers of all tensors of an adapter.

    Raises:
        InputError: as `weight_files`; ``QC-CKPT-005`` a file is damaged, ``-006`` a tensor is in
            two shards, or not where the index says.
    """
    files = weight_files(folder)
    headers: dict[str, Header] = {}
    for file in files:
        for header in read_headers(file):
            if header.name in headers:
                raise _contradiction(file, header.name, f"also in {headers[header.name].file}")
            headers[header.name] = header
    if files[0].name != WEIGHTS and (folder / INDEX).is_file():
        _check_index(folder, headers)
    return [*headers.values()]


def _check_index(folder: Path, headers: dict[str, Header]) -> None:
    path = safe_file(folder, INDEX)
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict):
        raise _contradiction(path, "weight_map", "no weight_map")
    for name in sorted(listed.keys() | headers.keys()):
        where = headers[name].file if name in headers else None
        if listed.get(name) != where:
            raise _contradiction(
                path, name, f"{where or 'no shard'}, and {listed.get(name)} in the index"
            )


def _contradiction(file: Path, name: str, found: str) -> InputError:
    return InputError(
        "QC-CKPT-006",
        "has a tensor that is not in one shard, as the index says",
        file=file,
        field=name,
        found=found,
        fix="download the adapter again",
    )


def weights_digest(folder: Path) -> str:
    """Return the SHA-256 of an adapter's tensors: of its file, or of its shards in their order."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        for chunk in _chunks(file):
            digest.update(chunk)
    return digest.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with reading(path), path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def join_command(files: Sequence[Path]) -> str:
    """Return the fix that joins shards into the one file that PEFT reads."""
    code = (
        "import sys, safetensors.torch as s; *f, out = sys.argv[1:]; "
        "s.save_file({k: v for p in f for k, v in s.load_file(p).items()}, out, {'format': 'pt'})"
    )
    names = [str(path) for path in (*files, files[0].parent / WEIGHTS)]
    return f'join them: python -c "{code}" {" ".join(map(shlex.quote, names))}'
