"""The one writer: whole or not at all under every fault; verify sees every change."""

# A publish block is the statement under test, and a fault may end it either way.
# ruff: noqa: PT012, PT017

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import shutil
from functools import partial
from pathlib import Path

import pytest
from support.faults import KILL, TORN, Faults, count, killed

from qcore.errors import InputError, WriteError
from qcore.io import artifact
from qcore.io.artifact import MANIFEST, Writer, check_target, publish, read_manifest, verify

BLOB = bytes(range(256)) * 40


def fill(out: Writer, word: str = "new") -> None:
    """Use every way to write."""
    out.meta["word"] = word
    out.write_json("config.json", {"word": word})
    out.write_text("note.txt", f"{word} ä\n")
    with out.stream("model.safetensors") as stream:
        for part in (BLOB, memoryview(BLOB)[1:77], b""):
            stream.write(part)
    out.write_bytes("sub/a.bin", b"a")
    out.write_bytes("sub/b.bin", b"")


def make(path: Path, word: str = "new", *, overwrite: bool = False) -> None:
    with publish(path, kind="bundle", overwrite=overwrite) as out:
        fill(out, word)


def tree(path: Path) -> dict[str, bytes | None]:
    """Every name below a folder, hidden ones too, with its bytes."""
    return {
        str(p.relative_to(path)): p.read_bytes() if p.is_file() else None
        for p in sorted(path.rglob("*"))
    }


