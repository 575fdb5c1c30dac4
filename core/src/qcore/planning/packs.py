"""Chooses which packs (rows laid end to end) of a run are planned: the largest and a typical one.

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
from heapq import nlargest

from ..config.settings import Settings
from ..data.microbatches import TILE, cost, extent, joined, spread
from ..data.sampler import Schedule
from ..errors import UsageError
from .report import Lengths, Pack, units_of

DRAWS = 1 << 20  #: rows, over all epochs, whose packs are enumerated
#: The most tokens of a pack, counting `TILE` extra for each row: kernels index chunks of 64 tokens
#: with the second axis of a CUDA grid, which is limited to 65535. Limits of 32-bit indices are
#: higher.
MOST = TILE * 65535
FRONT = 16  #: the most packs on the Pareto front; above it, neighbors are merged to their bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Packs:
    """The packs of a run that are planned.

    Attributes:
        largest: the pack with the most tokens, and the pack with the most tokens and tiles if it
            is another; with media, the Pareto front of tokens and units.
        longest_rows: lengths of the longest rows, as many as a micro-batch has, whether or not
            they occur in one micro-batch.
        usual: the pack whose token count is nearest to the mean; its units are the mean.
        micro_steps: mean number of micro-steps per optimizer step; with several ranks, those of
            the rank with the most work.
        held_out: tokens of the longest held-out row, which is evaluated alone; 0 without any.
        together: the most tokens of micro-batches that are joined into one
            (`qcore.data.microbatches.joined`); 0 if none are joined.
        most_units: units of the rows with the most media, as many as a micro-batch has; empty if
            the rows are text.
        held_out_units: the most units of a held-out row, which need not be the longest row.
        packs: mean number of packs per optimizer step, over all ranks.
        load: mean work of the rank with the most, in packs of mean size.
    """

    largest: tuple[Lengths, ...]
    longest_rows: Lengths
    usual: Lengths
    micro_steps: float
    held_out: int = 0
    together: int = 0
    most_units: tuple[int, ...] = ()
    held_out_units: int = 0
    packs: float = 0.0
    load: float = 0.0


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
    ranks: int = 1,
) -> Packs:
    """Choose the packs of a run to plan, from the lengths of its samples.

    Args:
        train: tokens of each training sample, in the order of the data set.
        held_out: tokens of each held-out sample.
        settings: batch size, seed and duration of the run.
        units: media units of each training sample; empty if all samples are text.
        held_out_units: media units of each held-out sample.
        sizes: samples of each training row; empty: one each.
        together: the most tokens of joined micro-batches; 0 joins none.
        draws: rows whose packs are enumerated; beyond it the worst case is assumed.
        ranks: ranks that share the micro-batches of a step; each joins its own.
    """
    schedule = Schedule(sizes or len(train), settings, train)
    by_tokens: dict[int, Lengths] = {}
    size = settings.per_device_train_batch_size
    longest_rows, most_units = _sorted(nlargest(size, train)), tuple(nlargest(size, units))
    front: list[Lengths] = []
    widest: Lengths = ()
    drawn = tokens = media = micro_steps = packs = steps = 0
    most = every = 0.0
    for step in range(schedule.total):
        if drawn >= draws:
            widest = _bound(longest_rows, sum(most_units), together)
            front = [widest]
            break
        steps += 1
        shares, loads = _shares(schedule.micro_batches(step), train, units, together, ranks)
        busiest = loads.index(max(loads))
        micro_steps, most = micro_steps + len(shares[busiest]), most + loads[busiest]
        packs, every = packs + sum(map(len, shares)), every + sum(loads)
        for rows in (rows for share in shares for rows in share):
            pack = _pack(rows, train, units)
            front, widest = _front(front, pack), max(widest, pack, key=extent)
            by_tokens.setdefault(sum(pack), pack)
            drawn, tokens = drawn + len(pack), tokens + sum(pack)
            media += units_of(pack)
    usual = by_tokens[min(by_tokens, key=lambda count: abs(count - tokens / packs))]
    return Packs(
        largest=tuple(dict.fromkeys((*front, widest))), longest_rows=longest_rows,
        usual=Pack(usual, round(media / packs)) if units else usual,
        micro_steps=micro_steps / steps,
        held_out=max(held_out, default=0),
        together=together,
        most_units=most_units,
        held_out_units=max(held_out_units, default=0),
        packs=packs / steps, load=packs * most / every / steps,
    )  # fmt: skip


def _shares(
    batches: list[list[int]],
    lengths: Sequence[int],
    units: Sequence[int],
    together: int,
    ranks: int,
) -> tuple[list[list[list[int]]], list[float]]:
    """Return the packs of each rank in a step, as the run spreads and joins them, and their cost.

    The cost of a single rank is 1, because it is compared with no other.
    """
    shares, loads = [batches], [1.0]
    if ranks > 1:
        costs = [_cost(rows, lengths, units) for rows in batches]
        numbers = spread(costs, ranks)
        shares = [[batches[n] for n in share] for share in numbers]
        loads = [sum(costs[n] for n in share) for share in numbers]
    if together:
        shares = [joined(share, lengths, together, units) for share in shares]
    return shares, loads


def _cost(rows: Sequence[int], lengths: Sequence[int], units: Sequence[int]) -> float:
    return cost([lengths[row] for row in rows], sum(units[row] for row in rows) if units else 0)


def _pack(rows: Sequence[int], lengths: Sequence[int], units: Sequence[int]) -> Lengths:
    pack = _sorted([lengths[row] for row in rows])
    return Pack(pack, sum(units[row] for row in rows)) if units else pack


def _front(front: list[Lengths], pack: Lengths) -> list[Lengths]:
    """Add `pack` to the Pareto front of (tokens, units)."""
    tokens, units = sum(pack), units_of(pack)
    if any(sum(other) >= tokens and units_of(other) >= units for other in front):
        return front
    merged = [other for other in front if sum(other) > tokens or units_of(other) > units]
    merged = sorted([*merged, pack], key=sum, reverse=True)  # which sorts units in ascending order
    if len(merged) <= FRONT:
        return merged
    # Replace every two neighbors by their bound, a pack with the maximum of tokens and units.
    return [Pack(merged[n], units_of(merged[min(n + 1, FRONT)])) for n in range(0, FRONT + 1, 2)]


def may_join(settings: Settings) -> bool:
    """Whether micro-batches may be joined without changing the result.

    They may not if the router loss, which is computed per micro-batch, or dropout, which is drawn
    per micro-batch, is on.
    """
    own = settings.router_aux_loss_coef or settings.lora_dropout
    return settings.join_micro_batches and not own


def holds(pack: Lengths) -> bool:
    """Whether kernels can index a micro-step of these rows."""
    return extent(pack, units_of(pack)) <= MOST


def check_pack(pack: Lengths) -> None:
    """Refuse a micro-step that no kernel can index, before it is planned.

    Raises:
        UsageError: ``QC-PLAN-005`` the micro-step has too many tokens.
    """
    if not holds(pack):
        units = units_of(pack)
        fit = MOST // (max(pack) + TILE + units)  # any row may have all units
        media = f" and {units} units of media" if units else ""
        raise UsageError(
            "QC-PLAN-005",
            "is more than kernels can index in one micro-step",
            field="per_device_train_batch_size",
            found=f"{len(pack)} rows, {sum(pack)} tokens{media} in all",
            expected=f"at most {MOST} tokens, counting {TILE} extra for each row"
            + (" and one for each unit" if units else ""),
            fix=f"lower it to {fit}, and raise gradient_accumulation_steps instead",
        )


def _sorted(lengths: list[int]) -> Lengths:
    return tuple(sorted(lengths, reverse=True))


def _bound(longest_rows: Lengths, units: int, together: int) -> Lengths:
    """Return an upper bound for all packs, without enumerating them."""
    pack = longest_rows
    while extent(pack) < together:
        pack = (*pack, min(pack[0], together - extent(pack)))
    return Pack(pack, max(units, together)) if units else pack
