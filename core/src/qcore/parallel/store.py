"""The store of torchrun's agent, and which of its keys belong to the ranks that run now.

This file decides the prefix of all keys. torchrun starts ranks again with the same store, in which
the keys of the ranks before are still there: new ranks would connect to addresses of processes that
have ended. The first rank therefore counts the rounds, and answers each rank that asks for the
number; the number of restarts that torchrun sets differs between machines.
"""

from __future__ import annotations

import os
import time
import uuid
from typing import Any, Final

_POLL: Final = 0.02
_PREFIX: Final = "qcore"


def serves() -> bool:
    """Whether torchrun's agent keeps a store for its ranks; otherwise the first rank does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def connect(timeout: float) -> Any:
    """A connection of its own to the store at ``MASTER_ADDR``.

    Args:
        timeout: seconds that a key is waited for.

    Raises:
        RuntimeError: it cannot be reached.
    """
    from datetime import timedelta

    from torch import distributed

    return distributed.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
        timeout=timedelta(seconds=timeout),
    )  # fmt: skip


def number_of_round(store: Any, rank: int, size: int, timeout: float) -> int:
    """The number of this start of the ranks, the same on all of them.

    Args:
        store: shared by all ranks, and by those of earlier rounds.
        rank: of this process.
        size: how many ranks there are.
        timeout: seconds to wait for the other ranks.

    Raises:
        RuntimeError: a rank did not come.
    """
    if rank:
        return _asked(store, rank, timeout)
    number: int = store.add(f"{_PREFIX}/rounds", 1)
    missing, answered = set(range(1, size)), dict[int, bytes]()
    deadline = time.monotonic() + timeout
    while missing:
        for other in sorted(missing):
            asks = f"{_PREFIX}/asks/{other}"
            # A rank of an earlier round has left a question too; its answer is never read.
            if store.check([asks]) and (question := store.get(asks)) != answered.get(other):
                store.set(f"{_PREFIX}/number/{other}/{question.decode()}", str(number))
                answered[other] = question
            if store.check([f"{_PREFIX}/{number}/here/{other}"]):
                missing.remove(other)
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank {min(missing)} has not come within {timeout:.0f} s")
        time.sleep(_POLL)
    return number


def _asked(store: Any, rank: int, timeout: float) -> int:
    from datetime import timedelta

    question = uuid.uuid4().hex
    store.set(f"{_PREFIX}/asks/{rank}", question)
    answer = f"{_PREFIX}/number/{rank}/{question}"
    store.wait([answer], timedelta(seconds=timeout))
    number = int(store.get(answer))
    store.set(f"{_PREFIX}/{number}/here/{rank}", "")
    return number


def prefixed(store: Any, number: int, name: str) -> Any:
    """A part of the store for the ranks of one round."""
    from torch import distributed

    return distributed.PrefixStore(f"{_PREFIX}/{number}/{name}", store)  # type: ignore[attr-defined]
