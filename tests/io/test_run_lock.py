"""A run's folder: one writer at a time, deletion in one step."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from pathlib import Path

import pytest
from support.faults import Faults, count

from qcore.errors import WriteError
from qcore.io.atomic import remove_tree
from qcore.io.run_lock import LOCK, Lock, boot_id


def _in_child(job: object) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            job()  # type: ignore[operator]
            status = 0
        except WriteError as error:
            status = error.exit_code
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_the_second_run_is_refused(tmp_path: Path) -> None:
    with Lock(tmp_path):
        with pytest.raises(WriteError, match=f"process {os.getpid()} on ") as caught:
            Lock(tmp_path).acquire()
        assert (caught.value.code, caught.value.exit_code) == ("QC-WRITE-010", 73)
        assert _in_child(lambda: Lock(tmp_path).acquire()) == 73
        owner = json.loads((tmp_path / LOCK).read_text())
        assert (owner["pid"], owner["boot_id"]) == (os.getpid(), boot_id())
    assert list(tmp_path.iterdir()) == []
    with Lock(tmp_path):
        pass


def test_the_lock_of_a_killed_run_is_stale(tmp_path: Path) -> None:
    assert _in_child(lambda: (Lock(tmp_path).acquire(), os._exit(7))) == 7
    assert (tmp_path / LOCK).exists()
    with Lock(tmp_path):
        pass


def test_a_forked_child_gives_nothing_back(tmp_path: Path) -> None:
    with Lock(tmp_path) as lock:
        assert _in_child(lock.release) == 0
        assert (tmp_path / LOCK).exists()
        with pytest.raises(WriteError):
            Lock(tmp_path).acquire()


@pytest.mark.parametrize(
    ("owner", "held"),
    [
        ({}, True),
        ({"pid": 2**22 + 1}, False),
        ({"boot_id": "another"}, False),
        ({"host": "another"}, True),
        (None, False),
    ],
)
def test_without_locks_of_the_kernel_the_owner_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: dict[str, object] | None, held: bool
) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    if owner is None:
        (tmp_path / LOCK).write_text("torn")
    else:
        lock = Lock(tmp_path).acquire()
        text = json.loads((tmp_path / LOCK).read_text()) | owner
        (tmp_path / LOCK).write_text(json.dumps(text))
        os.close(lock._fd)
    if held:
        with pytest.raises(WriteError, match="in use"):
            Lock(tmp_path).acquire()
    else:
        Lock(tmp_path).acquire().release()


def test_fifty_races(tmp_path: Path) -> None:
    """Six processes take the lock as often as they can; never two at once."""

    def work() -> None:
        got = 0
        while got < 50:
            try:
                with Lock(tmp_path):
                    (tmp_path / "inside").touch(exist_ok=False)
                    (tmp_path / "inside").unlink()
                    got += 1
            except WriteError:
                time.sleep(0)

    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work()
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6


def test_a_lock_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(WriteError):
        Lock(tmp_path / "nowhere").acquire()
    with Faults(1, errno.ENOSPC), pytest.raises(WriteError) as caught:
        Lock(tmp_path).acquire()
    assert caught.value.code == "QC-WRITE-003"
    with Lock(tmp_path):
        pass


def test_remove_tree_is_one_step_to_the_eye(tmp_path: Path) -> None:
    def start() -> Path:
        folder = tmp_path / "checkpoint-1"
        if not folder.exists():
            (folder / "sub").mkdir(parents=True)
            (folder / "sub" / "x").write_text("x")
            (folder / "y").symlink_to(tmp_path)
        return folder

    whole = sorted(p.name for p in start().rglob("*"))
    for n in range(count(lambda: remove_tree(start()))):
        folder = start()
        with Faults(n, errno.EIO), pytest.raises(WriteError):
            remove_tree(folder)
        assert not folder.exists() or sorted(p.name for p in folder.rglob("*")) == whole
    remove_tree(start())
    remove_tree(tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-1").exists()
