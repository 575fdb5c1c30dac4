"""What a tower reads of a pack: bytes, and the numbers that the processors make of them.

This file decides how values travel: one byte each up to the device, where a table turns them into
exactly the float32 numbers that transformers' processors give. An image's numbers and a video's
may differ in the last bit, as the two processors do their arithmetic in another order; so a table
is of a kind, and every patch says which is its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qcore.api import Media


@dataclass(slots=True)
class PixelBatch(Media):
    """Media whose ``values`` ``[U, F]`` are uint8, laid out channel, frame, row, column.

    Attributes:
        table: ``[K, C, 256]`` float32, the number of each byte, by kind and channel.
        kinds: ``[U]`` uint8, the row of `table` for each patch.
    """

    table: Tensor = field(kw_only=True)
    kinds: Tensor = field(kw_only=True)

    def pixel_values(
        self, dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """The processors' numbers of patches `start` to `stop`, ``[stop - start, F]``.

        Args:
            dtype: a float32 number is rounded to it once.
            start: the first patch.
            stop: behind the last one; all that follow where it is ``None``.
        """
        values = self.values[start:stop]
        channels = values.view(len(values), self.table.shape[1], -1).unbind(1)
        table = self.table.to(dtype)
        several = len(table) > 1
        first = self.kinds[start:stop, None].int() * 256 if several else 0
        # Channel by channel: an index is four times as wide as a byte.
        return torch.cat(
            [
                table[:, number].flatten().index_select(0, (channel.int() + first).flatten())
                .view(channel.shape)
                for number, channel in enumerate(channels)
            ],
            1,
        )  # fmt: skip
