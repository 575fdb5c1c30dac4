"""The process that decodes videos: what it may use, how it ends, and what the next video sees."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.media_kit import animated, file_payload, frames, payload, video

from qcore.api.media import RowError


def film(count: int = 9, seed: int = 0) -> bytes:
    return video(frames(count, 64, 48, seed), 2)


def pid(reader: Any) -> int:
    return int(reader._decoder._idle[-1]._process.pid)


def refused(reader: Any, data: bytes) -> RowError:
    with pytest.raises(RowError) as caught:
        reader.read(payload(data, "video"))
    return caught.value


def test_one_process_serves_all_videos(reader: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    path.write_bytes(film())
    one = reader.read(file_payload(path, "video"))
    first = pid(reader)
    assert reader.read(payload(film(seed=1), "video")).grid == one.grid
    assert refused(reader, b"no video").code == "QC-VISION-034"
    assert refused(reader, film()[:3000]).code == "QC-VISION-035"
    assert reader.read(payload(animated(4), "video")).grid[0] == 2
    assert pid(reader) == first


def test_a_process_that_hangs_is_ended(reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from qcore_multimodal import video_decoder

    reader.read(payload(film(), "video"))
    first = pid(reader)
    monkeypatch.setattr(video_decoder, "SECONDS", 0.3)
    os.kill(first, signal.SIGSTOP)
    start = time.monotonic()
    error = refused(reader, film(seed=1))
    assert error.code == "QC-VISION-046"
    assert time.monotonic() - start < 20
    monkeypatch.setattr(video_decoder, "SECONDS", 60.0)
    assert reader.read(payload(film(seed=1), "video")).grid[0] == 5
    assert pid(reader) != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_a_process_that_crashes_costs_one_row(reader: Any) -> None:
    reader.read(payload(film(), "video"))
    first = pid(reader)
    os.kill(first, signal.SIGSTOP)
    threading.Timer(0.2, os.kill, (first, signal.SIGKILL)).start()
    error = refused(reader, film(seed=1))
    assert error.code == "QC-VISION-035"
    assert "its decoder ended" in str(error.found)
    assert reader.read(payload(film(seed=1), "video")).grid[0] == 5


def test_threads_and_forks_do_not_share_a_video(reader: Any) -> None:
    films = [film(seed=seed) for seed in range(4)]
    wanted = [reader.read(payload(data, "video")) for data in films]
    for entry in reader._cache.folder.glob("*.media"):
        entry.unlink()
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(lambda data: reader.read(payload(data, "video")), films)] == wanted
    first = reader._decoder._idle[-1]
    child = os.fork()
    if not child:  # only the decoder: torch's threads do not survive a fork
        status = 1
        try:
            with reader._decoder.open(io.BytesIO(film(seed=9))) as opened:
                status = len([*opened.frames([0, 8])]) - 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert reader.read(payload(film(seed=5), "video")).grid[0] == 5
    assert reader._decoder._idle[-1] is first


@pytest.mark.parametrize("sent", [b"", b"\x40\0", (64).to_bytes(8, "little") + b'{"bou'])
def test_it_ends_when_its_reader_goes_inside_a_message(sent: bytes) -> None:
    code = f"""
import socket
from qcore_multimodal import video_worker
ours, theirs = socket.socketpair()
ours.sendall({sent!r})
ours.shutdown(socket.SHUT_WR)
video_worker.main(theirs)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


@pytest.mark.slow
def test_a_process_without_memory() -> None:
    """In a process of its own: the limit is this process's."""
    code = f"""
import socket, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from qcore_multimodal import video_worker
from support.media_kit import frames, video
import json, tempfile
video_worker.OPENING = video_worker.DECODING = 1 << 20  # less than the process has
ours, theirs = socket.socketpair()
with tempfile.TemporaryFile() as file:
    file.write(video(frames(3, 1600, 1200), 2)); file.flush()
    body = json.dumps({{"bounds": {{}}, "seconds": 60}}).encode()
    socket.send_fds(ours, [len(body).to_bytes(8, "little") + body], [file.fileno()])
    body = json.dumps({{"indices": [0, 1, 2], "seconds": 60}}).encode()
    ours.sendall(len(body).to_bytes(8, "little") + body)
    ours.shutdown(socket.SHUT_WR)
    video_worker.main(theirs)
theirs.close()
print(ours.recv(1 << 16))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert '"memory": true' in done.stdout, done.stdout


def test_it_ends_with_its_reader_and_imports_no_torch() -> None:
    code = f"""
import os, sys, time
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import io
from support.media_kit import frames, video
from qcore_multimodal.video_decoder import Decoder
decoder = Decoder()
with decoder.open(io.BytesIO(video(frames(5, 64, 48), 2))) as opened:
    shapes = [frame.shape for frame in opened.frames([0, 4])]
assert shapes == [(48, 64, 3)] * 2 and opened.count == 5, shapes
pid = decoder._idle[-1]._process.pid
maps = open(f"/proc/{{pid}}/maps").read() if sys.platform == "linux" else ""
assert "libtorch" not in maps
environment = open(f"/proc/{{pid}}/environ").read() if maps else ""
assert "SECRET" not in environment
del decoder
for _ in range(100):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        print("ended")
        break
    time.sleep(0.05)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, "SECRET": "x"},
    )  # fmt: skip
    assert done.stdout == "ended\n", done.stderr
