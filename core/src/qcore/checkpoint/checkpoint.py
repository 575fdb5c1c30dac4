"""`Checkpoint`: an opened model folder: config.json, tokenizer files, safetensors headers, index.

This file decides what makes a folder a checkpoint, before any weight is read. The safetensors
files may still be on the hub (`Weights`): their headers get the same checks, but no tensor can be
read. It does not import torch. `qcore.checkpoint.folder` decides which files may be opened,
`qcore.checkpoint.safetensors_header` which headers are valid, and `qcore.checkpoint.layout`
whether the tensors match the parameter table.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import InputError
from .folder import INDEX, Folder, check_name, read_config, read_index, read_json, safe_file
from .safetensors_header import DTYPE_BITS, Header, read_headers

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from .chat_template import Template

__all__ = [
    "DTYPE_BITS", "INDEX", "SINGLE", "Checkpoint", "Header", "Weights", "read_headers",
    "read_json", "required_template", "safe_file",
    "text_sections",
]  # fmt: skip

SINGLE = "model.safetensors"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
#: Suffixes of weight files that qcore neither reads nor writes.
_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


class Weights(Protocol):
    """The source of a checkpoint's safetensors files: its folder or the hub."""

    def names(self) -> Collection[str]:
        """Return the names of all files."""

    def where(self, name: str) -> object:
        """Return the location of a file, for errors."""

    def headers(self, shards: Sequence[str]) -> Iterable[list[Header]]:
        """Return the headers of each shard.

        Raises:
            InputError: ``QC-CKPT-003``, ``-005``, ``-006``.
        """


