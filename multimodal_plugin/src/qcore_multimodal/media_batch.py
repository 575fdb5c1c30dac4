"""`PixelBatch`: batch tensors of images and video for the vision tower.

This file decides how pixels travel: as one byte each up to the device, where a lookup table maps
them to exactly the float32 values of transformers' processors. The values of images and videos may
differ in the last bit, because the two processors order their arithmetic differently; so there is
one table per kind, and every patch carries the index of its kind.
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
        table: ``[K, C, 256]`` float32, the pixel value of each byte, per kind and channel.
        kinds: ``[U]`` uint8, index into `table` for each patch.
    """

    table: Tensor = field(kw_only=True)
    kinds: Tensor = field(kw_only=True)

    def pixel_values(
        self, dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Pixel values of patches `start` to `stop`, ``[stop - start, F]``.

        Args:
            dtype: result dtype; float32 values are rounded once.
            start: first patch.
            stop: end of the range, exclusive; ``None`` for all remaining patches.
        """
        values = self.values[start:stop]
        channels = values.view(len(values), self.table.shape[1], -1).unbind(1)
        table = self.table.to(dtype)
        several = len(table) > 1
        first = self.kinds[start:stop, None].int() * 256 if several else 0
        # Channel by channel: int32 indices take four times the memory of the bytes.
        return torch.cat(
            [
                table[:, number].flatten().index_select(0, (channel.int() + first).flatten())
                .view(channel.shape)
                for number, channel in enumerate(channels)
            ],
            1,
        )  # fmt: skip
