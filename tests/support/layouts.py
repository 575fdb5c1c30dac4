"""Generated rows of tokens with media among them, as an expanded text gives them.

The ids are those of a vocabulary of 97, so that small models can read them. Nothing here computes
a position: that is what the tests compare.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcore_multimodal.media import ProcessedMedium

VOCAB = 97
TEXT = 93  #: ids below are text
START, END = 95, 96
TOKENS = {"<|image_pad|>": 93, "<|video_pad|>": 94}
PADS = {"image": 93, "video": 94}


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids and the media among them."""

    name: str
    ids: tuple[int, ...]
    media: tuple[ProcessedMedium, ...]

    @property
    def types(self) -> Tensor:
        """``[T]``: 0 of text, 1 of images, 2 of videos, as transformers' processor tells them."""
        ids = torch.tensor(self.ids)
        return (ids == PADS["image"]).int() + 2 * (ids == PADS["video"]).int()

    def grids(self, kind: str) -> Tensor | None:
        """``[media, 3]`` of a kind; ``None`` where the row has none, as the processor has it."""
        found = [seen.grid for seen in self.media if seen.kind == kind]
        return torch.tensor(found) if found else None


def image(rows: int, columns: int, merge: int = 2) -> ProcessedMedium:
    """An image of so many rows and columns of embeddings."""
    grid = (1, rows * merge, columns * merge)
    return ProcessedMedium(kind="image", digest=f"image{grid}", grid=grid, merge=merge)


def video(
    frames: int, rows: int, columns: int, merge: int = 2, fps: float = 2.0
) -> ProcessedMedium:
    """A video of so many frames (an odd number's last counts twice) at a rate."""
    times = [n / fps for n in range(frames)]
    times += times[-1:] * (frames % 2)
    seconds = tuple((a + b) / 2 for a, b in zip(times[::2], times[1::2], strict=True))
    grid = (len(seconds), rows * merge, columns * merge)
    return ProcessedMedium(
        kind="video", digest=f"video{grid}", grid=grid, merge=merge, timestamps=seconds
    )


def row(name: str, *parts: int | ProcessedMedium, seed: int = 0, bare: bool = False) -> Row:
    """A row of parts: numbers of text tokens, and media.

    Args:
        name: of the row.
        parts: in order.
        seed: of the text, and of the lengths of timestamps.
        bare: images without the tokens that stand around them.
    """
    draw = random.Random(seed)
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids += text(draw, part)
        elif part.kind == "image":
            pads = [PADS["image"]] * part.tokens
            ids += pads if bare else [START, *pads, END]
        else:
            ids.append(START)
            for _ in range(part.grid[0]):
                pads = [PADS["video"]] * (part.tokens // part.grid[0])
                ids += [*text(draw, draw.randint(4, 7)), START, *pads, END]
            ids.append(END)
    return Row(name, tuple(ids), tuple(part for part in parts if isinstance(part, ProcessedMedium)))


def text(draw: random.Random, tokens: int) -> list[int]:
    return [draw.randrange(TEXT) for _ in range(tokens)]


def rows(merge: int = 2) -> list[Row]:
    """Rows of every kind that there is, then generated ones: 72."""

    def pic(height: int, width: int) -> ProcessedMedium:
        return image(height, width, merge)

    def clip(frames: int, height: int, width: int) -> ProcessedMedium:
        return video(frames, height, width, merge)

    named = [
        row("a token", 1),
        row("text alone", 37),
        row("one embedding", 3, pic(1, 1), 4),
        row("wide", 5, pic(2, 7), 9),
        row("high", 5, pic(7, 2), 9),
        row("a line", 2, pic(1, 40), 2),
        row("a column", 2, pic(40, 1), 2),
        row("image first", pic(3, 4), 6),
        row("image last", 6, pic(4, 3)),
        row("image alone", pic(3, 3)),
        row("images touch", 2, pic(3, 5), pic(5, 3), pic(1, 1), 2),
        row("images of several sizes", 2, pic(8, 8), 3, pic(2, 9), 1, pic(6, 1), 4),
        row("no token around it", pic(3, 2), 5, pic(2, 3), bare=True),
        row("two frames", 4, clip(2, 3, 4), 4),
        row("one frame", 4, clip(1, 4, 3), 4),
        row("nine frames", 4, clip(9, 2, 3), 4),
        row("ten frames", 4, clip(10, 3, 2), 4),
        row("video first", clip(4, 2, 2), 4),
        row("video last", 4, clip(5, 2, 2)),
        row("video alone", clip(3, 1, 1)),
        row("videos touch", 1, clip(3, 2, 5), clip(6, 5, 2), 1),
        row("image after video", 1, clip(5, 2, 3), pic(4, 4), 1),
        row("video after image", 1, pic(4, 4), clip(5, 3, 2), 1),
        row("in turns", 1, pic(2, 2), 7, clip(3, 3, 3), 5, pic(1, 5), clip(2, 1, 2), 3, pic(6, 2)),
    ]
    return named + [generated(seed, merge) for seed in range(48)]


def generated(seed: int, merge: int = 2) -> Row:
    """Up to eight parts, none or many of them media."""
    draw = random.Random(1000 + seed)
    parts: list[int | ProcessedMedium] = []
    for _ in range(draw.randint(1, 8)):
        size = draw.randint(1, 9), draw.randint(1, 9)
        kind = draw.random()
        if kind < 0.4:
            parts.append(draw.randint(1, 30))
        elif kind < 0.75:
            parts.append(image(*size, merge))
        else:
            parts.append(video(draw.randint(1, 9), *size, merge))
    return row(f"generated {seed}", *parts, seed=seed)


def tensors(axes: Sequence[Sequence[int]]) -> Tensor:
    """``[axes, T]`` int64."""
    return torch.stack([torch.tensor(list(axis)) for axis in axes])
