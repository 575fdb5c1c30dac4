"""Plan: what a training step will take of a card, before a weight is read.

This file decides how pieces (`measure`) make a step: everything that layers keep is there
when the head's loss is computed, and goes again layer by layer; the peak is the most at any of
these moments. It decides which layers compute what again, so that the step is as fast as the
budget allows: layers at the bottom give up their results first, because those of the top are
gone by the time the bottom's backward runs. And it decides the longest row that fits. What a
run with its data takes, and what becomes of it if it does not fit, is `run`'s.

Memory is predicted of what torch allocates (``max_memory_allocated``). Time is a model
(`cards`): expect about 15 % either way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from ..device import DTYPES
from ..identify import Identified
from ..kernels import Chosen, installed
from ..model import ops_of
from ..nn.adapted import Lora
from ..nn.again import POLICIES
from ..settings import Settings
from ..suits import refuse_unused
from ..targets import targets
from .cards import CARDS, LAUNCH, Card, seconds
from .host import most_pinned, pinned
from .measure import Measure
from .meta import Taken, meta_model, take
from .packs import check_pack, holds
from .pieces import SAMPLES, Piece
from .record import Lengths, Plan
from .trace import rounded

if TYPE_CHECKING:
    from ..model import Model
    from .trace import Trace

__all__ = ["Plan", "Planner"]

#: What torch's cuBLAS keeps for the forward's thread and the backward's, 32 MiB each on a card
#: of Hopper's kind, and what cuDNN's attention asks for beside.
LIBRARIES = 2 * 32 * 2**20 + 2**20
#: Bytes a trained number is moved through memory by one update: four read and three written in
#: float32, the norm's reading, and the copies in the run's dtype.
UPDATE = 36


@dataclass(frozen=True, slots=True)
class _Moment:
    """Bytes at one moment of a step, over what is always there."""

    name: str
    kept: int
    workspace: int
    ops: Mapping[str, int]


class Planner:
    """One model and its settings; plans of any micro-batch on cards of one kind.

    Args:
        found: the model, identified; its headers are enough.
        settings: the run's.
        card: where it will run; ``None``: on the CPU, which has no budget.
        backends: what the run has chosen; by default what it would if all backends pass.
        budget: bytes of the card that may be filled; by default all that a plan may.
        host: bytes of the host that inputs may be parked in; ``None``: not known.
    """

    def __init__(
        self,
        found: Identified,
        settings: Settings,
        card: Card | None,
        *,
        backends: Chosen | None = None,
        budget: int | None = None,
        host: int | None = None,
    ) -> None:
        self.host = host
        self.settings = settings
        self.card = card or CARDS[0]
        self.device = "cpu" if card is None else "cuda"
        whole = 1 << 62 if card is None else card.budget
        self.budget = whole if budget is None else budget
        wanted = settings.kernels if backends is None else backends.backends
        self.taken = take(installed(found.plugins), self.device, wanted)
        architecture, config = found.decision.architecture, found.checkpoint.config
        refuse_unused(settings.kernels, ops_of(architecture, config, found.layout))
        self.lora = targets(
            found.layout,
            settings.target_groups,
            Lora(r=settings.r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout),
            group_r={name: int(r) for name, r in settings.group_r.items()},
            group_lora_alpha={name: float(x) for name, x in settings.group_lora_alpha.items()},
        )
        make = partial(_make, found, settings, self.lora, self.taken, self.device)
        self.measure = Measure(make, self.device)
        self._parks: dict[int, Piece] = {}
        self._took: dict[tuple[int, str], tuple[float, float, int]] = {}
        self.static = self._static(found)

    def _static(self, found: Identified) -> dict[str, int]:
        """What is there all the time, by term."""
        model = self.measure.model
        groups = {entry.name: entry.row.group for entry in found.layout.table}
        terms = dict.fromkeys(
            ("weights nf4", "weights 16 bit", "weights fp32", "embeddings", "adapters"), 0
        )
        for holder in model.holders.values():
            if holder.four_bit:
                terms["weights nf4"] += holder.stored_bytes
        trained = 0
        for name, parameter in model.named_parameters():
            size = rounded(parameter.numel() * parameter.element_size())
            if parameter.requires_grad:
                terms["adapters"] += size
                trained += parameter.numel()
            elif groups.get(name) in ("embed", "head"):
                terms["embeddings"] += size
            else:
                wide = parameter.element_size() == 4
                terms["weights fp32" if wide else "weights 16 bit"] += size
        gradients = terms["adapters"]
        # What rounding and the scales' scales leave over is the codes'.
        terms["weights nf4"] += self.measure.held - sum(terms.values()) - 3 * gradients
        self.trained = trained
        return terms | {
            "adapters in the run's dtype": self.measure.working,
            "gradients": gradients,
            "optimizer": 2 * terms["adapters"],
            "libraries": LIBRARIES if self.device == "cuda" else 0,
        }

    def on(self, card: Card, budget: int | None = None) -> Planner:
        """The same on another card: what was measured is shared."""
        other = copy(self)
        other.card, other.budget = card, card.budget if budget is None else budget
        return other

    # One plan.

    @property
    def timed(self) -> bool:
        """Whether time is predicted."""
        return self.device == "cuda" and self.card.known

    def plan(self, lengths: Lengths, policies: Sequence[str]) -> Plan:
        """The step of one pack, each layer under its own policy."""
        static = self.static | {"batch": self.measure.batch(lengths)}
        top = max(self._moments(lengths, policies), key=lambda m: m.kept + m.workspace)
        memory = static | {"activations": top.kept, "workspace": top.workspace}
        card, host, launches = self._time(lengths, policies)
        return Plan(
            card=self.card.name if self.device == "cuda" else "cpu",
            lengths=lengths,
            policies=tuple(policies),
            budget=self.budget,
            memory=memory,
            peak=sum(memory.values()),
            moment=top.name,
            ops=top.ops,
            seconds=max(card, host) + self._update(),
            launches=launches,
            backends=self.taken.backends,
            notes=self._notes(lengths, policies),
            host=self._host(lengths, policies),
            host_budget=self.host,
            timed=self.timed,
        )

    def evaluation(self, length: int) -> dict[str, int]:
        """Bytes by term, at the peak of a held-out row's loss: alone in its pack, no gradients."""
        lengths = (length,)
        most = self.measure.evaluation(lengths, self.settings.loss_chunk_size)
        return self.static | {"batch": self.measure.batch(lengths), "workspace": most}

    def worst(self, packs: Sequence[Lengths], policies: Sequence[str]) -> Plan:
        """The plan of that one of `packs` that takes most."""
        plan = self.plan(max(packs, key=lambda one: self._peak(one, policies)), policies)
        return replace(plan, host=max(self._host(one, policies) for one in packs))

    def _peak(self, lengths: Lengths, policies: Sequence[str]) -> int:
        most = max(m.kept + m.workspace for m in self._moments(lengths, policies))
        return sum(self.static.values()) + self.measure.batch(lengths) + most

    def _pieces(self, lengths: Lengths, policies: Sequence[str]) -> list[Piece]:
        found = []
        for kind, policy in zip(self.measure.kinds, policies, strict=True):
            parks = policy == "offload" and self.device == "cuda"
            piece = self.measure.layer(kind, _alike(policy), lengths)
            found.append(self._parked(piece, lengths) if parks else piece)
        return found

    def _parked(self, piece: Piece, lengths: Lengths) -> Piece:
        """As under ``full``, its input on the host; the next one is on its way meanwhile."""
        if id(piece) not in self._parks:
            x = self._input(lengths)
            self._parks[id(piece)] = replace(
                piece,
                kept=piece.kept - x,
                forward=piece.forward + x,
                backward=piece.backward + 2 * x,
            )
        return self._parks[id(piece)]

    def _input(self, lengths: Lengths) -> int:
        """Bytes of what a layer reads."""
        model = self.measure.model
        return rounded(sum(lengths) * model.head.shape[1] * model.dtype.itemsize)

    def _host(self, lengths: Lengths, policies: Sequence[str]) -> int:
        """Bytes of the host that parked inputs take."""
        if self.device != "cuda":
            return 0
        return pinned(self._input(lengths), policies.count("offload"))

    def _moments(self, lengths: Lengths, policies: Sequence[str]) -> Iterable[_Moment]:
        pieces = self._pieces(lengths, policies)
        first = self.measure.embedding(lengths)
        end = self.measure.end(lengths, self.settings.loss_chunk_size)
        kept = first.kept
        yield _Moment("embedding", 0, first.forward, {})
        for number, piece in enumerate(pieces):
            yield _Moment(f"forward of layer {number}", kept, piece.forward, piece.forward_by)
            yield _Moment(f"backward of layer {number}", kept, piece.backward, piece.backward_by)
            kept += piece.kept
        yield _Moment("loss", kept, end.forward, end.forward_by)
        yield _Moment("backward of the loss", kept, end.backward, end.backward_by)

    def _time(self, lengths: Lengths, policies: Sequence[str]) -> tuple[float, float, int]:
        """Seconds of the card and of the host, and launches."""
        counted = [
            *self._pieces(lengths, policies),
            self.measure.embedding(lengths),
            self.measure.end(lengths, self.settings.loss_chunk_size),
        ]
        card = host = 0.0
        launches = 0
        for piece in counted:
            took = self._seconds(piece)
            card, host, launches = card + took[0], host + took[1], launches + took[2]
        if self.device == "cuda":  # there and back, beside the layers
            away = 2 * self._input(lengths) * policies.count("offload")
            card = max(card, away / self.card.host_link)
        return card, host, launches

    def _seconds(self, piece: Piece) -> tuple[float, float, int]:
        key = (id(piece), self.card.name)
        if key not in self._took:
            work = (*piece.forth, *piece.back)
            self._took[key] = (*seconds(work, self.card), len(work))
        return self._took[key]

    def _update(self) -> float:
        """A micro-step's share of the optimizer's update."""
        whole = self.trained * UPDATE / self.card.bandwidth + 20 * LAUNCH
        return whole / self.settings.gradient_accumulation_steps

    def _notes(self, lengths: Lengths, policies: Sequence[str]) -> tuple[str, ...]:
        told = []
        if parked := self._host(lengths, policies):
            told.append(f"{parked / 1e9:.1f} GB of the host's memory are pinned")
        if self.taken.absent:
            told.append(
                "not installed here, so references are counted, which take more memory and time: "
                + ", ".join(self.taken.absent)
            )
        layers = dict.fromkeys(zip(self.measure.kinds, policies, strict=True))
        if any(self.measure.stretches(kind, _alike(policy), lengths) for kind, policy in layers):
            told.append(
                f"told from rows of {SAMPLES[-1]} tokens and fewer, because a reference walks "
                "the tokens one chunk at a time: memory is rather overstated"
            )
        if self.device == "cpu":
            told.append("of the CPU only torch's tensors are counted, and no time is predicted")
        elif not self.card.known:
            told.append(f"the rates of {self.card.name} are not known, so no time is predicted")
        return tuple(told)

    # Search.

    def ladder(self) -> list[tuple[str, ...]]:
        """Policies from the fastest to those that take least."""
        layers = len(self.measure.kinds)
        steps = [("none",) * layers]
        for more, less in pairwise(self.allowed()):
            steps += [(less,) * n + (more,) * (layers - n) for n in range(1, layers + 1)]
        allowed = self.allowed()
        return [one for one in steps if set(one) <= set(allowed)] or [(allowed[0],) * layers]

    def allowed(self) -> tuple[str, ...]:
        """The policies that the settings leave to choose from."""
        settings = self.settings
        if not settings.gradient_checkpointing:
            return ("none",)
        if settings.recompute != "auto":
            return (settings.recompute,)
        return POLICIES if self.device == "cuda" else POLICIES[:-1]

    @property
    def frugal(self) -> str:
        """The policy that takes least, of those that the settings leave."""
        return self.allowed()[-1]

    def fastest(self, *packs: Lengths) -> Plan:
        """The first of the ladder under which all `packs` fit; the last where none does.

        Raises:
            UsageError: ``QC-PLAN-005`` a pack is more than any micro-step may be.
        """
        for pack in packs:
            check_pack(pack)
        steps = self.ladder()
        low, high = 0, len(steps) - 1
        while low < high:
            middle = (low + high) // 2
            if max(self._peak(one, steps[middle]) for one in packs) <= self.budget:
                high = middle
            else:
                low = middle + 1
        return self.worst(packs, steps[low])

    def freely(self) -> Planner:
        """The same with every policy to choose from, whatever the settings name."""
        other = copy(self)
        other.settings = replace(self.settings, gradient_checkpointing=True, recompute="auto")
        return other

    def best(self, length: int, rows: int) -> Plan:
        """The fastest micro-batch of rows of one length: any that divides `rows`."""
        sizes = [n for n in range(1, min(rows, 64) + 1) if rows % n == 0]
        packs = [(length,) * n for n in sizes]
        plans = [self.fastest(pack) for pack in packs if holds(pack)]
        fitting = [plan for plan in plans if plan.fits]
        if not fitting:
            return plans[0]
        return max(fitting, key=lambda plan: plan.tokens_per_second)

    def longest(self, policy: str | None = None, limit: int = 1 << 20) -> int:
        """Tokens of the longest single row that fits, a multiple of 64; 0: not even 64.

        Args:
            policy: of all layers; by default `frugal`.
            limit: more than that is not asked for.
        """
        if policy is None and self.host is not None and len(self.allowed()) > 1:
            # What takes least of the card may take more than the host has.
            return max(self.longest(one, limit) for one in self.allowed()[-2:])
        policies = (policy or self.frugal,) * len(self.measure.kinds)
        limit = min(limit, self._parking(policies))
        if limit < 64:
            return 0

        def peak(tokens: int) -> int:
            return self._peak((tokens,), policies)

        low, high = 64, min(4096, limit)
        at_low = peak(low)
        if at_low > self.budget:
            return 0
        while (at_high := peak(high)) <= self.budget:
            if high >= limit:
                return high
            low, at_low, high = high, at_high, min(4 * high, limit)
        # A peak is affine in the tokens but for tiles and for which moment it is: the secant
        # rule is nearly right at once; halves, where it is not, make an end of it.
        secant = True
        while high - low > 64:
            share = (self.budget - at_low) / (at_high - at_low) if secant else 0.5
            guess = (low + int(share * (high - low))) // 64 * 64
            guess, secant = min(max(guess, low + 64), high - 64), not secant
            if (at_guess := peak(guess)) <= self.budget:
                low, at_low = guess, at_guess
            else:
                high, at_high = guess, at_guess
        return low

    def _parking(self, policies: Sequence[str]) -> int:
        """Tokens whose inputs the host can hold, a multiple of 64."""
        parked = policies.count("offload") if self.device == "cuda" else 0
        if not parked or self.host is None:
            return 1 << 62
        width = self.measure.model.head.shape[1] * self.measure.model.dtype.itemsize
        return most_pinned(self.host, parked) // int(width) // 64 * 64


def _alike(policy: str) -> str:
    """The policy that a layer is measured under: meta has no host to park on."""
    return "full" if policy == "offload" else policy


def _make(
    found: Identified,
    settings: Settings,
    lora: Mapping[str, Lora],
    taken: Taken,
    device: str,
    trace: Trace,
) -> tuple[Model, object]:
    return meta_model(
        found, DTYPES[settings.dtype], lora, taken.through(trace.named),
        quantize=settings.quantization == "nf4", device=device,
    )  # fmt: skip
