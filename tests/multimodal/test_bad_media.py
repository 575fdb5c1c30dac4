"""Bad media: each refused in one line with its code, before memory is taken and without a trace."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin
from support.media_kit import (
    animated,
    bare_png,
    chunk,
    frames,
    payload,
    picture,
    saved,
    sound,
    video,
)  # fmt: skip
from support.tiers import fast

from qcore.api.media import Payload, RowError

Make = Callable[[], bytes]


def png(mode: str = "RGB", width: int = 60, height: int = 50) -> bytes:
    return saved(picture(mode, width, height), "PNG")


def mp4(count: int = 30) -> bytes:
    return video(frames(count, 64, 48), 30, "mp4", "libx264", "yuv420p")


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


def texts(*, zipped: bool) -> bytes:
    """A small PNG whose text grows to 80 MB."""
    info = PngImagePlugin.PngInfo()
    if zipped:
        info.add_text("Comment", "A" * 80_000_000, zip=True)
    else:
        info.add_itxt("Comment", "A" * 80_000_000, zip=True)
    return saved(picture("RGB", 60, 50), "PNG", pnginfo=info)


def profile() -> bytes:
    import zlib

    body = b"p\0\0" + zlib.compress(bytes(80_000_000))
    data = png()
    return data[:33] + chunk(b"iCCP", body) + data[33:]


def sixteen(mode: str = "I;16") -> bytes:
    return saved(Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16), "PNG")


def sizes() -> bytes:
    """Two Motion-JPEG frames of one size and two of another behind one header."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="avi") as container:
        stream: Any = container.add_stream("mjpeg", rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for number in range(4):
            side = 64 if number < 2 else 96
            packet = av.Packet(saved(picture("RGB", side, 48, number), "JPEG"))
            packet.stream, packet.pts, packet.dts = stream, number, number
            packet.time_base, packet.is_keyframe = Fraction(1, 2), True
            container.mux(packet)
    return file.getvalue()


def fragmented() -> bytes:
    """An MP4 whose samples are listed piece by piece, as cameras and browsers record."""
    import av

    file = io.BytesIO()
    options = {"movflags": "frag_keyframe+empty_moov"}
    with av.open(file, "w", format="mp4", options=options) as container:
        stream: Any = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for one in frames(30, 64, 48):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(one, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def raw_sound() -> bytes:
    """A MOV with a second of video, and of sound in 8,000 samples without compression."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mov") as container:
        stream: Any = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        sound: Any = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        for one in frames(30, 64, 48):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(one, format="rgb24")))
        container.mux(stream.encode())
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), "s16", "mono")
        silence.sample_rate = 8000
        container.mux(sound.encode(silence))
        container.mux(sound.encode())
    return file.getvalue()


def named(data: bytes, box: bytes, *numbers: int) -> bytes:
    """A file of whose first box of a name the first numbers are others."""
    at = data.index(box) + 4
    return data[:at] + struct.pack(f">{len(numbers)}I", *numbers) + data[at + 4 * len(numbers) :]


def packed_header() -> bytes:
    """A MOV whose index is compressed, as QuickTime once did."""
    data = mp4()
    at = data.index(b"mvhd")
    return data[:at] + b"cmov" + data[at + 4 :]


def inside(data: bytes, *names: bytes, put: bytes) -> bytes:
    """A file with bytes more at the end of a box of its first track, all sizes right.

    Boxes are named from the outside; what lies behind them must need no offset.
    """
    starts, at = [], 0
    for name in names:
        at = data.index(name, at) - 4
        starts.append(at)
        at += 8
    end = starts[-1] + int.from_bytes(data[starts[-1] : starts[-1] + 4], "big")
    made = bytearray(data)
    for start in starts:
        made[start : start + 4] = (
            int.from_bytes(made[start : start + 4], "big") + len(put)
        ).to_bytes(4, "big")
    return bytes(made[:end]) + put + bytes(made[end:])


def box(name: bytes, *numbers: int) -> bytes:
    return struct.pack(">I4s", 8 + 4 * len(numbers), name) + struct.pack(
        f">{len(numbers)}I", *numbers
    )


MANY = 150_000_000
STBL = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
STSZ = box(b"stsz", 0, 1, MANY)
LONG = struct.pack(">I4sQ", 1, b"stsz", 28) + STSZ[8:]  # its size in eight bytes
SOUND = box(b"hdlr", 0, 0, int.from_bytes(b"soun", "big")) + box(b"stts", 0, 1, MANY, 1)


def renamed(data: bytes, name: bytes) -> bytes:
    return data.replace(b"moov", name)


def early(data: bytes) -> bytes:
    """A MOV whose last stsz lies before its track's stts, as is legal."""
    at = data.rindex(b"stsz") - 4
    size = int.from_bytes(data[at : at + 4], "big")
    to = data.rindex(b"stts") - 4
    return data[:to] + data[at : at + size] + data[to:at] + data[at + size :]


def last(data: bytes, name: bytes, at: int, number: int) -> bytes:
    """A file of whose last box of a name one number is another."""
    at += data.rindex(name) + 4
    return data[:at] + struct.pack(">I", number) + data[at + 4 :]


#: Small files whose tables make FFmpeg build an index of a hundred million samples, and the frames
#: that remain readable without it, if any. FFmpeg gives up such an index when it gets no memory.
HUGE: dict[str, tuple[Make, int]] = {
    "in hoov": (lambda: renamed(named(mp4(), b"stsz", 0, 1, MANY), b"hoov"), 0),
    "in free": (lambda: renamed(named(mp4(), b"stsz", 0, 1, MANY), b"free"), 0),
    "in skip": (lambda: renamed(named(mp4(), b"stsz", 0, 1, MANY), b"skip"), 0),
    "in a sample's description": (lambda: inside(mp4(), *STBL, b"stsd", b"avc1", put=STSZ), 4),
    "in meta": (lambda: inside(mp4(), *STBL, put=struct.pack(
        ">I4sI", 12 + len(STSZ), b"meta", 0) + STSZ), 4),
    "in wave": (lambda: inside(mp4(), *STBL, put=struct.pack(
        ">I4s", 8 + len(STSZ), b"wave") + STSZ), 0),
    "of a long size": (lambda: inside(mp4(), *STBL, put=LONG), 0),
    "of no size": (lambda: inside(mp4(), *STBL, put=bytes(4) + STSZ[4:]), 0),
    "behind another name": (lambda: inside(mp4(), *STBL, put=b"\0\0el" + STSZ[4:]), 0),
    "of sound, then not": (lambda: inside(
        mp4(), *STBL, put=SOUND + STSZ + box(b"stts", 0, 1, MANY, 2)), 0),
    "of sound, then of video": (lambda: inside(
        mp4(), *STBL, put=SOUND + STSZ + SOUND.replace(b"soun", b"vide")), 0),
    "of edits": (lambda: inside(mp4(), b"moov", b"trak", put=struct.pack(
        ">I4s", 8 + 16 + 12 * 600, b"edts") + box(
        b"elst", 0, 600, *(1000, 0, 1 << 16) * 600)), 768),
    "in chunks of raw sound": (lambda: last(raw_sound(), b"stsc", 12, 0x7FFFFFFF), 4),
    "that no file holds": (lambda: named(mp4(), b"stsz", 0, 1, MANY), 0),
    "of fragments": (lambda: named(fragmented(), b"trun", 1, MANY), 0),
    "in a packed index": (packed_header, 0),
}  # fmt: skip

PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nhttp://127.0.0.1:9/a.ts\n"

IMAGES: dict[str, tuple[Make, str, str]] = {
    "empty": (lambda: b"", "QC-VISION-027", "no bytes"),
    "text named png": (lambda: b"hello, I am a picture\n", "QC-VISION-027", "PNG, JPEG"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "QC-VISION-027", "PNG, JPEG"),
    "tiff": (lambda: saved(picture("RGB", 9, 9), "TIFF"), "QC-VISION-027", "convert"),
    "a video": (mp4, "QC-VISION-027", "PNG, JPEG"),
    "truncated png": (lambda: half(png()), "QC-VISION-028", "damaged"),
    "png of a header": (lambda: png()[:20], "QC-VISION-028", "damaged"),
    "png without pixels": (lambda: bare_png(64, 64, whole=False), "QC-VISION-028", "damaged"),
    "png with a flipped bit": (lambda: flipped(png(), 2000), "QC-VISION-028", "damaged"),
    "truncated jpeg": (
        lambda: half(saved(picture("RGB", 60, 50), "JPEG")), "QC-VISION-028", "truncated"),
    "truncated webp": (
        lambda: half(saved(picture("RGB", 60, 50), "WEBP")), "QC-VISION-028", "damaged"),
    "truncated gif": (
        lambda: half(saved(picture("P", 60, 50), "GIF")), "QC-VISION-028", "damaged"),
    "truncated bmp": (
        lambda: half(saved(picture("RGB", 60, 50), "BMP")), "QC-VISION-028", "damaged"),
    "animated gif": (lambda: animated(3), "QC-VISION-029", '"video"'),
    "animated webp": (lambda: animated(3, "WEBP"), "QC-VISION-029", "3 frames"),
    "animated png": (lambda: animated(3, "PNG"), "QC-VISION-029", "3 frames"),
    "20,000 x 20,000": (lambda: bare_png(20_000, 20_000), "QC-VISION-030", "89478485"),
    "10,000 x 10,000": (lambda: bare_png(10_000, 10_000), "QC-VISION-030", "89478485"),
    "a header of 2 billion": (
        lambda: bare_png(2**31 - 1, 2**31 - 1, whole=False), "QC-VISION-030", "large"),
    "text bomb": (lambda: texts(zipped=True), "QC-VISION-030", "large"),
    "international text bomb": (lambda: texts(zipped=False), "QC-VISION-030", "large"),
    "aspect 201": (lambda: png("RGB", 201, 1), "QC-VISION-031", "200 times"),
    "aspect 201, tall": (lambda: png("L", 2, 402), "QC-VISION-031", "2 x 402"),
    "16-bit greyscale": (sixteen, "QC-VISION-032", "8 bits"),
}  # fmt: skip

VIDEOS: dict[str, tuple[Make, str, str]] = {
    "empty": (lambda: b"", "QC-VISION-034", "no bytes"),
    "text named mp4": (lambda: b"hello, I am a film\n", "QC-VISION-034", "MP4"),
    "a playlist of urls": (lambda: PLAYLIST, "QC-VISION-034", "MP4"),
    "a list of files": (
        lambda: b"ffconcat version 1.0\nfile /etc/passwd\n", "QC-VISION-034", "MP4"),
    "a jpeg": (lambda: saved(picture("RGB", 60, 50), "JPEG"), "QC-VISION-034", "MP4"),
    "truncated mp4": (lambda: half(mp4()), "QC-VISION-035", "damaged"),
    "truncated webm": (
        lambda: half(video(frames(30, 64, 48), 30, "webm", "libvpx", "yuv420p")),
        "QC-VISION-035", "damaged"),
    "truncated avi": (
        lambda: half(video(frames(30, 64, 48), 30, "avi", "mpeg4", "yuv420p")),
        "QC-VISION-035", "truncated"),
    "mp4 of a header": (lambda: mp4()[:40], "QC-VISION-035", "damaged"),
    "noise behind a header": (
        lambda: mp4()[:32] + np.random.default_rng(0).bytes(9000), "QC-VISION-035", "damaged"),
    "a description behind its track": (
        lambda: named(mp4(), b"stsd", 0, 1, 1 << 20), "QC-VISION-035", "damaged"),
    "sound alone": (sound, "QC-VISION-036", "audio"),
    "one frame": (lambda: mp4(1), "QC-VISION-037", '"image"'),
    "a still gif": (lambda: saved(picture("P", 60, 50), "GIF"), "QC-VISION-037", '"image"'),
    "frames of two sizes": (sizes, "QC-VISION-038", "96 x 48 at frame 2"),
    "aspect 250": (lambda: video(frames(4, 500, 2), 2), "QC-VISION-031", "500 x 2"),
    "truncated animation": (lambda: half(animated(9)), "QC-VISION-028", "damaged"),
}  # fmt: skip

OPTIONS: list[tuple[str, dict[str, Any], str, str]] = [
    ("image", {"min_pixels": "65536"}, "QC-VISION-025", "min_pixels"),
    ("image", {"max_pixels": 70000.0}, "QC-VISION-025", "max_pixels"),
    ("image", {"max_pixels": True}, "QC-VISION-025", "max_pixels"),
    ("image", {"max_pixels": None}, "QC-VISION-025", "max_pixels"),
    ("image", {"min_pixels": 0}, "QC-VISION-025", "65536"),
    ("image", {"max_pixels": 1 << 40}, "QC-VISION-025", "16777216"),
    ("image", {"min_pixels": 90000, "max_pixels": 80000}, "QC-VISION-025", "80000"),
    ("image", {"fps": 2}, "QC-VISION-026", "fps"),
    ("image", {"max_frames": 8}, "QC-VISION-026", "max_frames"),
    ("image", {"detail": "high"}, "QC-VISION-026", "detail"),
    ("video", {"fps": 0}, "QC-VISION-025", "fps"),
    ("video", {"fps": float("nan")}, "QC-VISION-025", "fps"),
    ("video", {"fps": "2"}, "QC-VISION-025", "fps"),
    ("video", {"fps": 1e9}, "QC-VISION-025", "240"),
    ("video", {"max_frames": 1}, "QC-VISION-025", "2 to 768"),
    ("video", {"max_frames": 769}, "QC-VISION-025", "2 to 768"),
    ("video", {"max_frames": 2.5}, "QC-VISION-025", "max_frames"),
    ("video", {"num_frames": 8}, "QC-VISION-026", "num_frames"),
    ("video", {"sample_fps": 2}, "QC-VISION-026", "write fps"),
    ("image", {"sample_fps": 2}, "QC-VISION-026", "write fps"),
]


def refused(reader: Any, part: Payload, code: str, says: str) -> None:
    with pytest.raises(RowError) as caught:
        reader.read(part)
    assert caught.value.code == code
    assert caught.value.__cause__ is None
    told = caught.value.error(Path("rows.jsonl"), 7)
    line = f"{told.message} {told.fix}"
    assert told.message.startswith("rows.jsonl: line 7")
    assert says in line
    assert "\n" not in line
    assert len(line) < 600


@pytest.mark.parametrize("name", IMAGES)
def test_bad_images(reader: Any, cache_home: Path, name: str) -> None:
    make, code, says = IMAGES[name]
    refused(reader, payload(make()), code, says)
    assert not cache_home.exists()


@pytest.mark.parametrize("name", VIDEOS)
def test_bad_videos(reader: Any, cache_home: Path, name: str) -> None:
    make, code, says = VIDEOS[name]
    refused(reader, payload(make(), "video"), code, says)
    assert not cache_home.exists()


@pytest.mark.parametrize("name", fast(HUGE, *[*HUGE][::4]))
def test_tables_of_any_size_cost_one_row(reader: Any, name: str) -> None:
    """Refused or read, in seconds and without a gigabyte; the next video is read."""
    make, frames_read = HUGE[name]
    part, start = payload(make(), "video"), time.monotonic()
    if frames_read:
        assert reader.read(part).grid[0] == frames_read // 2
    else:
        with pytest.raises(RowError) as caught:
            reader.read(part)
        assert caught.value.code in ("QC-VISION-035", "QC-VISION-039")
    assert time.monotonic() - start < 60
    status = Path(f"/proc/{reader._decoder._idle[-1]._process.pid}/status")
    if status.exists():
        peak = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        assert int(peak.split()[1]) < 1 << 20
    assert reader.read(payload(mp4(9), "video", fps=4)).grid[0] == 2


@pytest.mark.parametrize(("kind", "options", "code", "says"), OPTIONS)
def test_bad_options(reader: Any, kind: str, options: dict[str, Any], code: str, says: str) -> None:
    data = png() if kind == "image" else animated(4)
    reader.read(payload(data, kind))
    refused(reader, payload(data, kind, **options), code, says)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_every_frame_of_a_png_has_its_checksum(reader: Any, kind: str) -> None:
    """Of its picture, and of the frames behind it, which are in chunks of their own."""
    data = animated(4, "PNG") if kind == "video" else png()
    assert reader.read(payload(data, kind))
    names = [b"fcTL", b"fdAT", b"IDAT"] if kind == "video" else [b"IDAT"]
    for name in names:
        at = data.rindex(name) + 4
        length = int.from_bytes(data[at - 8 : at - 4], "big")
        # The last byte of what is packed is a checksum of its own, which Pillow does not compare.
        for place in (at + length - 1, at + length + 3):
            damaged = flipped(data, place)
            refused(reader, payload(damaged, kind), "QC-VISION-028", f"checksum in {name!r}")


def test_a_count_that_differs_at_every_reading(
    reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a file that another program writes to: once is put up with, twice is damage."""
    from qcore_multimodal.video_decoder import Video

    real, passes = Video.frames, iter((7, 5))

    def frames(film: Any, indices: Any) -> Any:
        yield from real(film, indices)
        film.count = next(passes)

    monkeypatch.setattr(Video, "frames", frames)
    refused(reader, payload(mp4(9), "video"), "QC-VISION-035", "5 frames, 7 before")


def test_a_superseded_index_is_no_second_one(reader: Any) -> None:
    """As editors leave one behind that write theirs at the end of the file."""
    data = mp4()
    at = data.index(b"moov") - 4
    old = b"free".join(data[at:].split(b"moov"))
    assert reader.read(payload(data + old, "video")).grid[0] == 2


def test_what_is_decoded_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The header tells of two frames only, and all of them come."""
    from qcore_multimodal.video_frames import Bounds, VideoFile, opened

    monkeypatch.setattr(VideoFile, "_scan", lambda film: (2, 30.0))
    bounds = Bounds(video_pixels=30 * 64 * 48)
    with opened(io.BytesIO(mp4()), bounds) as film:
        assert len([*film.frames(frozenset())]) == 30
    with pytest.raises(RowError) as caught, opened(io.BytesIO(mp4(31)), bounds) as film:
        list(film.frames(frozenset()))
    assert (caught.value.code, caught.value.found) == ("QC-VISION-030", "95232 in 31 frames")


def test_packets_are_counted_in_constant_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from qcore_multimodal.video_frames import Bounds, VideoFile

    packet = SimpleNamespace(size=9, is_discard=False)
    context = SimpleNamespace(width=64, height=48)
    stream = SimpleNamespace(
        codec_context=context, average_rate=Fraction(30), time_base=Fraction(1, 90_000), frames=0
    )

    def demux(_: Any) -> Any:
        for number in range(200_000):
            packet.pts = 3000 * number
            yield packet

    @contextmanager
    def opened(film: Any) -> Any:
        yield SimpleNamespace(demux=demux), stream

    monkeypatch.setattr(VideoFile, "_open", opened)
    tracemalloc.start()
    try:
        film = VideoFile(io.BytesIO(), "mov", Bounds())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (film.count, film.rate) == (200_000, 30)
    assert peak < 100_000


def test_a_profile_bomb(reader: Any) -> None:
    data = profile()
    assert len(data) < 200_000
    with pytest.raises(RowError) as caught:
        reader.read(payload(data))
    assert caught.value.code == "QC-VISION-030"


def test_exif_that_is_noise_is_no_orientation(reader: Any) -> None:
    """As for transformers' loader: the pixels are sound."""
    image = picture("RGB", 60, 90)
    noise = saved(image, "JPEG", exif=b"Exif\0\0XX\0\0\1\2\3")
    plain = reader.read(payload(saved(image, "JPEG")))
    assert reader.read(payload(noise)).grid == plain.grid


@pytest.mark.parametrize("width", [1, 200])
def test_small_and_flat_ones_are_read(reader: Any, width: int) -> None:
    assert reader.read(payload(png("RGB", width, 1))).tokens >= 64


def test_every_cut_of_every_format_is_told(reader: Any) -> None:
    """What Pillow raises is found out by cutting files anywhere; most cuts are refused."""
    told = 0
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        data = saved(picture("P" if form == "GIF" else "RGB", 24, 20), form)
        for size in range(0, len(data) - 20, max(1, len(data) // 60)):
            with pytest.raises(RowError, match=r"damaged|unsupported image format"):
                reader.read(payload(data[:size]))
            told += 1
    assert told > 250


@pytest.mark.slow
def test_every_flip_is_told_or_read(reader: Any) -> None:
    rng = np.random.default_rng(5)
    files = [
        *(
            (saved(picture("RGB", 24, 20), form), "image")
            for form in ("PNG", "JPEG", "WEBP", "BMP")
        ),
        (saved(picture("P", 24, 20), "GIF"), "image"),
        (animated(3), "video"),
        (mp4(6), "video"),
        (video(frames(5, 32, 32), 2), "video"),
    ]
    told = 0
    for data, kind in files:
        for at in rng.integers(0, len(data), 25):
            changed = flipped(data, int(at))
            changed = flipped(changed, min(int(at) + 3, len(data) - 1))
            try:
                reader.read(payload(changed, kind))
            except RowError as bad:
                assert bad.code.startswith("QC-VISION-0")  # noqa: PT017
                told += 1
    assert told > 40


def test_pillows_lenient_switch_is_not_followed(
    reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    refused(reader, payload(half(png())), "QC-VISION-028", "damaged")
    refused(reader, payload(bare_png(10_000, 10_000)), "QC-VISION-030", "89478485")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_no_warning_reaches_the_user(reader: Any, recwarn: pytest.WarningsRecorder) -> None:
    refused(reader, payload(bare_png(10_000, 10_000)), "QC-VISION-030", "large")
    reader.read(payload(saved(picture("P", 60, 50), "PNG", transparency=bytes(range(256)))))
    assert not list(recwarn)


def test_without_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    from qcore_multimodal.video_frames import Bounds, opened

    data, still = mp4(), animated(4)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(RowError) as caught, opened(io.BytesIO(data), Bounds()):
        pass
    assert caught.value.code == "QC-VISION-033"
    assert caught.value.fix == 'pip install "qcore-multimodal[video]"'
    with opened(io.BytesIO(still), Bounds()) as film:
        assert film.count == 4  # Pillow reads these


def test_a_file_that_is_gone(reader: Any, tmp_path: Path) -> None:
    part = Payload(kind="image", sha256="0" * 64, path=tmp_path / "gone.png", options={})
    refused(reader, part, "QC-VISION-042", "No such file")


def test_a_file_of_other_bytes_than_were_checked(reader: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png())
    part = Payload(kind="image", sha256="0" * 64, path=path, options={})
    refused(reader, part, "QC-VISION-042", "0" * 64)


_MEASURE = """
import resource, sys
from pathlib import Path
from support.media_kit import bare_png, checkpoint, file_payload
from qcore.api.media import RowError
from qcore_multimodal.reader import Reader
from PIL import Image
reader = Reader(checkpoint(Path(sys.argv[1])), report=sys.stderr.write)
part = file_payload(Path(sys.argv[2]))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = peak()
try:
    print(reader.read(part).tokens, peak() - before)
except RowError as bad:
    print(bad.code, peak() - before)
"""


@pytest.mark.parametrize(
    ("side", "mode", "told", "most"),
    [
        (20_000, "1", "QC-VISION-030", 120),
        pytest.param(9_400, "RGB", "16384", 1000, marks=pytest.mark.slow),
        pytest.param(9_400, "RGBA", "16384", 1700, marks=pytest.mark.slow),
    ],
)
def test_memory_is_bounded(
    tmp_path: Path, shared: Path, side: int, mode: str, told: str, most: int
) -> None:
    path = tmp_path / "large.png"
    if mode == "1":
        path.write_bytes(bare_png(side, side))
    else:
        Image.new(mode, (side, side)).save(path, compress_level=1)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(shared / "skus" / "processor"), str(path)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1],
        env={**__import__("os").environ, "XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    found, grown = done.stdout.split()
    assert found == told
    assert int(grown) < most, done.stdout
