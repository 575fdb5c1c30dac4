"""`Reader`: reads the images and videos of rows once, caches their pixels, and builds batches.

This file decides when a file is decoded (once, while the rows are checked), the key of its cache
entry (a hash of its bytes, the processor's settings, the versions of the decoding and resizing
packages, and this file's layout), and what happens when an entry disappears during a run: the
values are processed again, which is reported once, because it costs the time that the cache should
save. They are read from their source: the file, whose digest must be the same, or the row of the
data file that holds the bytes. Several threads may read at once; equal bytes are decoded once.
`checked_bytes` reads payloads; `images` and `videos` decode bytes to pixels; `media_options` parses
the options of a part; `processor` computes patches.

- ``QC-VISION-043`` cached values disappeared, and the bytes of the row cannot be read again.
- ``QC-VISION-045`` the media in rows of a file without access by row exceed the cache.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

import numpy as np
import torch
from torch import Tensor

from qcore.api import RowError
from qcore.errors import InputError, UsageError

from .cache import SIZE_VARIABLE, Cache
from .checked_bytes import decoded_frames, decoded_image, open_payload, unchanged
from .media import KINDS, ProcessedMedium
from .media_batch import PixelBatch
from .media_options import KEYS, Limits, parse_limits
from .preview import PreviewCache, preview, video_preview
from .processor_files import load

if TYPE_CHECKING:
    from qcore.api import CheckpointView, Medium, Payload, Placed

    from .processor import Bytes, Grid, ImageProcessor, VideoProcessor
    from .video_decoder import Decoder

_TURNS: Final = 256
_LAYOUT: Final = 1  # version of the cache entries and of the decoding code


class Reader:
    """A `qcore.api.media.MediaReader` with the processors of one checkpoint.

    Args:
        checkpoint: provides the processor files.
        report: receives lines for the user.
        previews: keeps small copies of decoded images, whose values are then neither computed nor
            cached; ``None`` for a run.
    """

    kinds: Final = KINDS
    keys: Final = KEYS
    concurrent: Final = True

    def __init__(
        self,
        checkpoint: CheckpointView,
        report: Callable[[str], None],
        previews: PreviewCache | None = None,
    ) -> None:
        self._report = report
        self._previews = previews
        self._checkpoint = checkpoint
        self._tables: dict[str, Tensor] = {}
        self._bytes = 0  # size of all values that this process has read
        self._counted: set[bytes] = set()
        self._reported: set[str] = set()
        self._guard = threading.RLock()  # of what threads share: the processors and the counts
        # By digest: who waits for other bytes than its own waits briefly.
        self._turns = tuple(threading.Lock() for _ in range(_TURNS))

    def measuring(self, size: int) -> Reader:
        """See `qcore.api.media.MeasuringReader`."""
        return Reader(self._checkpoint, self._report, PreviewCache(size))

    # Created on first use: a text-only run reads no processor file and imports no transformers.

    @cached_property
    def _cache(self) -> Cache:
        return Cache.of_user()

    @cached_property
    def _decoder(self) -> Decoder:
        from .video_decoder import Decoder

        return Decoder()

    @cached_property
    def _images(self) -> ImageProcessor:
        from .processor import CLASSES, ImageProcessor

        return ImageProcessor("image", load(self._checkpoint, "image", CLASSES["image"]))

    @cached_property
    def _videos(self) -> VideoProcessor:
        from .processor import CLASSES, VideoProcessor

        return VideoProcessor("video", load(self._checkpoint, "video", CLASSES["video"]))

    @property
    def control(self) -> tuple[str, ...]:
        """Control tokens of images and videos."""
        from .placeholders import CONTROL

        return CONTROL

    def read(self, payload: Payload) -> ProcessedMedium:
        """Process an image or a video, or find it in the cache.

        Raises:
            RowError: ``QC-VISION-025`` to ``-039``.
            InputError: ``QC-VISION-020`` to ``-023``, on the first medium of a kind.
            UsageError: ``QC-VISION-040``, ``-041``, on the first medium; ``QC-VISION-045``.
            WriteError: the cache cannot be written.
        """
        with self._guard:  # makes the processors, the cache and the decoder on first use
            limits = self._limits(payload)
            digest = self._digest(payload, limits)
            cache, _ = self._cache, self._decoder
        with self._turns[int(digest[:8], 16) % _TURNS]:
            metadata = cache.metadata(digest)
            if metadata is None and self._previews is not None and payload.kind == "image":
                metadata = self._measured(payload, limits, self._previews)
            elif metadata is None:
                metadata, _ = self._process(payload, limits, digest)
        medium = ProcessedMedium(
            kind=payload.kind,
            digest=digest,
            grid=_grid(metadata["grid"]),
            merge=metadata["merge"],
            timestamps=tuple(metadata["seconds"]),
            source=payload.without_data(),
        )
        with self._guard:
            self._count(medium, payload)
        return medium

    def expand(self, text: str, media: Sequence[Medium]) -> str:
        """Repeat every placeholder of a rendered text once per embedding of its medium."""
        from .placeholders import expand

        return expand(text, cast("Sequence[ProcessedMedium]", media))

    def place(self, ids: Sequence[int], media: Sequence[Medium]) -> Placed:
        """Media tokens and position ids of an expanded text."""
        from .placeholders import configured_ids
        from .positions import place

        tokens = configured_ids(self._checkpoint.config)
        if not all(type(token) is int for token in tokens.values()):
            self._check_tokens()
        try:
            return place(
                ids, cast("Sequence[ProcessedMedium]", media), cast("dict[str, int]", tokens)
            )
        except RowError:
            self._check_tokens()  # config.json may be the cause instead of the row
            raise

    def _check_tokens(self) -> None:
        """Raises `InputError` ``QC-VISION-053`` if config.json and the tokenizer disagree."""
        from .placeholders import token_findings

        ids = self._checkpoint.load_tokenizer().get_vocab()
        for finding in token_findings(self._checkpoint.config, ids):
            raise InputError(
                finding.code, finding.what, file=self._checkpoint.path / str(finding.file),
                field=finding.field, found=finding.found, expected=finding.expected,
                fix=finding.fix,
            )  # fmt: skip

    def preview(self, payload: Payload, size: int) -> str:
        """A small copy of an image, or of a video's first frame, as a data URL."""
        if payload.kind == "image":
            kept = self._previews.get(payload.sha256, size) if self._previews else ""
            return kept or preview(payload, size)
        return video_preview(payload, size, self._decoder)

    def batch(self, media: Sequence[Medium], where: Tensor) -> PixelBatch:
        """Pixels of the patches of a pack, with the lookup tables of their values.

        Raises:
            InputError: ``QC-VISION-042``, ``-043``, or the decoding error of a changed file.
        """
        batch = cast("Sequence[ProcessedMedium]", media)
        names = sorted({medium.kind for medium in batch})
        units = sum(medium.units for medium in batch)
        sizes = self._processor(batch[0].kind)  # both kinds have the tower's patch size
        area, temporal = sizes.patch**2, sizes.temporal
        values = np.empty((units, 3, temporal, area), np.uint8)
        kinds = np.empty(units, np.uint8)
        start = 0
        for medium in batch:
            stop = start + medium.units
            # The single frame of an image fills both frames of a patch.
            values[start:stop] = self._values(medium).reshape(medium.units, 3, -1, area)
            kinds[start:stop] = names.index(medium.kind)
            start = stop
        return PixelBatch(
            values=torch.from_numpy(values.reshape(units, -1)),
            grids=tuple(medium.grid for medium in batch),
            where=where,
            table=torch.stack([self._table(name) for name in names]),
            kinds=torch.from_numpy(kinds),
        )

    def _table(self, kind: str) -> Tensor:
        if kind not in self._tables:
            self._tables[kind] = self._processor(kind).table()
        return self._tables[kind]

    def _processor(self, kind: str) -> ImageProcessor | VideoProcessor:
        return self._images if kind == "image" else self._videos

    def _limits(self, payload: Payload) -> Limits:
        if payload.kind == "image":
            return parse_limits("image", payload.options, self._images.bounds, None)
        max_frames = self._videos.max_frames or 0
        frames = (self._videos.temporal, max_frames)
        return parse_limits(
            "video", payload.options, self._videos.bounds, frames, listed=bool(payload.frames)
        )

    def _digest(self, payload: Payload, limits: Limits) -> str:
        """The cache key of a payload's values: a hash of everything they depend on."""
        video = payload.kind == "video"
        used = ("transformers", "pillow", "numpy", *(("torch", "av") if video else ()))
        return _sha256(
            {
                "layout": _LAYOUT,
                "kind": payload.kind,
                "sha256": payload.sha256,
                "processor": self._processor(payload.kind).settings,
                "limits": [limits.min_pixels, limits.max_pixels, limits.fps, limits.max_frames],
                "versions": {name: _version(name) for name in used},
            }
        )

    def _process(
        self, payload: Payload, limits: Limits, digest: str
    ) -> tuple[dict[str, Any], Bytes]:
        """Decode and process a payload, and cache its values."""
        from . import videos

        timestamps: tuple[float, ...] = ()
        if payload.kind == "video" and payload.frames:
            merge = self._videos.merge
            grid, timestamps, values = videos.process_frames(
                decoded_frames(payload), len(payload.frames), self._videos, limits
            )
        else:
            with open_payload(payload) as file:
                if payload.kind == "image":
                    merge = self._images.merge
                    grid, values = self._image(file, payload, limits)
                else:
                    merge = self._videos.merge
                    with unchanged(file, payload):
                        grid, timestamps, values = videos.process(
                            file, self._videos, limits, self._decoder
                        )
        metadata = {"grid": grid, "merge": merge, "seconds": timestamps}
        self._cache.put(digest, metadata, values)
        return metadata, values

    def _measured(self, payload: Payload, limits: Limits, previews: PreviewCache) -> dict[str, Any]:
        """Decode an image to check it, and compute its grid without its values."""
        with open_payload(payload) as file:
            picture = decoded_image(file, payload)
        height, width, _ = picture.shape
        with _aspect_ratio():
            grid = self._images.grid(height, width, limits)
        previews.put(payload.sha256, picture)
        return {"grid": grid, "merge": self._images.merge, "seconds": ()}

    def _image(self, file: BinaryIO, payload: Payload, limits: Limits) -> tuple[Grid, Bytes]:
        picture = decoded_image(file, payload)
        with _aspect_ratio():
            return self._images.patches(picture, limits)

    def _count(self, medium: ProcessedMedium, payload: Payload) -> None:
        """Compare the size of all values with the limit of the cache.

        Raises:
            UsageError: ``QC-VISION-045``.
        """
        digest = bytes.fromhex(medium.digest)
        if digest in self._counted:
            return
        self._counted.add(digest)
        sizes = self._processor(medium.kind)
        self._bytes += medium.units * 3 * sizes.patch**2 * (
            1 if medium.kind == "image" else sizes.temporal
        )  # fmt: skip
        if self._bytes <= self._cache.bound:
            return
        bound = f"{self._cache.bound / 1e9:g}"
        if not payload.lasting:
            raise UsageError(
                "QC-VISION-045",
                "the media of these rows exceed the cache and cannot be read again: the data file "
                "has no access by row",
                field=SIZE_VARIABLE, found=f"more than {bound} GB",
                fix=f"raise {SIZE_VARIABLE} above {bound}, or convert the file to JSON Lines "
                "without compression or to Parquet",
            )  # fmt: skip
        self._report_once(
            f"the media of these rows exceed the cache of {bound} GB and are decoded again in "
            f"every epoch, which is slow; raise {SIZE_VARIABLE} above {bound} to cache more"
        )

    def _values(self, medium: ProcessedMedium) -> Bytes:
        values = self._cache.values(medium.digest)
        if values is not None:
            return values
        payload = medium.source
        if payload is None or not payload.lasting:
            raise InputError(
                "QC-VISION-043", f"the cached values of a {medium.kind} are missing",
                file=self._cache.folder, found=f"no valid {medium.digest}.media",
                fix="start the command again, which reads the row again",
            )  # fmt: skip
        self._report_once(
            f"entries of the media cache {self._cache.folder} are missing or damaged: "
            "they are processed again"
        )
        try:
            return self._process(payload, self._limits(payload), medium.digest)[1]
        except RowError as error:
            raise InputError(
                error.code, error.what, file=payload.path, field=error.at or None,
                found=error.found, expected=error.expected, fix=error.fix,
            ) from None  # fmt: skip

    def _report_once(self, what: str) -> None:
        """Report a message once per run."""
        if what not in self._reported:
            self._reported.add(what)
            self._report(what)


@contextmanager
def _aspect_ratio() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise RowError(
            "QC-VISION-031", "the processor refuses the aspect ratio", found=str(error)
        ) from None


def _grid(numbers: Sequence[int]) -> Grid:
    times, rows, columns = numbers
    return times, rows, columns


def _sha256(content: object) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@cache  # called for every medium, and each lookup reads a file
def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
