"""GPU specifications (memory, rates), and the time that an op takes on one (a roofline model).

This file decides how long an op takes (the maximum of FLOPs over the matrix rate, bytes over the
memory bandwidth, and one launch) and which link a GPU has to others of its machine: A100, H100 and
H200 as SXM modules have NVLink (`qcore.planning.links`). Rates are datasheet values times the
efficiency measured on an H100. It imports no torch.

Codes: ``QC-PLAN-002`` an unknown GPU, ``-003`` an invalid budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ..errors import UsageError, nearest
from .links import NVLINK3, NVLINK4, PCIE4, PCIE5, Link

GIB = 2**30

#: Shares of the datasheet rates, measured on an H100 80GB HBM3: products of a layer reach about
#: 690 of 989 TFLOP/s (8192^3 reaches 807), a copy 3.02 of 3.35 TB/s, elementwise kernels less.
PRODUCTS, BYTES = 0.70, 0.78
LAUNCH = 2.5e-6  #: seconds of the shortest kernel
GAPS = 1.04  #: wall-clock time divided by the sum of kernel times
#: Seconds that the host takes to dispatch one op, measured on the host of an H100; short steps are
#: bound by it. It depends on the host, not on the GPU.
HOST = 120e-6
CONTEXT = 700_000_000  #: bytes of the CUDA context and its libraries, outside torch's allocator
FRAGMENTS = 0.03  #: share of GPU memory lost to fragmentation


class Op(Protocol):
    """The work of one op (`qcore.planning.segments.Work`)."""

    @property
    def name(self) -> str: ...
    @property
    def flops(self) -> float: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def wide(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A GPU type.

    Attributes:
        name: name for users.
        memory: bytes that torch reports.
        bandwidth: memory bandwidth in bytes per second, datasheet.
        bf16: FLOP/s of dense bf16 products with float32 accumulation, datasheet.
        fp32: FLOP/s in float32, datasheet.
        host_link: bytes per second to or from pinned memory, one direction.
        link: link to other GPUs of the machine.
        words: words that all occur in CUDA's name of the GPU; empty for an unknown GPU.
    """

    name: str
    memory: int
    bandwidth: float
    bf16: float
    fp32: float
    host_link: float
    link: Link
    words: tuple[str, ...]

    @property
    def known(self) -> bool:
        """Whether its rates are known; for an unknown GPU only memory is planned."""
        return bool(self.words)

    @property
    def budget(self) -> int:
        """Bytes that a plan may use."""
        return int(self.memory * (1 - FRAGMENTS)) - CONTEXT


#: Sources: NVIDIA's datasheets of the H100 SXM5 (2023-03), H200 SXM (2024), A100 SXM4 (2021) and
#: L40S (2023); whitepapers of the Ada (2022) and Blackwell (2025) GeForce architectures, bf16
#: with FP32 accumulate. Memory as `torch.cuda.get_device_properties` reports it.
CARDS = (
    Card(
        name="H100-80", memory=int(79.18 * GIB), bandwidth=3.35e12, bf16=989e12, fp32=67e12,
        host_link=50e9, link=NVLINK4, words=("H100", "HBM3"),
    ),
    Card(
        name="H200", memory=int(139.8 * GIB), bandwidth=4.8e12, bf16=989e12, fp32=67e12,
        host_link=50e9, link=NVLINK4, words=("H200",),
    ),
    Card(
        name="A100-80", memory=int(79.25 * GIB), bandwidth=2.039e12, bf16=312e12, fp32=19.5e12,
        host_link=24e9, link=NVLINK3, words=("A100", "80GB"),
    ),
    Card(
        name="A100-40", memory=int(39.4 * GIB), bandwidth=1.555e12, bf16=312e12, fp32=19.5e12,
        host_link=24e9, link=NVLINK3, words=("A100", "40GB"),
    ),
    Card(
        name="RTX-4090", memory=int(23.5 * GIB), bandwidth=1.008e12, bf16=165.2e12, fp32=82.6e12,
        host_link=24e9, link=PCIE4, words=("RTX", "4090"),
    ),
    Card(
        name="RTX-5090", memory=int(31.3 * GIB), bandwidth=1.792e12, bf16=209.5e12, fp32=104.8e12,
        host_link=50e9, link=PCIE5, words=("RTX", "5090"),
    ),
    Card(
        name="L40S", memory=int(44.4 * GIB), bandwidth=0.864e12, bf16=362e12, fp32=91.6e12,
        host_link=24e9, link=PCIE4, words=("L40S",),
    ),
)  # fmt: skip


