"""The chunked cross entropy against torch's, and that full logits never exist."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qcore.api.blocks import Packed
from qcore.nn.loss import cross_entropy_sum

H, V = 12, 101


def problem(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, H, generator=generator).to(dtype)
    head = torch.randn(V, H, generator=generator).to(dtype)
    return hidden, head, torch.randint(V, (rows,), generator=generator)


def reference(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    x = hidden.double().requires_grad_()
    loss = F.cross_entropy(x @ head.double().t(), targets, reduction="sum")
    loss.backward()
    assert x.grad is not None
    return loss.detach(), x.grad


@pytest.mark.parametrize("rows", [1, 2, 37, 64])
@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 38, 1000, None])
def test_equals_torch_whether_chunks_divide_or_not(rows: int, chunk: int | None):
    hidden, head, targets = problem(rows)
    expected, expected_grad = reference(hidden, head, targets)
    hidden.requires_grad_()
    loss = cross_entropy_sum(hidden, head, targets, chunk)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    (loss * 0.25).backward()
    assert hidden.grad is not None
    error = (hidden.grad.double() - 0.25 * expected_grad).abs().max()
    assert float(error) < 1e-6 * float(expected_grad.abs().max())


def test_bf16_keeps_the_loss_in_float32():
    hidden, head, targets = problem(37, torch.bfloat16)
    expected, expected_grad = reference(hidden, head, targets)
    hidden.requires_grad_()
    loss = cross_entropy_sum(hidden, head, targets, 8)
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    assert float(loss) == pytest.approx(float(expected), rel=5e-3)
    error = (hidden.grad.double() - expected_grad).abs().max()
    assert float(error) < 2e-2 * float(expected_grad.abs().max())


def test_large_logits_do_not_overflow():
    head = torch.eye(4, H) * 1e4
    hidden = torch.eye(4, H).requires_grad_()
    targets = torch.tensor([0, 1, 2, 0])
    loss = cross_entropy_sum(hidden, head, targets, 3)
    assert float(loss) == pytest.approx(1e4, rel=1e-6)  # three are certain, one is certainly wrong
    loss.backward()
    assert bool(torch.isfinite(hidden.grad).all())  # type: ignore[arg-type]


def test_a_nan_is_not_hidden():
    hidden, head, targets = problem(9)
    hidden[4, 3] = torch.nan
    hidden.requires_grad_()
    loss = cross_entropy_sum(hidden, head, targets, 2)
    assert torch.isnan(loss)


def test_no_rows_is_zero_with_a_gradient():
    hidden, head, targets = problem(0)
    hidden.requires_grad_()
    loss = cross_entropy_sum(hidden, head, targets)
    assert float(loss) == 0
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, H)


def test_without_gradients_it_is_the_same_number():
    hidden, head, targets = problem(37)
    with torch.no_grad():
        plain = cross_entropy_sum(hidden, head, targets, 5)
    assert float(plain) == float(cross_entropy_sum(hidden.requires_grad_(), head, targets, 5))
    assert not plain.requires_grad


def test_the_head_gets_no_gradient():
    hidden, head, targets = problem(5)
    hidden.requires_grad_()
    head.requires_grad_()
    cross_entropy_sum(hidden, head, targets).backward()
    assert head.grad is None


class _Sizes(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.largest = max(self.largest, leaf.numel())
        return out


def test_full_logits_never_exist():
    rows, chunk = 200, 4
    hidden, head, targets = problem(rows)
    hidden.requires_grad_()
    saved = []
    with _Sizes() as sizes, saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        cross_entropy_sum(hidden, head, targets, chunk).backward()
    assert chunk * V <= sizes.largest <= max(rows * H, V * H)
    assert sizes.largest < rows * V / 8
    assert sum(tensor.numel() for tensor in saved) <= rows * H
    with _Sizes() as full:  # the measure can fail: torch's own makes them
        F.cross_entropy(hidden @ head.t(), targets).backward()
    assert full.largest >= rows * V


def test_supervised_positions_are_those_with_a_target_also_after_a_move():
    batch = Packed.of([torch.arange(5)], [torch.tensor([-100, 3, -100, 0, -1])])
    assert batch.supervised().tolist() == [1, 3]
    assert batch.to(torch.device("cpu")).supervised().tolist() == [1, 3]


def test_mean_over_accumulated_parts_equals_the_whole():
    hidden, head, targets = problem(37)
    whole = cross_entropy_sum(hidden, head, targets, 7)
    parts = [cross_entropy_sum(hidden[s], head, targets[s], 7) for s in (slice(20), slice(20, 37))]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)
