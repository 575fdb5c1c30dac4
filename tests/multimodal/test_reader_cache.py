"""The cache of values: what is decoded once, what is believed, what goes, and what is said."""

from __future__ import annotations

import fcntl
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from support.media_kit import animated, file_payload, frames, payload, picture, saved, video

from qcore.api.media import Payload, RowError
from qcore.errors import InputError, UsageError, WriteError

WHERE = torch.arange(1)


def png(seed: int = 0, side: int = 256) -> bytes:
    return saved(picture("RGB", side, side, seed), "PNG")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the size of each image that is decoded."""
    from qcore_multimodal import images

    seen: list[int] = []
    decode = images.decode

    def counted(data: bytes) -> Any:
        seen.append(len(data))
        return decode(data)

    monkeypatch.setattr(images, "decode", counted)
    return seen


def test_what_is_kept_is_not_decoded(new_reader: Callable[[], Any], decoded: list[int]) -> None:
    first = new_reader()
    one = first.read(payload(png()))
    values = first.batch([one, one], WHERE).values
    assert len(decoded) == 1
    again = new_reader()
    assert again.read(payload(png())) == one
    assert torch.equal(again.batch([one, one], WHERE).values, values)
    assert len(decoded) == 1


def test_what_names_an_entry(new_reader: Callable[[], Any], decoded: list[int]) -> None:
    """Other bytes, another limit, another kind: another entry; the same limit told: the same."""
    reader = new_reader()
    names = [
        reader.read(payload(data, kind, **options)).digest
        for data, kind, options in [
            (png(), "image", {}),
            (png(1), "image", {}),
            (png(), "image", {"min_pixels": 80_000}),
            (png(), "image", {"max_pixels": 80_000}),
            (animated(4), "video", {}),
            (animated(4), "video", {"fps": 1}),
            (animated(4), "video", {"max_frames": 2}),
        ]
    ]
    assert len(set(names)) == len(names)
    assert reader.read(payload(png(), min_pixels=65536)).digest == names[0]


@pytest.mark.parametrize("name", ["transformers", "pillow"])
def test_another_version_decodes_again(
    new_reader: Callable[[], Any], decoded: list[int], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from qcore_multimodal import reader as module

    before = new_reader().read(payload(png()))
    real = module._version
    monkeypatch.setattr(module, "_version", lambda one: "0" if one == name else real(one))
    assert new_reader().read(payload(png())).digest != before.digest
    assert len(decoded) == 2


def test_versions_are_looked_up_once(
    reader: Any, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lookup reads a file of metadata, which takes longer than a small picture does."""
    from qcore_multimodal import reader as module

    module._version.cache_clear()
    asked: list[str] = []
    real = module.version
    monkeypatch.setattr(module, "version", lambda one: asked.append(one) or real(one))
    for seed in range(3):
        reader.read(payload(png(seed)))
    assert len(decoded) == 3
    assert sorted(asked) == ["numpy", "pillow", "transformers"]


@pytest.fixture
def files_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every read that the reader makes of a file."""
    taken: list[int] = []

    class Counted(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            taken.append(super().readinto(buffer) or 0)
            return taken[-1]

        def readall(self) -> bytes:
            raise AssertionError("a file is read without a bound")

    monkeypatch.setattr(Payload, "open", lambda one: io.BufferedReader(Counted(one.path)))
    return taken


def test_a_picture_is_read_once(
    reader: Any, cache_home: Path, tmp_path: Path, files_read: list[int]
) -> None:
    """What is decoded is what is hashed; the same where its values have to be made again."""
    path = tmp_path / "a.png"
    path.write_bytes(png())
    seen = reader.read(file_payload(path))
    assert sum(files_read) == path.stat().st_size
    reader.batch([seen], WHERE)
    assert sum(files_read) == path.stat().st_size
    (cache_home / f"{seen.digest}.media").unlink()
    reader.batch([seen], WHERE)
    assert sum(files_read) == 2 * path.stat().st_size


def test_a_film_that_is_written_to_while_it_is_decoded(
    reader: Any, tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qcore_multimodal import videos

    path = tmp_path / "a.mkv"
    path.write_bytes(video(frames(9, 64, 64), 2))
    real = videos.process

    def process(*arguments: Any) -> Any:
        made = real(*arguments)
        with path.open("ab") as file:
            file.write(b"x")
        return made

    part = file_payload(path, "video")
    monkeypatch.setattr(videos, "process", process)
    with pytest.raises(RowError, match="changed after its row was checked") as caught:
        reader.read(part)
    assert caught.value.code == "QC-VISION-042"
    assert not cache_home.exists()


def test_a_film_that_is_damaged_by_what_is_written_to_it(
    reader: Any, tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read is then half of two files, which is no fault of either."""
    from qcore_multimodal import videos

    path = tmp_path / "a.mkv"
    path.write_bytes(video(frames(9, 64, 64), 2))
    real, part = videos.process, file_payload(path, "video")

    def process(*arguments: Any) -> Any:
        path.write_bytes(b"x" * 1000)
        return real(*arguments)

    monkeypatch.setattr(videos, "process", process)
    with pytest.raises(RowError, match="changed after its row was checked") as caught:
        reader.read(part)
    assert caught.value.code == "QC-VISION-042"
    assert caught.value.__suppress_context__
    assert not cache_home.exists()


