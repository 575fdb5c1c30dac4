"""Writing of a token store: samples are appended one by one, in constant memory.

This file decides what is counted while samples are written: the table of the rows' own variables,
and the files that media are read from. Where the files lie is decided by the caller:
`qcore.data.store.cache` publishes a store, `anonymous` needs no name.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from ...io.atomic import writing
from ..rendering.masking import Example
from .records import PackedExample, payload_json
from .samples import TokenStore

if TYPE_CHECKING:
    from ...api.media import MediaReader, Payload

_BUFFER: Final = 4 << 20  #: bytes that are written at once
TOKENS, INDEX, MEDIA = "tokens.bin", "index.bin", "media.bin"
FILES: Final = (TOKENS, INDEX, MEDIA)


class Sink(Protocol):
    """A file that is being written."""

    def write(self, data: bytearray, /) -> object:
        """Write all of it."""


class StoreWriter:
    """Appends samples to the three files of a store.

    Args:
        sinks: by name of `FILES`.

    Attributes:
        count: samples so far.
        variables: the rows' own variables as JSON; the first one is empty.
        paths: files that media were read from, with their digests.
        held: by number of a sample: payloads that cannot be stored.
    """

    def __init__(self, sinks: dict[str, Sink]) -> None:
        self._sinks = sinks
        self._buffers = {name: bytearray() for name in FILES}
        self._sizes = dict.fromkeys(FILES, 0)
        self._codes = {"": 0}
        self.count = 0
        self.paths: dict[Path, str] = {}
        self.held: dict[int, tuple[Payload, ...]] = {}

    @property
    def variables(self) -> list[str]:
        """The table of variables, by their codes in the index."""
        return list(self._codes)

    def extend(self, examples: Iterable[Example | PackedExample]) -> None:
        """Append samples."""
        for example in examples:
            self.add(example)

    def add(self, example: Example | PackedExample) -> None:
        """Append a sample."""
        one = example if isinstance(example, PackedExample) else PackedExample.of(example)
        if one.media_count:
            self._note(one.payloads)
        at, more = self._append(TOKENS, one.tokens), self._append(MEDIA, one.media)
        code = self._codes.setdefault(one.variables, len(self._codes))
        self._append(INDEX, one.record(at, more, code))
        self.count += 1

    def _note(self, payloads: tuple[Payload, ...]) -> None:
        if any(payload_json(payload) is None for payload in payloads):
            self.held[self.count] = payloads
        for payload in payloads:
            for one in payload.frames or (payload,):
                if one.path is not None:
                    self.paths[one.path] = one.sha256

    def _append(self, name: str, data: bytes) -> int:
        """Append bytes to a file; returns where they start."""
        at, buffer = self._sizes[name], self._buffers[name]
        self._sizes[name] += len(data)
        buffer += data
        if len(buffer) >= _BUFFER:
            self._flush(name)
        return at

    def _flush(self, name: str) -> None:
        self._sinks[name].write(self._buffers[name])
        self._buffers[name] = bytearray()

    def close(self) -> None:
        """Write what is left in the buffers."""
        for name in FILES:
            self._flush(name)


class _Anonymous:
    """A file without a name, whose errors name its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with writing(folder):
            self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115

    def write(self, data: bytearray, /) -> None:
        view = memoryview(data)
        with writing(self._folder):
            while view:
                view = view[self.file.write(view) :]


class AnonymousStore:
    """A store in files without names, which the system deletes at the end of the process.

    Args:
        folder: where the space is taken; by default the system's folder for temporary files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        self._files: dict[str, _Anonymous] = {}
        self._writer: StoreWriter | None = None

    @contextmanager
    def writer(self) -> Iterator[StoreWriter]:
        """Open the store for writing.

        Raises:
            WriteError: ``QC-WRITE-003`` to ``-006``.
        """
        with ExitStack() as stack:
            self._files = {name: _Anonymous(self._folder) for name in FILES}
            for one in self._files.values():
                stack.callback(one.file.close)
            self._writer = StoreWriter(dict(self._files))
            yield self._writer
            self._writer.close()
            stack.pop_all()

    def open(self, reader: MediaReader | None = None) -> TokenStore:
        """The store for reading; once, after `writer`."""
        assert self._writer is not None, "a store is written first"
        descriptors = {name: os.dup(one.file.fileno()) for name, one in self._files.items()}
        for one in self._files.values():
            one.file.close()
        return TokenStore(
            descriptors[TOKENS], descriptors[INDEX], descriptors[MEDIA],
            self._writer.variables, reader=reader, held=self._writer.held,
        )  # fmt: skip


def store_of(examples: Iterable[Example], reader: MediaReader | None = None) -> TokenStore:
    """An anonymous store of some samples."""
    store = AnonymousStore()
    with store.writer() as out:
        out.extend(examples)
    return store.open(reader)
