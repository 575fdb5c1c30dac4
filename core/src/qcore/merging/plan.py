"""The files that a merge will write, from headers alone: shards, index, configuration.

This file decides that a merged checkpoint is its base, file by file, and how a base in block FP8 or
in 4 bits is written in 16 bits: the same files without the scales, new headers and index, no
``quantization_config`` and none of the files that describe quantized weights. A file keeps the
order of the base, except that wider dtypes come first, as in files that safetensors writes: so
every value is aligned to its dtype. It reads no tensor and writes nothing.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..adapter.taken_tokenizer import TakenTokenizer
from ..checkpoint.block_scales import SECTION, is_fp8, scale_problem
from ..checkpoint.checkpoint import DTYPE_BITS, INDEX, Checkpoint, Header
from ..checkpoint.four_bit import FourBit
from ..checkpoint.json_text import without
from ..checkpoint.quantization_formats import SIDECARS, Quantization
from ..checkpoint.safetensors_header import PREFIX
from ..errors import InputError
from ..io.atomic import reading
from ..io.manifest import MANIFEST

CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class TensorPatch:
    """How one tensor of the result is made.

    Attributes:
        source: the tensor of the base.
        written: the tensor of the result; the same where nothing is decoded.
        scale: the base's block scales of it, when it is decoded from FP8.
        four_bit: the base's scales and state of it, when it is decoded from 4 bits.
        added: rows of the result that the base does not have; they are the last ones.
    """

    source: Header
    written: Header
    scale: Header | None = None
    four_bit: FourBit | None = None
    added: int = 0

    @property
    def decoded(self) -> bool:
        """Whether the values are decoded."""
        return self.scale is not None or self.four_bit is not None


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the result: its header's bytes, and its tensors in order."""

    head: bytes
    patches: tuple[TensorPatch, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """The result of a merge, before a tensor is read.

    Attributes:
        shards: its safetensors files by name.
        copied: other files that are the base's.
        texts: files that are written anew, by name.
        taken: files that come from another folder than the base's, by name.
        block: rows and columns that share a scale, when something is decoded.
    """

    shards: Mapping[str, Shard]
    copied: tuple[str, ...]
    texts: Mapping[str, str]
    taken: Mapping[str, Path] = field(default_factory=dict)
    block: tuple[int, int] | None = None

    def with_tokenizer(self, taken: TakenTokenizer) -> MergePlan:
        """Return the plan with tokenizer files of the adapter in place of the base's."""
        gone = {*taken.files, *taken.texts, *taken.dropped}
        return replace(
            self,
            copied=tuple(name for name in self.copied if name not in gone),
            texts={**self.texts, **taken.texts},
            taken=taken.files,
        )

    def patches(self) -> Iterator[TensorPatch]:
        """Every tensor of the result."""
        return (patch for shard in self.shards.values() for patch in shard.patches)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(patch.written.end - patch.written.start for patch in self.patches())

    @property
    def decoded(self) -> int:
        """Tensors that the base has quantized and the result in 16 bits."""
        return sum(patch.decoded for patch in self.patches())


def plan_merge(checkpoint: Checkpoint, quantized: Quantization | None = None) -> MergePlan:
    """What is written for a base.

    Args:
        checkpoint: the base.
        quantized: its quantized weights, to be decoded; ``None`` to write the base's own dtypes.

    Raises:
        InputError: ``QC-KEY-007`` for FP8 without scales that fit, ``QC-CKPT-005`` for a file
            that was cut since it was opened.
    """
    by_file: dict[str, list[Header]] = {shard: [] for shard in checkpoint.shards}
    for header in sorted(checkpoint.headers.values(), key=lambda header: header.start):
        by_file[header.file].append(header)
    others = [name for name in checkpoint.sidecars if name != MANIFEST]
    if quantized is None:
        shards = {
            file: Shard(_head(checkpoint, file, headers), tuple(TensorPatch(h, h) for h in headers))
            for file, headers in by_file.items()
        }
        index = (INDEX,) if checkpoint.index is not None else ()
        return MergePlan(shards=shards, copied=(*others, *index), texts={})
    scales = _checked(checkpoint, quantized)
    dropped = {header.name for header in scales.values()}
    dropped |= {other.name for one in quantized.four_bit.values() for other in one.companions}
    shards = {}
    for file, headers in by_file.items():
        kept = [header for header in headers if header.name not in dropped]
        if kept:  # a file of nothing but scales is not written: no index would name it
            metadata = metadata_of(_head(checkpoint, file, headers))
            shards[file] = laid_out(metadata, (_decoded(header, quantized) for header in kept))
    path = checkpoint.file(CONFIG)
    with reading(path):
        texts = {CONFIG: without(path.read_text(encoding="utf-8"), SECTION)}
    if checkpoint.index is not None:
        texts[INDEX] = index_text(checkpoint.index, shards)
    return MergePlan(
        shards=shards,
        copied=tuple(name for name in others if name not in (*SIDECARS, CONFIG)),
        texts=texts,
        block=quantized.block,
    )


def _checked(checkpoint: Checkpoint, quantized: Quantization) -> Mapping[str, Header]:
    """The scales by weight; those of carried tensors, which no table met, fit as well."""
    scales = {header.name for header in quantized.scales.values()}
    for name, header in checkpoint.headers.items():
        if is_fp8(header) and name not in scales:
            scale = quantized.scales.get(name)
            problem = scale_problem(header, scale, quantized.block or (1, 1), checkpoint.path)
            if problem is not None:
                raise problem
    return quantized.scales


def _head(checkpoint: Checkpoint, file: str, headers: list[Header]) -> bytes:
    """The bytes of a file before its first tensor."""
    path = checkpoint.file(file)
    with reading(path), path.open("rb") as source:
        size = headers[0].start if headers else path.stat().st_size
        head = source.read(size)
    if len(head) != size:
        raise InputError(
            "QC-CKPT-005",
            "is damaged",
            file=path,
            found=f"{len(head)} bytes",
            expected=size,
            fix="download the file again",
        )
    return head


def metadata_of(head: bytes) -> Any:
    """``__metadata__`` of a header that was parsed before."""
    return json.loads(head[PREFIX:]).get("__metadata__")


def _decoded(header: Header, quantized: Quantization) -> TensorPatch:
    """A tensor, decoded if it is quantized."""
    four_bit = quantized.four_bit.get(header.name)
    if four_bit is not None:
        written = replace(header, dtype=four_bit.dtype, shape=four_bit.shape)
        return TensorPatch(header, written, four_bit=four_bit)
    scale = quantized.scales.get(header.name)
    dtype = "BF16" if scale is not None else header.dtype
    return TensorPatch(header, replace(header, dtype=dtype), scale)


def laid_out(metadata: Any, patches: Iterable[TensorPatch]) -> Shard:
    """A file of these tensors, those of wider dtypes first.

    Args:
        metadata: ``__metadata__`` of the header.
        patches: its tensors; where they are written is decided here.
    """
    patches = sorted(patches, key=lambda patch: -DTYPE_BITS[patch.written.dtype])
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    placed, at = [], 0
    for patch in patches:
        header = patch.written
        end = at + header.numel * DTYPE_BITS[header.dtype] // 8
        entries[header.name] = {
            "dtype": header.dtype, "shape": list(header.shape), "data_offsets": [at, end],
        }  # fmt: skip
        placed.append((patch, at, end))
        at = end
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    base = PREFIX + len(raw)
    return Shard(
        struct.pack("<Q", len(raw)) + raw,
        tuple(
            replace(patch, written=replace(patch.written, start=base + at, end=base + end))
            for patch, at, end in placed
        ),
    )


def index_text(index: Mapping[str, Any], shards: Mapping[str, Shard]) -> str:
    """The base's index, of the tensors that are written.

    Args:
        index: the base's.
        shards: what is written, by name of the file.
    """
    files = {p.written.name: file for file, shard in shards.items() for p in shard.patches}
    written = [patch.written for shard in shards.values() for patch in shard.patches]
    metadata = index.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    metadata["total_size"] = sum(header.end - header.start for header in written)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(header.numel for header in written)
    weights = {name: files[name] for name in index["weight_map"] if name in files}
    weights |= {name: file for name, file in files.items() if name not in weights}
    return json.dumps({**index, "metadata": metadata, "weight_map": weights}, indent=2) + "\n"
