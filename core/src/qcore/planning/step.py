"""Predicts peak memory and time of a training step from measured segments; runs no step itself.

This file decides how segments (`qcore.planning.measure`, `qcore.planning.tower`) make a step: what
layers save accumulates until the loss is computed and is freed layer by layer in backward; the
peak is the maximum over these moments. A tower runs first, and its backward last. A frozen tower
leaves only its outputs; if these are cached between steps (`qcore.training.collate`), the pack
carries them in place of media, and the worst case is that all are computed at once, before the pack
exists. `qcore.planning.planner` chooses the policies.

The peak predicts ``torch.cuda.max_memory_allocated``. Time is a model (`qcore.planning.gpus`) with
an error of about 15 %.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

from ..adapter.targets import lora_targets
from ..config.settings import Settings, in_bytes
from ..nn.kernels.registry import Chosen, installed, requested
from ..nn.model import ops_of
from ..plugins.resolve_model import Identified, classes_of
from .gpus import CARDS, LAUNCH, Card, Seconds, seconds
from .host_memory import pinned
from .links import Gathers, Ranks
from .measure import Measure
from .meta_model import choose_backends, of_settings
from .report import Lengths, Pack, Plan, units_of
from .segments import SAMPLES, Segment
from .sharding import GATHERED, Sharding, sharded_terms
from .static import static_terms
from .trace import rounded

#: Bytes of memory traffic per trained parameter in one update: four reads and three writes in
#: float32, one read for the norm, and the copies in the compute dtype.
UPDATE = 36


@dataclass(frozen=True, slots=True)
class _Moment:
    """Bytes at one moment of a step, without the static terms.

    Attributes:
        name: the moment, for users.
        kept: bytes that earlier segments have saved for backward.
        workspace: peak bytes of the running segment.
        ops: `workspace` by op.
        gathered: bytes of gathered layers of a sharded base.
    """

    name: str
    kept: int
    workspace: int
    ops: Mapping[str, int]
    gathered: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all terms."""
        return self.kept + self.workspace + self.gathered


