"""What a kill leaves is deleted by the next run of the same name, and nothing else is."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.faults import Faults, count, killed

from qcore.errors import WriteError
from qcore.io.artifact import MANIFEST, publish, verify
from qcore.io.atomic import make_folders, remove_tree, rewrite
from qcore.io.run_lock import LOCK, Lock


def make(target: Path, word: str = "new", *, overwrite: bool = False) -> None:
    with publish(target, kind="bundle", overwrite=overwrite) as out:
        out.write_text("note", word)


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def after(patch: pytest.MonkeyPatch, name: str, job: Callable[[], object]) -> None:
    """Run a job after the first call of ``os.NAME``, as another process may."""
    real, ran = getattr(os, name), [False]

    def call(*args: object, **kwargs: object) -> object:
        result = real(*args, **kwargs)
        if not ran[0]:
            ran[0] = True
            job()
        return result

    patch.setattr(os, name, call)


# -- a sweep beside a run that begins


def test_a_sweep_between_the_creation_of_a_folder_and_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after(monkeypatch, "mkdir", lambda: make(tmp_path / "out", "other"))
    with pytest.raises(WriteError) as error:
        make(tmp_path / "out")
    assert error.value.code == "QC-WRITE-001"  # the other run was faster; no folder was swept
    assert (tmp_path / "out" / "note").read_text() == "other"
    after(monkeypatch, "mkdir", lambda: make(tmp_path / "new", "other"))
    make(tmp_path / "second")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "new", "second"}


def test_a_folder_that_a_sweep_has_locked_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    def lock() -> None:
        (partial,) = tmp_path.glob(".out.partial-*")
        held.append(os.open(partial, os.O_RDONLY))
        fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)

    after(monkeypatch, "mkdir", lock)
    make(tmp_path / "out")
    assert verify(tmp_path / "out").ok
    os.close(held[0])


def test_a_parent_that_vanishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run that created the same parent failed, and deletes it while it is empty."""
    real = os.mkdir

    def mkdir(path: Path, *mode: int) -> None:
        if "partial" in str(path) and not (tmp_path / "seen").exists():
            (tmp_path / "seen").touch()
            shutil.rmtree(tmp_path / "deep")
        real(path, *mode)

    monkeypatch.setattr(os, "mkdir", mkdir)
    make(tmp_path / "deep" / "out")
    assert verify(tmp_path / "deep" / "out").ok


def test_a_parent_that_another_run_creates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.mkdir

    def mkdir(path: Path, *mode: int) -> None:
        real(path, *mode)
        real(path, *mode)  # as if another process had been faster

    monkeypatch.setattr(os, "mkdir", mkdir)
    assert make_folders(tmp_path / "a" / "b") == []
    assert (tmp_path / "a" / "b").is_dir()


# -- what is deleted, and what is not


def kinds(tmp_path: Path) -> None:
    """One leftover of each kind beside ``out``."""
    for kind in ("partial", "trash", "old"):
        folder = tmp_path / f".out.{kind}-0123456789abcdef"
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "x").write_text("x")
    (tmp_path / ".out.partial-0123456789abcde0").write_text("a file")


def test_every_kind_goes_at_the_next_start(tmp_path: Path) -> None:
    kinds(tmp_path)
    make(tmp_path / "out")
    assert hidden(tmp_path) == []


def test_the_replaced_artifact_stays_until_there_is_a_new_one(tmp_path: Path) -> None:
    kinds(tmp_path)
    with publish(tmp_path / "out", kind="bundle") as out:
        assert [name for name in hidden(tmp_path) if "old" in name]
        out.write_text("note", "new")
    assert hidden(tmp_path) == []


NAMES = {
    "a prefix": ("out", "out.partial-b"),
    "the same first 100 letters": ("x" * 100 + "1", "x" * 100 + "2"),
    "long names": ("ü" * 100 + "1", "ü" * 100 + "2"),
}


@pytest.mark.parametrize("names", NAMES.values(), ids=[*NAMES])
def test_leftovers_of_another_name_stay(tmp_path: Path, names: tuple[str, str]) -> None:
    mine, other = (tmp_path / name for name in names)
    make(other, "first")
    calls = count(lambda: make(other, "second", overwrite=True))
    for at in range(calls):  # the kill between the renames leaves the only copy beside the target
        if killed(lambda: make(other, "third", overwrite=True), at) and not other.exists():
            break
    left = hidden(tmp_path)
    assert len(left) == 2
    make(mine)
    assert hidden(tmp_path) == left
    make(other, "fourth")
    assert hidden(tmp_path) == []


def test_a_long_name_is_published(tmp_path: Path) -> None:
    target = tmp_path / ("ü" * 127)
    make(target)
    make(target, overwrite=True)
    remove_tree(target)
    assert list(tmp_path.iterdir()) == []


# -- single files


def test_two_processes_rewrite_one_file(tmp_path: Path) -> None:
    path = tmp_path / "stamps.json"

    def chunks() -> Iterator[bytes]:
        yield b"outer, "
        rewrite(path, [b"inner"])
        assert path.read_bytes() == b"inner"
        yield b"whole"

    rewrite(path, chunks())
    assert path.read_bytes() == b"outer, whole"
    assert [one.name for one in tmp_path.iterdir()] == ["stamps.json"]


def test_a_rewrite_that_was_killed_leaves_nothing_for_long(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for at in range(count(lambda: rewrite(path, [b"old"]))):
        killed(lambda: rewrite(path, [b"new"]), at)
        assert path.read_bytes() in (b"old", b"new")
        rewrite(path, [b"old"])
        assert [one.name for one in tmp_path.iterdir()] == ["plan.json"]
    with Faults(1, errno.ENOSPC), pytest.raises(WriteError) as error:
        rewrite(path, [b"new"])
    assert error.value.code == "QC-WRITE-003"
    assert path.read_bytes() == b"old"


# -- the lock of a folder that is deleted


def test_a_folder_that_vanishes_between_its_creation_and_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "deep" / "out.run"
    after(monkeypatch, "mkdir", lambda: shutil.rmtree(tmp_path / "deep"))
    with Lock(folder, create=True):
        assert (folder / LOCK).exists()


def test_the_lock_of_a_new_folder_is_not_released_by_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "out.run"
    first = Lock(folder, create=True).acquire()
    remove_tree(folder)
    second = Lock(folder, create=True).acquire()
    first.release()
    with pytest.raises(WriteError, match="in use"):
        Lock(folder).acquire()
    second.release()


def test_races_for_a_folder_that_each_owner_deletes(tmp_path: Path) -> None:
    """Six processes create, lock and delete one folder; never two at once."""
    folder = tmp_path / "out.run"

    def work() -> None:
        got = 0
        while got < 40:
            try:
                with Lock(folder, create=True):
                    (tmp_path / "inside").touch(exist_ok=False)
                    (tmp_path / "inside").unlink()
                    remove_tree(folder)
                    got += 1
            except WriteError as error:
                if error.code != "QC-WRITE-010":
                    raise
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
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_is_the_name_that_artifacts_have() -> None:
    assert MANIFEST == "MANIFEST.json"