def test_what_is_published(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(BLOB * 500)  # more than one chunk of a copy
    target = tmp_path / "deep" / "er" / "out"
    with publish(target) as out:
        fill(out)
        out.copy("copied.bin", source)
        assert not target.exists()
    assert {p.name for p in target.parent.iterdir()} == {"out"}
    assert (target / "copied.bin").read_bytes() == BLOB * 500
    assert (target / "model.safetensors").read_bytes() == BLOB + BLOB[1:77]
    assert json.loads((target / "config.json").read_text()) == {"word": "new"}
    manifest = json.loads((target / MANIFEST).read_text())
    assert (manifest["format_version"], manifest["kind"]) == (1, "adapter")
    assert manifest["meta"] == {"word": "new"}
    for name, entry in manifest["files"].items():
        data = (target / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    seen: list[tuple[int, int]] = []
    report = verify(target, progress=lambda done, total: seen.append((done, total)))
    assert report.ok
    assert (report.kind, report.files, report.problems) == ("adapter", 6, [])
    assert seen[-1] == (report.size, report.size)
    assert read_manifest(target).meta == {"word": "new"}


def test_permissions_are_the_users(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        make(tmp_path / "out")
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out" / "config.json").stat().st_mode & 0o777 == 0o640


def test_items_of_any_type_are_written_as_bytes(tmp_path: Path) -> None:
    import array

    floats = array.array("f", [1.0, 2.0])
    with publish(tmp_path / "out") as out, out.stream("x") as stream:
        assert stream.write(memoryview(floats)) == 8
    assert (tmp_path / "out" / "x").read_bytes() == floats.tobytes()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
def test_an_exception_of_the_caller_leaves_nothing(tmp_path: Path, error: type) -> None:
    target = tmp_path / "a" / "out"
    with pytest.raises(error), publish(target) as out:
        fill(out)
        raise error
    assert tree(tmp_path) == {}


def test_a_file_that_failed_is_not_listed(tmp_path: Path) -> None:
    with publish(tmp_path / "out") as out:
        with pytest.raises(ValueError), out.stream("x") as stream:
            stream.write(b"half")
            raise ValueError
        out.write_bytes("x", b"whole")
    assert verify(tmp_path / "out").ok
    assert (tmp_path / "out" / "x").read_bytes() == b"whole"


# Targets.


def test_an_empty_folder_is_a_target_and_a_full_one_is_not(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    check_target(target)
    make(target)
    before = tree(tmp_path)
    for ask in (lambda: check_target(target), lambda: make(target)):
        with pytest.raises(WriteError, match="is not empty") as caught:
            ask()
        assert (caught.value.code, caught.value.exit_code) == ("QC-WRITE-001", 73)
    assert tree(tmp_path) == before


def test_only_an_artifact_is_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"
    make(target, "old")
    make(target, "new", overwrite=True)
    assert verify(target).meta == {"word": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (target / MANIFEST).unlink()
    with pytest.raises(WriteError, match="qcore does not replace it"):
        make(target, overwrite=True)


def test_a_link_is_followed_to_its_folder(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "disk" / "out")
    make(link)
    assert link.is_symlink()
    assert verify(link).ok
    assert verify(tmp_path / "disk" / "out").ok


def test_targets_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path, code in (
        (tmp_path / "file", "002"),
        (tmp_path / "file" / "out", "002"),
        ("/", "002"),
    ):
        with pytest.raises(WriteError) as caught:
            make(Path(path))
        assert caught.value.code == f"QC-WRITE-{code}"
    with pytest.raises(WriteError) as caught:
        make(tmp_path / ("x" * 300))
    assert caught.value.exit_code == 73
    with pytest.raises(WriteError, match="too little free space") as caught:
        check_target(tmp_path / "out", need_bytes=1 << 60)
    assert caught.value.code == "QC-WRITE-007"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(WriteError) as caught:
        check_target(tmp_path / "out")
    tmp_path.chmod(0o700)
    assert caught.value.code == "QC-WRITE-005"


def test_a_target_filled_meanwhile(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(WriteError, match="meanwhile") as caught, publish(target):
        target.mkdir()
        (target / "theirs").write_text("x")
    assert caught.value.code == "QC-WRITE-001"
    assert tree(tmp_path) == {"out": None, "out/theirs": b"x"}


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "a/../x", "./x", "a//x", "a/b/c", "", "a/", ".", "..", "a\\b", "C:x", "a\0b",
     "a\nb", "x" * 256, "\udc80", MANIFEST],
)  # fmt: skip
def test_unsafe_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(WriteError) as caught, publish(tmp_path / "out") as out:
        out.write_bytes(name, b"")
    assert caught.value.code == "QC-WRITE-008"
    assert tree(tmp_path) == {}


def test_a_name_twice(tmp_path: Path) -> None:
    with pytest.raises(WriteError) as caught, publish(tmp_path / "out") as out:
        out.write_bytes("x", b"1")
        out.write_bytes("x", b"2")
    assert caught.value.code == "QC-WRITE-009"


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_a_source_that_cannot_be_copied(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source"
    if kind == "folder":
        source.mkdir()
    elif kind == "pipe":
        os.mkfifo(source)
    with (
        pytest.raises(InputError, match="cannot be read") as caught,
        publish(tmp_path / "o") as out,
    ):
        out.copy("x", source)
    assert caught.value.code == "QC-READ-001"
    assert not (tmp_path / "o").exists()


# Faults. `before` is the state that a failure must leave.


def _start(tmp_path: Path, case: str) -> Path:
    shutil.rmtree(tmp_path / "w", ignore_errors=True)
    (tmp_path / "w").mkdir()
    target = tmp_path / "w" / "out"
    if case == "parents":
        return tmp_path / "w" / "a" / "b" / "out"
    if case == "empty":
        target.mkdir()
    elif case == "over":
        make(target, "old")
    return target


CASES = ["fresh", "parents", "empty", "over"]
#: A sweep over system calls takes every fifth of them, or all.
STEPS = pytest.mark.parametrize(
    "step",
    [pytest.param(5, id="sample"), pytest.param(1, id="all", marks=pytest.mark.slow)],
)


@STEPS
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_every_call_fails_in_turn(tmp_path: Path, case: str, number: int, step: int) -> None:
    target = _start(tmp_path, case)
    calls = count(lambda: make(target, overwrite=True))
    assert calls > 20
    points, refused = range(0, calls, step), 0
    for n in points:
        target = _start(tmp_path, case)
        before = tree(tmp_path)
        try:
            with Faults(n, number):
                make(target, overwrite=True)
        except WriteError as error:
            refused += 1
            code = {errno.ENOSPC: "003", errno.EIO: "004", errno.EACCES: "005"}[number]
            assert error.code == f"QC-WRITE-{code}", n
            assert "\n" not in error.message
            assert tree(tmp_path) == before, n
        else:  # only what tidies up after the new one stands may fail unsaid
            assert case == "over"
            assert verify(target).meta == {"word": "new"}
    assert refused >= len(points) - 10
    assert refused == len(points) or case == "over"
    assert refused > 0


@STEPS
@pytest.mark.parametrize("case", CASES)
def test_a_disk_that_stays_broken(tmp_path: Path, case: str, step: int) -> None:
    calls = count(lambda: make(_start(tmp_path, case), overwrite=True))
    for n in range(0, calls, step):
        target = _start(tmp_path, case)
        old = verify(target).meta if case == "over" else None
        try:
            with Faults(n, errno.EIO, onwards=True):
                make(target, overwrite=True)
        except WriteError:
            pass
        _whole(target, case, old)


@STEPS
@pytest.mark.parametrize("action", [KILL, TORN])
@pytest.mark.parametrize("case", CASES)
def test_killed_at_every_call(tmp_path: Path, case: str, action: int, step: int) -> None:
    target = _start(tmp_path, case)
    calls = count(lambda: make(target, overwrite=True))
    points, deaths = range(0, calls, step), 0
    for n in points:
        target = _start(tmp_path, case)
        old = verify(target).meta if case == "over" else None
        deaths += killed(partial(make, target, overwrite=True), n, action)
        _whole(target, case, old)
        make(target, "next", overwrite=True)
        assert verify(target).meta == {"word": "next"}
        assert [p.name for p in target.parent.iterdir()] == ["out"], "leftovers are swept"
    assert deaths == len(points)


def _whole(target: Path, case: str, old: object) -> None:
    """The target is the complete old, the complete new, or absent (empty where it was)."""
    if target.is_dir() and any(target.iterdir()):
        report = verify(target)
        assert report.ok, report.problems
        assert report.meta in ({"word": "new"}, old)
    else:
        assert target.exists() == (case == "empty") or case in ("empty", "over")


def test_bytes_are_durable_before_the_name(tmp_path: Path) -> None:
    """The recorded calls: no rename before every file and folder of it is synced."""
    target = tmp_path / "a" / "b" / "out"
    with Faults() as faults:
        make(target)
    named: dict[int, str] = {}
    unsynced: set[str] = set()
    renamed = False
    for name, args, result in faults.log:
        if name == "open":
            named[result] = str(args[0])
            if args[1] & os.O_CREAT:
                unsynced |= {named[result], os.path.dirname(named[result])}
        elif name == "write":
            unsynced.add(named[args[0]])
        elif name == "mkdir":
            unsynced.add(str(args[0]))
            if ".partial-" not in str(args[0]):  # that one's name is not to last
                unsynced.add(os.path.dirname(args[0]))
        elif name == "fsync":
            unsynced.discard(named[args[0]])
        elif name == "rename":
            assert not unsynced - {str(target.parent)}
            unsynced.add(os.path.dirname(args[1]))
            renamed = True
    assert renamed
    assert not unsynced, "the parents are synced at the end"


@pytest.mark.parametrize("limit", [0, 1, 17, 5000, len(BLOB) + 75])
def test_a_real_short_write(tmp_path: Path, limit: int) -> None:
    """The kernel writes a part and then refuses (a file size limit, in a child)."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            make(tmp_path / "out")
        except WriteError as error:
            status = 0 if error.code == "QC-WRITE-003" else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert tree(tmp_path) == {}


def test_what_a_living_run_writes_is_not_swept(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="meanwhile"), publish(tmp_path / "out") as first:
        first.write_bytes("x", b"1")
        make(tmp_path / "out", "second")
        first.write_bytes("y", b"2")
    assert verify(tmp_path / "out").meta == {"word": "second"}


def test_leftovers_go_before_the_disk_is_needed_again(tmp_path: Path) -> None:
    assert killed(lambda: make(tmp_path / "out"), 10)
    (left,) = tmp_path.iterdir()
    with publish(tmp_path / "out"):
        assert not left.exists()


# Verify.


def test_two_hundred_flipped_bits(tmp_path: Path) -> None:
    target = tmp_path / "out"
    make(target)
    files = [p for p in sorted(target.rglob("*")) if p.is_file() and p.stat().st_size]
    dice = random.Random(5)
    for n in range(200):
        path = files[n % len(files)]
        data = bytearray(path.read_bytes())
        bit = dice.randrange(len(data) * 8)
        data[bit // 8] ^= 1 << bit % 8
        good = path.read_bytes()
        path.write_bytes(data)
        report = verify(target)
        assert not report.ok, (path, bit)
        assert path.name in report.problems[0]
        path.write_bytes(good)
    assert verify(target).ok


def _link(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to(folder.parent / "config.json")


def _linked_folder(folder: Path) -> None:
    (folder / "sub").rename(folder.parent / "sub")
    (folder / "sub").symlink_to(folder.parent / "sub")


def _pipe(folder: Path) -> None:
    (folder / "note.txt").unlink()
    os.mkfifo(folder / "note.txt")


def _grow(folder: Path) -> None:
    with (folder / "note.txt").open("a") as file:
        file.write("x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "note.txt").unlink(), "note.txt: missing"),
        (lambda f: (f / "note.txt").rename(f / "nota.txt"), "note.txt: missing"),
        (_link, "config.json: a link that leaves the folder"),
        (_linked_folder, "sub/a.bin: a link that leaves the folder"),
        (_pipe, "note.txt: not a plain file"),
        (_grow, "note.txt: 8 bytes, expected"),
        (lambda f: (f / "sub" / "b.bin").write_bytes(b"1"), "sub/b.bin: 1 bytes, expected 0"),
        (lambda f: (f / MANIFEST).unlink(), "has no MANIFEST.json"),
        (lambda f: (f / MANIFEST).write_bytes(b""), "is not JSON"),
        (lambda f: (f / MANIFEST).write_bytes(b"[" * 100_000), "is not JSON"),
        (lambda f: (f / MANIFEST).write_bytes(b"[]"), "is not a mapping"),
    ],
)
def test_changes_are_seen(tmp_path: Path, change: object, words: str) -> None:
    target = tmp_path / "out"
    make(target)
    change(target)  # type: ignore[operator]
    report = verify(target)
    assert not report.ok
    assert any(words in problem for problem in report.problems), report.problems
    assert not any("\n" in problem for problem in report.problems)


def _forge(target: Path, **changes: object) -> None:
    """Write a manifest with changed values whose own digest is right."""
    payload = json.loads((target / MANIFEST).read_text()) | {"manifest_sha256": "0" * 64}
    payload |= changes
    text = json.dumps(payload, indent=2) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    head, _, tail = text.rpartition("0" * 64)
    (target / MANIFEST).write_text(head + digest + tail)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"format_version": 2}, "later format"),
        ({"format_version": "1"}, "other keys"),
        ({"more": 1}, "other keys"),
        ({"kind": 3}, "wrong type"),
        ({"meta": []}, "wrong type"),
        ({"files": []}, "lists no files"),
        ({"files": {"x": {"size": -1, "sha256": "0" * 64}}}, "no size"),
        ({"files": {"x": {"size": True, "sha256": "0" * 64}}}, "no size"),
        ({"files": {"x": {"size": 1, "sha256": "../x"}}}, "no digest"),
        ({"files": {"../secret": {"size": 1, "sha256": "0" * 64}}}, "not plain"),
        ({"files": {"/etc/passwd": {"size": 1, "sha256": "0" * 64}}}, "absolute"),
        ({"files": {"C:\\x": {"size": 1, "sha256": "0" * 64}}}, "absolute"),
        ({"files": {MANIFEST: {"size": 1, "sha256": "0" * 64}}}, "own name"),
    ],
)
def test_forged_manifests(tmp_path: Path, changes: dict[str, object], words: str | None) -> None:
    target = tmp_path / "out"
    make(target)
    (tmp_path / "secret").write_text("x")
    _forge(target, **changes)
    report = verify(target)
    if words is None:
        assert report.ok
        return
    assert words in report.problems[0]
    with pytest.raises(InputError, match=words) as caught:
        read_manifest(target)
    assert (caught.value.exit_code, caught.value.code[:12]) == (65, "QC-MANIFEST-")


def test_a_key_twice_in_the_manifest(tmp_path: Path) -> None:
    make(tmp_path / "out")
    path = tmp_path / "out" / MANIFEST
    path.write_text(path.read_text().replace('"kind"', '"kind": "x", "kind"'))
    assert "not JSON as qcore writes it" in verify(tmp_path / "out").problems[0]


def test_no_folder_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        verify(tmp_path / "nowhere")
    assert caught.value.code == "QC-MANIFEST-001"


def test_no_file_of_a_broken_manifest_is_opened(tmp_path: Path) -> None:
    target = tmp_path / "out"
    make(target)
    _forge(target, files={"../secret": {"size": 1, "sha256": "0" * 64}})
    with Faults() as faults:
        verify(target)
    assert not [args for name, args, _ in faults.log if name == "open"]


def test_everything_public_is_exported() -> None:
    assert all(hasattr(artifact, name) for name in artifact.__all__)