class Steps:
    """Predicts steps of any micro-batch, for one model, its settings and one GPU.

    Args:
        identified: the model; its headers are enough.
        settings: settings of the run.
        card: the GPU; ``None`` for the CPU, which has no budget.
        backends: the backends that the run has chosen; by default those that it would choose if
            all backends pass verification.
        budget: memory budget in bytes; by default all that a plan may use.
        host: bytes of host memory for offloaded layer inputs; ``None`` if unknown.
    """

    def __init__(
        self,
        identified: Identified,
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
        config = identified.checkpoint.config
        kernels = installed(identified.plugins)
        architecture = identified.decision.architecture
        used = ops_of(architecture, config, identified.layout, identified.modality)
        asked = requested(kernels, settings.kernels, used.ops)
        wanted = asked if backends is None else backends.backends
        self.taken = choose_backends(kernels, self.device, wanted, used)
        self.backends = dict(self.taken.backends)
        self.lora = lora_targets(identified.layout, settings, classes_of(config))
        make = partial(of_settings, identified, settings, self.lora, self.taken, self.device)
        self.measure = Measure(make, self.device)
        self._offloaded: dict[int, Segment] = {}
        self._time_by_segment: dict[tuple[int, str], tuple[Seconds, Seconds]] = {}
        self.static, self.trained = static_terms(self.measure, identified, self.device)
        self.ranks = Ranks()
        self.sharding: Sharding | None = None

    def on(self, card: Card, budget: int | None = None) -> Self:
        """Return the same for another GPU and budget (bytes); the measurements are shared."""
        other = copy(self)
        other.card, other.budget = card, card.budget if budget is None else budget
        return other

    def over(self, ranks: Ranks, *, sharded: bool) -> Self:
        """Return the same for a rank of several.

        Args:
            ranks: all ranks of the run.
            sharded: whether the base is sharded over them; otherwise each rank holds all of it.
        """
        other = copy(self)
        other.ranks, other.sharding = ranks, None
        if sharded:
            other.sharding = Sharding(ranks=ranks, terms=sharded_terms(self.measure.model))
        return other

    @property
    def always(self) -> dict[str, int]:
        """Bytes that a rank always has allocated, by term."""
        if self.sharding is None:
            return self.static
        saved = self.sharding.saved
        return {term: size - saved.get(term, 0) for term, size in self.static.items()}

    @property
    def timed(self) -> bool:
        """Whether time is predicted."""
        return self.device == "cuda" and self.card.known

    def plan(
        self, lengths: Lengths, policies: Sequence[str], micro_steps: float | None = None
    ) -> Plan:
        """Predict the step of one pack.

        Args:
            lengths: tokens of each row; a `Pack` if the rows have media.
            policies: policy of each layer.
            micro_steps: micro-steps per optimizer step; by default as in the settings.

        Returns:
            The plan of a micro-step.
        """
        memory = self.always | {"batch": self._batch(lengths)}
        top = max(self._moments(lengths, policies), key=lambda m: m.nbytes)
        memory |= {} if self.sharding is None else {GATHERED: top.gathered}
        memory |= {"activations": top.kept, "workspace": top.workspace}
        card, host, launches, gathers = self._time(lengths, policies)
        return Plan(
            card=self.card.name if self.device == "cuda" else "cpu",
            lengths=lengths,
            policies=tuple(policies),
            budget=self.budget,
            memory=memory,
            peak=sum(memory.values()),
            moment=top.name,
            ops=top.ops,
            seconds=max(card, host) + gathers.exposed + self._update(micro_steps),
            launches=launches,
            backends=self.backends,
            notes=self._notes(lengths, policies),
            host=self._host(lengths, policies),
            host_budget=self.host,
            timed=self.timed,
            gathers=gathers,
        )

    def evaluation(self, length: int, units: int = 0) -> dict[str, int]:
        """Predict the peak of the evaluation of one held-out row, which has no gradients.

        Args:
            length: tokens of the row.
            units: units of its media.

        Returns:
            Bytes by term.
        """
        lengths = Pack((length,), units)
        most = self.measure.evaluation((length,), self.settings.loss_chunk_size)
        if units:
            before = self._before(lengths, (), graph=False)[0]
            most = max(most, *(moment.kept + moment.workspace for moment in before))
        gathered = {} if self.sharding is None else {GATHERED: self.sharding.most}
        return self.always | {"batch": self._batch(lengths)} | gathered | {"workspace": most}

    def worst(self, packs: Sequence[Lengths], policies: Sequence[str]) -> Plan:
        """Plan the pack that takes the most memory, with the maximum `Plan.host` of all packs."""
        plan = self.plan(max(packs, key=lambda pack: self.peak(pack, policies)), policies)
        return replace(plan, host=max(self._host(pack, policies) for pack in packs))

    def peak(self, lengths: Lengths, policies: Sequence[str]) -> int:
        """Return the peak in bytes, without the rest of the plan."""
        most = max(moment.nbytes for moment in self._moments(lengths, policies))
        return sum(self.always.values()) + self._batch(lengths) + most

    @property
    def _caches_features(self) -> bool:
        """Whether packs carry cached outputs of a frozen tower in place of media."""
        tower = self.measure.tower
        return (
            tower is not None and not tower.trained and in_bytes(self.settings.media_cache_gb) > 0
        )

    def _batch(self, lengths: Lengths) -> int:
        """Return the bytes of a pack and its media, and of what is derived from them."""
        plain, units = tuple(lengths), units_of(lengths)
        if not units:
            return self.measure.batch(plain)
        tower = self.measure.require_tower()
        media = tower.cached_bytes(units) if self._caches_features else tower.media_bytes(units)
        return self.measure.batch(plain, media=True) + media

    def _segments(self, lengths: Lengths, policies: Sequence[str]) -> list[Segment]:
        segments, plain = [], tuple(lengths)
        for kind, policy in zip(self.measure.kinds, policies, strict=True):
            offloads = policy == "offload" and self.device == "cuda"
            segment = self.measure.layer(kind, _measured_policy(policy), plain)
            segments.append(self._offload(segment, lengths) if offloads else segment)
        return segments

    def _offload(self, segment: Segment, lengths: Lengths) -> Segment:
        """Move the input of a ``full`` segment to the host; one more input is in flight."""
        if id(segment) not in self._offloaded:
            x = self._input(lengths)
            self._offloaded[id(segment)] = replace(
                segment,
                kept=segment.kept - x,
                forward=segment.forward + x,
                backward=segment.backward + 2 * x,
            )
        return self._offloaded[id(segment)]

    def _input(self, lengths: Lengths) -> int:
        """Return the bytes of the input of a layer."""
        width = self.measure.width * self.measure.model.dtype.itemsize
        return rounded(sum(lengths) * width)

    def _host(self, lengths: Lengths, policies: Sequence[str]) -> int:
        """Return the bytes of pinned host memory for offloaded inputs."""
        if self.device != "cuda":
            return 0
        return pinned(self._input(lengths), policies.count("offload"))

    def _moments(self, lengths: Lengths, policies: Sequence[str]) -> Iterable[_Moment]:
        segments = self._segments(lengths, policies)
        end = self.measure.end(tuple(lengths), self.settings.loss_chunk_size)
        before, kept = self._before(lengths, policies, graph=True)
        yield from before
        for number, segment in enumerate(segments):
            gathered = (0, 0)
            if self.sharding is not None:
                gathered = self.sharding.gathered(number, 1), self.sharding.gathered(number, -1)
            yield from _passes(f"layer {number}", kept, kept, segment, gathered)
            kept += segment.kept
        yield _Moment("loss", kept, end.forward, end.forward_by_op)
        yield _Moment("backward of the loss", kept, end.backward, end.backward_by_op)

    def _before(
        self, lengths: Lengths, policies: Sequence[str], *, graph: bool
    ) -> tuple[list[_Moment], int]:
        """Return the moments before the first layer, and the bytes that they leave behind."""
        first, units = self.measure.embedding(tuple(lengths)), units_of(lengths)
        moments = [_Moment("embedding", 0, first.forward, {})]
        if not units:
            return moments, first.kept
        tower, graph = self.measure.require_tower(), graph and self.measure.require_tower().trained
        # A tower with cached outputs runs before the tokens are embedded, and its media are freed.
        below, kept = (tower.media_bytes(units), 0) if self._caches_features else (first.kept, 0)
        segments = tower.segments(units, _tower_policy(policies), graph=graph)
        for number, segment in enumerate(segments):
            name = f"layer {number - 1} of the tower" if number else "what the tower reads"
            # The token embeddings are freed before the backward reaches the tower.
            moments += _passes(name, below + kept, kept, segment)
            kept += segment.kept
        placing = self.measure.placing(tuple(lengths), units, graph=graph)
        kept = 0 if self._caches_features else kept  # counted in the batch
        moments.append(
            _Moment("media among the tokens", kept, placing.forward, placing.forward_by_op)
        )
        kept += placing.kept + (tower.output_bytes(units) if self._caches_features else 0)
        return moments, kept

    def _time(self, lengths: Lengths, policies: Sequence[str]) -> tuple[float, float, int, Gathers]:
        """Return the seconds of the GPU and the host, the launches, and what gathering takes."""
        plain, units = tuple(lengths), units_of(lengths)
        layers = self._segments(lengths, policies)
        counted = [
            *layers,
            self.measure.embedding(plain),
            self.measure.end(plain, self.settings.loss_chunk_size),
        ]
        if units:
            tower = self.measure.require_tower()
            counted += tower.segments(units, _tower_policy(policies), graph=tower.trained)
        passes = [one for segment in counted for one in self._seconds(segment)]
        card, host = sum(one.card for one in passes), sum(one.host for one in passes)
        if self.device == "cuda":  # to the host and back, overlapping with the layers
            transferred = 2 * self._input(lengths) * policies.count("offload")
            card = max(card, transferred / self.card.host_link)
        gathers = Gathers()
        if self.sharding is not None:
            compute = [(one.both, two.both) for one, two in map(self._seconds, layers)]
            gathers = self.sharding.gathers(compute, self.card)
            longer = max(card + gathers.exposed, host + self.sharding.host)
            gathers = gathers._replace(exposed=longer - max(card, host))
        return card, host, sum(segment.launches for segment in counted), gathers

    def _seconds(self, segment: Segment) -> tuple[Seconds, Seconds]:
        """Return the times of forward and backward of a segment."""
        key = (id(segment), self.card.name)
        if key not in self._time_by_segment:
            self._time_by_segment[key] = (
                seconds(segment.forward_work, self.card),
                seconds(segment.backward_work, self.card),
            )
        return self._time_by_segment[key]

    def _update(self, micro_steps: float | None) -> float:
        """Return a micro-step's share of the time of the optimizer update, in seconds."""
        whole = self.trained * UPDATE / self.card.bandwidth + 20 * LAUNCH
        return whole / (micro_steps or self.settings.gradient_accumulation_steps)

    def _notes(self, lengths: Lengths, policies: Sequence[str]) -> tuple[str, ...]:
        notes = []
        if (pinned_bytes := self._host(lengths, policies)) >= 5e7:
            notes.append(f"offload pins {pinned_bytes / 1e9:.1f} GB of host memory")
        if self.taken.absent:
            notes.append(
                "not installed here, so the plan assumes references, which take more memory and "
                "time: " + ", ".join(self.taken.absent)
            )
        layers = dict.fromkeys(zip(self.measure.kinds, policies, strict=True))
        plain = tuple(lengths)
        if any(
            self.measure.extrapolates(kind, _measured_policy(policy), plain)
            for kind, policy in layers
        ):
            notes.append(
                f"extrapolated from rows of at most {SAMPLES[-1]} tokens, because a reference "
                "loops over the tokens one chunk at a time: memory is rather overestimated"
            )
        if self.device == "cpu":
            notes.append(
                "on the CPU the plan covers only torch's tensors, and time is not predicted"
            )
        elif not self.card.known:
            notes.append(f"the rates of {self.card.name} are not known, so no time is predicted")
        return tuple(notes)


def _passes(
    name: str, forward: int, backward: int, segment: Segment, gathered: tuple[int, int] = (0, 0)
) -> tuple[_Moment, _Moment]:
    """Return forward and backward of a segment, with the bytes there before each of them.

    Args:
        name: of the segment.
        forward: bytes saved before its forward.
        backward: bytes saved before its backward.
        segment: its bytes.
        gathered: bytes of gathered layers in forward and in backward.
    """
    first, last = gathered
    return (
        _Moment(f"forward of {name}", forward, segment.forward, segment.forward_by_op, first),
        _Moment(f"backward of {name}", backward, segment.backward, segment.backward_by_op, last),
    )


def _measured_policy(policy: str) -> str:
    """Return the policy that a layer is measured under; the meta device has no host memory."""
    return "full" if policy == "offload" else policy


def _tower_policy(policies: Sequence[str]) -> str:
    """Return the policy of every layer of a tower, the same as in `Model.hidden`."""
    return "none" if set(policies) <= {"none"} else "full"
