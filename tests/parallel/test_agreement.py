"""Errors and signals of one rank end all of them; ranks that differ are refused by field."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from qcore.errors import InputError
from qcore.io.stop_signals import StopNow
from qcore.parallel.agreement import check_same, together, turns
from qcore.parallel.world import World

CHILD = """
import json
import torch
from qcore.errors import InputError, QcoreError, WriteError
from qcore.io.stop_signals import StopNow
from qcore.parallel.agreement import check_same, together, turns
from qcore.parallel.world import World

def ended(call):
    try:
        call()
    except QcoreError as error:
        return [type(error).__name__, error.code, error.message, error.fix]
    except StopNow:
        return "StopNow"

with World.of_environment(torch.device("cpu")) as world:
    def block(errors):
        with together(world):
            if world.rank in errors:
                raise errors[world.rank]
    order = []
    for own in turns(world):
        with together(world):
            order.append(own)
    same = {"a": 1, "data": {0: "x"}.get(world.rank, "y"), "b": world.rank}
    found = {
        "nothing": ended(lambda: block({})),
        "first": ended(lambda: block({0: WriteError("QC-A-001", "is full", file="f", fix="go")})),
        "one": ended(lambda: block({2: InputError("QC-A-002", "is so", found=3)})),
        "two": ended(lambda: block({
            2: InputError("QC-A-002", "two"), 1: InputError("QC-A-001", "one")})),
        "signal": ended(lambda: block({1: StopNow()})),
        "same": ended(lambda: check_same(world, {"a": (1, 2), "b": None})),
        "differs": ended(lambda: check_same(world, same)),
        "turns": order,
    }
print(json.dumps(found))
"""


def test_three_ranks() -> None:
    """In the order of ranks; rank 2 is the first of another machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    common = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank % 2)},
        )
        for rank in range(3)
    ]  # fmt: skip
    found = [json.loads(child.communicate(timeout=120)[0]) for child in children]
    assert [each.pop("turns") for each in found] == [
        [True, False, False], [False, False, True], [False, True, False],
    ]  # fmt: skip
    assert found[0] == found[1] == found[2]
    here = socket.gethostname()
    assert found[0] == {
        "nothing": None,
        "first": ["WriteError", "QC-A-001", "f: is full", "go"],
        "one": ["InputError", "QC-A-002", f"rank 2 ({here}): is so: found 3", None],
        "two": ["InputError", "QC-A-001", f"rank 1 ({here}): one", None],
        "signal": "StopNow",
        "same": None,
        "differs": [
            "InputError", "QC-PARALLEL-003",
            "data: rank 1 differs from rank 0: found y, expected x",
            "start the same command on every machine, with the same files and the same versions "
            "of all libraries and plugins",
        ],
    }  # fmt: skip


@pytest.mark.parametrize("error", [InputError("QC-A-001", "x"), StopNow(), ValueError("x")])
def test_alone_nothing_is_changed(error: BaseException) -> None:
    world = World.alone()
    with pytest.raises(type(error)) as caught, together(world):
        raise error
    assert caught.value is error
    assert [*turns(world)] == [True]
    check_same(world, {"a": 1})
