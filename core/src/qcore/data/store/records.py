"""The bytes of one sample in a token store: tokens, the record of the index, media.

This file decides the format. A sample is its token ids (32 bit), followed by one bit a token that
is set where the token is trained; a label is the id of a trained token, else `IGNORED`. What only
samples with media have (where their bytes are, where they lie among the tokens) is in a file of
its own. Media are not stored: they are read again from where they came from.
`qcore.data.store.samples` reads what `qcore.data.store.write` writes.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...api.media import Payload, Placed
from ..rendering.masking import IGNORED, Example
from ..sources.row_bytes import RowBytes

FORMAT: Final = 1
_NUMBERS: Final = (
    "at", "more", "line",  # 64 bit
    "row", "sample", "tokens", "supervised", "turns", "reasoned", "variables", "media", "units",
    "more_bytes",
)  # fmt: skip
_LONG: Final = 3
#: A record of the index: byte offsets of a sample in both files, its counts, a checksum of its
#: bytes in both files, and two digests: `content_digest` and `label_digest`.
RECORD: Final = np.dtype(
    [(name, "<i8" if at < _LONG else "<i4") for at, name in enumerate(_NUMBERS)]
    + [("check", "<u4"), ("content", "u1", (16,)), ("digest", "u1", (32,))]
)
_PACK: Final = struct.Struct(f"<{_LONG}q{len(_NUMBERS) - _LONG}iI16s32s")


@dataclass(frozen=True, slots=True)
class Record:
    """A record of the index.

    Attributes:
        numbers: by name of a column of `RECORD`.
        check: CRC-32 of the sample's bytes.
        content: as `content_digest`.
        digest: as `label_digest`.
    """

    numbers: Mapping[str, int]
    check: int
    content: bytes
    digest: bytes

    @classmethod
    def unpack(cls, data: bytes) -> Record:
        """The record of these bytes."""
        *numbers, check, content, digest = _PACK.unpack(data)
        return cls(dict(zip(_NUMBERS, numbers, strict=True)), check, content, digest)


class PackedExample(NamedTuple):
    """A sample as it is stored: what a process that renders rows sends of it.

    Attributes:
        tokens: as `token_bytes`.
        media: as `media_bytes`.
        check: CRC-32 of both.
        content: as `content_digest`.
        digest: as `label_digest`.
        line: as `Example.line`.
        row: as `Example.row`.
        sample: as `Example.sample`.
        length: number of tokens.
        supervised: as `Example.supervised`.
        turns: as `Example.turns`.
        reasoned: as `Example.reasoned`.
        media_count: number of its media.
        units: rows of values that the tower computes for its media.
        variables: as `Example.variables`.
        payloads: as `Example.payloads`.
    """

    tokens: bytes
    media: bytes
    check: int
    content: bytes
    digest: bytes
    line: int
    row: int
    sample: int
    length: int
    supervised: int
    turns: int
    reasoned: int
    media_count: int
    units: int
    variables: str
    payloads: tuple[Payload, ...]

    @classmethod
    def of(cls, example: Example) -> PackedExample:
        """A sample in the form in which it is stored."""
        tokens, media = token_bytes(example), media_bytes(example)
        return cls(
            tokens=tokens,
            media=media,
            check=checksum(tokens, media),
            content=content_digest(example),
            digest=label_digest(tokens),
            line=example.line,
            row=example.row,
            sample=example.sample,
            length=example.length,
            supervised=example.supervised,
            turns=example.turns,
            reasoned=example.reasoned,
            media_count=len(example.media),
            units=sum(medium.units for medium in example.media),
            variables=example.variables,
            payloads=example.payloads,
        )

    def record(self, at: int, more: int, variables: int) -> bytes:
        """The record of the index.

        Args:
            at: offset of `tokens` in their file.
            more: offset of `media` in theirs.
            variables: code of the sample's variables.
        """
        return _PACK.pack(
            at, more, self.line, self.row, self.sample, self.length, self.supervised, self.turns,
            self.reasoned, variables, self.media_count, self.units, len(self.media),
            self.check, self.content, self.digest,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMedium:
    """What is known of a medium without reading it.

    Attributes:
        kind: kind of media.
        digest: of its bytes and of how they are processed.
        tokens: embeddings that the tower makes of it.
        units: rows of values that the tower computes.
        payload: where to read it again; ``None`` if that cannot be stored.
    """

    kind: str
    digest: str
    tokens: int
    units: int
    payload: Payload | None


def token_bytes(example: Example) -> bytes:
    """Ids and trained bits of a sample."""
    ids = np.frombuffer(example.ids, np.int32)
    labels = np.frombuffer(example.labels, np.int32)
    trained = labels != IGNORED
    assert np.array_equal(labels[trained], ids[trained]), "a label is the id of its token"
    return ids.tobytes() + np.packbits(trained).tobytes()


def token_size(tokens: int) -> int:
    """Bytes of a sample of so many tokens."""
    return 4 * tokens + (tokens + 7) // 8


def tokens_of(data: bytes, tokens: int) -> tuple[array[int], array[int]]:
    """Ids and labels of `token_bytes`."""
    ids = np.frombuffer(data, np.int32, tokens)
    bits = np.frombuffer(data, np.uint8, offset=4 * tokens)
    labels = np.where(np.unpackbits(bits, count=tokens), ids, np.int32(IGNORED))
    return array("i", ids.tobytes()), array("i", labels.astype(np.int32).tobytes())


def content_digest(example: Example) -> bytes:
    """The first 16 bytes of the SHA-256 of a sample's token ids and media."""
    digest = hashlib.sha256(example.ids)
    for medium in example.media:
        digest.update(f"{medium.kind}:{medium.digest}\n".encode())
    return digest.digest()[:16]


