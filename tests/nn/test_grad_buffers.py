"""Gradients laid out as their inputs lie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcore.nn.grad_buffers import GradBuffers, as_one_buffer


def columns(rows: int, *widths: int) -> list[Tensor]:
    return list(torch.randn(rows, sum(widths)).split(widths, 1))


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_slices_of_one_buffer_get_one_buffer(rows: int) -> None:
    inputs = columns(rows, 3, 5, 2)
    made = GradBuffers(*inputs).gradients(inputs[0], None, None, None)
    for one, x in zip(made, inputs, strict=True):
        assert one.shape == x.shape
        one.copy_(x)
    assert torch.equal(as_one_buffer(made), torch.cat(inputs, 1))
    assert as_one_buffer(made).data_ptr() == made[0].data_ptr()


@pytest.mark.parametrize("rows", [1, 4])
def test_given_gradients_keep_their_values(rows: int) -> None:
    inputs = columns(rows, 3, 5, 2)
    given = torch.randn(rows, 5)
    made = GradBuffers(*inputs).gradients(inputs[0], None, given, None)
    made[0].fill_(1)
    made[2].fill_(2)
    assert torch.equal(made[1], given)
    assert torch.equal(as_one_buffer(made)[:, 3:8], given)


def test_a_neighbour_writes_beside_what_is_there() -> None:
    inputs = columns(6, 3, 5)
    (early,) = GradBuffers(inputs[1]).gradients(inputs[1], None)
    early.fill_(3)
    first, second = GradBuffers(*inputs).gradients(inputs[0], None, early)
    assert second.data_ptr() == early.data_ptr()
    first.fill_(1)
    assert torch.equal(early, torch.full((6, 5), 3.0))
    assert as_one_buffer([first, second]).data_ptr() == first.data_ptr()


@pytest.mark.parametrize("rows", [1, 6])
def test_half_a_head(rows: int) -> None:
    """Query and gate interleaved: the gate's gradient lies between the query's."""
    qg, k = columns(rows, 2 * 2 * 4, 5)
    gate = qg.unflatten(1, (2, 8))[..., 4:]
    dgate = torch.randn(rows, 2, 4)
    dqg, dk, dg = GradBuffers(qg, k, gate).gradients(qg, None, None, dgate)
    dqg.unflatten(1, (2, 8))[..., :4] = 0
    dk.fill_(7)
    assert torch.equal(dg, dgate)
    assert torch.equal(dqg.unflatten(1, (2, 8))[..., 4:], dgate)


def test_what_lies_apart_stays_apart() -> None:
    one, other = torch.randn(4, 3), torch.randn(4, 2)
    made = GradBuffers(one, other).gradients(one, None, other)
    assert made[1].data_ptr() == other.data_ptr()
    assert made[0].is_contiguous()
    assert torch.equal(as_one_buffer(made)[:, 3:], other)


@pytest.mark.parametrize(
    "x", [torch.randn(3, 4, 5).transpose(0, 1), torch.randn(1, 6).expand(4, 6)]
)
def test_what_is_no_slice_of_rows_gets_a_packed_gradient(x: Tensor) -> None:
    (made,) = GradBuffers(x).gradients(x, None)
    assert made.shape == x.shape
    assert made.is_contiguous()


def test_slices_out_of_order_are_copied() -> None:
    one, other = columns(4, 3, 2)
    assert torch.equal(as_one_buffer([other, one]), torch.cat([other, one], 1))
    assert torch.equal(as_one_buffer([one]), one)