class Checkpoint:
    """A model folder, opened once. Build with `Checkpoint.open`.

    Attributes:
        path: the folder.
        source: the folder or hub id that the user passed.
        revision: commit that a hub id resolved to.
        config: content of config.json.
        headers: tensors of all shards, by name on disk.
        shards: names of the safetensors files, in order of first use.
        index: content of the index file; ``None`` for a single safetensors file.
        sidecars: names of all other regular files of the folder.
        copies: names of files with the weights in another format; never read, never copied.
        headers_only: whether the safetensors files were not downloaded; if so, `file` refuses
            them.
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
        headers_only: bool = False,
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
        self.headers_only = headers_only
        self._elsewhere: Mapping[str, Path] = {}

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        source: str | None = None,
        revision: str | None = None,
        remote: Weights | None = None,
    ) -> Checkpoint:
        """Read the config and the headers of a model folder.

        Args:
            path: the folder.
            source: the hub id that the user passed; defaults to `path`.
            revision: commit that a hub id resolved to.
            remote: source of the safetensors files, used if the folder lacks any of them.

        Raises:
            InputError: ``QC-CKPT-001`` no folder or no config.json, ``-002`` invalid JSON,
                ``-003`` an unsafe path, ``-004`` no weights, ``-005`` a damaged safetensors
                file, ``-006`` index and shards disagree, ``-007`` pickled weights;
                ``QC-READ-001`` a file cannot be read.
        """
        folder = Path(path)
        config = read_config(folder)
        local = Folder(folder)
        index = read_index(local)
        shards = (SINGLE,) if index is None else tuple(dict.fromkeys(index["weight_map"].values()))
        for shard in shards:
            check_name(folder, shard)
        weights = local if remote is None or local.names() >= {*shards} else remote
        if index is None and SINGLE not in weights.names():
            raise _no_weights(folder, weights)
        headers = _collect(weights, shards)
        if index is not None:
            _check_index(folder, index, headers, weights)
        _refuse_strays(weights, shards)
        others = sorted(local.names() - {INDEX, *shards})
        return cls(
            folder,
            source if source is not None else str(path),
            revision,
            config,
            headers,
            shards,
            index,
            sidecars=tuple(name for name in others if not name.endswith(_WEIGHTS)),
            copies=tuple(name for name in others if name.endswith(_WEIGHTS)),
            headers_only=weights is not local,
        )

    @classmethod
    def open_files(
        cls, path: str | Path, *, source: str | None = None, revision: str | None = None
    ) -> Checkpoint:
        """Read the config of a model folder; weights and their index may be absent or damaged.

        The checkpoint has no headers, and `file` refuses its weights.

        Args:
            path: the folder.
            source: what the user named, if it is not the folder.
            revision: commit that a hub id resolved to.

        Raises:
            InputError: ``QC-CKPT-001``, ``-002`` and ``QC-READ-001``, as `open`.
        """
        folder = Path(path)
        config = read_config(folder)
        names = sorted(Folder(folder).names())
        weights = tuple(name for name in names if name.endswith(".safetensors"))
        others = tuple(name for name in names if not name.endswith((".safetensors", INDEX)))
        return cls(
            folder,
            source if source is not None else str(path),
            revision,
            config,
            headers={},
            shards=weights,
            index=None,
            sidecars=tuple(name for name in others if not name.endswith(_WEIGHTS)),
            copies=tuple(name for name in others if name.endswith(_WEIGHTS)),
            headers_only=True,
        )

    def file(self, name: str) -> Path:
        """Return the path of a file, after checking that it lies inside the folder.

        Raises:
            InputError: ``QC-CKPT-003`` an unsafe path, ``-006`` no such file, ``-009`` a
                safetensors file of which only the header was downloaded.
        """
        if self.headers_only and name in self.shards:
            raise InputError(
                "QC-CKPT-009",
                "was not downloaded, only its header was read",
                file=self.source,
                field=name,
                fix="open the checkpoint with its weights",
            )
        return self._elsewhere.get(name) or safe_file(self.path, name)

    def with_files(
        self, files: Mapping[str, Path], dropped: Collection[str], template: Template | None
    ) -> Checkpoint:
        """Return the checkpoint of a run that reads some tokenizer files of another folder.

        Args:
            files: these files, by name.
            dropped: names of files that the run does not read.
            template: the chat template of the run.
        """
        other = copy(self)
        for name in ("tokenizer_config", "template"):  # read from the files before
            vars(other).pop(name, None)
        other._elsewhere = {**self._elsewhere, **files}
        other.sidecars = tuple(sorted({*self.sidecars, *files} - {*dropped}))
        other.template = template
        return other

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """Content of tokenizer_config.json; empty if there is no such file."""
        return self._optional_json("tokenizer_config.json")

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """Content of generation_config.json; empty if there is no such file."""
        return self._optional_json("generation_config.json")

    def _optional_json(self, name: str) -> dict[str, Any]:
        return read_json(self.file(name)) if name in self.sidecars else {}

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON object from a file of the folder. Duplicate keys are errors.

        Raises:
            InputError: as `file`; ``QC-CKPT-002`` the file is not a JSON object.
        """
        return read_json(self.file(name))

    def load_tokenizer(self) -> Tokenizer:
        """Load the tokenizer from tokenizer.json. Every call reads the file again.

        Raises:
            InputError: ``QC-TOKENIZER-001``.
        """
        from .tokenizer import load_tokenizer

        return load_tokenizer(self)

    def close(self) -> None:
        """End the process that renders `template`, if any. The next render starts it again."""
        template = vars(self).get("template")  # does not trigger the cached property
        if template is not None:
            template.close()

    @cached_property
    def template(self) -> Template | None:
        """The chat template, or ``None`` if the checkpoint has none.

        It is read from chat_template.jinja, then tokenizer_config.json, then chat_template.json.
        The checkpoint owns it and ends its process in `close`; `Template.reopen` returns a copy
        that the caller closes.
        """
        from .tokenizer_files import read_template

        return read_template(self)

    @property
    def total_bytes(self) -> int:
        """Size of all tensors on disk, in bytes."""
        return sum(header.end - header.start for header in self.headers.values())