def label_digest(tokens: bytes) -> bytes:
    """SHA-256 of a sample's token ids and labels, as `token_bytes` has them."""
    return hashlib.sha256(tokens).digest()


def checksum(*parts: bytes) -> int:
    """CRC-32 of the bytes of a sample."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value


def media_bytes(example: Example) -> bytes:
    """Media of a sample and their positions; empty for text."""
    if not example.media:
        return b""
    placed = example.placed
    assert placed is not None, "media are placed"
    payloads: Sequence[Payload | None] = example.payloads or (None,) * len(example.media)
    head = {
        "media": [
            {
                "kind": medium.kind,
                "digest": medium.digest,
                "tokens": medium.tokens,
                "units": medium.units,
                "payload": payload_json(payload),
            }
            for medium, payload in zip(example.media, payloads, strict=True)
        ],
        "where": len(placed.where),
        "axes": len(placed.positions),
    }
    arrays = (placed.where, *placed.positions)
    return json.dumps(head).encode() + b"\n" + b"".join(one.tobytes() for one in arrays)


def media_of(data: bytes) -> tuple[list[StoredMedium], Placed]:
    """Media and positions of `media_bytes`."""
    text, _, rest = data.partition(b"\n")
    head = json.loads(text)
    media = [
        StoredMedium(
            kind=one["kind"], digest=one["digest"], tokens=one["tokens"], units=one["units"],
            payload=payload_of(one["payload"]),
        )
        for one in head["media"]
    ]  # fmt: skip
    values = array("i", rest)
    where, axes = head["where"], head["axes"]
    size = (len(values) - where) // axes if axes else 0
    starts = range(where, where + axes * size, size or 1)
    positions = tuple(values[start : start + size] for start in starts)
    return media, Placed(where=values[:where], positions=positions)


def payload_json(payload: Payload | None) -> dict[str, Any] | None:
    """A payload as JSON; ``None`` if it cannot be stored, because its bytes are not kept."""
    if payload is None or not payload.lasting:
        return None
    origin = payload.origin
    if origin is not None and not isinstance(origin, RowBytes):
        return None
    options = dict(payload.options)
    try:
        if json.loads(json.dumps(options)) != options:
            return None
    except (TypeError, ValueError):
        return None
    frames = [payload_json(frame) for frame in payload.frames]
    if None in frames:
        return None
    return {
        "kind": payload.kind,
        "sha256": payload.sha256,
        "path": None if payload.path is None else str(payload.path),
        "origin": None if origin is None else [str(origin.path), origin.line],
        "frames": frames,
        "options": options,
    }


def payload_of(value: Mapping[str, Any] | None) -> Payload | None:
    """The payload of `payload_json`."""
    if value is None:
        return None
    origin, frames = value["origin"], [payload_of(frame) for frame in value["frames"]]
    return Payload(
        kind=value["kind"],
        sha256=value["sha256"],
        path=None if value["path"] is None else Path(value["path"]),
        origin=None if origin is None else RowBytes(Path(origin[0]), origin[1]),
        frames=tuple(frame for frame in frames if frame is not None),
        options=value["options"],
    )


def joined_digest(digests: NDArray[np.uint8], starts: NDArray[np.bool_]) -> str:
    """Digest of samples in order and of their grouping into rows.

    The grouping is part of it because all samples of a row are trained one after the other.

    Args:
        digests: ``[samples, 32]``, `label_digest` of each.
        starts: whether each is the first one of its row.
    """
    lines = np.concatenate([digests, starts.astype(np.uint8)[:, None]], axis=1)
    return hashlib.sha256(np.ascontiguousarray(lines).data).hexdigest()
