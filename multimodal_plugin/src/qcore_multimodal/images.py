"""Image decoding with Pillow: which files are refused before decoding, and how modes convert.

This file decides which formats and color modes are supported. Transparency is composited on white,
where some versions of transformers drop it; EXIF orientation is applied, as transformers' loader
does. CMYK is converted to RGB by Pillow without color profiles, as in transformers; 16-bit color is
reduced to its upper 8 bits. 16-bit grayscale is refused: Pillow, and therefore transformers, would
clip every value above 255 to white. `MAX_PIXELS` bounds memory: about 1.5 GB for the largest image
with transparency, half of that without.

- ``QC-VISION-027`` an unsupported format.
- ``QC-VISION-028`` a damaged file: truncated, a wrong checksum, or any other decoder error.
- ``QC-VISION-029`` an animated image where a still image is expected.
- ``QC-VISION-030`` too many pixels or bytes, or a decompression bomb.
- ``QC-VISION-031`` an extreme aspect ratio.
- ``QC-VISION-032`` a color mode without a defined conversion to 8 bits.
"""

from __future__ import annotations

import io
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from qcore.api import RowError

MAX_PIXELS: Final = 89_478_485  # Pillow's default limit, which the process may have raised
MAX_BYTES = 1 << 28  #: of an image file, which is read into memory
MAX_ASPECT: Final = 200  # the processors' limit, checked before decoding
FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_MODES: Final = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")
_SIGNATURES: Final = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"BM": "BMP",
}
#: Exceptions that Pillow raises on malformed files: its format readers parse with struct, dicts and
#: indices, and let most of their exceptions through.
_DECODER_ERRORS: Final = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
    EOFError, MemoryError, RuntimeError, struct.error, zlib.error,
)  # fmt: skip


def read_bounded(file: BinaryIO, most: int | None = None) -> bytes:
    """All bytes of an image file.

    Args:
        file: the file.
        most: bytes that it may have; ``None`` for `MAX_BYTES`.

    Raises:
        RowError: ``QC-VISION-030`` the file is larger.
    """
    most = MAX_BYTES if most is None else most
    data = file.read(most + 1)
    if len(data) > most:
        raise RowError(
            "QC-VISION-030",
            "has too many bytes",
            found=f"more than {most}",
            expected=f"at most {most}",
            fix="save the image compressed or smaller",
        )
    return data


def decode(data: bytes) -> NDArray[np.uint8]:
    """Decode a still image to upright RGB ``[H, W, 3]``.

    Raises:
        RowError: ``QC-VISION-027`` to ``-032``.
    """
    with open_image(data) as image, _PIXELS.taken(image.width * image.height):
        _check_still(image)
        verify_checksums(image, data)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # without a copy if already upright
        return to_rgb(image)


@contextmanager
def open_image(data: bytes) -> Iterator[Image.Image]:
    """Open an image with a valid header; decoder errors inside the context become `RowError`.

    Raises:
        RowError: ``QC-VISION-027``, ``-028``, ``-030`` to ``-032``.
    """
    try:
        with _STRICT, Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(*image.size)
            _check_mode(image.mode)
            yield image
    except UnidentifiedImageError:
        raise _unknown(data) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(str(error)) from None
    except _DECODER_ERRORS as error:
        bomb = isinstance(error, ValueError) and "Decompressed data too large" in str(error)
        if bomb or "MAX_TEXT" in str(error):
            raise _too_large(str(error)) from None
        raise _damaged(error) from None


class _Strict:
    """Pillow's settings of the process while any thread decodes: strict, and without a word.

    They are those of the process, so the first thread sets them and the last one restores them.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._inside = 0
        self._restore = ExitStack()

    def __enter__(self) -> None:
        with self._guard:
            if not self._inside:
                self._restore.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                lenient = ImageFile.LOAD_TRUNCATED_IMAGES
                self._restore.callback(setattr, ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
                ImageFile.LOAD_TRUNCATED_IMAGES = False
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._guard:
            self._inside -= 1
            if not self._inside:
                self._restore.close()


class _Pixels:
    """Bounds the pixels that all threads decode at once: they take the memory of one image."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken = 0

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Wait until `count` pixels are free, and take them."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + count <= MAX_PIXELS)
            self._taken += count
        try:
            yield
        finally:
            with self._changed:
                self._taken -= count
                self._changed.notify_all()


_STRICT: Final = _Strict()
_PIXELS: Final = _Pixels()


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """RGB pixels of an image ``[H, W, 3]``, transparency composited on white."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        white.alpha_composite(image)
        image = white
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def check_size(width: int, height: int) -> None:
    """Refuse a size before memory is allocated (``QC-VISION-028``, ``-030``, ``-031``)."""
    if min(width, height) < 1:
        raise RowError("QC-VISION-028", "has no pixels", found=f"{width} x {height}")
    if width * height > MAX_PIXELS:
        raise _too_large(f"{width} x {height} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise RowError(
            "QC-VISION-031",
            "has an extreme aspect ratio",
            found=f"{width} x {height} pixels",
            expected=f"the longer side at most {MAX_ASPECT} times the shorter",
            fix="crop the image",
        )


def verify_checksums(image: Image.Image, data: bytes) -> None:
    """Verify the checksums of a PNG, which decoding ignores."""
    if image.format == "PNG":
        with Image.open(io.BytesIO(data), formats=("PNG",)) as again:
            again.verify()


def _check_mode(mode: str) -> None:
    if mode in _MODES:
        return
    gray = mode.startswith(("I", "F"))
    raise RowError(
        "QC-VISION-032",
        "is grayscale with more than 8 bits" if gray else "has an unsupported color mode",
        found=f"mode {mode}",
        expected=f"one of {', '.join(_MODES)}",
        fix="scale the image to 8 bits and save it again" if gray else "save the image as RGB",
    )


def _check_still(image: Image.Image) -> None:
    # A JPEG with embedded previews (format MPO) is still an image.
    if image.format in ("PNG", "WEBP", "GIF") and getattr(image, "is_animated", False):
        raise RowError(
            "QC-VISION-029",
            "is animated",
            found=f"{image.format} with {getattr(image, 'n_frames', 2)} frames",
            expected="a still image",
            fix='use {"type": "video"} for it',
        )


def _unknown(data: bytes) -> RowError:
    named = next((name for start, name in _SIGNATURES.items() if data.startswith(start)), None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        named = "WEBP"
    if named is not None:
        return RowError(
            "QC-VISION-028",
            "is damaged",
            found=f"{named} with an unreadable header",
            fix="save the image again",
        )
    return RowError(
        "QC-VISION-027",
        "unsupported image format",
        found=f"{len(data)} bytes that start with {data[:8]!r}" if data else "no bytes",
        expected=", ".join(FORMATS),
        fix="convert the image to PNG",
    )


def _damaged(error: BaseException) -> RowError:
    return RowError(
        "QC-VISION-028",
        "is damaged",
        found=(str(error) or type(error).__name__)[:200],
        expected="an image that decodes to its end",
        fix="save the image again",
    )


def _too_large(size: str) -> RowError:
    # Pillow's message states its own limit, which differs from this one.
    pixels = re.search(r"\((\d+ pixels)\)", size)
    return RowError(
        "QC-VISION-030",
        "is too large to decode",
        found=size if pixels is None else pixels[1],
        expected=f"at most {MAX_PIXELS} pixels, and texts of at most 1 MiB",
        fix="scale the image down; the processor would too",
    )
