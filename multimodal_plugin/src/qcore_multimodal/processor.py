"""The checkpoint's image and video processors, computed by transformers' classes.

This file decides how far transformers' code is used: all of its arithmetic, without torchvision.
Only two functions of torchvision are needed, a resize and a normalization, and each is a line or
two of torch. Pixels stay bytes: rescaling and normalization depend on one byte, so
`Processor.table` holds their result for all 256 values. `processor_files` validates the settings;
`images` and `videos` decode.

Shapes: U patches, C channels, T frames, P pixels along a patch's side.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from .media_options import Limits
from .processor_files import size_bounds

Bytes = NDArray[np.uint8]
Grid = tuple[int, int, int]


class _WithoutTorchvision(BaseVideoProcessor):  # type: ignore[misc]
    """Replaces the two torchvision functions of the base class by torch."""

    def resize(self, image: Tensor, size: Any, resample: Any = None, **_: Any) -> Tensor:
        """Bicubic resize of ``[..., C, H, W]`` bytes; torchvision calls the same kernel."""
        target = (size.height, size.width)
        if image.shape[-2:] == target:
            return image
        flat = image.reshape(-1, *image.shape[-3:])
        out = F.interpolate(flat, target, mode="bicubic", align_corners=False, antialias=True)
        return out.reshape(*image.shape[:-2], *target)

    def normalize(self, image: Tensor, mean: Any, std: Any, **_: Any) -> Tensor:
        """``(image - mean) / std`` per channel, in this order."""
        by_channel = [torch.as_tensor(x, dtype=image.dtype).view(-1, 1, 1) for x in (mean, std)]
        return image.sub(by_channel[0]).div_(by_channel[1])


class _Video(Qwen3VLVideoProcessor, _WithoutTorchvision):  # type: ignore[misc]
    """Qwen's video processor, whose ``super().resize`` is `_WithoutTorchvision.resize`."""


#: Kind to the class that is constructed with the settings of the processor file.
CLASSES: Mapping[str, Callable[..., Any]] = {"image": Qwen2VLImageProcessorPil, "video": _Video}


class Processor:
    """Common base of the image and the video processor.

    Attributes:
        kind: ``image`` or ``video``.
        patch: pixels along a patch's side.
        merge: patches along each side of the block that becomes one embedding.
        temporal: frames per patch.
        settings: all settings that the pixel values depend on; part of the cache key.
        bounds: minimum and maximum pixels.
        max_frames: maximum number of sampled frames of a video; ``None`` for images.
    """

    def __init__(self, kind: str, stock: Any) -> None:
        self.kind = kind
        self._stock = stock
        self.patch: int = stock.patch_size
        self.merge: int = stock.merge_size
        self.temporal: int = stock.temporal_patch_size
        self.settings: dict[str, Any] = {
            name: value
            for name, value in stock.to_dict().items()
            if not name.endswith(("_class", "_type"))
        }
        self.bounds: tuple[int, int] = size_bounds(stock.size)
        self.max_frames: int | None = stock.max_frames if kind == "video" else None

    def table(self) -> Tensor:
        """Pixel value of each byte per channel, ``[C, 256]`` float32."""
        stock = self._stock
        ramp = np.broadcast_to(np.arange(256, dtype=np.uint8), (len(stock.image_mean), 1, 256))
        if self.kind == "video":
            out: Tensor = stock.rescale_and_normalize(
                torch.from_numpy(ramp.copy()), True, stock.rescale_factor, True,
                tuple(stock.image_mean), tuple(stock.image_std),
            )  # fmt: skip
        else:
            scaled = stock.rescale(ramp, stock.rescale_factor)
            scaled = stock.normalize(scaled, stock.image_mean, stock.image_std)
            out = torch.from_numpy(np.ascontiguousarray(scaled))
        return out[:, 0]

    def _size(self, limits: Limits) -> Any:
        return SizeDict(shortest_edge=limits.min_pixels, longest_edge=limits.max_pixels)


