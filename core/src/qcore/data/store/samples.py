"""Reading of a token store: `Samples`, a sequence whose samples are read when they are asked for.

This file decides that planning, the order of a run and its setup use columns of the index, and that
a sample is read alone, checked against its checksum. The index is memory-mapped. Tokens are read
with ``pread``, not mapped: mapped pages count as memory of the process until the system is short
of it, and a file that is cut while it is mapped would kill the process.

Code: ``QC-DATA-080`` the stored tokens of a row are damaged.
"""

from __future__ import annotations

import mmap
import os
import weakref
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from ...api.media import RowError
from ...errors import InputError, WriteError
from ...io.atomic import remove_tree
from ..rendering.masking import Example
from .records import (
    RECORD,
    Record,
    StoredMedium,
    checksum,
    joined_digest,
    media_of,
    token_size,
    tokens_of,
)

if TYPE_CHECKING:
    from ...api.media import MediaReader, Medium, Payload

Numbers = NDArray[np.int64]


class TokenStore:
    """An open store; it closes its files when it is garbage-collected.

    Args:
        tokens: descriptor of the file with the tokens; the store owns all three.
        index: of the index.
        media: of the file with the media.
        variables: the rows' own variables, by their codes in the index.
        reader: reads media.
        held: by number of a sample: payloads that the store does not have.
        folder: of a store that is kept; it is deleted when its tokens turn out to be damaged.
    """

    def __init__(
        self,
        tokens: int,
        index: int,
        media: int,
        variables: Sequence[str],
        *,
        reader: MediaReader | None = None,
        held: Mapping[int, tuple[Payload, ...]] | None = None,
        folder: Path | None = None,
    ) -> None:
        self._tokens, self._media = tokens, media
        self.variables = list(variables)
        self.folder = folder
        self._reader, self._held = reader, held or {}
        size = os.fstat(index).st_size
        self._map = mmap.mmap(index, size, prot=mmap.PROT_READ) if size else None
        os.close(index)
        for descriptor in (tokens, media):
            weakref.finalize(self, os.close, descriptor)
        self.count = size // RECORD.itemsize

    def column(self, name: str) -> NDArray[Any]:
        """A copy of a column of the index; the pages that it was read from are given back."""
        if self._map is None:
            return np.empty(0, RECORD)[name].copy()
        values = np.frombuffer(self._map, RECORD)[name].copy()
        self._map.madvise(mmap.MADV_DONTNEED)
        return values

    def samples(self) -> Samples:
        """All samples, in order."""
        return Samples(self, np.arange(self.count))

    def record(self, number: int) -> Record:
        """The record of a sample."""
        assert self._map is not None, "an empty store has no record"
        at = number * RECORD.itemsize
        return Record.unpack(self._map[at : at + RECORD.itemsize])

    def example(self, number: int) -> Example:
        """Read a sample.

        Raises:
            InputError: ``QC-DATA-080``; a medium changed since its row was read.
        """
        record = self.record(number)
        n = record.numbers
        tokens, media = self._bytes(record)
        ids, labels = tokens_of(tokens, n["tokens"])
        stored, placed = media_of(media) if media else ([], None)
        payloads = self._held.get(number) or tuple(
            one.payload for one in stored if one.payload is not None
        )
        return Example(
            ids=ids,
            labels=labels,
            line=n["line"],
            turns=n["turns"],
            supervised=n["supervised"],
            media=tuple(map(self._medium, stored, payloads)),
            placed=placed,
            row=n["row"],
            sample=n["sample"],
            reasoned=n["reasoned"],
            variables=self.variables[n["variables"]],
            payloads=payloads,
        )

    def media(self, number: int) -> list[StoredMedium]:
        """What is known of a sample's media without reading them."""
        record = self.record(number)
        return media_of(self._bytes(record)[1])[0] if record.numbers["media"] else []

    def _bytes(self, record: Record) -> tuple[bytes, bytes]:
        """The bytes of a sample in both files, checked."""
        n = record.numbers
        tokens = os.pread(self._tokens, token_size(n["tokens"]), n["at"])
        media = os.pread(self._media, n["more_bytes"], n["more"]) if n["media"] else b""
        if checksum(tokens, media) != record.check:
            if self.folder is not None:
                with suppress(WriteError):
                    remove_tree(self.folder)
            raise InputError(
                "QC-DATA-080",
                "holds damaged tokens",
                file=self.folder,
                field=f"row {n['row']}, sample {n['sample']}",
                fix="run the command again, with --resume if there is a checkpoint: the rows are "
                "rendered again",
            )
        return tokens, media

    def _medium(self, stored: StoredMedium, payload: Payload) -> Medium:
        """Read a medium again; its values are usually in the reader's cache."""
        assert self._reader is not None, "rows with media come from a reader"
        try:
            medium = self._reader.read(payload)
        except RowError as bad:
            raise InputError(
                bad.code, bad.what, file=payload.path, field=bad.at or None,
                found=bad.found, expected=bad.expected, fix=bad.fix,
            ) from None  # fmt: skip
        if medium.digest != stored.digest:
            raise InputError(
                "QC-MEDIA-008",
                "changed after its row was read",
                file=payload.path,
                found=f"digest {medium.digest[:12]}",
                expected=stored.digest[:12],
                fix="do not modify media files during a run",
            )
        return medium


