"""Starts commands in forked copies of a process that has imported everything they import.

This file decides how a command starts: in a process group of its own, with its output in files,
armed with a fault after the fork. Importing torch takes seconds and a fork takes milliseconds.
Run as ``python -m torture.server``: one JSON request a line on standard input, for each a line
with the process id on standard output, and another with how it ended. `client` is the other end.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from torture.programs import PROGRAMS

#: Imported before the first command, which would otherwise take ten seconds.
_FIRST = ("qcore.cli.main", "qcore.training.train", "qcore.merging.merge", "transformers")


def _import_all(path: Path) -> None:
    """Import the modules that a command had imported, named one a line."""
    for name in path.read_text("utf-8").split():
        if name not in sys.modules and name != "__main__":
            with contextlib.suppress(Exception):  # such as those of a test of the package itself
                importlib.import_module(name)


def _status(code: object) -> int:
    if code is None:
        return 0
    return code if isinstance(code, int) else 1


def _run(request: dict[str, Any]) -> NoReturn:
    """The command, in this process; never returns."""
    os.setsid()
    for stream, number in (("out", 1), ("err", 2)):
        fd = os.open(request[stream], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(fd, number)
        os.close(fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    if request["control"]:
        os.environ["TORTURE_CONTROL"] = request["control"]
        ctypes.CDLL(None).torture_arm(request["control"].encode())
    code: object = 1
    try:
        PROGRAMS[request["program"]](request["arguments"], request["options"])
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001, as the interpreter itself ends a process
        traceback.print_exc()
    if request["modules"]:
        Path(request["modules"]).write_text("\n".join(sys.modules), "utf-8")
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_status(code))


def serve() -> None:
    """Answer requests until standard input is closed."""
    for name in _FIRST:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        begun = time.monotonic()
        child = os.fork()
        if child == 0:
            _run(request)
        print(json.dumps({"pid": child}), flush=True)
        _, ended = os.waitpid(child, 0)
        answer = {"status": os.waitstatus_to_exitcode(ended), "seconds": time.monotonic() - begun}
        if request["modules"] and Path(request["modules"]).exists():
            _import_all(Path(request["modules"]))
            gc.collect()
            gc.freeze()  # a child that collects would otherwise copy every page
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
