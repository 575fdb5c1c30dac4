"""Reading the media of rows: those of many rows at once, where the reader allows it.

This file decides how many are read at once, that the order of rows does not depend on it, and that
the template is proved to render media before the first is read. `qcore.data.media.files` finds the
bytes, the `MediaReader` of a plugin decodes them.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ...io.cores import available_cores
from ..media.files import Finder
from ..rows import ChatRow
from ..sources.row_bytes import row_bytes
from .text_reader import DeferredRow, TextReader

if TYPE_CHECKING:
    from ...api.media import MediaReader, Medium, Payload

_MOST: Final = 8  # images that are decoded at once; each takes up to hundreds of megabytes

Read = tuple["Medium", "Payload"]


@dataclass(frozen=True, slots=True)
class PendingRow:
    """A row whose media are being read.

    Attributes:
        row: the row.
        reads: return, or wait for, each of its media in order; they raise what reading raised.
    """

    row: ChatRow
    reads: tuple[Callable[[], Read], ...] = ()

    def media(self) -> tuple[Read, ...]:
        """All media of the row, and their payloads without the bytes of the row.

        Raises:
            RowError: of the first that cannot be read.
            QcoreError: as `MediaReader.read`.
        """
        return tuple(read() for read in self.reads)


class RowMedia:
    """Reads the media of rows; a context manager that ends its threads.

    Args:
        reader: of media; without it rows must be text only.
        prove: checks that the template renders media, so that text-only files do not need it.
        workers: as the setting ``dataset_num_proc``.
    """

    def __init__(
        self, reader: MediaReader | None, prove: Callable[[MediaReader], None], workers: int
    ) -> None:
        self._reader = reader
        self._prove = prove
        self._finders: dict[tuple[Path, Path | None], Finder] = {}
        self._proved = False
        self._count = thread_count(workers, reader)
        self._threads: ThreadPoolExecutor | None = None

    def close(self) -> None:
        """End the threads; what is waiting is not read."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
            self._threads = None

    def finder(self, folder: Path, media_root: Path | None) -> Finder:
        """What finds the media of the data files in a folder."""
        key = folder, media_root
        return self._finders.get(key) or self._finders.setdefault(key, Finder(*key))

    def start(self, row: ChatRow) -> PendingRow:
        """Begin to read the media of a row.

        Raises:
            DeferredRow: this process reads no media.
            InputError: of `prove`, on the first row with media.
        """
        reader = self._reader
        if reader is None or not row.media:
            return PendingRow(row)
        if isinstance(reader, TextReader):
            raise DeferredRow
        if not self._proved:
            self._prove(reader)
            self._proved = True
        assert row.path is not None, "rows are read from files"
        root = None if row.source is None else row.source.media_root
        finder = self.finder(row.path.parent, root)
        origin = row_bytes(row.path, row.line)
        return PendingRow(
            row,
            tuple(self._begun(partial(finder.read_payload, p, reader, origin)) for p in row.media),
        )

    def _begun(self, read: Callable[[], Read]) -> Callable[[], Read]:
        """The same call, begun in a thread if there are some."""
        if self._count == 1:
            return read
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._count, "media")
        future: Future[Read] = self._threads.submit(read)
        return future.result


def thread_count(workers: int, reader: MediaReader | None) -> int:
    """The number of media that are read at once.

    Args:
        workers: as the setting ``dataset_num_proc``.
        reader: of the media.
    """
    if not getattr(reader, "concurrent", False) or workers in (0, 1):
        return 1
    return min(_MOST, available_cores() if workers < 0 else workers)