class Seconds(NamedTuple):
    """Seconds on the GPU and on the host, which overlap."""

    card: float
    host: float

    @property
    def both(self) -> float:
        """Wall-clock seconds."""
        return max(self.card, self.host)


def seconds(work: Iterable[Op], card: Card) -> Seconds:
    """Return the time that a GPU takes for `work`."""
    busy = host = 0.0
    for op in work:
        rate = card.fp32 if op.wide else card.bf16 * PRODUCTS
        busy += max(LAUNCH, op.flops / rate, op.nbytes / (card.bandwidth * BYTES))
        host += HOST
    return Seconds(busy * GAPS, host)


def card_of(device_name: str, memory: int) -> Card:
    """Look up a GPU by the name that CUDA reports.

    Args:
        device_name: name that CUDA reports.
        memory: bytes of memory, used for an unknown GPU.

    Returns:
        The GPU; an unknown GPU has the rates of an A100, and its time is not predicted.
    """
    for card in CARDS:
        if all(word in device_name for word in card.words):
            return card
    a100 = CARDS[2]
    return Card(
        name=device_name, memory=memory, bandwidth=a100.bandwidth, bf16=a100.bf16,
        fp32=a100.fp32, host_link=a100.host_link, link=PCIE4, words=(),
    )  # fmt: skip


def gpu_by_name(name: str) -> Card:
    """Look up a GPU by its name for users, or by the unique start of one, in any case.

    Raises:
        UsageError: ``QC-PLAN-002`` the name is unknown or ambiguous.
    """
    names = [card.name for card in CARDS]
    matches = [card for card in CARDS if card.name.lower().startswith(name.lower())]
    exact = [card for card in matches if card.name.lower() == name.lower()]
    if len(exact or matches) == 1:
        return (exact or matches)[0]
    suggestion = nearest(name.upper(), names, cutoff=0.4)
    raise UsageError(
        "QC-PLAN-002",
        "unknown GPU",
        field="--gpu",
        found=name,
        expected="one of " + ", ".join(names),
        fix=f"pass --gpus {name} for a number of GPUs"
        if name.isdigit()
        else f"did you mean {suggestion}?"
        if suggestion
        else "name the most similar GPU and pass --budget",
    )


def parse_budget(text: str) -> int | None:
    """Convert ``--budget`` (GB) to bytes; ``None`` for ``auto``.

    Raises:
        UsageError: ``QC-PLAN-003`` the value is not a number in range.
    """
    if text == "auto":
        return None
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < 1e6:
        raise UsageError(
            "QC-PLAN-003",
            "is not a memory size",
            field="--budget",
            found=text,
            expected="gigabytes, a number above 0 and below 1000000 without a unit, or auto",
            fix="pass --budget 24",
        )
    return int(size * 1e9)


def cap_budgets(cards: Sequence[Card], budget: int | None) -> tuple[list[int], list[str]]:
    """Limit the memory budget of each GPU to what a plan may use.

    Args:
        cards: the GPUs of the plan.
        budget: bytes of ``--budget``; ``None`` for all that a plan may use.

    Returns:
        The budget of each GPU in bytes, and a line if any is lower than `budget`.
    """
    if budget is None:
        return [card.budget for card in cards], []
    small = [f"{card.budget / 1e9:.1f} GB on {card.name}" for card in cards if card.budget < budget]
    line = f"--budget {budget / 1e9:g} is more than a plan may use; using {', '.join(small)}"
    lines = [line] if small else []
    return [min(card.budget, budget) for card in cards], lines