def test_a_film_whose_frames_come_and_go(
    reader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another number of them at every reading, by what is written to it meanwhile."""
    from qcore_multimodal.video_decoder import Video

    path = tmp_path / "a.mkv"
    path.write_bytes(video(frames(9, 64, 64), 2))
    real, passes, part = Video.frames, iter((7, 5)), file_payload(path, "video")

    def frames_of(film: Any, indices: Any) -> Any:
        with path.open("ab") as file:
            file.write(b"x")
        yield from real(film, indices)
        film.count = next(passes)

    monkeypatch.setattr(Video, "frames", frames_of)
    with pytest.raises(RowError, match="changed after its row was checked"):
        reader.read(part)


def test_another_processor_decodes_again(
    new_reader: Callable[[], Any], shared: Path, tmp_path: Path
) -> None:
    from support.media_kit import FILES, checkpoint

    from qcore_multimodal.reader import Reader

    folder = tmp_path / "base"
    folder.mkdir()
    for name in FILES:
        content = json.loads((shared / "skus" / "processor" / name).read_text())
        (folder / name).write_text(json.dumps(content | {"image_mean": [0.5, 0.4, 0.5]}))
    other = Reader(checkpoint(folder), print).read(payload(png()))
    assert other.digest != new_reader().read(payload(png())).digest


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut in the head": lambda data: data[:30],
    "cut in the values": lambda data: data[:-1],
    "longer": lambda data: data + b"x",
    "other magic": lambda data: b"X" + data[1:],
    "another head": lambda data: data.replace(b'"merge": 2', b'"merge": 4'),
    "a flipped value": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_entry_is_made_again(
    new_reader: Callable[[], Any], cache_home: Path, decoded: list[int], name: str
) -> None:
    reader = new_reader()
    seen = reader.read(payload(png()))
    values = reader.batch([seen], WHERE).values
    (entry,) = cache_home.glob("*.media")
    whole = entry.read_bytes()
    entry.write_bytes(DAMAGE[name](whole))
    fresh = new_reader()
    assert fresh.read(payload(png())) == seen
    assert torch.equal(fresh.batch([seen], WHERE).values, values)
    assert len(decoded) == 2
    assert entry.read_bytes() == whole


def test_what_is_gone_in_the_middle_of_a_run_is_made_again_and_said(
    new_reader: Callable[..., Any], cache_home: Path, tmp_path: Path, decoded: list[int]
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(1))
    reader = new_reader(report=(said := []).append)
    media = [reader.read(payload(png())), reader.read(file_payload(path)),
             reader.read(payload(animated(4), "video"))]  # fmt: skip
    values = reader.batch(media, WHERE).values
    for entry in cache_home.glob("*.media"):
        entry.unlink()
    assert torch.equal(reader.batch(media, WHERE).values, values)
    assert torch.equal(reader.batch(media, WHERE).values, values)
    assert len(decoded) == 4
    missing = f"entries of the media cache {cache_home} are missing or damaged: "
    assert said == [missing + "they are processed again"]
    assert len(list(cache_home.glob("*.media"))) == 3


def test_a_file_that_changes_in_the_middle_of_a_run(
    new_reader: Callable[[], Any], cache_home: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png())
    reader = new_reader()
    seen = reader.read(file_payload(path))
    path.write_bytes(png(1))
    assert reader.batch([seen], WHERE).values.shape[0] == seen.units  # kept values stay good
    for entry in cache_home.glob("*.media"):
        entry.unlink()
    with pytest.raises(InputError, match="changed after its row was checked") as caught:
        reader.batch([seen], WHERE)
    assert caught.value.code == "QC-VISION-042"
    assert caught.value.file == str(path)
    assert list(cache_home.glob("*.media")) == []


def test_values_that_nobody_can_make_again(new_reader: Callable[[], Any], cache_home: Path) -> None:
    seen = new_reader().read(replace(payload(png()), origin=None))
    for entry in cache_home.glob("*.media"):
        entry.unlink()
    with pytest.raises(InputError) as caught:
        new_reader().batch([seen], WHERE)
    assert caught.value.code == "QC-VISION-043"


def test_the_folder_is_bounded_and_the_oldest_go(
    new_reader: Callable[..., Any], cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten images of 196,608 bytes in a folder for six."""
    monkeypatch.setenv("QCORE_MEDIA_CACHE_GB", str(6 * 197_500 / 1e9))
    reader = new_reader(report=(said := []).append)
    media = [reader.read(payload(png(seed))) for seed in range(5)]
    now = time.time_ns()
    for age, one in enumerate(media):
        os.utime(cache_home / f"{one.digest}.media", ns=(now, now - 10**12 + age * 10**9))
    reader.batch([media[0]], WHERE)  # used now
    media += [reader.read(payload(png(seed))) for seed in range(5, 7)]
    kept = {path.stem for path in cache_home.glob("*.media")}
    assert media[0].digest in kept
    assert media[1].digest not in kept
    assert {media[5].digest, media[6].digest} <= kept
    assert sum(path.stat().st_size for path in cache_home.iterdir()) <= 6 * 197_500
    (told,) = said  # more than fits, said while the rows are checked
    assert "exceed the cache of" in told
    assert "raise QCORE_MEDIA_CACHE_GB above" in told


def test_what_others_wrote_counts(tmp_path: Path) -> None:
    from qcore_multimodal.cache import Cache

    ours, theirs = (Cache(tmp_path, 1_000_000) for _ in range(2))
    for number in range(200):
        one = ours if number % 2 else theirs
        one.put(f"{number:064}", {}, np.zeros(20_000, np.uint8))
    # Each looks at the folder at least once in 64 entries of its own.
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1_000_000 + 64 * 20_100


def test_one_medium_larger_than_all_may_be(
    new_reader: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, cache_home: Path
) -> None:
    monkeypatch.setenv("QCORE_MEDIA_CACHE_GB", "0.0001")
    with pytest.raises(RowError, match="does not fit in the media cache") as caught:
        new_reader().read(payload(png()))
    assert caught.value.code == "QC-VISION-044"
    assert "QCORE_MEDIA_CACHE_GB" in (caught.value.fix or "")


def test_a_medium_holds_no_bytes_of_its_row(new_reader: Callable[[], Any]) -> None:
    """What a run keeps of each medium is small, can be pickled, and is enough in any process."""
    import pickle

    from support.media_kit import list_payload

    data, reader = png(side=600), new_reader()
    part = replace(payload(data), origin=Row(0))
    frame = replace(payload(png(), "video"), origin=Row(1))
    film = replace(list_payload([png(), png()]), frames=(frame, frame))
    media = [reader.read(part), reader.read(film)]
    kept = pickle.dumps(media)
    assert len(kept) < 2000 < len(data)
    values = reader.batch(media, WHERE).values
    for entry in reader._cache.folder.glob("*.media"):
        entry.unlink()
    Row.rows = [data, png()]
    assert torch.equal(new_reader().batch(pickle.loads(kept), WHERE).values, values)


@dataclass(frozen=True)
class Row:
    """A row by its number."""

    number: int
    rows: ClassVar[list[bytes]] = []

    def read(self, sha256: str) -> bytes:
        return self.rows[self.number]


def test_bytes_of_a_row_that_changed(reader: Any, cache_home: Path) -> None:
    seen = reader.read(replace(payload(png()), origin=Row(0)))
    for entry in cache_home.glob("*.media"):
        entry.unlink()
    Row.rows = [png(1)]
    with pytest.raises(InputError, match="changed after its row was checked") as caught:
        reader.batch([seen], WHERE)
    assert caught.value.code == "QC-VISION-042"


def test_rows_that_cannot_be_read_again_must_fit(
    new_reader: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused while the rows are checked, not in the middle of the run."""
    monkeypatch.setenv("QCORE_MEDIA_CACHE_GB", str(3 * 197_500 / 1e9))
    reader = new_reader()
    parts = [replace(payload(png(seed)), origin=None) for seed in range(4)]
    for part in [*parts[:3], *parts[:3]]:
        reader.read(part)
    with pytest.raises(UsageError) as caught:
        reader.read(parts[3])
    assert caught.value.code == "QC-VISION-045"
    assert "raise QCORE_MEDIA_CACHE_GB" in str(caught.value.fix)


@pytest.mark.parametrize("value", ["", "many", "0", "-1", "nan", "inf"])
def test_a_bound_that_is_none(
    new_reader: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("QCORE_MEDIA_CACHE_GB", value)
    with pytest.raises(UsageError, match="QCORE_MEDIA_CACHE_GB") as caught:
        new_reader().read(payload(png()))
    assert caught.value.code == "QC-VISION-040"


@pytest.mark.parametrize("call", ["mkdir", "mkstemp", "replace"])
def test_a_folder_that_cannot_be_written_stops_the_run(
    new_reader: Callable[[], Any], cache_home: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    import errno

    from qcore_multimodal import cache

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    place = {"mkdir": Path, "mkstemp": cache.tempfile, "replace": cache.os}[call]
    reader = new_reader()
    with monkeypatch.context() as patch:
        patch.setattr(place, call, full)
        with pytest.raises(WriteError, match="disk is full") as caught:
            reader.read(payload(png()))
    assert caught.value.code == "QC-WRITE-003"
    assert not cache_home.exists() or list(cache_home.iterdir()) == []  # nothing half-written


def test_leftovers_of_dead_processes_go(new_reader: Callable[[], Any], cache_home: Path) -> None:
    """A process that lives has locked its file, however old that is."""
    cache_home.mkdir(parents=True)
    old, held, new = (cache_home / f".{name}.tmp" for name in ("old", "held", "new"))
    for file in (old, held, new):
        file.write_bytes(b"x")
    for file in (old, held):
        os.utime(file, (1, 1))
    with held.open("rb") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        new_reader().read(payload(png()))
    assert [file.exists() for file in (old, held, new)] == [False, True, True]


_WORKER = """
import sys
from pathlib import Path
import torch
from support.media_kit import checkpoint, payload, picture, saved
from qcore_multimodal.reader import Reader
reader = Reader(checkpoint(Path(sys.argv[1])), report=sys.stderr.write)
total = 0
for turn in range(3):
    for seed in range(12):
        seen = reader.read(payload(saved(picture("RGB", 200, 200, seed), "PNG")))
        total += int(reader.batch([seen], torch.arange(1)).values.sum(dtype=torch.int64))
print(total)
"""


@pytest.mark.slow
def test_two_processes_share_a_folder_too_small_for_both(
    cache_home: Path, shared: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "QCORE_MEDIA_CACHE_GB": "0.001"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(shared / "skus" / "processor")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            cwd=Path(__file__).parents[1],
        )
        for _ in range(2)
    ]  # fmt: skip
    told = [one.communicate() for one in running]
    assert [one.returncode for one in running] == [0, 0], told
    assert told[0][0] == told[1][0]
    assert not list(cache_home.glob("*.tmp"))
    assert all("Traceback" not in errors for _, errors in told)


def test_a_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from qcore_multimodal.cache import Cache

    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("QCORE_MEDIA_CACHE_GB", raising=False)
    cache = Cache.of_user()
    assert cache.folder == tmp_path / ".cache" / "qcore" / "media"
    assert cache.bound == 20_000_000_000


def test_no_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from qcore_multimodal.cache import Cache

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UsageError) as caught:
        Cache.of_user()
    assert caught.value.code == "QC-VISION-041"


def test_threads_decode_each_image_once_and_leave_pillow_as_it_was(
    new_reader: Callable[[], Any], decoded: list[int]
) -> None:
    """A bomb among them is refused in each thread, whatever the others do."""
    import warnings
    from concurrent.futures import ThreadPoolExecutor

    from PIL import Image, ImageFile

    before = list(warnings.filters), ImageFile.LOAD_TRUNCATED_IMAGES
    good = [png(seed, 320) for seed in range(12)]
    expected = [new_reader().read(payload(data)).grid for data in good]
    decoded.clear()
    cut = good[0][:-400]
    reader = new_reader()
    for name in list(reader._cache.folder.iterdir()):
        name.unlink()

    def read(data: bytes) -> Any:
        try:
            return reader.read(payload(data)).grid
        except RowError as error:
            return error.code

    with ThreadPoolExecutor(8) as pool:
        grids = list(pool.map(read, [*good, *good, cut, *good, cut]))
    assert grids == [*expected, *expected, "QC-VISION-028", *expected, "QC-VISION-028"]
    assert len(decoded) == len(good) + 2
    assert (list(warnings.filters), ImageFile.LOAD_TRUNCATED_IMAGES) == before
    assert Image.MAX_IMAGE_PIXELS is not None
