"""Which packs of a run are planned: the largest ones and a typical one.

This file decides which packs are planned. The row order is a function of the step
(`qcore.data.sampler`), so every micro-batch is known beforehand; beyond `DRAWS` rows the longest
rows are assumed to meet in one pack, the worst case. It also decides how many tokens a pack may
have. It imports no model.

With media the planner keeps the Pareto front of (tokens, media units) and plans every pack on it,
because a pack with fewer of each may take more memory than the two extremes.

Codes: ``QC-PLAN-005`` a micro-step has more tokens than kernels can index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config.settings import Settings
from ..data.microbatches import TILE, extent, joined
from ..data.sampler import Schedule
from ..errors import UsageError
from .report import Lengths, Pack, units_of

DRAWS = 1 << 20  #: rows, over all epochs, whose packs are looked at one by one
#: Tokens of a pack, `TILE` more for each row: kernels number chunks of 64 tokens along the second
#: axis of a CUDA grid, which ends at 65535. All that counts rows of tensors in 32 bits ends later.
MOST = TILE * 65535
FRONT = 16  #: packs that are planned because of their units; where there are more, bounds of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Packs:
    """Of a run.

    Attributes:
        largest: the pack with most tokens, and the one with most tokens and tiles if another;
            with media also those with most units for their tokens.
        longest_rows: as many as a micro-batch has, whether they meet in one or not.
        usual: the pack whose tokens are nearest to the mean; its units are the mean.
        micro_steps: of an optimizer step, in the mean.
        held_out: tokens of the longest held-out row, which is evaluated alone; 0 without any.
        together: what micro-batches may take that run as one (`packing.joined`); 0: none do.
        most_units: of the media of as many rows as a micro-batch has, those with most; none: the
            rows are text.
        held_out_units: the most of a held-out row, which need not be the longest.
    """

    largest: tuple[Lengths, ...]
    longest_rows: Lengths
    usual: Lengths
    micro_steps: float
    held_out: int = 0
    together: int = 0
    most_units: tuple[int, ...] = ()
    held_out_units: int = 0


def packs_of(
    train: Sequence[int],
    held_out: Sequence[int],
    settings: Settings,
    *,
    units: Sequence[int] = (),
    held_out_units: Sequence[int] = (),
    sizes: Sequence[int] = (),
    together: int = 0,
    draws: int = DRAWS,
) -> Packs:
    """The packs of samples of these lengths.

    Args:
        train: tokens of each training sample, in the order of the data set.
        held_out: tokens of each held-out sample.
        settings: batch, seed and how long the run is.
        units: of the media of each training sample; none: they are text alone.
        held_out_units: of each held-out sample.
        sizes: samples of each training row; empty: one each.
        together: as `Packs` has it.
        draws: rows that are looked at one by one.
    """
    schedule = Schedule(sizes or len(train), settings)
    by_tokens: dict[int, Lengths] = {}
    size = settings.per_device_train_batch_size
    longest_rows = _sorted(sorted(train)[-size:])
    most_units = tuple(sorted(units, reverse=True)[:size])
    front: list[Lengths] = []
    widest: Lengths = ()
    drawn = tokens = media = micro_steps = steps = 0
    for step in range(schedule.total):
        if drawn >= draws:
            widest = _bound(longest_rows, sum(most_units), together)
            front = [widest]
            break
        steps += 1
        batches = schedule.micro_batches(step)
        for rows in joined(batches, train, together, units) if together else batches:
            pack = _sorted([train[row] for row in rows])
            if units:
                pack = Pack(pack, sum(units[row] for row in rows))
            front, widest = _front(front, pack), max(widest, pack, key=extent)
            by_tokens.setdefault(sum(pack), pack)
            drawn, micro_steps, tokens = drawn + len(pack), micro_steps + 1, tokens + sum(pack)
            media += units_of(pack)
    mean = tokens / micro_steps
    usual = by_tokens[min(by_tokens, key=lambda count: abs(count - mean))]
    return Packs(
        largest=tuple(dict.fromkeys((*front, widest))),
        longest_rows=longest_rows,
        usual=Pack(usual, round(media / micro_steps)) if units else usual,
        micro_steps=micro_steps / steps,
        held_out=max(held_out, default=0),
        together=together,
        most_units=most_units,
        held_out_units=max(held_out_units, default=0),
    )


def _front(front: list[Lengths], pack: Lengths) -> list[Lengths]:
    """Add `pack` to the Pareto front of (tokens, units)."""
    tokens, units = sum(pack), units_of(pack)
    if any(sum(one) >= tokens and units_of(one) >= units for one in front):
        return front
    left = [one for one in front if sum(one) > tokens or units_of(one) > units]
    left = sorted([*left, pack], key=sum, reverse=True)  # and so by units, ascending
    if len(left) <= FRONT:
        return left
    # In place of each two neighbours a pack that neither takes more than.
    return [Pack(left[n], units_of(left[min(n + 1, FRONT)])) for n in range(0, FRONT + 1, 2)]


def may_join(settings: Settings) -> bool:
    """Whether joining micro-batches leaves the result unchanged.

    The load balance of experts is of a micro-batch's own rows, and dropout is drawn for each.
    """
    own = settings.router_aux_loss_coef or settings.lora_dropout
    return settings.join_micro_batches and not own


def holds(pack: Lengths) -> bool:
    """Whether a micro-step of these rows is possible on any GPU."""
    return extent(pack, units_of(pack)) <= MOST


def check_pack(pack: Lengths) -> None:
    """Refuse a micro-step that nothing can compute, before it is planned.

    Raises:
        UsageError: ``QC-PLAN-005``.
    """
    if not holds(pack):
        units = units_of(pack)
        fit = MOST // (max(pack) + TILE + units)  # whichever row has them
        media = f" and {units} units of media" if units else ""
        raise UsageError(
            "QC-PLAN-005",
            "is more than kernels can index in one micro-step",
            field="per_device_train_batch_size",
            found=f"{len(pack)} rows, {sum(pack)} tokens{media} in all",
            expected=f"at most {MOST} tokens, of which each row takes {TILE} more than it has"
            + (" and each unit one" if units else ""),
            fix=f"lower it to {fit}, and raise gradient_accumulation_steps instead",
        )


def _sorted(lengths: list[int]) -> Lengths:
    return tuple(sorted(lengths, reverse=True))


def _bound(longest_rows: Lengths, units: int, together: int) -> Lengths:
    """A pack that no other takes more than, without a look at each."""
    pack = longest_rows
    while extent(pack) < together:
        pack = (*pack, min(pack[0], together - extent(pack)))
    return Pack(pack, max(units, together)) if units else pack
