"""A dispatch mode that records live bytes, peak memory and work of a segment.

This file decides how memory is counted (by storage, from its allocation until its last tensor is
freed, rounded up as the caching allocator does) and what an op costs: FLOPs of matrix products and
bytes read and written. It works alike for meta tensors, which stand for those of a device, and for
real tensors, with which it is tested. `qcore.planning.gpus` converts work to time.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..nn.storage import storage_id
from .segments import Work

_F = TypeVar("_F", bound=Callable[..., Any])
_BLOCK = 512  # the allocator's unit
#: Ops that make a tensor and write nothing.
_EMPTY = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
#: Ops that are given a tensor and read none of it.
_LIKE = {"new_zeros", "new_full", "new_ones", "zeros_like", "ones_like", "full_like"}
#: Products, and which argument is their left side.
_PRODUCTS = {
    "mm": 0,
    "bmm": 0,
    "_grouped_mm": 0,
    "addmm": 1,
    "addmm_": 1,
    "baddbmm": 1,
    "baddbmm_": 1,
}


def rounded(nbytes: int) -> int:
    """As the allocator rounds."""
    return -(-nbytes // _BLOCK) * _BLOCK


class Trace(TorchDispatchMode):
    """Counts what tensors of one device take while it is entered.

    Args:
        device: type of the device whose memory is counted: ``meta``, ``cpu``, ``cuda``.

    Attributes:
        live: bytes of storages made under it that are still there.
        peak: the most that `live` was since `mark`.
        live_by_op: what of `live` is whose: by op, as `named` names them; else by no name.
        peak_by_op: the same of `peak`.
        work: the ops since `mark`, in order.
    """

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.live = 0
        self.peak = 0
        self.live_by_op: Counter[str] = Counter()
        self.peak_by_op: Counter[str] = Counter()
        self.work: list[Work] = []
        self._known: dict[int, weakref.ref[Any]] = {}
        self._op = ""
        self._nodes: dict[str, str] = {}

    def mark(self) -> None:
        """Start a new measurement of peak and work."""
        self.peak, self.peak_by_op = self.live, self.live_by_op.copy()
        self.work = []

    def named(self, op: str, function: _F) -> _F:
        """`function`, whose allocations are `op`'s, its backward's too."""

        def call(*args: Any, **kwargs: Any) -> Any:
            before, self._op = self._op, op
            try:
                out = function(*args, **kwargs)
            finally:
                self._op = before
            for one in tree_leaves(out):
                if isinstance(one, Tensor) and one.grad_fn is not None:
                    self._nodes.setdefault(one.grad_fn.name(), op)
            return out

        return cast(_F, call)

    def record(self, name: str, args: Iterable[Any], flops: float) -> None:
        """Take a kernel that the dispatcher does not see."""
        tensors = {id(one): one for one in args if isinstance(one, Tensor)}.values()
        wide = any(one.dtype == torch.float32 for one in list(tensors)[:1])
        self.work.append(Work(name, flops, sum(map(_bytes, tensors)), wide))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        lying = {storage_id(x) for x in given}
        fresh = False
        for tensor in made:
            if storage_id(tensor) not in lying and tensor.device.type == self.device:
                fresh = True
                self._see(tensor)
        name = func.overloadpacket.__name__
        if (fresh or func._schema.is_mutable) and name not in _EMPTY:
            self._count(func, name, args, kwargs, out, given, made)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, rounded(storage.nbytes())
        if key in self._known:
            return
        op = self._owner()
        self._known[key] = weakref.ref(storage, self._gone(key, size, op))
        self.live += size
        self.live_by_op[op] += size
        if self.live > self.peak:
            self.peak, self.peak_by_op = self.live, self.live_by_op.copy()

    def _owner(self) -> str:
        if self._op:
            return self._op
        node = torch._C._current_autograd_node()
        return "" if node is None else self._nodes.get(node.name(), "")

    def _gone(self, key: int, size: int, op: str) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.live -= size
            self.live_by_op[op] -= size

        return gone

    def _count(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: Any,
        out: Any,
        given: list[Tensor],
        made: list[Tensor],
    ) -> None:
        here = [x for x in given + made if x.device.type == self.device]
        if not here or not made:
            return
        if func.overloadpacket in flop_registry or name in _PRODUCTS or func._schema.is_mutable:
            pass
        elif not any(isinstance(x, Tensor) for x in args) or name in _LIKE:
            here = [x for x in made if x.device.type == self.device]  # `like` is not read
        tensors = {id(x): x for x in here}.values()
        flops, wide = 0.0, False
        if name in _PRODUCTS:
            left, right = args[_PRODUCTS[name] : _PRODUCTS[name] + 2]
            groups = len(right) if right.dim() == 3 and left.dim() == 2 else 1
            flops = 2.0 * left.numel() * right.numel() / left.shape[-1] / groups
            if left.dim() == right.dim() == 3:
                flops /= len(left)
            wide = left.dtype == torch.float32
        elif func.overloadpacket in flop_registry:
            flops = float(flop_registry[func.overloadpacket](*args, **kwargs, out_val=out))
        self.work.append(Work(name, flops, sum(map(_bytes, tensors)), wide))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
