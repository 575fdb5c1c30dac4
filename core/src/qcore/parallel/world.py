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
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from ..errors import InputError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup

_T = TypeVar("_T")

#: Variables that ``torchrun`` sets in each process that it starts.
VARIABLES: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT: Final = timedelta(minutes=10)  #: of a collective: all ranks reach it in about one step
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
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            distributed.init_process_group(backend, timeout=timeout)
            patient = distributed.new_group(backend="gloo", timeout=_PATIENT)
        except (RuntimeError, ValueError, OSError) as error:
            raise InputError(
                "QC-PARALLEL-002",
                f"rank {rank} of {size} cannot connect to the other ranks",
                found=str(error).partition("\n")[0][:200],
                fix="start the same command on every machine, and check that each can reach "
                "MASTER_ADDR at MASTER_PORT",
            ) from error
        return cls(rank, size, local, patient)

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and reports."""
        return self.rank == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect from the other ranks."""
        if self.size > 1:
            from torch import distributed

            if distributed.is_initialized():
                distributed.destroy_process_group()

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the ranks; every rank gets the same bits."""
        if self.size > 1:
            from torch import distributed

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

    def _exchanged(self, value: Any, group: ProcessGroup | None) -> list[Any]:
        """Gather bytes as CPU tensors: first how many, then all, padded to the longest."""
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
