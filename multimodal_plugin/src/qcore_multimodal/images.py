"""Bytes to pixels by Pillow: what is refused before anything is decoded, and what is converted how.

This file decides which formats and colours are read. Transparency is laid on white, where some
versions of transformers drop it; EXIF orientation is applied, as its loader does. CMYK becomes RGB
by Pillow's rule, without colour profiles, as there too; 16 bits of a colour become their upper 8.
16-bit greyscale is refused: Pillow, and so transformers, would clip all above 255 to white. Memory
is bounded by `MAX_PIXELS`: some 1.5 GB for the largest image with transparency, half of it without.

- ``QC-VISION-027`` not a format that is read.
- ``QC-VISION-028`` damaged: truncated, a checksum that is wrong, whatever a decoder refuses.
- ``QC-VISION-029`` animated, where a still image is asked for.
- ``QC-VISION-030`` too many pixels, or a decompression bomb.
- ``QC-VISION-031`` one side too many times the other.
- ``QC-VISION-032`` a colour mode that has no agreed way to 8 bits.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from qcore.api import RowError

MAX_PIXELS: Final = 89_478_485  # Pillow's own limit, which a program may have lifted
MAX_BYTES = 1 << 28  #: of a picture's file, which is read whole
MAX_ASPECT: Final = 200  # the processors' rule, told before a decoder is asked
FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_MODES: Final = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")
_SIGNATURES: Final = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"BM": "BMP",
}
#: What Pillow's format readers raise on bytes that are not as their format says. They parse with
#: struct, dicts and indices, and let most of what these raise through.
_DECODER_ERRORS: Final = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
    EOFError, MemoryError, RuntimeError, struct.error, zlib.error,
)  # fmt: skip


def read_bounded(file: BinaryIO) -> bytes:
    """All bytes of a picture's file.

    Raises:
        RowError: ``QC-VISION-030`` more than a picture may have.
    """
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise RowError(
            "QC-VISION-030",
            "is a picture of too many bytes",
            found=f"more than {MAX_BYTES}",
            expected=f"at most {MAX_BYTES}",
            fix="save it with compression, or smaller",
        )
    return data


def decode(data: bytes) -> NDArray[np.uint8]:
    """A still image as RGB, upright, ``[H, W, 3]``.

    Raises:
        RowError: ``QC-VISION-027`` to ``-032``.
    """
    with open_image(data) as image:
        _check_still(image)
        verify_checksums(image, data)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # no copy of what stands upright
        return to_rgb(image)


@contextmanager
def open_image(data: bytes) -> Iterator[Image.Image]:
    """An image whose header was read and found good; whatever Pillow raises inside is told.

    Raises:
        RowError: as `decode`, less what only the pixels show.
    """
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
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
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Its pixels as ``[H, W, 3]``, transparency on white."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        white.alpha_composite(image)
        image = white
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def check_size(width: int, height: int) -> None:
    """Refuse a size before memory is taken for it (``QC-VISION-030``, ``-031``)."""
    if min(width, height) < 1:
        raise RowError("QC-VISION-028", "has no pixels", found=f"{width} x {height}")
    if width * height > MAX_PIXELS:
        raise _too_large(f"{width} x {height} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise RowError(
            "QC-VISION-031",
            "has sides too far apart for the processor",
            found=f"{width} x {height} pixels",
            expected=f"the longer at most {MAX_ASPECT} times the shorter",
            fix="crop it",
        )


def verify_checksums(image: Image.Image, data: bytes) -> None:
    """Have the checksums of a PNG compared: reading its pixels, of any frame, passes over them."""
    if image.format == "PNG":
        with Image.open(io.BytesIO(data), formats=("PNG",)) as again:
            again.verify()


def _check_mode(mode: str) -> None:
    if mode in _MODES:
        return
    gray = mode.startswith(("I", "F"))
    raise RowError(
        "QC-VISION-032",
        "is greyscale of more than 8 bits" if gray else "has colours that are not read",
        found=f"mode {mode}",
        expected=f"one of {', '.join(_MODES)}",
        fix="scale it to 8 bits and save it again" if gray else "save it as RGB",
    )


def _check_still(image: Image.Image) -> None:
    # A JPEG may carry previews of itself (format MPO): it is a still all the same.
    if image.format in ("PNG", "WEBP", "GIF") and getattr(image, "is_animated", False):
        raise RowError(
            "QC-VISION-029",
            "is animated",
            found=f"{image.format} of {getattr(image, 'n_frames', 2)} frames",
            expected="a still image",
            fix='give it as {"type": "video"}',
        )


def _unknown(data: bytes) -> RowError:
    named = next((name for start, name in _SIGNATURES.items() if data.startswith(start)), None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        named = "WEBP"
    if named is not None:
        return RowError(
            "QC-VISION-028",
            "is damaged",
            found=f"{named} whose header cannot be read",
            fix="save the image again",
        )
    return RowError(
        "QC-VISION-027",
        "is no image that is read",
        found=f"{len(data)} bytes that start with {data[:8]!r}" if data else "no bytes",
        expected=", ".join(FORMATS),
        fix="convert it to PNG",
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
    # Pillow's sentence names its own limit, which is not this one.
    pixels = re.search(r"\((\d+ pixels)\)", size)
    return RowError(
        "QC-VISION-030",
        "is too large to decode",
        found=size if pixels is None else pixels[1],
        expected=f"at most {MAX_PIXELS} pixels, and texts of at most 1 MiB",
        fix="scale it down; the processor would",
    )
