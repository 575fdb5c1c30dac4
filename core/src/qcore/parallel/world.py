"""The ranks of a run and their collectives, on ``torch.distributed``.

This file decides how a process recognizes that it is one of several ranks (the variables that
``torchrun`` sets), how they connect, and in which form they exchange objects: as JSON, never as a
pickle. A process of its own is a world of one rank, in which every collective is the identity and
``torch.distributed`` is not imported. What the ranks compute is up to `nn` and `training`; who
starts them is up to the launcher.

Codes: ``QC-PARALLEL-001`` variables that contradict each other, ``-002`` the ranks do not connect.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from ..errors import InputError, Interrupted, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.cuda import Event
    from torch.distributed import ProcessGroup

    from .watch import Peers

_T = TypeVar("_T")

#: Variables that ``torchrun`` sets in each process that it starts.
VARIABLES: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT: Final = timedelta(minutes=10)  #: of a collective: all ranks reach it in about one step
_NAMED: Final = timedelta(seconds=30)  # the watch has named the late rank before
_PATIENT: Final = timedelta(days=7)  # while the first rank prepares data, the others wait


@dataclass(frozen=True, slots=True)
class World:
    """The ranks of a run, seen from one of them.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        local_rank: number of this process on its machine; the index of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    _patient: ProcessGroup | None = field(default=None, repr=False, compare=False)
    _peers: Peers | None = field(default=None, repr=False, compare=False)
    _sums: list[tuple[Event, Event]] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def alone(cls) -> World:
        """A process without others."""
        return cls()

    @classmethod
    def of_environment(cls, device: torch.device, timeout: timedelta = TIMEOUT) -> World:
        """The world that the launcher of this process has described in its environment.

        Connects to the other ranks: by NCCL on CUDA, by gloo on the CPU. On CUDA the GPU of the
        local rank becomes the current device.

        Args:
            device: where the ranks compute.
            timeout: of each collective.

        Raises:
            UsageError: ``QC-PARALLEL-001``.
            InputError: ``QC-PARALLEL-002``.
        """
        rank, size, local = described(os.environ)
        if size == 1:
            return cls.alone()
        import torch
        from torch import distributed

        if device.type == "cuda":
            _check_gpus(local, torch.cuda.device_count())
            torch.cuda.set_device(local)
        from . import handover, store

        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        place = f"rank {rank} ({socket.gethostname()}"
        place += f", GPU {local})" if device.type == "cuda" else ")"
        peers: Peers | None = None
        seconds = timeout.total_seconds()
        try:
            if store.serves():
                shared, rounds = store.connect(seconds), store.connect(seconds)
                number = store.number_of_round(rounds, rank, size, seconds)
                watched = store.prefixed(rounds, number, "watch")
                peers = handover.watch(watched, rank, size, place, seconds)
                distributed.init_process_group(
                    backend, store=store.prefixed(shared, number, "group"),
                    rank=rank, world_size=size, timeout=timeout + _NAMED,
                )  # fmt: skip
            else:  # the first rank serves a store once it connects
                distributed.init_process_group(backend, timeout=timeout + _NAMED)
                watched = store.prefixed(store.connect(seconds), 0, "watch")
                peers = handover.watch(watched, rank, size, place, seconds)
            patient = distributed.new_group(backend="gloo", timeout=_PATIENT)
        except (RuntimeError, ValueError, OSError) as error:
            apart = InputError(
                "QC-PARALLEL-002",
                f"rank {rank} of {size} cannot connect to the other ranks",
                found=str(error).partition("\n")[0][:200],
                fix="start the same command on every machine, and check that each can reach "
                "MASTER_ADDR at MASTER_PORT",
            )
            raise (peers.unexplained(apart) if peers is not None else apart) from error
        return cls(rank, size, local, patient, peers)

    @property
    def name(self) -> str:
        """How this rank is named in errors: ``rank 1 (host, GPU 1)``."""
        return f"rank {self.rank}" if self._peers is None else self._peers.name

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and reports."""
        return self.rank == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # A rank that fails stays in sight of the others, and NCCL would wait for them.
        if kind is None or issubclass(kind, Interrupted):
            self.close()

    def close(self) -> None:
        """Disconnect from the other ranks."""
        if self.size > 1:
            from torch import distributed

            if self._peers is not None:
                self._peers.leave()
            if distributed.is_initialized():
                distributed.destroy_process_group()

    def sum_(self, tensor: Tensor, what: str = "a sum") -> None:
        """Replace a tensor by its sum over the ranks; every rank gets the same bits.

        Args:
            tensor: the same shape on every rank.
            what: for an error about a rank that does not arrive.
        """
        if self.size > 1:
            from torch import distributed

            with self._collective(what), self._timed(tensor):
                distributed.all_reduce(tensor)

    def gather(self, value: _T) -> list[_T]:
        """The values of all ranks, in their order.

        Args:
            value: JSON; tuples arrive as lists.
        """
        return [value] if self.size == 1 else self._exchanged(value, None)

    def broadcast(self, value: _T) -> _T:
        """The value of the first rank; see `gather`."""
        if self.size == 1:
            return value
        first: _T = self._exchanged(value if self.first else None, None)[0]
        return first

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather(None)

    def wait(self, value: _T) -> list[_T]:
        """Like `gather`, for ranks that may arrive hours apart."""
        return [value] if self.size == 1 else self._exchanged(value, self._patient)

    def finishing(self) -> AbstractContextManager[None]:
        """A block in which the failure of another rank does not end this one: it saves."""
        return nullcontext() if self._peers is None else self._peers.finishing()

    def step(self, tokens: int) -> list[str]:
        """Note that a step has ended; returns a line for each rank newly found to be slow.

        The device has finished the sums of the step.

        Args:
            tokens: that this rank computed in it.
        """
        if self._peers is None:
            return []
        waited = sum(began.elapsed_time(ended) for began, ended in self._sums) / 1000
        self._peers.step(tokens, waited)
        self._sums.clear()
        return self._peers.slow()

    @contextmanager
    def _timed(self, tensor: Tensor) -> Iterator[None]:
        """Let a GPU measure how long it waits in a collective; the host does not wait there."""
        if not tensor.is_cuda:
            yield
            return
        from torch.cuda import Event

        pair = Event(enable_timing=True), Event(enable_timing=True)
        pair[0].record()
        yield
        pair[1].record()
        self._sums.append(pair)

    def _collective(self, what: str, *, patient: bool = False) -> AbstractContextManager[None]:
        if self._peers is None:
            return nullcontext()
        return self._peers.collective(what, patient=patient)

    def _exchanged(self, value: Any, group: ProcessGroup | None) -> list[Any]:
        """Gather bytes as CPU tensors: first how many, then all, padded to the longest."""
        with self._collective("an exchange", patient=group is not None):
            return self._gathered(value, group)

    def _gathered(self, value: Any, group: ProcessGroup | None) -> list[Any]:
        import torch
        from torch import distributed

        own = json.dumps(value).encode()
        count = torch.tensor([len(own)])
        counts = [torch.zeros_like(count) for _ in range(self.size)]
        distributed.all_gather(counts, count, group=group)
        sizes = [int(each) for each in counts]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        parts = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(parts, padded, group=group)
        return [
            json.loads(part[:size].numpy().tobytes())
            for part, size in zip(parts, sizes, strict=True)
        ]


def is_rank() -> bool:
    """Whether a launcher has started this process as one of several ranks.

    Raises:
        UsageError: ``QC-PARALLEL-001``.
    """
    return described(os.environ)[1] > 1


def described(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Rank, world size and local rank that variables describe; 0, 1, 0 without any.

    A world of one rank needs no other variable.

    Raises:
        UsageError: ``QC-PARALLEL-001`` some are missing, or contradict each other.
    """
    if not ({"RANK", "WORLD_SIZE"} & environment.keys()):
        return 0, 1, 0
    if environment.get("WORLD_SIZE", "").strip() == "1":
        return 0, 1, 0
    missing = [name for name in VARIABLES if not environment.get(name)]
    if missing:
        raise _wrong(missing[0], "not set", "the variable that torchrun sets")
    numbers = {name: environment[name] for name in VARIABLES if not name.endswith("ADDR")}
    for name, text in numbers.items():
        if not (text.isascii() and text.isdigit()):
            raise _wrong(name, text, "a number")
    rank, size, local, _ = map(int, numbers.values())
    if not rank < size:
        raise _wrong("RANK", rank, f"below WORLD_SIZE, {size}")
    return rank, size, local


def _wrong(name: str, found: object, expected: str) -> UsageError:
    return UsageError(
        "QC-PARALLEL-001",
        "does not describe a rank",
        field=name,
        found=found,
        expected=expected,
        fix="start the ranks with torchrun, or unset RANK and WORLD_SIZE for a run of one process",
    )


def _check_gpus(local: int, count: int) -> None:
    if local >= count:
        raise UsageError(
            "QC-PARALLEL-001",
            "there are fewer GPUs than ranks on this machine",
            field="LOCAL_RANK",
            found=f"rank {local} with {count} visible GPUs",
            fix=f"start at most {count} ranks here, or check CUDA_VISIBLE_DEVICES",
        )
