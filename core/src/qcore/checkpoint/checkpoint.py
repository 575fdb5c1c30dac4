"""A model folder: config, template, tokenizer files, safetensors headers and index.

This file decides what a checkpoint is before any weight is read. The safetensors files may
still be on a hub (`Weights`); then their headers are judged as those of files here are, and
no tensor can be read. It needs no torch and judges nothing else: which files may be opened is
`qcore.checkpoint.folder`'s business, what a sound header is
`qcore.checkpoint.safetensors_header`'s, whether the tensors are the right ones
`qcore.checkpoint.layout`'s.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import InputError
from ..io.atomic import reading
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
#: Weights in formats that qcore neither reads nor writes.
_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


class Weights(Protocol):
    """Where the safetensors files of a checkpoint are: in its folder, or still on a hub."""

    def names(self) -> Collection[str]:
        """Every file there."""

    def where(self, name: str) -> object:
        """A file, as an error names it."""

    def headers(self, shards: Sequence[str]) -> Iterable[list[Header]]:
        """The tensors of each of these files. Raises ``QC-CKPT-003``, ``-005``, ``-006``."""


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
        headers_only: whether the safetensors files are not here; then `file` refuses them.
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

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        source: str | None = None,
        revision: str | None = None,
        remote: Weights | None = None,
    ) -> Checkpoint:
        """Read config and headers of a model folder.

        Args:
            path: the folder.
            source: what the user named, where it is not the folder.
            revision: commit that a hub id resolved to.
            remote: where the safetensors files are, unless all of them are in the folder.

        Raises:
            InputError: ``QC-CKPT-001`` no folder or no config.json, ``-002`` JSON that does not
                parse, ``-003`` an unsafe path, ``-004`` no weights, ``-005`` a damaged
                safetensors file, ``-006`` index and shards disagree, ``-007`` pickled weights;
                ``QC-READ-001`` a file that cannot be read.
        """
        folder = Path(path)
        config = read_config(folder)
        here = Folder(folder)
        index = read_index(here)
        shards = (SINGLE,) if index is None else tuple(dict.fromkeys(index["weight_map"].values()))
        for shard in shards:
            check_name(folder, shard)
        weights = here if remote is None or here.names() >= {*shards} else remote
        if index is None and SINGLE not in weights.names():
            raise _no_weights(folder, weights)
        headers = _collect(weights, shards)
        if index is not None:
            _check_index(folder, index, headers, weights)
        _refuse_strays(weights, shards)
        others = sorted(here.names() - {INDEX, *shards})
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
            headers_only=weights is not here,
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
        """A file of the folder, proved to lie inside it.

        Raises:
            InputError: ``QC-CKPT-003`` an unsafe path, ``-006`` no such file, ``-009`` a
                safetensors file of which only the header was fetched.
        """
        if self.headers_only and name in self.shards:
            raise InputError(
                "QC-CKPT-009",
                "was not downloaded, only its header was read",
                file=self.source,
                field=name,
                fix="open the checkpoint with its weights",
            )
        return safe_file(self.path, name)

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

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object from a file of the folder; duplicate keys are refused.

        Raises:
            InputError: as `file`; ``QC-CKPT-002`` not one JSON object.
        """
        return read_json(self.file(name))

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer of tokenizer.json; reads the file at each call.

        Raises:
            InputError: ``QC-TOKENIZER-001``.
        """
        from .tokenizer import load_tokenizer

        return load_tokenizer(self)

    def close(self) -> None:
        """End the process that renders `template`, if one runs; another use starts it again."""
        template = vars(self).get("template")  # without reading the file for it
        if template is not None:
            template.close()

    @cached_property
    def template(self) -> Template | None:
        """The chat template: chat_template.jinja, else the one in tokenizer_config.json.

        The checkpoint owns it and ends its process in `close`; use `Template.reopen` for one
        to close yourself.
        """
        from .chat_template import Template

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

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(header.end - header.start for header in self.headers.values())


def required_template(checkpoint: Checkpoint) -> Template:
    """The chat template of a checkpoint that must have one.

    Raises:
        InputError: ``QC-PRE-001`` it has none.
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
    """Where config.json describes the text model: its text section, if any, then its top level."""
    text = config.get("text_config")
    return (text, config) if isinstance(text, Mapping) else (config,)


def _no_weights(folder: Path, weights: Weights) -> InputError:
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


def _collect(weights: Weights, shards: Sequence[str]) -> dict[str, Header]:
    """The tensors of all shards by name, each in one of them."""
    headers: dict[str, Header] = {}
    for shard, found in zip(shards, weights.headers(shards), strict=True):
        more = {header.name: header for header in found}
        if not headers.keys().isdisjoint(more):
            name = next(name for name in more if name in headers)
            raise InputError(
                "QC-CKPT-006",
                "is in two shards",
                file=weights.where(shard),
                field=name,
                found=f"{headers[name].file} and {shard}",
                fix="download the checkpoint again",
            )
        headers |= more
    return headers


def _refuse_strays(weights: Weights, shards: Sequence[str]) -> None:
    """Refuse safetensors that are no shard: a loader may prefer them to the index."""
    for name in sorted({*weights.names()} - {*shards}):
        if name.endswith(".safetensors"):
            raise InputError(
                "QC-CKPT-006",
                "is beside the checkpoint's own files, and some loaders would take it instead",
                file=weights.where(name),
                expected=f"only the files that {INDEX} names, or {SINGLE} alone",
                fix="delete it if it is left over, or move it to a folder of its own",
            )


def _check_index(
    folder: Path, index: dict[str, Any], headers: dict[str, Header], weights: Weights
) -> None:
    weight_map: dict[str, str] = index["weight_map"]
    if weight_map == {name: header.file for name, header in headers.items()}:
        return
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
                file=weights.where(header.file),
                field=name,
                fix="download the checkpoint again",
            )
