"""The Triton loss head under the interpreter: loss and gradient against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from qcore.nn import loss_triton
from qcore.nn.loss import cross_entropy_sum as reference

Case = tuple[Tensor, Tensor, Tensor]


def _case(s: int, h: int, v: int, dtype: torch.dtype, spread: float = 1.0) -> Case:
    generator = torch.Generator().manual_seed(s * 1000 + v)
    hidden = torch.randn(s, h, generator=generator) * spread
    head = torch.randn(v, h, generator=generator) / h**0.5
    targets = torch.randint(v, (s,), generator=generator)
    return hidden.to(dtype), head.to(dtype), targets


def _exact(case: Case, scale: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64, written out by torch's own cross entropy."""
    hidden, head, targets = case
    x = hidden.double().requires_grad_()
    loss = F.cross_entropy(x @ head.double().t(), targets, reduction="sum")
    (loss * scale).backward()
    assert x.grad is not None
    return loss.detach(), x.grad


def _found(case: Case, scale: float, chunk: int | None) -> tuple[Tensor, Tensor]:
    hidden, head, targets = case
    x = hidden.clone().requires_grad_()
    loss = loss_triton.cross_entropy_sum(x, head, targets, chunk)
    (loss * scale).backward()
    assert x.grad is not None
    return loss.detach(), x.grad


@pytest.mark.parametrize(
    ("s", "h", "v", "chunk"),
    [(1, 16, 40, None), (7, 24, 1000, 3), (5, 16, 8192, 5), (4, 16, 8193, 2), (3, 8, 20011, 1)],
)
def test_loss_and_gradient_are_those_of_float64(s: int, h: int, v: int, chunk: int | None) -> None:
    case = _case(s, h, v, torch.float32)
    loss, grad = _exact(case, 0.37)
    found, found_grad = _found(case, 0.37, chunk)
    assert found == pytest.approx(float(loss), rel=1e-5)
    assert (found_grad - grad).norm() <= 1e-5 * grad.norm()


def test_bf16() -> None:
    """The interpreter cuts bf16 off where a GPU rounds; the bound beside plain is tests/gpu's."""
    case = _case(33, 64, 4000, torch.bfloat16)
    loss, grad = _exact(case, 1 / 33)
    found, found_grad = _found(case, 1 / 33, 8)
    assert found == pytest.approx(float(loss), rel=2e-3)
    assert (found_grad.double() - grad).norm() <= 1e-2 * grad.norm()


def test_a_scale_of_the_mean_rounds_nothing_again() -> None:
    """Gradients at 1 / rows and at 2 / rows are the same digits."""
    hidden, head, targets = _case(7, 32, 300, torch.bfloat16)
    one, two = (_found((hidden, head, targets), scale, 4)[1] for scale in (1 / 7, 2 / 7))
    assert torch.equal(one * 2, two)
    third = _found((hidden, head, targets), 1.0, 4)[1]
    assert (third.float() / 7 - one.float()).norm() <= 1e-2 * one.float().norm()


def test_wide_logits_and_a_sure_answer_keep_their_digits() -> None:
    """Scores of hundreds, and a target with a probability of nearly 1."""
    hidden, head, targets = _case(6, 16, 300, torch.float32, spread=60.0)
    targets[:3] = (hidden @ head.t()).argmax(1)[:3]
    case = hidden, head, targets
    loss, grad = _exact(case, 1.0)
    found, found_grad = _found(case, 1.0, None)
    assert found == pytest.approx(float(loss), rel=1e-5)
    assert (found_grad - grad).norm() <= 1e-5 * grad.norm()
    sure = _case(1, 16, 300, torch.float32, spread=5.0)
    best = (sure[0] @ sure[1].t()).argmax(1)
    sure = (sure[0], sure[1], best)
    _, grad = _exact(sure, 1.0)
    assert (_found(sure, 1.0, None)[1] - grad).norm() <= 1e-4 * grad.norm()


def test_it_is_the_reference_and_repeats_bit_for_bit() -> None:
    hidden, head, targets = _case(9, 16, 500, torch.bfloat16)
    one, two = (_found((hidden, head, targets), 0.5, chunk) for chunk in (4, 4))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    x = hidden.clone().requires_grad_()
    loss = reference(x, head, targets, 4)
    (loss * 0.5).backward()
    assert x.grad is not None
    assert float(one[0]) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert (one[1].float() - x.grad.float()).norm() <= 1e-2 * x.grad.float().norm()


def test_what_is_not_finite_is_not_hidden() -> None:
    hidden, head, targets = _case(3, 16, 300, torch.float32)
    hidden[1, 3] = float("nan")
    assert loss_triton.cross_entropy_sum(hidden, head, targets).isnan()
    hidden[1, 3] = float("inf")
    assert not loss_triton.cross_entropy_sum(hidden, head, targets).isfinite()


def test_without_a_gradient_and_without_rows() -> None:
    hidden, head, targets = _case(5, 16, 300, torch.float32)
    loss, _ = _exact((hidden, head, targets), 1.0)
    assert float(loss_triton.cross_entropy_sum(hidden, head, targets)) == pytest.approx(float(loss))
    none = loss_triton.cross_entropy_sum(hidden[:0].clone().requires_grad_(), head, targets[:0])
    none.backward()
    assert float(none.detach()) == 0


def test_buffers_are_written_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory full of NaN changes nothing."""
    case = _case(7, 16, 301, torch.float32)
    expected = _found(case, 1.0, 3)
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty

    def poison(make):  # type: ignore[no-untyped-def]
        def made(*args, **kwargs):  # type: ignore[no-untyped-def]
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return made

    monkeypatch.setattr(torch, "empty", poison(empty))
    monkeypatch.setattr(torch, "empty_like", poison(empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poison(new_empty))
    found = _found(case, 1.0, 3)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_rows_of_a_chunk_fit_their_budget() -> None:
    assert loss_triton.chunk_rows(248320, 2) == 1024
    assert loss_triton.chunk_rows(248320, 4) == 512
    assert loss_triton.chunk_rows(10**10, 4) == 1
    for vocabulary in (1000, 32001, 151936, 2_000_000):
        rows = loss_triton.chunk_rows(vocabulary, 2)
        assert rows * vocabulary * 2 <= loss_triton.CHUNK_BYTES


def test_the_registry_has_it_and_its_own_check_passes() -> None:
    from qcore.nn.kernels.builtin import core_kernels

    (kernel,) = (one for one in core_kernels() if one.op == "cross_entropy")
    assert kernel.load() is loss_triton.cross_entropy_sum
    assert kernel.refuse(torch.device("cpu")) == "it needs a CUDA device"
    verdict = kernel.verify(torch.device("cpu"))
    assert verdict.good, verdict.text


def test_the_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    real = loss_triton.cross_entropy_sum
    monkeypatch.setattr(loss_triton, "cross_entropy_sum", lambda *args: real(*args) * 1.02)
    assert not loss_triton.verify(torch.device("cpu")).good
