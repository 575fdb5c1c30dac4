"""Record what one installed qcore writes and prints: ``python tests/goldens/record.py OUT``.

This file decides how the cases are run and what a record folder holds:

* ``record.json``: format, scratch folder, versions of the packages that decide numbers, and
  how long the record took;
* ``json/NAME.json``: the object that ``--json`` printed;
* ``status.json``: exit status by case;
* ``plain.json``: of cases that must fail, run without ``--json``: exit status and error codes;
* ``options.json`` and ``help/``: verbs and options of every ``--help``, and its text;
* ``artifacts/`` and ``sha256.json``: every file of the folders that a case keeps.

All runs take place in one scratch folder, emptied first, because adapters name the absolute path
of their base: two records can be compared only if their scratch folders have the same path.
Results depend on the machine and on torch, so both records are made on one machine.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from goldens.case import GROUPS, Case, Chain
from goldens.cases import CASES, CHAINS
from goldens.edits import write_json
from goldens.inputs import make_inputs
from goldens.run_cases import DEMOS

FORMAT = 1
#: Packages whose versions decide numbers and messages; those of qcore itself may differ.
_PACKAGES = (
    "torch", "triton", "numpy", "safetensors", "tokenizers", "transformers", "bitsandbytes",
    "pillow", "av", "huggingface-hub", "click",
)  # fmt: skip
_LIMIT = 900.0  # seconds that one command may take
_CODE = re.compile(r"^error\[(QC-[A-Z0-9]+-\d{3})\]", re.MULTILINE)
_OPTION = re.compile(r"^ +(?:-\w, )?(--[a-z0-9-]+)", re.MULTILINE)
_VERB = re.compile(r"^  ([a-z][a-z0-9-]*)(?:  |$)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """Runs the qcore of one environment in a scratch folder.

    Attributes:
        python: the interpreter of the environment.
        scratch: the folder that commands run in.
    """

    python: Path
    scratch: Path

    def __call__(self, name: str, words: Sequence[str], **env: str) -> Ended:
        """``qcore WORDS`` with a home and caches of its own."""
        home = self.scratch / "home" / name
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        fixed = {
            "PATH": os.environ.get("PATH", ""),
            "HOME": str(home),
            "TMPDIR": str(home / "tmp"),
            "XDG_CACHE_HOME": str(home / "cache"),
            "LC_ALL": "C.UTF-8",
            "COLUMNS": "80",
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        }
        done = subprocess.run(
            [self.python, "-m", "qcore", *words],
            cwd=self.scratch, env=fixed | env, capture_output=True, text=True, timeout=_LIMIT,
            check=False,
        )  # fmt: skip
        return Ended(done.returncode, done.stdout, done.stderr)


class Record:
    """A record folder that is being filled; cases of several threads write to it."""

    def __init__(self, folder: Path, runner: Runner) -> None:
        self.folder = folder
        self.run = runner
        self.status: dict[str, int] = {}
        self.plain: dict[str, dict[str, object]] = {}
        self.sha256: dict[str, str] = {}
        self.unexpected: list[str] = []
        for name in ("json", "help", "artifacts"):
            (folder / name).mkdir(parents=True)

    def chain(self, chain: Chain) -> None:
        """Run cases that build on one another."""
        for case in chain:
            self._case(case)

    def _case(self, case: Case) -> None:
        began = time.monotonic()
        if case.prepare is not None:
            case.prepare(self.run.scratch)
        ended = self.run(case.name, [*case.words, "--json"], **case.env)
        self.status[case.name] = ended.status
        code = self._json(case.name, ended)
        if code != case.code or (ended.status == 0) != (case.code == ""):
            end = f"exit status {ended.status} {code}: {ended.out[-300:]} {ended.err[-300:]}"
            self.unexpected.append(f"{case.name}: expected {case.code or 'success'}, {end}")
        if case.code:
            without = self.run(case.name, case.words, **case.env)
            codes = _CODE.findall(without.err)
            self.plain[case.name] = {"status": without.status, "codes": codes}
        for kept in case.keeps:
            self._keep(kept)
        print(f"{time.monotonic() - began:6.1f} s  {case.name}", file=sys.stderr)

    def _json(self, name: str, ended: Ended) -> str:
        """Store what was printed; the error code in it, or nothing."""
        try:
            value = json.loads(ended.out)
        except ValueError:
            value = {"not_json": ended.out, "stderr": ended.err}
        write_json(self.folder / "json" / f"{name}.json", value)
        error = value.get("error") if isinstance(value, dict) else None
        return str(error.get("code", "")) if isinstance(error, dict) else ""

    def _keep(self, kept: str) -> None:
        for path in sorted((self.run.scratch / kept).rglob("*")):
            if path.is_file():
                name = path.relative_to(self.run.scratch).as_posix()
                copy = self.folder / "artifacts" / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
                self.sha256[name] = digest(copy)

    def helps(self) -> None:
        """Verbs and options of every ``--help``."""
        options: dict[str, dict[str, list[str]]] = {}
        queue = [""]
        while queue:
            verb = queue.pop(0)
            text = self.run("help", [*verb.split(), "--help"]).out
            (self.folder / "help" / f"{verb.replace(' ', '-') or 'qcore'}.txt").write_text(text)
            commands = text.partition("\nCommands:\n")[2]
            verbs = sorted(set(_VERB.findall(commands)))
            options[verb or "qcore"] = {
                "options": sorted(set(_OPTION.findall(text))), "verbs": verbs,
            }  # fmt: skip
            if not verb or verb in GROUPS:
                queue += [f"{verb} {name}".strip() for name in verbs]
        write_json(self.folder / "options.json", options)

    def finish(self, seconds: float) -> None:
        """Write what was collected."""
        order = [case.name for case in CASES]
        write_json(self.folder / "status.json", {name: self.status[name] for name in order})
        write_json(self.folder / "plain.json", dict(sorted(self.plain.items())))
        write_json(self.folder / "sha256.json", dict(sorted(self.sha256.items())))
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        facts = {
            "format": FORMAT,
            "scratch": str(self.run.scratch),
            "packages": _packages(self.run.python),
            "seconds": round(seconds, 1),
            "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        }
        write_json(self.folder / "record.json", facts)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _packages(python: Path) -> dict[str, str | None]:
    """Versions of the packages of an environment; ``None``: not installed."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "def version(name):\n"
        "    try:\n        return m.version(name)\n"
        "    except m.PackageNotFoundError:\n        return None\n"
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))\n"
    )
    done = subprocess.run(
        [python, "-c", code, *_PACKAGES], capture_output=True, text=True, check=True
    )
    versions: dict[str, str | None] = json.loads(done.stdout)
    return versions


