"""Where the media of a row lie among its tokens, and the position of every token on three axes.

This file decides what transformers' ``get_rope_index`` decides: text counts up on all axes at
once; a medium's embeddings have one position in time and those of their row and column in height
and width, all counted from where the text before them ended; the text behind them goes on after
the longer side. A frame of a video is placed like an image: its time is told by the text before
it. How positions turn into angles is the architecture's. It imports no torch.

- ``QC-VISION-052`` the runs of placeholders in the ids are not those of the media.
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
    """Positions of an expanded row's tokens, and which of them the tower's outputs replace.

    Arrays are filled by slices: a row of 65,536 tokens takes about ten milliseconds.

    Args:
        ids: token ids of an expanded text.
        media: of the row, in order.
        tokens: ids by token; those of the two placeholders are read.

    Returns:
        `Placed` with the axes time, height and width, arrays of C ints.

    Raises:
        RowError: ``QC-VISION-052`` the ids hold other runs of placeholders than the media have.
    """
    # No position is beyond its index, as a grid has no fewer cells than its longer side.
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
    """Start, rows and columns of every image and of every frame of a video."""
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
            # One more would join the next run, which transformers would take for one medium.
            if (count := ids[start:at].count(pad)) != size or pad in ids[at : at + 1]:
                run = f"{count} among {size}" if count < size else f"more than {size}"
                raise _run_error(number, medium, f"{run} from token {start}", size)
            yield start, (rows, columns)
    for kind, pad in ((kind, tokens[token]) for kind, token in PADS.items()):
        wanted = sum(medium.tokens for medium in media if medium.kind == kind)
        if (present := ids.count(pad)) != wanted:
            raise RowError(
                "QC-VISION-052",
                f"has other tokens of {kind} than its media need",
                found=present,
                expected=wanted,
                fix=_FIX,
            )


def _run_error(number: int, medium: ProcessedMedium, run: str, size: int) -> RowError:
    return RowError(
        "QC-VISION-052",
        f"has another run of tokens than medium {number + 1}, of kind {medium.kind}, needs",
        found=run,
        expected=f"{size} on end",
        fix=_FIX,
    )


_FIX = "use the tokenizer.json and chat template that came with the weights"
