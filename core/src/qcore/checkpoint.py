"""A model folder: config, template, tokenizer files, safetensors headers and index.

This file decides what a checkpoint is before any weight is read, and that nothing outside
the folder is ever opened: a shard or sidecar is one path component whose real path lies in
the folder, or in the ``blobs`` folder of the same hub cache entry. It needs no torch and
judges nothing: whether the tensors are the right ones is `locate`'s question.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .durable import reading
from .errors import InputError

if TYPE_CHECKING:
    from .data.render import Template

#: Bits per element by the dtype names of the safetensors format.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "F4": 4,
}  # fmt: skip

_MAX_JSON = 64 * 2**20
_MAX_HEADER = 100_000_000  # the limit of the safetensors format itself
_MAX_TENSORS = 1_000_000
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
#: Weights in formats that qcore neither reads nor writes.
_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True, slots=True)
class Header:
    """One tensor of a safetensors file; `start` and `end` are byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Checkpoint:
    """A model folder, opened once. Build with `Checkpoint.open`.

    Attributes:
        path: the folder.
        source: what the user named: a folder or a hub id.
        revision: commit that a hub id resolved to.
        config: config.json.
        headers: tensors by name on disk, over all shards.
        shards: safetensors files, in order of first use.
        index: the index file's content, or ``None`` for a single file.
        sidecars: every other regular file of the folder, by name.
        copies: files that hold the weights in another format; never read, never copied.
    """

    def __init__(
        self,
        path: Path,
        source: str,
        revision: str | None,
        config: dict[str, Any],
        headers: dict[str, Header],
        shards: tuple[str, ...],
        index: dict[str, Any] | None,
        sidecars: tuple[str, ...],
        copies: tuple[str, ...] = (),
    ) -> None:
        self.path = path
        self.source = source
        self.revision = revision
        self.config = config
        self.headers = headers
        self.shards = shards
        self.index = index
        self.sidecars = sidecars
        self.copies = copies

    @classmethod
    def open(
        cls, path: str | Path, *, source: str | None = None, revision: str | None = None
    ) -> Checkpoint:
        """Read config and headers of a model folder.

        Raises:
            InputError: ``QC-CKPT-001`` no folder or no config.json, ``-002`` JSON that does not
                parse, ``-003`` an unsafe path, ``-004`` no weights, ``-005`` a damaged
                safetensors file, ``-006`` index and shards disagree, ``-007`` pickled weights;
                ``QC-READ-001`` a file that cannot be read.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise InputError(
                "QC-CKPT-001", "is not a model folder", file=path, fix="name a folder or a hub id"
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
                "is not the name of a model type",
                file=folder / "config.json",
                field="model_type",
                found=repr(config.get("model_type")),
                expected="a string",
                fix="use the config.json that came with the weights",
            )
        with reading(folder):
            index, shards = _shards(folder)
        headers: dict[str, Header] = {}
        for shard in shards:
            for header in read_headers(safe_file(folder, shard)):
                if header.name in headers:
                    raise InputError(
                        "QC-CKPT-006",
                        "is in two shards",
                        file=folder / shard,
                        field=header.name,
                        found=f"{headers[header.name].file} and {shard}",
                        fix="download the checkpoint again",
                    )
                headers[header.name] = header
        if index is not None:
            _check_index(folder, index, headers)
        others = sorted(
            entry.name
            for entry in os.scandir(folder)
            if entry.is_file() and entry.name not in shards and entry.name != INDEX
        )
        _refuse_strays(folder, others)
        name = source if source is not None else str(path)
        return cls(
            folder,
            name,
            revision,
            config,
            headers,
            shards,
            index,
            sidecars=tuple(name for name in others if not name.endswith(_WEIGHTS)),
            copies=tuple(name for name in others if name.endswith(_WEIGHTS)),
        )

    def file(self, name: str) -> Path:
        """A file of the folder, proved to lie inside it. Raises ``QC-CKPT-003``."""
        return safe_file(self.path, name)

    @property
    def text_config(self) -> dict[str, Any]:
        """The section that holds the language model: ``text_config``, or config.json itself."""
        section = self.config.get("text_config")
        return section if isinstance(section, dict) else self.config

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json, or empty."""
        return self._optional_json("tokenizer_config.json")

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, or empty."""
        return self._optional_json("generation_config.json")

    def _optional_json(self, name: str) -> dict[str, Any]:
        return read_json(self.file(name)) if name in self.sidecars else {}

    @cached_property
    def template(self) -> Template | None:
        """The chat template: chat_template.jinja, else the one in tokenizer_config.json."""
        from .data.render import Template

        if "chat_template.jinja" in self.sidecars:
            path = self.file("chat_template.jinja")
            try:
                with reading(path):
                    return Template(path.read_text(encoding="utf-8"), str(path))
            except UnicodeDecodeError as error:
                raise InputError(
                    "QC-CKPT-002", "is not UTF-8", file=path, found=error.reason,
                    fix="use the template that came with the weights",
                ) from None  # fmt: skip
        for name in ("tokenizer_config.json", "chat_template.json"):
            text = self._optional_json(name).get("chat_template")
            if isinstance(text, str):
                return Template(text, str(self.path / name))
        return None

    def read(self, name: str) -> bytes:
        """The bytes of one tensor, little endian, row major."""
        header = self.headers[name]
        path = self.file(header.file)
        with reading(path), path.open("rb") as file:
            file.seek(header.start)
            data = file.read(header.end - header.start)
        if len(data) != header.end - header.start:
            raise _damaged(path, f"{len(data)} of {header.end - header.start} bytes", name)
        return data

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(header.end - header.start for header in self.headers.values())


def safe_file(folder: Path, name: str) -> Path:
    """`name` inside `folder`, refused unless its real path stays there.

    Raises:
        InputError: ``QC-CKPT-003`` for a separator, a drive, a NUL, a link out of the folder,
            or something that is no regular file.
    """
    path = folder / name
    plain = 0 < len(os.fsencode(name)) <= 255 and name not in (".", "..")
    if plain and not set(name) & set("/\\:\0"):
        real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
        # A hub cache keeps snapshots/<commit>/<file> as links into its own blobs/.
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
        inside = real.parent == home or (blobs is not None and real.parent == blobs)
        if inside and stat.S_ISREG(real.stat().st_mode if real.exists() else 0):
            return path
        if inside and not real.exists():
            raise InputError(
                "QC-CKPT-006",
                "is named but is not there",
                file=path,
                fix="download the checkpoint again",
            )
    raise InputError(
        "QC-CKPT-003",
        "leaves the model folder",
        file=folder,
        field=repr(name[:100]),
        expected="a plain file name of a file inside the folder",
        fix="do not use this checkpoint unless you know who wrote it",
    )


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key '{twice}' stands twice")
    return seen


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size, duplicate keys refused (``QC-CKPT-002``)."""
    try:
        with reading(path):
            if path.stat().st_size > _MAX_JSON:
                raise ValueError(f"larger than {_MAX_JSON} bytes")
            text = path.read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=_reject_duplicates)
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