@contextmanager
def _alone(scratch: Path) -> Iterator[None]:
    """Empty the scratch folder, and wait for another record that uses it."""
    scratch.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{scratch}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(mode=0o700)
        yield
        shutil.rmtree(scratch)


def record(out: Path, python: Path, inputs: Path, scratch: Path, jobs: int) -> list[str]:
    """Make a record; a line for each case that ended otherwise than it must.

    Args:
        out: the folder of the record, absent or empty.
        python: the interpreter of the environment that is recorded.
        inputs: the input files; made from this version's demo checkpoints where absent.
        scratch: the folder in which commands run.
        jobs: chains that run beside one another.
    """
    began = time.monotonic()
    with _alone(scratch), ThreadPoolExecutor(jobs) as pool:
        made = Record(out, Runner(python=python, scratch=scratch))
        list(pool.map(made.chain, DEMOS))
        if not inputs.exists():
            dense, moe = (scratch / chain[0].name / "base" for chain in DEMOS)
            partial = inputs.with_name(f"{inputs.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            make_inputs(dense, moe, partial)
            partial.rename(inputs)
        shutil.copytree(inputs, scratch / "inputs")
        list(pool.map(made.chain, CHAINS))
        made.helps()
        made.finish(time.monotonic() - began)
    return made.unexpected


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Record what an installed qcore writes.")
    parser.add_argument("out", type=Path, help="folder of the record; absent or empty")
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    parser.add_argument("--inputs", type=Path, help="input files, by default beside OUT")
    default = Path(tempfile.gettempdir()) / "qcore-goldens"
    parser.add_argument("--scratch", type=Path, default=default)
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time")
    arguments = parser.parse_args()
    if arguments.out.exists() and any(arguments.out.iterdir()):
        parser.error(f"{arguments.out} is not empty")
    inputs = arguments.inputs or arguments.out.resolve().parent / "inputs"
    # A symlink to the interpreter is not resolved: it is what makes it the environment's.
    python = arguments.python.absolute()
    unexpected = record(
        arguments.out.resolve(), python, inputs.resolve(), arguments.scratch, arguments.jobs
    )
    for line in unexpected:
        print(line)
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
