"""Gradients beside the float32 reference: what is reported of each tensor, and what is required.

This file decides the bounds. The reference is `gradient_twin` in float32; ``theirs`` is the same
in bfloat16, ``ours`` is qcore. Of each LoRA tensor: cosine with the reference, and the norm of the
difference over the reference's. Required of ours:

* cosine at least 0.999, for every tensor;
* error at most that of theirs: over the set (the geometric mean of the tensors' ratios, so that
  no large one hides a small one) within 1.05, of one tensor within 1.25.

Why not 1.0: an error in bfloat16 is a draw. `spread` says how far theirs is from itself under
another seed of tokens, targets and B, and the table prints it beside what is judged. Measured on
a CPU (0.8B, 278 tokens, references in torch): theirs under three seeds, geometric mean within
1.02, one tensor up to 1.40; ours over theirs, of the same seed, 0.92 to 0.97 and up to 1.24, also
with decays near 0 and near 1 and after 200 steps. The margin of one tensor is below that spread,
so one above it is looked at again with other tokens and targets (`Proof.again`), same adapters:
what counts is then the geometric mean of its ratios. Chance draws anew; a kernel errs again.

Of few values the norm of an error is mostly chance: the ratio of two such norms of n independent
values has a logarithm of standard deviation ``n ** -0.5``. Of fewer than 219 values it may be
``exp(3.3 / n ** 0.5)``: 1.34 for the 128 of a decay's B, 3.2 for the 8 of the shared expert's
gate (2.2 was seen there without any kernel, at small widths). Their cosine
must be 0.999 all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from support.gradient_cases import Gradients
from torch import Tensor

COSINE, SET, ONE = 0.999, 1.05, 1.25


@dataclass(frozen=True, slots=True)
class Line:
    """One LoRA tensor: cosine with the reference and relative error, ours and theirs."""

    name: str
    values: int
    cosine: float
    error: float
    their_cosine: float
    their_error: float

    @property
    def allowed(self) -> float:
        """Most of `ratio`: `ONE`, or what chance makes of so few values."""
        return max(ONE, math.exp(3.3 / self.values**0.5))

    @property
    def ratio(self) -> float:
        """Our error over theirs."""
        return self.error / max(self.their_error, 1e-30)


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found of one case of one shape."""

    title: str
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = field(default=())
    again: tuple[Proof, ...] = field(default=())

    @property
    def doubtful(self) -> list[str]:
        """Tensors whose error in this draw is above what one may be."""
        return [line.name for line in self.lines if not line.ratio <= line.allowed]

    def over_draws(self, name: str) -> float:
        """Geometric mean of a tensor's ratios in this and all other draws."""
        ratios = [
            line.ratio for one in (self, *self.again) for line in one.lines if line.name == name
        ]
        return math.exp(sum(math.log(max(ratio, 1e-30)) for ratio in ratios) / len(ratios))

    @property
    def mean_ratio(self) -> float:
        """Geometric mean of the tensors' ratios."""
        return math.exp(
            sum(math.log(max(line.ratio, 1e-30)) for line in self.lines) / len(self.lines)
        )

    def row(self) -> str:
        """A line of the table."""
        worst = max(self.lines, key=lambda line: line.ratio)
        ours, theirs = (
            (min(getattr(x, f"{who}cosine") for x in self.lines),
             max(getattr(x, f"{who}error") for x in self.lines))
            for who in ("", "their_")
        )  # fmt: skip
        state = "ok" if not self.violations() else "FAILS"
        return (
            f"{self.title:28s} {len(self.lines):4d} | {ours[0]:.5f} {theirs[0]:.5f} | "
            f"{ours[1]:.4f} {theirs[1]:.4f} | {self.mean_ratio:.3f} {worst.ratio:.3f} "
            f"{short(worst.name):28s} | {state} {'; '.join((*self.notes, *self._redrawn()))}"
        )

    def _redrawn(self) -> list[str]:
        return [
            f"{short(name)} over {1 + len(self.again)} draws {self.over_draws(name):.3f}"
            for name in self.doubtful
            if self.again
        ]

    def violations(self) -> list[str]:
        """What is required and not so."""
        found = [text for one in self.again for text in one.violations() if "cosine" in text]
        for line in self.lines:
            # Written so that a NaN is a violation.
            if not line.cosine >= COSINE:
                found.append(f"{short(line.name)}: cosine {line.cosine:.5f} "
                             f"(transformers {line.their_cosine:.5f})")  # fmt: skip
            if not line.ratio <= line.allowed and not self.over_draws(line.name) <= line.allowed:
                found.append(f"{short(line.name)}: error {line.error:.4f}, {line.ratio:.2f} of "
                             f"transformers' {line.their_error:.4f}; over {1 + len(self.again)} "
                             f"draws {self.over_draws(line.name):.2f}")  # fmt: skip
        if not self.mean_ratio <= SET:
            found.append(f"all tensors: error {self.mean_ratio:.3f} of transformers'")
        return found


HEADER = (
    f"{'shape, case':28s}    n | least cosine    | worst error   | ours / transformers'\n"
    f"{'':28s}      |    ours  theirs |   ours theirs |  mean worst tensor"
)


def prove(
    title: str, ours: Gradients, theirs: Gradients, reference: Gradients, *notes: str
) -> Proof:
    """Every tensor of the reference, which all three must have.

    Raises:
        AssertionError: for another set of names, or a reference that is zero: nothing would be
            shown of that tensor.
    """
    assert ours.keys() == theirs.keys() == reference.keys(), "other tensors have gradients"
    lines = []
    for name, want in reference.items():
        assert float(want.norm()) > 0, f"{name}: the reference's gradient is zero"
        lines.append(Line(name, want.numel(), *_of(ours[name], want), *_of(theirs[name], want)))
    return Proof(title, tuple(lines), notes)


def _of(found: Tensor, want: Tensor) -> tuple[float, float]:
    """Cosine and relative error, in float64."""
    one, two = found.double().flatten(), want.double().flatten()
    norm = float(two.norm())
    cosine = float(one @ two) / (max(float(one.norm()), 1e-300) * norm)
    return cosine, float((one - two).norm()) / norm


def spread(one: Proof, two: Proof) -> str:
    """How far transformers' own errors are apart under two seeds: the noise that margins allow."""
    other = {line.name: line.their_error for line in two.lines}
    logs = [math.log(line.their_error / other[line.name]) for line in one.lines]
    mean = math.exp(abs(sum(logs) / len(logs)))
    most = math.exp(max(abs(x) for x in logs))
    return f"transformers' error under two seeds: mean {mean:.3f}, most of one tensor {most:.3f}"


def flips(found: Sequence[Tensor], reference: Sequence[Tensor], real: Tensor) -> list[int]:
    """Of each layer, tokens whose set of experts is another one; padding does not count."""
    return [
        int((a.sort(1).values != b.sort(1).values).any(1)[real.to(a.device)].sum())
        for a, b in zip(found, reference, strict=True)
    ]


def differing(one: Gradients, two: Gradients) -> list[str]:
    """The tensors that are not the same bits."""
    return [name for name in one if not torch.equal(one[name], two[name])]


def short(name: str) -> str:
    """Layer, map and side."""
    return name.replace("model.language_model.layers.", "").replace(".weight", "")