def _shards(folder: Path) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """The index, when there is one, and the shards in order of first use."""
    if (folder / INDEX).exists():
        index = read_json(safe_file(folder, INDEX))
        weight_map = index.get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(shard, str) for shard in weight_map.values())
        ):
            raise InputError(
                "QC-CKPT-002",
                "is not a mapping of tensor names to files",
                file=folder / INDEX,
                field="weight_map",
                fix="download the checkpoint again",
            )
        return index, tuple(dict.fromkeys(weight_map.values()))
    if (folder / SINGLE).exists():
        return None, (SINGLE,)
    for name in sorted(entry.name for entry in os.scandir(folder)):
        if name.endswith((".bin", ".pt", ".pth", ".ckpt")):
            raise InputError(
                "QC-CKPT-007",
                "holds pickled weights, which qcore never opens",
                file=folder / name,
                expected="safetensors",
                fix="use the safetensors revision of this checkpoint",
            )
    raise InputError(
        "QC-CKPT-004",
        "has no weights",
        file=folder,
        expected=f"{SINGLE} or {INDEX}",
        fix="download the safetensors files",
    )


def _refuse_strays(folder: Path, others: list[str]) -> None:
    """Refuse safetensors that are no shard: a loader may prefer them to the index."""
    for name in others:
        if name.endswith(".safetensors"):
            raise InputError(
                "QC-CKPT-006",
                "is beside the checkpoint's own files, and some loaders would take it instead",
                file=folder / name,
                expected=f"only the files that {INDEX} names, or {SINGLE} alone",
                fix="delete it if it is left over, or move it to a folder of its own",
            )