def required_template(checkpoint: Checkpoint) -> Template:
    """Return the chat template of a checkpoint.

    Raises:
        InputError: ``QC-PRE-001`` the checkpoint has no chat template.
    """
    template = checkpoint.template
    if template is None:
        raise InputError(
            "QC-PRE-001",
            "has no chat template",
            file=checkpoint.path,
            expected="chat_template.jinja, or chat_template in tokenizer_config.json",
            fix="copy chat_template.jinja from the original checkpoint",
        )
    return template


def text_sections(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Return the sections that describe the text model: ``text_config``, if any, then the top."""
    text = config.get("text_config")
    return (text, config) if isinstance(text, Mapping) else (config,)


def _no_weights(folder: Path, weights: Weights) -> InputError:
    shards = sorted(name for name in weights.names() if _SHARD.fullmatch(name))
    if shards:
        return _no_index(folder, shards)
    for name in sorted(weights.names()):
        if name.endswith((".bin", ".pt", ".pth", ".ckpt")):
            return InputError(
                "QC-CKPT-007",
                "holds pickled weights, which qcore never opens",
                file=weights.where(name),
                expected="safetensors",
                fix="use the safetensors revision of this checkpoint",
            )
    return InputError(
        "QC-CKPT-004",
        "has no weights",
        file=folder,
        expected=f"{SINGLE} or {INDEX}",
        fix="download the safetensors files",
    )


def _no_index(folder: Path, shards: Sequence[str]) -> InputError:
    """Return the error for shards without their index; it names the shards that lack, too."""
    there, total = {int(name[6:11]) for name in shards}, int(shards[0][-17:-12])
    lacking = [f"{shards[0][:6]}{n:05d}{shards[0][11:]}" for n in range(1, total + 1)
               if n not in there]  # fmt: skip
    also = f", and {len(lacking)} of {total} shards are absent" if lacking else ""
    found = f"{len(there)} of {total} shards"
    return InputError(
        "QC-CKPT-004",
        f"has shards but no {INDEX}{also}",
        file=folder,
        found=f"{found}; first absent {lacking[0]}" if lacking else found,
        expected=INDEX,
        fix=f"download {' and '.join([INDEX, *lacking[:3]])}",
    )


def _collect(weights: Weights, shards: Sequence[str]) -> dict[str, Header]:
    """Return the headers of all shards by name; a tensor in two shards is an error."""
    headers: dict[str, Header] = {}
    for shard, shard_headers in zip(shards, weights.headers(shards), strict=True):
        by_name = {header.name: header for header in shard_headers}
        if not headers.keys().isdisjoint(by_name):
            name = next(name for name in by_name if name in headers)
            raise InputError(
                "QC-CKPT-006",
                "is in two shards",
                file=weights.where(shard),
                field=name,
                found=f"{headers[name].file} and {shard}",
                fix="download the checkpoint again",
            )
        headers |= by_name
    return headers


def _refuse_strays(weights: Weights, shards: Sequence[str]) -> None:
    """Refuse safetensors files that are not shards: some loaders prefer them to the index."""
    for name in sorted({*weights.names()} - {*shards}):
        if name.endswith(".safetensors"):
            raise InputError(
                "QC-CKPT-006",
                "is not one of the checkpoint's shards, but some loaders would load it instead",
                file=weights.where(name),
                expected=f"only the files that {INDEX} names, or {SINGLE} alone",
                fix="move it to another folder",
            )


def _check_index(
    folder: Path, index: dict[str, Any], headers: dict[str, Header], weights: Weights
) -> None:
    weight_map: dict[str, str] = index["weight_map"]
    if weight_map == {name: header.file for name, header in headers.items()}:
        return
    for name, shard in weight_map.items():
        header = headers.get(name)
        if header is None or header.file != shard:
            raise InputError(
                "QC-CKPT-006",
                "is not in the shard that the index names",
                file=folder / INDEX,
                field=name,
                found=header.file if header else "no shard has it",
                expected=shard,
                fix="download the checkpoint again",
            )
    for name, unlisted in headers.items():
        if name not in weight_map:
            raise InputError(
                "QC-CKPT-006",
                "is in a shard but not in the index",
                file=weights.where(unlisted.file),
                field=name,
                fix="download the checkpoint again",
            )
