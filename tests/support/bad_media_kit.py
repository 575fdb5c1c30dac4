"""Data files with media for ``qcore train``, and parts that are as bad as they come."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from support.cli_kit import Ended, here
from support.media_kit import chunk, frames, picture, saved, video
from support.model_kit import snapshot

Make = Callable[[Path], Any]

PNG = saved(picture("RGB", 60, 50), "PNG")
QUESTION = {"type": "text", "text": "what is it?"}


def image(given: Any, **more: Any) -> dict[str, Any]:
    return {"type": "image", "image": given, **more}


def conversation(*parts: Any, answer: Any = "ok") -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": list(parts)},
            {"role": "assistant", "content": answer},
        ]
    }


GOOD = conversation(QUESTION, image("good.png"))


def train(capsys: Any, base: Path, data: Path, *rows: Any, flags: tuple[str, ...] = ()) -> Ended:
    """``qcore train`` on these rows, its output beside the data's folder."""
    path = data / "rows.jsonl"
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return here(
        capsys, "train", "--model", base, "--data", path, "--output", data.parent / "out",
        "--device", "cpu", *flags,
    )  # fmt: skip


def untouched(data: Path) -> list[str]:
    """Paths beside the data's folder and in it; of the cache only what is half written.

    The list of refused rows is meant to be written.
    """
    return [
        path for path in snapshot(data.parent)
        if not path.startswith(("cache", "out.run")) or path.endswith(".tmp")
    ]  # fmt: skip


def part(kind: str, content: bytes, name: str = "", **more: Any) -> Make:
    """A part whose file lies in the folder."""

    def make(folder: Path) -> dict[str, Any]:
        path = folder / (name or ("bad.png" if kind == "image" else "bad.mp4"))
        path.write_bytes(content)
        return {"type": kind, kind: path.name, **more}

    return make


def given(value: Any, kind: str = "image", **more: Any) -> Make:
    """A part of a value that needs no file."""
    return lambda folder: {"type": kind, kind: value, **more}


def url(content: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def sixteen(channels: int) -> bytes:
    """A PNG of 16 bits a channel; of three, Pillow has no mode to write it."""
    width, height = 64, 48
    head = struct.pack(">IIBBBBB", width, height, 16, 0 if channels == 1 else 2, 0, 0, 0)
    pixels = np.random.default_rng(0).integers(0, 65536, (height, width * channels)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def mp4(count: int = 12) -> bytes:
    return video(frames(count, 64, 48), 12, "mp4", "libx264", "yuv420p")


def stripe(content: bytes) -> bytes:
    return content[: len(content) // 2]
