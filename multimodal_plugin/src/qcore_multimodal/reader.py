"""Images and videos of rows, read once: what core asks of a modality's reader.

This file decides when something is decoded (once, while the rows are checked), what names its
values in the cache (its bytes, all numbers of the processor, the versions of what decodes and
resizes, and this file's layout of them), and what happens when they are gone in the middle of a
run: they are made again, which is said once, as it costs the time that the cache was to save. How
bytes become pixels is `images`' and `videos`', what is asked of the processor `options`' and
`processor`'s.

- ``QC-VISION-042`` a file is not what it was when core looked for it, or is gone.
- ``QC-VISION-043`` values are gone, and this process did not read the row that had the bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

import numpy as np
import torch
from torch import Tensor

from qcore.api import RowError
from qcore.errors import InputError

from .cache import BOUND, Cache
from .media import KINDS, Seen
from .media_batch import Pixels
from .media_options import KEYS, Limits, limits
from .payload_store import Origins
from .processor_files import load

if TYPE_CHECKING:
    from qcore.api import CheckpointView, Medium, Payload, Placed

    from .processor import Bytes, Grid, Images, Videos

_LAYOUT: Final = 1  # of what an entry of the cache holds, and of how pixels are made of bytes


class Reader:
    """Reads with the processors of one checkpoint (`qcore.api.media.MediaReader`)."""

    kinds: Final = KINDS
    keys: Final = KEYS

    def __init__(self, checkpoint: CheckpointView, tell: Callable[[str], None]) -> None:
        self._say = tell
        self._checkpoint = checkpoint
        self._tables: dict[str, Tensor] = {}
        self._bytes = 0  # of all values that this process read of
        self._told: set[str] = set()

    # Made when a row has one: a run of text reads no processor file and imports no transformers.

    @cached_property
    def _cache(self) -> Cache:
        return Cache.of_user()

    @cached_property
    def _origins(self) -> Origins:
        return Origins()

    @cached_property
    def _images(self) -> Images:
        from .processor import CLASSES, Images

        return Images("image", load(self._checkpoint, "image", CLASSES["image"]))

    @cached_property
    def _videos(self) -> Videos:
        from .processor import CLASSES, Videos

        return Videos("video", load(self._checkpoint, "video", CLASSES["video"]))

    @property
    def control(self) -> tuple[str, ...]:
        """Tokens that stand for media."""
        from .placeholders import CONTROL

        return CONTROL

    def read(self, payload: Payload) -> Seen:
        """Process an image or a video, or find it in the cache.

        Raises:
            RowError: ``QC-VISION-025`` to ``-039``.
            InputError: ``QC-VISION-020`` to ``-023``, when the first of a kind is read.
            UsageError: ``QC-VISION-040``, ``-041``, when the first of all is.
            WriteError: its values cannot be kept.
        """
        wanted = self._limits(payload)
        digest = self._digest(payload, wanted)
        about = self._cache.find(digest)
        if about is None:
            about, _ = self._make(payload, wanted, digest)
        seen = Seen(
            kind=payload.kind,
            digest=digest,
            grid=_grid(about["grid"]),
            merge=about["merge"],
            seconds=tuple(about["seconds"]),
        )
        self._remember(digest, payload, seen)
        return seen

    def expand(self, text: str, media: Sequence[Medium]) -> str:
        """A rendered text with every placeholder as long as its medium."""
        from .placeholders import expand

        return expand(text, cast("Sequence[Seen]", media))

    def place(self, ids: Sequence[int], media: Sequence[Medium]) -> Placed:
        """Where the media lie in the token ids of an expanded text."""
        from .placeholders import named_ids
        from .positions import place

        tokens = named_ids(self._checkpoint.config)
        if not all(type(token) is int for token in tokens.values()):
            self._check_tokens()
        try:
            return place(ids, cast("Sequence[Seen]", media), cast("dict[str, int]", tokens))
        except RowError:
            self._check_tokens()  # not the row's fault where config.json names other tokens
            raise

    def _check_tokens(self) -> None:
        """Raises `InputError`: ``QC-VISION-053``, which the guards tell of rows that are good."""
        from .placeholders import token_findings

        ids = self._checkpoint.load_tokenizer().get_vocab()
        for found in token_findings(self._checkpoint.config, ids):
            raise InputError(
                found.code, found.what, file=self._checkpoint.path / str(found.file),
                field=found.field, found=found.found, expected=found.expected, fix=found.fix,
            )  # fmt: skip

    def batch(self, media: Sequence[Medium], where: Tensor) -> Pixels:
        """Bytes of the patches of a pack, with the tables that make numbers of them.

        Raises:
            InputError: ``QC-VISION-042``, ``-043``, or what a changed file is refused for.
        """
        seen = cast("Sequence[Seen]", media)
        names = sorted({one.kind for one in seen})
        units = sum(one.units for one in seen)
        sizes = self._processor(seen[0].kind)  # both kinds have the tower's
        area, temporal = sizes.patch**2, sizes.temporal
        values = np.empty((units, 3, temporal, area), np.uint8)
        kinds = np.empty(units, np.uint8)
        start = 0
        for one in seen:
            stop = start + one.units
            # An image's one frame fills both of a patch.
            values[start:stop] = self._values(one).reshape(one.units, 3, -1, area)
            kinds[start:stop] = names.index(one.kind)
            start = stop
        return Pixels(
            values=torch.from_numpy(values.reshape(units, -1)),
            grids=tuple(one.grid for one in seen),
            where=where,
            table=torch.stack([self._table(name) for name in names]),
            kinds=torch.from_numpy(kinds),
        )

    def _table(self, kind: str) -> Tensor:
        if kind not in self._tables:
            self._tables[kind] = self._processor(kind).table()
        return self._tables[kind]

    def _processor(self, kind: str) -> Images | Videos:
        return self._images if kind == "image" else self._videos

    def _limits(self, payload: Payload) -> Limits:
        if payload.kind == "image":
            return limits("image", payload.options, self._images.bounds, None)
        most = self._videos.most_frames or 0
        frames = (self._videos.temporal, most)
        return limits("video", payload.options, self._videos.bounds, frames)

    def _digest(self, payload: Payload, wanted: Limits) -> str:
        """Names the values of a payload: equal exactly where they must be."""
        video = payload.kind == "video"
        used = ("transformers", "pillow", "numpy", *(("torch", "av") if video else ()))
        return _sha256(
            {
                "layout": _LAYOUT,
                "kind": payload.kind,
                "sha256": payload.sha256,
                "processor": self._processor(payload.kind).numbers,
                "limits": [wanted.least, wanted.most, wanted.fps, wanted.frames],
                "versions": {name: _version(name) for name in used},
            }
        )

    def _make(self, payload: Payload, wanted: Limits, digest: str) -> tuple[dict[str, Any], Bytes]:
        """Decode and process a payload, and keep its values."""
        from . import videos

        seconds: tuple[float, ...] = ()
        with _opened(payload) as file:
            if payload.kind == "image":
                merge = self._images.merge
                grid, values = self._image(file, payload, wanted)
            else:
                merge = self._videos.merge
                with _unchanged(file, payload):
                    grid, seconds, values = videos.process(file, self._videos, wanted)
        about = {"grid": grid, "merge": merge, "seconds": seconds}
        self._cache.put(digest, about, values)
        return about, values

    def _image(self, file: BinaryIO, payload: Payload, wanted: Limits) -> tuple[Grid, Bytes]:
        from . import images

        data = images.whole(file)
        _check_digest(payload, hashlib.sha256(data).hexdigest())
        picture = images.decode(data)
        try:
            return self._images.patches(picture, wanted)
        except ValueError as error:
            raise RowError(
                "QC-VISION-031", "is of a shape that the processor refuses", found=str(error)
            ) from None

    def _remember(self, digest: str, payload: Payload, seen: Seen) -> None:
        """Keep what values could be made again from."""
        if not self._origins.add(digest, payload):
            return
        sizes = self._processor(seen.kind)
        self._bytes += seen.units * 3 * sizes.patch**2 * (
            1 if seen.kind == "image" else sizes.temporal
        )  # fmt: skip
        if self._bytes > self._cache.bound:
            bound = f"{self._cache.bound / 1e9:g}"
            self._tell(
                f"media of these rows are more than {bound} GB: they are decoded again whenever "
                f"they are needed, which is slow; set {BOUND} above {bound} to keep more"
            )

    def _values(self, seen: Seen) -> Bytes:
        values = self._cache.values(seen.digest)
        if values is not None:
            return values
        payload = self._origins.find(seen.digest)
        if payload is None:
            raise InputError(
                "QC-VISION-043", f"values of a {seen.kind} are gone from the cache",
                file=self._cache.folder, found=f"no sound {seen.digest}.media",
                fix="start again, so that its row is read anew",
            )  # fmt: skip
        self._tell(
            f"values of media in {self._cache.folder} are gone or damaged: they are made again"
        )
        try:
            return self._make(payload, self._limits(payload), seen.digest)[1]
        except RowError as bad:
            raise InputError(
                bad.code, bad.what, file=payload.path, field=bad.at or None, found=bad.found,
                expected=bad.expected, fix=bad.fix,
            ) from None  # fmt: skip

    def _tell(self, what: str) -> None:
        """Once a run."""
        if what not in self._told:
            self._told.add(what)
            self._say(what)


@contextmanager
def _opened(payload: Payload) -> Iterator[BinaryIO]:
    """The bytes of a payload; core looked for them before."""
    try:
        with payload.open() as file:
            yield file
    except OSError as error:
        raise RowError(
            "QC-VISION-042", "cannot be read any more", found=error.strerror or str(error)
        ) from None


@contextmanager
def _unchanged(file: BinaryIO, payload: Payload) -> Iterator[None]:
    """Hold a file that is read piece by piece to the digest that names its values."""
    before = _stamp(file, payload)
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    _check_digest(payload, digest.hexdigest())
    file.seek(0)
    try:
        yield
    except RowError:
        _check_stamp(file, payload, before)  # what it is refused for may be half of two files
        raise
    _check_stamp(file, payload, before)


def _check_stamp(file: BinaryIO, payload: Payload, before: tuple[int, int]) -> None:
    if (after := _stamp(file, payload)) != before:
        raise _changed(
            f"{after[0]} bytes", f"{before[0]}, and no write while it is decoded"
        ) from None


def _stamp(file: BinaryIO, payload: Payload) -> tuple[int, int]:
    """Size and time of the last write; zeros for what the row holds itself."""
    if payload.path is None:
        return 0, 0
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _check_digest(payload: Payload, found: str) -> None:
    """Refuse bytes that are not those whose digest names the values."""
    if found != payload.sha256:
        raise _changed(found, f"sha256 {payload.sha256}")


def _changed(found: str, expected: str) -> RowError:
    return RowError(
        "QC-VISION-042", "is not what it was when its row was checked", found=found,
        expected=expected, fix="leave the files alone while a run reads them",
    )  # fmt: skip


def _grid(numbers: Sequence[int]) -> Grid:
    times, rows, columns = numbers
    return times, rows, columns


def _sha256(content: object) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@cache  # looked up for every medium, and a lookup reads a file
def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
