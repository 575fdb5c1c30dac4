"""Gradient buffers: gradients of tensors that share one buffer are written into one buffer.

A stacked linear map returns its outputs as column slices of one buffer ``[T, C]``. Its backward
needs their gradients in the same layout; otherwise it has to copy them together. The consumers'
backward functions run one after another, and each knows its own slices only. This file decides
the convention that makes them meet: a gradient is written where its input would lie, in a buffer
as wide as the input's (`GradBuffers.gradients`), and a function that receives such a gradient and
also reads the neighbouring slices writes their gradients beside it. `as_one_buffer` returns the
shared buffer, and copies only if the slices do not share one.

A function that needs the gradient of a neighbouring slice takes that slice as an input and
returns it unchanged.

Shapes: T rows, C columns of all slices of a buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .storage import storage_id


class _Slot(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    group: int


class GradBuffers:
    """How the inputs ``[T, ...]`` of a function lie: in common buffers, or each alone.

    Keep it for backward in place of the inputs: it holds no memory.
    """

    __slots__ = ("_slots",)

    def __init__(self, *inputs: Tensor) -> None:
        groups: dict[tuple[int, int], int] = {}
        single = _single_rows(inputs)
        places = []
        for number, x in enumerate(inputs):
            storage, stride = storage_id(x), x.stride()
            begin, width = single.get(storage, (0, stride[0])) if len(x) == 1 else (0, stride[0])
            offset = int(x.storage_offset() - begin) % max(width, 1)
            if offset + _reach(x) < width:
                group = groups.setdefault((storage, width), number)
                stride = (width, *stride[1:])
            else:  # rows that overlap: no slice of a buffer of rows
                stride, offset, group = _packed(x.shape), 0, groups.setdefault((-1, number), number)
            places.append(_Slot(x.shape, stride, offset, group))
        self._slots = tuple(places)

    def gradients(self, like: Tensor, *given: Tensor | None) -> tuple[Tensor, ...]:
        """One gradient for each input, laid out as the inputs are.

        Args:
            like: a tensor of the dtype and device of what is new.
            given: for each input its gradient where it is known, ``None`` where it is not: its
                tensor is then not initialized, and to be written by the caller.
        """
        buffers: dict[int, Tensor] = {}
        for place, gradient in zip(self._slots, given, strict=True):
            if gradient is not None and place.group not in buffers and _lies(gradient, place):
                buffers[place.group] = gradient
        out = []
        for place, gradient in zip(self._slots, given, strict=True):
            if place.group not in buffers:
                buffers[place.group] = _buffer(place, like)
            buffer = buffers[place.group]
            made = buffer.as_strided(place.shape, place.stride, place.offset)
            if gradient is not None and not _same(gradient, made):
                made.copy_(gradient)
            out.append(made)
        return tuple(out)


def as_one_buffer(slices: Sequence[Tensor]) -> Tensor:
    """``([T, c1], [T, c2], ...) -> [T, c1 + c2 + ...]``: their buffer where they share one."""
    first = slices[0]
    width = sum(one.shape[1] for one in slices)
    at = first.storage_offset()
    for one in slices:
        if (
            storage_id(one) != storage_id(first)
            or one.stride() != (width, 1)
            or one.storage_offset() != at
        ):
            return torch.cat(list(slices), 1)
        at += one.shape[1]
    return first.as_strided((len(first), width), (width, 1), first.storage_offset())


def _reach(x: Tensor) -> int:
    """How far the last element of a row lies behind its first."""
    return sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True))


def _single_rows(inputs: Sequence[Tensor]) -> dict[int, tuple[int, int]]:
    """By storage, where inputs of one row begin and how wide they are together.

    The stride of a dimension of size one says nothing: views set it as they like.
    """
    spans: dict[int, tuple[int, int]] = {}
    for x in inputs:
        if len(x) == 1:
            begin = int(x.storage_offset())
            end = begin + _reach(x) + 1
            first, last = spans.get(storage_id(x), (begin, end))
            spans[storage_id(x)] = min(first, begin), max(last, end)
    return {storage: (begin, end - begin) for storage, (begin, end) in spans.items()}


def _packed(shape: torch.Size) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(size, 1))
    return tuple(strides)


def _buffer(place: _Slot, like: Tensor) -> Tensor:
    rows, width = place.shape[0], place.stride[0]
    return like.new_empty(max(rows * width, 1))


def _lies(gradient: Tensor, place: _Slot) -> bool:
    """Whether `gradient` is a slice of a buffer in which its neighbours have their places too."""
    rows, width = place.shape[0], place.stride[0]
    room = gradient.untyped_storage().nbytes() // gradient.element_size()
    return (
        gradient.shape == place.shape
        and gradient.stride() == place.stride
        and gradient.storage_offset() == place.offset
        and room >= rows * width
    )


def _same(one: Tensor, other: Tensor) -> bool:
    return (
        storage_id(one) == storage_id(other)
        and one.storage_offset() == other.storage_offset()
        and one.stride() == other.stride()
    )
