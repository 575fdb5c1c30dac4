"""Gradients of every LoRA tensor on a card, beside transformers in float32 and in bfloat16.

This file decides the cases: four layers of each published shape at full width, NF4, with the
kernels that a run takes and gradients added where its optimiser keeps them. `support.gradient_*`
has the sides, the bounds and why they are what they are; `test_gradients_harness` proves these
without a card. A table of all cases is printed at the end, also of those that fail.

Experts: where scores of two experts are close, float32 and bfloat16 pick others, and the
gradients are then those of another function. What is judged is computed with the experts that
the float32 reference picked, on both sides, for every token. Beside it stand, not judged, the
tokens by layer that pick others when left alone and the errors that follow; ours must not flip
more of them than transformers' own.

Repeats: attention is the only op that may differ between two runs. It is named by exchange: with
attention by plain products in its place all gradients and ten optimiser steps agree bit for bit,
so nothing else differs; of attention alone, only q's gradient may.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.cuda_memory import GIB, fill_free, take_free
from support.gradient_cases import Case, Gradients, Routes
from support.gradient_proof import HEADER, Proof, differing, flips, prove, short, spread
from support.gradient_slices import SKUS, Slice, plain_attention, text_of
from support.gradient_twin import Twin
from torch import Tensor

from qcore.nn.attention.cuda import fused_attention

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
CASES = {
    "packed": Case(),
    "packed, seed 1": Case(seed=1),
    "padded": Case(lengths=(450, 512, 77, 333), padded=512),
    "decay near 0": Case(decay="forgets"),
    "decay near 1": Case(decay="keeps"),
    "200 steps": Case(),
}
DRAWS = 4  #: of other tokens, for a tensor that errs more than one may
PROOFS: dict[tuple[str, str], Proof] = {}
LINES: list[str] = []


class Sides:
    """The three sides of one shape."""

    def __init__(self, sku: str) -> None:
        self.sku = sku
        self.ours = Slice(text_of(sku), CUDA, torch.bfloat16, kernels=True)
        assert self.ours.chosen is not None
        taken = self.ours.chosen.backends
        assert "reference" not in taken.values(), self.ours.chosen.lines()
        self.theirs = Twin(self.ours, torch.bfloat16)
        self.reference = Twin(self.ours, torch.float32)

    def set(self, case: Case, *, steps: int = 0) -> None:
        """The same adapters and decays everywhere; `steps`: trained by qcore."""
        self.ours.set_decay(case.decay)
        if steps:
            losses = self.ours.train(steps)
            assert sum(losses[-8:]) < sum(losses[:8]), "nothing was learned"
        else:
            self.ours.draw_lora(case.seed)
        self.theirs.copy_from(self.ours)
        self.reference.copy_from(self.ours)


@pytest.fixture(scope="module", autouse=True)
def _table() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    began = time.perf_counter()
    yield
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}\n{HEADER}")
    for proof in PROOFS.values():
        print(proof.row())
    print("\n".join(LINES))
    print(f"{time.perf_counter() - began:.0f} s in all")


@pytest.fixture(scope="module", params=SKUS)
def sides(request: pytest.FixtureRequest) -> Iterator[Sides]:
    made = Sides(request.param)
    yield made
    made.__dict__.clear()
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("name", CASES)
def test_gradients_err_no_more_than_transformers(sides: Sides, name: str) -> None:
    case = CASES[name]
    sides.set(case, steps=200 if name == "200 steps" else 0)
    proof = _proof(sides, name, case, alone=name in ("packed", "200 steps"))
    if proof.doubtful:
        others = (replace(case, seed=case.seed + 10 + n) for n in range(DRAWS))
        again = tuple(_proof(sides, name, other) for other in others)
        proof = replace(proof, again=again)
    PROOFS[sides.sku, name] = proof
    if name == "packed, seed 1" and (sides.sku, "packed") in PROOFS:
        LINES.append(f"{sides.sku}: {spread(PROOFS[sides.sku, 'packed'], proof)}")
    assert not proof.violations(), "\n".join(proof.violations())


def _proof(sides: Sides, name: str, case: Case, *, alone: bool = False) -> Proof:
    """Both sides beside the reference; `alone`: experts left alone are told of too."""
    free = Routes()
    want = sides.reference.gradients(case, free)
    forced = free.by_layer() if sides.ours.moe else None
    notes = _left_alone(sides, case, want, forced) if forced is not None and alone else []
    ours = sides.ours.gradients(case, Routes(forced=forced))
    theirs = sides.theirs.gradients(case, Routes(forced=forced))
    return prove(f"{sides.sku} {name}", ours, theirs, want, *notes)


def _left_alone(sides: Sides, case: Case, want: Gradients, picked: list[Tensor]) -> list[str]:
    """What follows where each side picks its own experts; not judged but for the number."""
    mine, their = Routes(), Routes()
    loose = prove("", sides.ours.gradients(case, mine), sides.theirs.gradients(case, their), want)
    ours, theirs = (flips(one.by_layer(), picked, case.real()) for one in (mine, their))
    # Two draws of one rate: three standard deviations of their difference.
    assert sum(ours) <= sum(theirs) + 3 * (2 * sum(theirs) + 1) ** 0.5, (ours, theirs)
    errors = [max(getattr(line, who) for line in loose.lines) for who in ("error", "their_error")]
    return [
        f"own experts: {ours} of {int(case.real().sum())} tokens flip ({theirs} theirs), "
        f"worst error {errors[0]:.3f} ({errors[1]:.3f})"
    ]


def test_only_attention_differs_between_two_runs(sides: Sides) -> None:
    case = CASES["packed"]
    sides.set(case)
    fused = [sides.ours.gradients(case) for _ in range(3)]
    before = sides.ours.attend(plain_attention)
    plain = [sides.ours.gradients(case) for _ in range(3)]
    runs = [sides.ours.train(10) for _ in range(2)]
    masters = [side.detach().clone() for _, side in sides.ours.sides()]
    sides.ours.train(10)
    after = [side.detach() for _, side in sides.ours.sides()]
    sides.ours.attend(before[0])
    moved = sorted({n for one in fused[1:] for n in differing(fused[0], one)})
    still = sorted({n for one in plain[1:] for n in differing(plain[0], one)})
    LINES.append(
        f"{sides.sku}: {len(moved)} of {len(fused[0])} gradients differ between runs; "
        f"{len(still)} with plain attention in place of the fused"
    )
    assert not still, [short(name) for name in still]
    assert runs[0] == runs[1]
    assert all(torch.equal(one, two) for one, two in zip(masters, after, strict=True))


@pytest.mark.parametrize("ends", [(0, 1000, 1001, 1078, 1411), (0, 1024, 2048)])
def test_of_attention_only_the_gradient_of_q_differs(ends: tuple[int, ...]) -> None:
    """FlashAttention for a pack, cuDNN for equal rows; heads of the 4B."""
    draw = torch.Generator(CUDA).manual_seed(0)
    q, k, v = (
        torch.randn(ends[-1], h, 256, generator=draw, device=CUDA, dtype=torch.bfloat16)
        for h in (16, 4, 4)
    )
    do = torch.randn(q.shape, generator=draw, device=CUDA, dtype=torch.bfloat16)

    def run() -> Gradients:
        given = [x.clone().requires_grad_() for x in (q, k, v)]
        o = fused_attention(*given, ends, 256**-0.5)
        dq, dk, dv = torch.autograd.grad(o, given, do)
        return {"o": o.detach(), "dq": dq, "dk": dk, "dv": dv}

    first = run()
    found = {name for _ in range(20) for name in differing(first, run())}
    LINES.append(
        f"attention, ends {ends}: differs in {sorted(found) or 'nothing'} of o, dq, dk, dv"
    )
    assert found <= {"dq"}, found


def test_nothing_reads_what_was_never_written(sides: Sides) -> None:
    """All free memory is NaN, then all that torch hands out is: no gradient changes by a bit."""
    case = CASES["packed"]
    sides.set(case)
    before = sides.ours.attend(plain_attention)
    want = sides.ours.gradients(case)
    _poison()
    poisoned = sides.ours.gradients(case)
    # Deterministic mode may take other algorithms, so it is compared with itself.
    clean, filled = (_in_mode(sides, case, fill=fill) for fill in (False, True))
    sides.ours.attend(before[0])
    assert differing(want, poisoned) == []
    assert all(bool(g.isfinite().all()) for g in filled.values())
    assert differing(clean, filled) == []
    _poison()
    fused = sides.ours.gradients(case)
    assert all(bool(g.isfinite().all()) for g in fused.values())


def _poison() -> None:
    """Leave torch no free memory that is not NaN, and more of it than a run takes."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    fill_free(torch.nan, more=min(24 * GIB, free // 2))
    taken = take_free()
    assert sum(one.nbytes for one in taken) > 0
    assert all(bool(one.isnan().all()) for one in taken)  # the trap is set
    del taken
    fill_free(torch.nan)  # also what the check itself wrote


def _in_mode(sides: Sides, case: Case, *, fill: bool) -> Gradients:
    """In deterministic mode; `fill`: what is new is NaN, or the largest integer, till written."""
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert not fill or bool(torch.empty(8, device=CUDA).isnan().all())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sides.ours.gradients(case)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