class Samples(Sequence[Example]):
    """Samples of a store, in order; all samples of a row follow each other.

    Args:
        store: the store.
        numbers: their numbers in it.
    """

    def __init__(self, store: TokenStore, numbers: Numbers) -> None:
        self.store = store
        self._numbers = numbers
        self._whole = np.array_equal(numbers, np.arange(store.count))
        self._lengths: array[int] | None = None
        self._units: array[int] | None = None
        self._sizes: tuple[int, ...] | None = None

    def column(self, name: str) -> NDArray[Any]:
        """A copy of a column of the index, for these samples."""
        values = self.store.column(name)
        return values if self._whole else values[self._numbers]

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each sample."""
        if self._lengths is None:
            self._lengths = _ints(self.column("tokens"))
        return self._lengths

    @property
    def units(self) -> Sequence[int]:
        """Media units of each sample; empty if no sample has media."""
        if self._units is None:
            units = self.column("units")
            self._units = _ints(units) if units.any() else array("i")
        return self._units

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each row."""
        if self._sizes is None:
            starts = np.flatnonzero(self.starts())
            self._sizes = tuple(np.diff(np.append(starts, len(self))).tolist())
        return self._sizes

    def starts(self) -> NDArray[np.bool_]:
        """Whether each sample is the first one of its row.

        A sample without the number of a row is a row of its own.
        """
        rows = self.column("row")
        before = np.roll(rows, 1)
        before[:1] = -1
        starts: NDArray[np.bool_] = (rows != before) | (rows == 0)
        return starts

    def digest(self) -> str:
        """Hex digest of tokens, labels and the grouping into rows, in order."""
        return joined_digest(self.column("digest"), self.starts())

    def with_media(self) -> Iterator[tuple[int, list[StoredMedium]]]:
        """Number and media of each row with media, of the sample that has all of them."""
        counts = self.column("media")
        if not counts.any():
            return
        chosen = np.flatnonzero(counts)
        rows = zip(self.column("row")[chosen].tolist(), self._numbers[chosen].tolist(), strict=True)
        for row, samples in groupby(rows, lambda pair: pair[0]):
            numbers = [number for _, number in samples]
            yield row, max(map(self.store.media, numbers), key=len)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> Samples: ...
    def __getitem__(self, at: int | slice) -> Example | Samples:
        if isinstance(at, slice):
            return Samples(self.store, self._numbers[at])
        return self.store.example(int(self._numbers[at]))

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Example]:
        return map(self.store.example, map(int, self._numbers))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Samples | tuple | list):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as a list


def _ints(values: NDArray[Any]) -> array[int]:
    return array("i", np.ascontiguousarray(values, np.int32).tobytes())
