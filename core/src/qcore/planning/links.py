"""The links between GPUs, and the time that a collective takes over them.

This file decides how long an all-reduce and an all-gather take: a ring moves ``(n - 1) / n`` of the
bytes over each link once for an all-gather and twice for an all-reduce, at the rate of the slowest
link of the ring, after a constant latency. `qcore.planning.gpus` decides which link a GPU has. It
imports no torch.

Codes: ``QC-PLAN-009`` an invalid number of GPUs or machines, ``-010`` an invalid rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..errors import UsageError

#: Bytes that NCCL allocates beside torch for one communicator: channels, their buffers and
#: kernels. They are not part of a peak as torch reports it, and lower the budget.
NCCL = 800_000_000
MOST = 4096  #: the largest number of GPUs of a machine, and of machines


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A link between two GPUs.

    Attributes:
        name: name for users.
        reduce: bytes per second, one direction, that an all-reduce reaches.
        gather: bytes per second, one direction, that an all-gather reaches.
        latency: seconds of the shortest collective.
    """

    name: str
    reduce: float
    gather: float
    latency: float = 60e-6


#: Fitted to NCCL on two H200 (NVLink 4, 18 links, multicast off; torch 2.11, 2026-11). All-reduce
#: of float32: 122 MB 0.46 ms, 160 MB 0.56 ms, 435 MB 1.41 ms, 1,000 MB 3.05 ms. All-gather of
#: uint8: to 50 MB 0.13 ms, 200 MB 0.42 ms, 800 MB 1.53 ms.
NVLINK4 = Link(name="NVLink 4", reduce=334e9, gather=270e9)
#: NVLink 3 has 600 of the 900 GB/s of NVLink 4 (NVIDIA's A100 and H100 datasheets); not measured.
NVLINK3 = Link(name="NVLink 3", reduce=223e9, gather=180e9)
#: PCIe 4 x16 transfers 32 GB/s in theory and about 20 in a collective through the host; PCIe 5
#: twice that. Not measured.
PCIE4 = Link(name="PCIe 4", reduce=20e9, gather=20e9)
PCIE5 = Link(name="PCIe 5", reduce=40e9, gather=40e9)
#: Bytes per second between two machines, all adapters of a machine together: 100 Gbit/s Ethernet
#: at 80 %. An assumption, which an option replaces.
NETWORK = 10e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The processes of a run, one for each GPU, and the links between them.

    Attributes:
        gpus: GPUs of each machine.
        nodes: machines.
        link: link between the GPUs of a machine.
        network: bytes per second between two machines.
    """

    gpus: int = 1
    nodes: int = 1
    link: Link = NVLINK4
    network: float = NETWORK

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.gpus * self.nodes

    @property
    def slowest(self) -> Link:
        """The link that limits a ring over all ranks."""
        network = Link(name="network", reduce=self.network, gather=self.network)
        if self.nodes == 1:
            return self.link
        return network if self.gpus == 1 or self.network < self.link.reduce else self.link

    def all_reduce(self, nbytes: int) -> float:
        """Return the seconds in which all ranks sum `nbytes` bytes."""
        if self.size == 1:
            return 0.0
        moved = 2 * nbytes * (self.size - 1) / self.size
        return self.slowest.latency + moved / self.slowest.reduce

    def all_gather(self, nbytes: int) -> float:
        """Return the seconds in which all ranks collect `nbytes` bytes from their shards."""
        if self.size == 1:
            return 0.0
        moved = nbytes * (self.size - 1) / self.size
        return self.slowest.latency + moved / self.slowest.gather


class Gathers(NamedTuple):
    """All-gathers of a micro-step.

    Attributes:
        nbytes: bytes of all layers, gathered in forward and in backward.
        seconds: time on the links.
        exposed: seconds by which the micro-step takes longer.
    """

    nbytes: int = 0
    seconds: float = 0.0
    exposed: float = 0.0


def parse_ranks(
    own: Link,
    gpus: int | None = None,
    nodes: int | None = None,
    link: float | None = None,
    network: float | None = None,
) -> Ranks:
    """Check the options about several GPUs.

    Args:
        own: the link of the GPU.
        gpus: GPUs of each machine; by default one.
        nodes: machines; by default one.
        link: GB/s between two GPUs of a machine; by default that of the GPU.
        network: GB/s between two machines; by default `NETWORK`.

    Raises:
        UsageError: ``QC-PLAN-009`` a number is out of range; ``-010`` a rate is.
    """
    for option, number in (("--gpus", gpus), ("--nodes", nodes)):
        if number is not None and not 1 <= number <= MOST:
            raise UsageError(
                "QC-PLAN-009",
                "is out of range",
                field=option,
                found=number,
                expected=f"1 to {MOST}",
                fix=f"pass {option} 2",
            )
    for option, rate in (("--link", link), ("--network", network)):
        if rate is not None and not 0 < rate < 1e5:
            raise UsageError(
                "QC-PLAN-010",
                "is not a rate",
                field=option,
                found=rate,
                expected="GB/s in one direction, above 0 and below 100000",
                fix=f"pass {option} 10, or leave it out",
            )
    if link is not None:
        own = Link(name=f"{link:g} GB/s", reduce=link * 1e9, gather=link * 1e9)
    rate = NETWORK if network is None else network * 1e9
    return Ranks(gpus=gpus or 1, nodes=nodes or 1, link=own, network=rate)