def _damaged(path: Path, found: str, field: str | None = None) -> InputError:
    return InputError(
        "QC-CKPT-005",
        "is damaged",
        file=path,
        field=field,
        found=found,
        fix="download the file again",
    )


def read_headers(path: Path) -> Iterator[Header]:
    """The tensors of one safetensors file, checked against the file's length.

    Raises:
        InputError: ``QC-CKPT-005`` for a truncated file, overlapping or missing bytes,
            an unknown dtype, a size that is not that of the shape.
    """
    with reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _damaged(path, f"{size} bytes, less than a header")
        length = struct.unpack("<Q", prefix)[0]
        if length > min(size - 8, _MAX_HEADER):
            raise _damaged(path, f"a header of {length} bytes in a file of {size}")
        raw = file.read(length)
    try:
        entries = json.loads(raw, object_pairs_hook=_reject_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"a header that does not parse ({error})") from None
    if not isinstance(entries, dict) or len(entries) > _MAX_TENSORS:
        raise _damaged(path, "a header that is not a mapping of tensors")
    entries.pop("__metadata__", None)
    headers = [_header(path, name, entry, 8 + length) for name, entry in entries.items()]
    headers.sort(key=lambda header: (header.start, header.end))
    at = 8 + length
    for header in headers:
        if header.start != at:
            raise _damaged(path, "bytes that overlap or belong to no tensor", header.name)
        at = header.end
    if at != size:
        raise _damaged(path, f"{size} bytes where the header accounts for {at}")
    yield from headers


def _header(path: Path, name: str, entry: object, base: int) -> Header:
    if not isinstance(entry, Mapping):
        raise _damaged(path, "an entry that is not a tensor", name)
    dtype = entry.get("dtype")
    shape, offsets = _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _damaged(path, f"dtype {dtype!r}", name)
    if shape is None or offsets is None or len(offsets) != 2:
        found = f"shape {entry.get('shape')!r}, offsets {entry.get('data_offsets')!r}"
        raise _damaged(path, found, name)
    header = Header(name, dtype, shape, path.name, base + offsets[0], base + offsets[1])
    if (header.end - header.start) * 8 != header.numel * DTYPE_BITS[dtype]:
        raise _damaged(path, f"{header.end - header.start} bytes for {dtype} {shape}", name)
    return header


def _sizes(value: object) -> tuple[int, ...] | None:
    if isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value):
        return tuple(value)
    return None


def _check_index(folder: Path, index: dict[str, Any], headers: dict[str, Header]) -> None:
    weight_map: dict[str, str] = index["weight_map"]
    for name, shard in weight_map.items():
        found = headers.get(name)
        if found is None or found.file != shard:
            raise InputError(
                "QC-CKPT-006",
                "is not in the shard that the index names",
                file=folder / INDEX,
                field=name,
                found=found.file if found else "no shard has it",
                expected=shard,
                fix="download the checkpoint again",
            )
    for name, header in headers.items():
        if name not in weight_map:
            raise InputError(
                "QC-CKPT-006",
                "is in a shard but not in the index",
                file=folder / header.file,
                field=name,
                fix="download the checkpoint again",
            )
