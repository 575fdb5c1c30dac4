"""What the host can give to inputs that wait there: the system's word and a container's."""

from __future__ import annotations

from pathlib import Path

from qcore.planning.host_memory import available, most_pinned, pinned


def test_pinned_blocks_are_powers_of_two() -> None:
    assert (pinned(1024, 3), pinned(1025, 3), pinned(0, 3), pinned(1025, 0)) == (3072, 6144, 0, 0)
    for room in (0, 2, 3, 4096, 10**9 + 7):
        size = most_pinned(room, 3)
        assert pinned(size, 3) <= room < pinned(size + 1, 3)


def test_what_the_host_has(tmp_path: Path) -> None:
    table, group, own = (tmp_path / name for name in ("meminfo", "cgroup", "own"))
    assert available(table, group, own) is None
    table.write_text("MemTotal:  9000 kB\nMemAvailable:  4000 kB\n")
    assert available(table, group, own) == 4096000
    group.mkdir()
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("5000\n")
    assert available(table, group, own) == 4096000
    (group / "memory.max").write_text("8000\n")
    assert available(table, group, own) == 3000
    (group / "memory.max").write_text("4000\n")
    assert available(table, group, own) == 0


def test_cached_files_are_given_up_when_memory_is_asked_for(tmp_path: Path) -> None:
    """A base of 70 GB that was read fills a container's count, and stands in nobody's way."""
    (tmp_path / "memory.max").write_text("100000\n")
    (tmp_path / "memory.current").write_text("95000\n")
    nowhere = tmp_path / "none"
    assert available(nowhere, tmp_path, nowhere) == 5000
    (tmp_path / "memory.stat").write_text("anon 5000\nfile 90000\ninactive_file 60000\n"
                                          "active_file 30000\n")  # fmt: skip
    assert available(nowhere, tmp_path, nowhere) == 95000


def test_a_limit_of_any_group_above_holds(tmp_path: Path) -> None:
    group, own = tmp_path / "cgroup", tmp_path / "own"
    inner = group / "slurm" / "job_7"
    inner.mkdir(parents=True)
    own.write_text("0::/slurm/job_7\n")
    for folder, most in ((inner, "max"), (group / "slurm", "9000"), (tmp_path, "1")):
        (folder / "memory.max").write_text(most)
        (folder / "memory.current").write_text("2000")
    assert available(tmp_path / "none", group, own) == 7000
    (inner / "memory.max").write_text("2500")
    assert available(tmp_path / "none", group, own) == 500
