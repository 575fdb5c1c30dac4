"""Collectives of one process are the identity; two gloo processes get the same values."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys

import pytest
import torch

from qcore.errors import UsageError
from qcore.parallel.world import World, described

RANKS = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}

CHILD = """
import json, math, sys
import torch
from qcore.parallel.world import World

with World.of_environment(torch.device("cpu")) as world:
    values = torch.tensor([0.1 + world.rank, 2.0])
    world.sum_(values)
    facts = world.gather({"rank": world.rank, "text": "x" * 40 * world.rank, "loss": math.inf})
    world.barrier()
    found = {
        "place": [world.rank, world.size, world.local_rank, world.first],
        "sum": values.tolist(),
        "all": facts,
        "first": world.broadcast([world.rank, "ä"]),
        "wait": world.wait(world.rank),
        "same": world == World(world.rank, 2, world.rank),
    }
print(json.dumps(found))
"""


def test_alone_every_method_is_the_identity() -> None:
    values = torch.tensor([0.1, 2.0])
    with World.alone() as world:
        world.sum_(values)
        world.barrier()
        value = (1, "a")
        assert world.gather(value) == [value] == world.wait(value)
        assert world.broadcast(value) is value
    assert torch.equal(values, torch.tensor([0.1, 2.0]))
    assert (world.rank, world.size, world.local_rank, world.first) == (0, 1, 0, True)


def test_alone_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom qcore.parallel.world import World\n"
        "World.alone().barrier()\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1"}, {"LOCAL_RANK": "3"}])
def test_of_environment_without_other_ranks(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*RANKS, *ADDRESS):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert World.of_environment(torch.device("cpu")) == World.alone()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"RANK": "2"}, "RANK"),
        ({"RANK": "-1"}, "RANK"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK"),
    ],
)
def test_variables_that_describe_no_rank_are_refused(change: dict[str, str], field: str) -> None:
    with pytest.raises(UsageError) as caught:
        described(RANKS | ADDRESS | change)
    assert (caught.value.code, caught.value.field) == ("QC-PARALLEL-001", field)


def test_variables_of_a_launcher_without_torchrun_are_refused() -> None:
    with pytest.raises(UsageError, match=r"LOCAL_RANK.*not set"):
        described({"RANK": "0", "WORLD_SIZE": "4"})


def test_two_ranks() -> None:
    port = str(free_port())
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD],
            env=os.environ
            | ADDRESS
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": port},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [child.communicate(timeout=60)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    zero, one = map(json.loads, outputs)
    assert (zero.pop("place"), one.pop("place")) == ([0, 2, 0, True], [1, 2, 1, False])
    assert zero == one
    assert zero["sum"] == pytest.approx([1.2, 4.0])
    assert [each["rank"] for each in zero["all"]] == [0, 1]
    assert zero["all"][1]["text"] == "x" * 40
    assert zero["all"][0]["loss"] == math.inf
    assert zero["first"] == [0, "ä"]
    assert zero["wait"] == [0, 1]
    assert zero["same"]


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
