"""The packs that a run's rows really make: which may take most memory, which is usual.

This file decides which packs are planned. The order of rows is a function of the step
(`schedule`), so every micro-batch of the run is known beforehand; beyond `DRAWS` rows the longest
rows are taken to meet in one pack, which is the most that can happen. It also decides how many
tokens a pack may have at all. It imports no model.

Codes: ``QC-PLAN-005`` a micro-step holds more than kernels can number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError
from ..packing import TILE, extent, joined
from ..schedule import Schedule
from ..settings import Settings
from .record import Lengths

DRAWS = 1 << 20  #: rows, over all epochs, whose packs are looked at one by one
#: Tokens of a pack, `TILE` more for each row: kernels number chunks of 64 tokens along the second
#: axis of a CUDA grid, which ends at 65535. All that counts rows of tensors in 32 bits ends later.
MOST = TILE * 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class Packs:
    """Of a run.

    Attributes:
        largest: the pack with most tokens, and the one with most tokens and tiles if another.
        longest_rows: as many as a micro-batch has, whether they meet in one or not.
        usual: the pack whose tokens are nearest to the mean.
        micro_steps: of an optimizer step, in the mean.
        held_out: tokens of the longest held-out row, which is evaluated alone; 0 without any.
        together: what micro-batches may take that run as one (`packing.joined`); 0: none do.
    """

    largest: tuple[Lengths, ...]
    longest_rows: Lengths
    usual: Lengths
    micro_steps: float
    held_out: int = 0
    together: int = 0


def packs_of(
    train: Sequence[int],
    held_out: Sequence[int],
    settings: Settings,
    *,
    together: int = 0,
    draws: int = DRAWS,
) -> Packs:
    """The packs of rows of these lengths.

    Args:
        train: tokens of each training row, in the order of the data set.
        held_out: tokens of each held-out row.
        settings: batch, seed and how long the run is.
        together: as `Packs` has it.
        draws: rows that are looked at one by one.
    """
    schedule = Schedule(len(train), settings)
    by_tokens: dict[int, Lengths] = {}
    longest_rows = _sorted(sorted(train)[-settings.per_device_train_batch_size :])
    longest: Lengths = ()
    widest: Lengths = ()
    drawn = tokens = micro_steps = steps = 0
    for step in range(schedule.total):
        if drawn >= draws:
            longest = widest = _bound(longest_rows, together)
            break
        steps += 1
        batches = schedule.micro_batches(step)
        for rows in joined(batches, train, together) if together else batches:
            pack = _sorted([train[row] for row in rows])
            longest, widest = max(longest, pack, key=sum), max(widest, pack, key=extent)
            by_tokens.setdefault(sum(pack), pack)
            drawn, micro_steps, tokens = drawn + len(pack), micro_steps + 1, tokens + sum(pack)
    mean = tokens / micro_steps
    return Packs(
        largest=tuple(dict.fromkeys((longest, widest))),
        longest_rows=longest_rows,
        usual=by_tokens[min(by_tokens, key=lambda count: abs(count - mean))],
        micro_steps=micro_steps / steps,
        held_out=max(held_out, default=0),
        together=together,
    )


def may_join(settings: Settings) -> bool:
    """Whether micro-batches may run as one and compute the same.

    The load balance of experts is of a micro-batch's own rows, and dropout is drawn for each.
    """
    own = settings.router_aux_loss_coef or settings.lora_dropout
    return settings.join_micro_batches and not own


def holds(pack: Lengths) -> bool:
    """Whether a micro-step may be of these rows, on whatever card."""
    return extent(pack) <= MOST


def check_pack(pack: Lengths) -> None:
    """Refuse a micro-step that nothing can compute, before it is planned.

    Raises:
        UsageError: ``QC-PLAN-005``.
    """
    if not holds(pack):
        fit = MOST // (max(pack) + TILE)
        raise UsageError(
            "QC-PLAN-005",
            "is more than kernels can number in a micro-step",
            field="per_device_train_batch_size",
            found=f"{len(pack)} rows, {sum(pack)} tokens in all",
            expected=f"at most {MOST} tokens, of which each row takes {TILE} more than it has",
            fix=f"lower it to {fit}, and raise gradient_accumulation_steps instead",
        )


def _sorted(lengths: list[int]) -> Lengths:
    return tuple(sorted(lengths, reverse=True))


def _bound(longest_rows: Lengths, together: int) -> Lengths:
    """A pack that no other takes more than, without a look at each."""
    pack = longest_rows
    while extent(pack) < together:
        pack = (*pack, min(pack[0], together - extent(pack)))
    return pack
