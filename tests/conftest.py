"""Fixtures that every area shares, and the peak memory of each worker."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from support.conversations import conversations, write_rows
from support.hub_server import HubServer

if not list(Path("/dev").glob("nvidia[0-9]*")):
    # Without a card Triton's kernels run in its interpreter. Triton reads this at its first
    # import, which any test may cause (bitsandbytes imports it), so it is set before them all.
    os.environ["TRITON_INTERPRET"] = "1"

# No test reads the tokens that another one has kept; those of the store name a folder of their own.
os.environ["QCORE_DATA_CACHE_GB"] = "0"

#: Peak resident memory that a worker of the tests without a GPU may reach.
WORKER_GIB = 4.0
_GIB = 2**20  # in the unit of ru_maxrss, KiB
_RAISED: dict[str, float] = {}  # test -> GiB by which it raised this process's peak
_PEAKS = pytest.StashKey[list[tuple[str, float, dict[str, float]]]]()


def peak() -> float:
    """Peak resident memory of this process, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _GIB


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Records by how much a test raised the peak."""
    before = peak()
    result = yield
    if (more := peak() - before) > 0.1:
        _RAISED[item.nodeid] = more
    return result


def pytest_configure(config: pytest.Config) -> None:
    """Peaks of all workers are collected in the process that reports."""
    config.stash[_PEAKS] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker sends its peak home; the process that reports holds all peaks to the limit."""
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["memory"] = (peak(), _RAISED)
        return
    if not config.stash[_PEAKS]:  # no workers
        config.stash[_PEAKS].append(("main", peak(), _RAISED))
    if session.exitstatus == 0 and too_large(config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """Of xdist: a worker has ended."""
    output = getattr(node, "workeroutput", {})
    if "memory" in output:
        node.config.stash[_PEAKS].append((node.gateway.id, *output["memory"]))  # type: ignore[attr-defined]


def too_large(config: pytest.Config) -> list[str]:
    """Workers above the limit; tests on a GPU may hold more."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return []
    return [worker for worker, most, _ in config.stash[_PEAKS] if most > WORKER_GIB]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the peaks, and the tests that raised them most."""
    config = terminalreporter.config
    for worker, most, raised in sorted(config.stash[_PEAKS]):
        terminalreporter.write_line(f"peak memory of {worker}: {most:.2f} GiB")
        for test, more in sorted(raised.items(), key=lambda pair: -pair[1])[:5]:
            terminalreporter.write_line(f"  +{more:.2f} GiB {test}")
    for worker in too_large(config):
        terminalreporter.write_line(f"FAILED: {worker} took more than {WORKER_GIB} GiB", red=True)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m gpu``, import only files that hold the mark.

    The others take a minute to import, and need packages that a GPU machine may not have.
    """
    if config.option.markexpr != "gpu" or not collection_path.match("test_*.py"):
        return None
    return True if "pytest.mark.gpu" not in collection_path.read_text("utf-8") else None


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real configs, templates, tokenizer and key lists; skips where absent."""
    named = os.environ.get("QCORE_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "skus").is_dir():
        pytest.skip("reference files are not beside the checkout (set QCORE_SHARED)")
    return folder


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """``once(name, write)``: the folder that ``write(folder)`` fills, made once for all workers.

    What is in it belongs to every test: at the end nothing of it may have changed.
    """
    home = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        home = home.parent  # of the session, not of this worker
    home = home / "once"
    home.mkdir(exist_ok=True)
    made: dict[Path, dict[str, tuple[int, int]]] = {}

    def make(name: str, write: Callable[[Path], object]) -> Path:
        folder, done = home / name, home / f"{name}.done"
        with FileLock(home / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # left by a `write` that raised
                folder.mkdir()
                write(folder)
                done.touch()
        made.setdefault(folder, _state(folder))
        return folder

    yield make
    for folder, state in made.items():
        assert _state(folder) == state, f"a test changed {folder}, which all tests share"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A small model hub on loopback; run the client in a subprocess with ``hub.env(home)``."""
    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Multi-turn, thinking, tool calls (arguments as mapping and as string), system turns."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", conversations(24))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums are added in one order, whatever ran before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
