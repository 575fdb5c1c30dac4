"""Images and videos made for tests, and transformers' own processors to compare with.

The stock video class calls torchvision, which has no wheel for every build of torch. Here the class
runs unchanged on stand-ins for the four names that it takes from there, written after
torchvision's source: its resize hands bytes to ``interpolate`` as they are and leaves a picture of
the wanted size alone, its normalize subtracts and divides.
"""

from __future__ import annotations

import enum
import hashlib
import io
import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from qcore.api.media import Payload
from qcore.checkpoint.checkpoint import Checkpoint

Array = NDArray[np.uint8]
VISION = {"patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3}
FILES = ("preprocessor_config.json", "video_preprocessor_config.json")


def checkpoint(folder: Path, config: dict[str, Any] | None = None) -> Checkpoint:
    """A checkpoint whose folder has processor files and no weights."""
    names = tuple(sorted(path.name for path in folder.iterdir()))
    config = {"model_type": "qwen3_5", "vision_config": VISION} if config is None else config
    return Checkpoint(folder, str(folder), None, config, {}, (), None, names)


@dataclass(frozen=True)
class Held:
    """Where bytes of a row are read again."""

    data: bytes

    def read(self, sha256: str) -> bytes:
        assert sha256 == hashlib.sha256(self.data).hexdigest()
        return self.data


def payload(data: bytes, kind: str = "image", **options: Any) -> Payload:
    """What core found for a part that holds its bytes."""
    digest = hashlib.sha256(data).hexdigest()
    return Payload(kind=kind, sha256=digest, data=data, origin=Held(data), options=options)


def file_payload(path: Path, kind: str = "image", **options: Any) -> Payload:
    """What core found for a part that names a file."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Payload(kind=kind, sha256=digest, path=path, options=options)


def list_payload(files: Sequence[Path | bytes], **options: Any) -> Payload:
    """What core found for a video that is a list of frames."""
    frames = tuple(
        payload(one, "video") if isinstance(one, bytes) else file_payload(one, "video")
        for one in files
    )
    digest = hashlib.sha256("".join(one.sha256 for one in frames).encode()).hexdigest()
    return Payload(kind="video", sha256=digest, frames=frames, options=options)


def settings(shared: Path, kind: str) -> dict[str, Any]:
    """What the real processor file of a kind says, less the names of classes."""
    name = FILES[kind == "video"]
    content = json.loads((shared / "skus" / "processor" / name).read_text())
    return {key: value for key, value in content.items() if not key.endswith(("_class", "_type"))}


def stock_images(shared: Path, **changed: Any) -> Any:
    """transformers' image processor."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(**{**settings(shared, "image"), **changed})


def stock_videos(shared: Path, monkeypatch: pytest.MonkeyPatch, **changed: Any) -> Any:
    """transformers' video processor, unchanged, on stand-ins for torchvision."""
    from transformers import image_processing_backends, video_processing_utils
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    mode = enum.Enum("InterpolationMode", {"BICUBIC": "bicubic", "LANCZOS": "lanczos"})

    def resize(image: Any, size: Any, interpolation: Any, antialias: bool) -> Any:
        if tuple(image.shape[-2:]) == tuple(size):
            return image
        made = torch.nn.functional.interpolate(
            image.reshape(-1, *image.shape[-3:]),
            size=list(size),
            mode=interpolation.value,
            align_corners=False,
            antialias=antialias,
        )
        return made.reshape(*image.shape[:-2], *size)

    def normalize(image: Any, mean: Any, std: Any, inplace: bool = False) -> Any:
        mean, std = (torch.as_tensor(one, dtype=image.dtype).view(-1, 1, 1) for one in (mean, std))
        return (image.sub_(mean) if inplace else image.sub(mean)).div_(std)

    names = SimpleNamespace(
        InterpolationMode=mode, resize=resize, normalize=normalize, grayscale_to_rgb=lambda one: one
    )
    for module in (image_processing_backends, video_processing_utils):
        monkeypatch.setattr(module, "tvF", names, raising=False)
    monkeypatch.setattr(
        image_processing_backends, "pil_torch_interpolation_mapping", {3: mode["BICUBIC"]}
    )
    return Qwen3VLVideoProcessor(**{**settings(shared, "video"), **changed})


def picture(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth picture with noise, of any mode."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [127 + 90 * np.sin(rows / (5 + n) + columns / (9 - n) + n) for n in range(4)]
    noisy = np.stack(waves, -1) + rng.integers(-30, 31, (height, width, 4))
    pixels = noisy.clip(0, 255).astype(np.uint8)
    if mode in ("RGBA", "CMYK"):
        return Image.fromarray(pixels, mode)
    image = Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
    if mode == "LA":
        image = image.convert("L").convert("LA")
        image.putalpha(Image.fromarray(np.ascontiguousarray(pixels[..., 3])))
        return image
    return image if mode == "RGB" else image.convert(mode)


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    """The bytes of a file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    """One chunk of a PNG, its checksum right."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def bare_png(width: int, height: int, *, whole: bool = True) -> bytes:
    """A black PNG of one bit a pixel; without its pixels where it is not `whole`."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes(1 + (width + 7) // 8) * height, 1) if whole else b""
    body = chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + body


def frames(count: int, width: int, height: int, seed: int = 0) -> Array:
    """``[count, height, width, 3]``: a smooth picture that moves, with noise."""
    rng = np.random.default_rng(seed)
    times, rows, columns = np.mgrid[0:count, 0:height, 0:width]
    waves = [127 + 90 * np.sin(times / 3 + rows / (5 + n) + columns / (9 - n)) for n in range(3)]
    noisy = np.stack(waves, -1) + rng.integers(-20, 21, (count, height, width, 3))
    made: Array = noisy.clip(0, 255).astype(np.uint8)
    return made


def video(
    pixels: Array | Sequence[Array],
    rate: float | Fraction = 30,
    form: str = "matroska",
    codec: str = "ffv1",
    layout: str = "bgr0",
    times: Sequence[int] | None = None,
) -> bytes:
    """A file; of the usual codec and layout it gives back exactly the pixels.

    Args:
        pixels: ``[T, H, W, 3]``.
        rate: frames a second.
        form: FFmpeg's name of the container.
        codec: its name of the encoder.
        layout: pixel format.
        times: milliseconds at which the frames are shown, where the rate varies.
    """
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream: Any = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = *pixels[0].shape[:2], layout
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, one in enumerate(pixels):
            frame = av.VideoFrame.from_ndarray(one, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def sound() -> bytes:
    """An MP4 that holds a second of silence and nothing else."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def animated(count: int, form: str = "GIF", duration: int = 50) -> bytes:
    """An animated picture; every frame another noise."""
    images = [picture("RGB", 40, 30, seed) for seed in range(count)]
    return saved(
        images[0], form, save_all=True, append_images=images[1:], duration=duration, loop=0
    )
