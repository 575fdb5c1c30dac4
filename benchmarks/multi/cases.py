"""The cases of `multi_gpu`: a shape, its rows on each rank, and what is trained of it.

A case is written ``SHAPE:ROWSxTOKENS`` with options behind colons: ``l4`` takes the first four
layers, ``e4`` trains the experts too at rank 4, ``full`` (or another policy of activation
checkpointing) is that of all layers, ``s12`` times twelve steps, ``x2`` measures one card and all
in turn twice, and ``one``, ``data`` and ``sharded`` measure those placements alone. ``gradients``
in front compares gradients in place of measuring time. ``hf`` in front times transformers + peft +
bitsandbytes under `DistributedDataParallel`, ``hf-fla`` the same with fla.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from peers.shapes import SHAPES, Job

#: How weights are placed: on one GPU, whole on each rank, or sharded over the ranks.
PLACEMENTS = ("one", "data", "sharded")
PEERS = ("hf", "hf-fla")  #: as `train_step_gpu` has them
POLICIES = ("none", "elementwise", "full", "offload")  #: as `qcore.nn.recompute` has them
NUMBERS = {"l": "layers", "e": "expert_rank", "s": "steps", "x": "rounds"}  #: options of a case
#: What ``--cases`` names in short.
SETS = {
    "first": ("4b:2x4096", "35b-a3b:1x8192:s12:x2", "gradients:4b:1x2048:l4"),
    "large": ("397b-a17b:1x8192:sharded", "397b-a17b:1x8192:e4:sharded", "122b-a10b:1x8192"),
    "dense": ("9b:1x8192", "27b:1x8192"),
    "peers": ("hf:4b:2x4096",),
    "tiny": (
        "gradients:tiny:2x33", "gradients:tiny-moe:2x33", "tiny:2x33", "tiny-moe:1x65",
        "tiny-moe:1x65:e4:sharded",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is measured together, on the same weights and rows.

    Attributes:
        shape: one of `SHAPES`.
        batch: rows of a micro-batch, of which each rank has one a step.
        seq: tokens of a row.
        layers: of the slice; 0: all.
        expert_rank: LoRA rank of each expert; 0: experts are frozen.
        steps: timed ones; 0: as the command says.
        rounds: how often one card and all with the whole base are measured in turn.
        policy: activation checkpointing of all layers; empty: the fastest that fit.
        placements: of `PLACEMENTS`.
        gradients: compare gradients with those of one rank, and measure no time.
        peer: of `PEERS`, to time in place of qcore; empty: qcore.
    """

    shape: str
    batch: int
    seq: int
    layers: int = 0
    expert_rank: int = 0
    steps: int = 0
    rounds: int = 1
    policy: str = ""
    placements: tuple[str, ...] = PLACEMENTS
    gradients: bool = False
    peer: str = ""

    @property
    def word(self) -> str:
        """The case as `parse` reads it."""
        words = ["gradients"] if self.gradients else [self.peer] if self.peer else []
        words += [self.shape, f"{self.batch}x{self.seq}"]
        words += [f"l{self.layers}"] if self.layers else []
        words += [f"e{self.expert_rank}"] if self.expert_rank else []
        words += [f"s{self.steps}"] if self.steps else []
        words += [f"x{self.rounds}"] if self.rounds > 1 else []
        words += [self.policy] if self.policy else []
        words += self.placements if self.placements != PLACEMENTS else ()
        return ":".join(words)

    @property
    def job(self) -> Job:
        """The sizes."""
        return Job(
            shape=self.shape, layers=self.layers, batch=self.batch, seq=self.seq,
            expert_rank=self.expert_rank,
        )  # fmt: skip

    @property
    def count(self) -> int:
        """Layers."""
        return int(self.job.text["num_hidden_layers"])

    def fewer(self) -> Case | None:
        """The same with an eighth of the layers less; ``None`` where few are left."""
        layers = self.count * 7 // 32 * 4  # a multiple of four: each fourth attends to all tokens
        return replace(self, layers=layers) if layers >= 4 else None

    def smaller(self, policies: Sequence[str]) -> Case | None:
        """What to try where this case ran out of memory: a policy that takes less, or `fewer`.

        Args:
            policies: those that its layers had.
        """
        least = min(map(POLICIES.index, policies), default=0) + 1
        return replace(self, policy=POLICIES[least]) if least < len(POLICIES) else self.fewer()


def parse(text: str) -> list[Case]:
    """The cases that ``--cases`` names, comma-separated.

    Raises:
        ValueError: one of them is not a case.
    """
    words = [word for one in text.split(",") for word in SETS.get(one, (one,))]
    return [_case(word) for word in words]


def _case(word: str) -> Case:
    parts = word.split(":")
    front = parts.pop(0) if parts[0] in ("gradients", *PEERS) else ""
    shape, *rest = parts or [""]
    if shape not in SHAPES or not rest or not re.fullmatch(r"[1-9]\d*x[1-9]\d*", rest[0]):
        raise ValueError(f"{word}: expected SHAPE:ROWSxTOKENS; shapes: {', '.join(SHAPES)}")
    batch, seq = map(int, rest[0].split("x"))
    case = Case(
        shape=shape, batch=batch, seq=seq, gradients=front == "gradients",
        peer=front if front in PEERS else "",
    )  # fmt: skip
    placements = tuple(one for one in rest[1:] if one in PLACEMENTS)
    numbers: dict[str, Any] = {}
    for option in rest[1:]:
        if match := re.fullmatch(r"([lesx])([1-9]\d*)", option):
            numbers[NUMBERS[match[1]]] = int(match[2])
        elif option in POLICIES:
            case = replace(case, policy=option)
        elif option not in PLACEMENTS:
            raise ValueError(f"{word}: unknown option {option}")
    return replace(case, **numbers, placements=placements or PLACEMENTS)
