"""`ContainedReader`: a media reader whose exceptions become errors of its plugin.

This file decides what a reader's methods may raise: `RowError` for a bad row, errors of qcore, and
`MemoryError` pass as they are, as does an interrupt; any other exception is the plugin's fault. The
function that makes the reader is contained by `qcore.plugins.manager`, like every function of a
record.

Codes: ``QC-PLUGIN-002`` the reader raised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

from ..api.media import RowError
from ..errors import Failure, PluginError, QcoreError, contained

if TYPE_CHECKING:
    from torch import Tensor

    from ..api.blocks import Media
    from ..api.media import MeasuringReader, MediaReader, Medium, Payload, Placed
    from ..plugins.manager import Owner

_T = TypeVar("_T")


class ContainedReader:
    """A `MediaReader` that calls a plugin's reader.

    Args:
        reader: the plugin's.
        owner: the plugin.

    Raises:
        PluginError: ``QC-PLUGIN-002``, in the constructor as in every method.
    """

    def __init__(self, reader: MediaReader, owner: Owner) -> None:
        self._reader = reader
        self._owner = owner
        self.kinds: tuple[str, ...] = self._call("kinds", lambda: tuple(reader.kinds))
        self.keys: tuple[str, ...] = self._call("keys", lambda: tuple(reader.keys))
        self.control: tuple[str, ...] = self._call("control", lambda: tuple(reader.control))
        self.concurrent: bool = self._call(
            "concurrent", lambda: getattr(reader, "concurrent", False) is True
        )

    def measuring(self, size: int) -> ContainedReader:
        """See `MeasuringReader.measuring`; this reader, if the plugin's has no such method."""

        def made() -> MediaReader | None:
            if not hasattr(self._reader, "measuring"):
                return None
            return cast("MeasuringReader", self._reader).measuring(size)

        reader = self._call("measuring", made)
        return self if reader is None else ContainedReader(reader, self._owner)

    def read(self, payload: Payload) -> Medium:
        """See `MediaReader.read`."""
        return self._call("read", partial(self._reader.read, payload))

    def expand(self, text: str, media: Sequence[Medium]) -> str:
        """See `MediaReader.expand`."""
        return self._call("expand", partial(self._reader.expand, text, media))

    def place(self, ids: Sequence[int], media: Sequence[Medium]) -> Placed:
        """See `MediaReader.place`."""
        return self._call("place", partial(self._reader.place, ids, media))

    def batch(self, media: Sequence[Medium], where: Tensor) -> Media:
        """See `MediaReader.batch`."""
        return self._call("batch", partial(self._reader.batch, media, where))

    def preview(self, payload: Payload, size: int) -> str:
        """See `MediaReader.preview`."""
        return self._call("preview", partial(self._reader.preview, payload, size))

    def _call(self, name: str, call: Callable[[], _T]) -> _T:
        result = contained(call)
        if not isinstance(result, Failure):
            return result
        if isinstance(result.error, RowError | QcoreError | MemoryError):
            raise result.error
        raise PluginError(
            "QC-PLUGIN-002",
            f"{self._owner.name} failed in MediaReader.{name}",
            found=result,
            fix=self._owner.remedy,
        ) from result.error