class ImageProcessor(Processor):
    """The image processor."""

    def grid(self, height: int, width: int, limits: Limits) -> Grid:
        """The grid that `patches` makes of an image of a size, without its pixels.

        Raises:
            ValueError: the processor refuses the aspect ratio.
        """
        rows, columns = smart_resize(
            height,
            width,
            factor=self.patch * self.merge,
            min_pixels=limits.min_pixels,
            max_pixels=limits.max_pixels,
        )
        return 1, rows // self.patch, columns // self.patch

    def patches(self, picture: Bytes, limits: Limits) -> tuple[Grid, Bytes]:
        """Resize an RGB image ``[H, W, C]`` and split it into patches.

        Returns:
            The grid, and ``[U, C x P x P]``: one frame per patch, which the processor would
            repeat.

        Raises:
            ValueError: the processor refuses the aspect ratio.
        """
        stock = self._stock
        image = stock.resize(
            np.moveaxis(picture, -1, 0),
            size=self._size(limits),
            resample=stock.resample,
            factor=self.patch * self.merge,
        )
        flat, rows, columns = stock.patchify(
            image, patch_size=self.patch, merge_size=self.merge, temporal_patch_size=1
        )
        return (1, rows, columns), flat.astype(np.uint8)


class VideoProcessor(Processor):
    """The video processor."""

    @property
    def rate(self) -> float:
        """Frames per second at which videos are sampled by default."""
        return float(self._stock.fps)

    def sample(self, count: int, rate: float, limits: Limits) -> list[int]:
        """Indices of the sampled frames; `rate` is the video's frames per second."""
        stock = self._stock
        if limits.max_frames is not None:
            stock = copy.copy(stock)
            stock.max_frames = limits.max_frames
        metadata = VideoMetadata(total_num_frames=count, fps=rate)
        indices: list[int] = stock.sample_frames(
            metadata, num_frames=stock.num_frames, fps=limits.fps or stock.fps
        ).tolist()
        return indices

    def size(self, count: int, height: int, width: int, limits: Limits) -> tuple[int, int]:
        """Height and width of `count` frames after resizing.

        Raises:
            ValueError: the processor refuses the number of frames or the aspect ratio.
        """
        stock = self._stock
        # On the meta device only the shape is computed.
        sized = stock.resize(
            torch.empty(1, count, 1, height, width, dtype=torch.uint8, device="meta"),
            size=self._size(limits),
            resample=stock.resample,
            factor=self.patch * self.merge,
            temporal_factor=self.temporal,
            cap_pixels_per_frame=bool(stock.cap_pixels_per_frame),
        )
        return int(sized.shape[-2]), int(sized.shape[-1])

    def resize(self, frame: Bytes, size: tuple[int, int]) -> Tensor:
        """Resize one RGB frame: ``[H, W, C] -> [C, *size]``."""
        image = torch.from_numpy(np.ascontiguousarray(np.moveaxis(frame, -1, 0)))
        out: Tensor = _WithoutTorchvision.resize(
            self._stock, image, SizeDict(height=size[0], width=size[1])
        )
        return out

    def patches(self, frames: Tensor) -> tuple[Grid, Bytes]:
        """Split resized frames ``[T, C, H, W]`` into patches; an odd last frame is repeated.

        Returns:
            The grid, and ``[U, C x temporal x P x P]``.
        """
        flat, *grid = self._stock.patchify(
            frames[None],
            patch_size=self.patch,
            merge_size=self.merge,
            temporal_patch_size=self.temporal,
        )
        times, rows, columns = grid
        return (times, rows, columns), flat[0].numpy()

    def timestamps(self, indices: Sequence[int], rate: float) -> tuple[float, ...]:
        """Time of each temporal patch in seconds: the middle of its first and last frame."""
        step = self.temporal
        padded = [*indices, *[indices[-1]] * (-len(indices) % step)]
        times = [index / rate for index in padded]
        return tuple((times[i] + times[i + step - 1]) / 2 for i in range(0, len(times), step))
