"""Media token indices of a row, and the position ids of all tokens on three rotary axes.

This file reproduces transformers' ``get_rope_index``: for text, all axes count up together; the
embeddings of an image or video share one position in time and have their row and column as height
and width, all offset by the end of the preceding text; the following text continues after the
longer side. A frame of a video is placed like an image: the text before it states its timestamp.
The architecture turns position ids into angles. It imports no torch.

- ``QC-VISION-052`` the placeholder runs in the token ids do not match the media.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence

from qcore.api import Placed, RowError

from .media import ProcessedMedium
from .placeholders import PADS


def place(
    ids: Sequence[int], media: Sequence[ProcessedMedium], tokens: Mapping[str, int]
) -> Placed:
    """Position ids of an expanded row, and the tokens whose embeddings the tower computes.

    Arrays are filled by slices: a row of 65,536 tokens takes about ten milliseconds.

    Args:
        ids: token ids of the expanded text.
        media: the row's media, in order.
        tokens: token to id; only the two placeholders are used.

    Returns:
        `Placed` with the axes time, height and width, as arrays of C ints.

    Raises:
        RowError: ``QC-VISION-052`` the placeholder runs do not match the media.
    """
    # A position never exceeds its token index: a grid has no fewer cells than its longer side.
    line = array("i", range(len(ids)))
    where = array("i")
    time, height, width = array("i"), array("i"), array("i")
    done = position = 0
    for start, (rows, columns) in _placeholder_runs(ids, media, tokens):
        size = rows * columns
        text = line[position : position + start - done]
        position += start - done
        where += line[start : start + size]
        time += text + line[position : position + 1] * size
        height += text
        for row in range(position, position + rows):
            height += line[row : row + 1] * columns
        width += text + line[position : position + columns] * rows
        done, position = start + size, position + max(rows, columns)
    rest = line[position : position + len(ids) - done]
    return Placed(where=where, positions=(time + rest, height + rest, width + rest))


def _placeholder_runs(
    ids: Sequence[int], media: Sequence[ProcessedMedium], tokens: Mapping[str, int]
) -> Iterator[tuple[int, tuple[int, int]]]:
    """First token, rows and columns of every image and of every frame of a video."""
    at = 0
    for number, medium in enumerate(media):
        pad = tokens[PADS[medium.kind]]
        frames, rows, columns = (
            medium.grid[0],
            medium.grid[1] // medium.merge,
            medium.grid[2] // medium.merge,
        )
        size = rows * columns
        for _ in range(frames):
            try:
                start = ids.index(pad, at)
            except ValueError:
                raise _run_error(number, medium, "none", size) from None
            at = start + size
            # A longer run would join the next run, which transformers would read as one medium.
            if (count := ids[start:at].count(pad)) != size or pad in ids[at : at + 1]:
                run = f"{count} among {size}" if count < size else f"more than {size}"
                raise _run_error(number, medium, f"{run} from token {start}", size)
            yield start, (rows, columns)
    for kind, pad in ((kind, tokens[token]) for kind, token in PADS.items()):
        wanted = sum(medium.tokens for medium in media if medium.kind == kind)
        if (present := ids.count(pad)) != wanted:
            raise RowError(
                "QC-VISION-052",
                f"has a different number of {kind} tokens than its media need",
                found=present,
                expected=wanted,
                fix=_FIX,
            )


def _run_error(number: int, medium: ProcessedMedium, run: str, size: int) -> RowError:
    return RowError(
        "QC-VISION-052",
        f"has the wrong number of placeholder tokens for medium {number + 1} ({medium.kind})",
        found=run,
        expected=f"{size} consecutive",
        fix=_FIX,
    )


_FIX = "use the tokenizer.json and chat template that came with the weights"
