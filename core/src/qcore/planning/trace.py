"""Dispatch mode that counts live bytes, peak memory, FLOPs and bytes moved by every torch op.

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
_BLOCK = 512  # allocation granularity of torch's caching allocator, in bytes
#: Ops that allocate a tensor and write nothing.
_EMPTY = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
#: Ops that take a tensor but do not read its values.
_LIKE = {"new_zeros", "new_full", "new_ones", "zeros_like", "ones_like", "full_like"}
#: Matrix products, and the index of their left argument.
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
    """Round a size in bytes up as the caching allocator does."""
    return -(-nbytes // _BLOCK) * _BLOCK


class Trace(TorchDispatchMode):
    """Counts the memory and work of tensors of one device while it is active.

    Args:
        device: type of the device to count: ``meta``, ``cpu`` or ``cuda``.

    Attributes:
        live: bytes of live storages that were allocated under the trace.
        peak: maximum of `live` since `mark`.
        live_by_op: `live` by op (see `named`); allocations outside an op have the name "".
        peak_by_op: `live_by_op` at the time of the peak.
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
        """Wrap a function so that its allocations, also in backward, are counted for `op`.

        Args:
            op: name of the op.
            function: the implementation of the op.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            before, self._op = self._op, op
            try:
                out = function(*args, **kwargs)
            finally:
                self._op = before
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                    self._nodes.setdefault(tensor.grad_fn.name(), op)
            return out

        return cast(_F, call)

    def record(self, name: str, args: Iterable[Any], flops: float) -> None:
        """Add the work of a kernel that bypasses the dispatcher.

        Args:
            name: name of the kernel.
            args: its arguments; each tensor among them counts as read or written once.
            flops: floating-point operations of its matrix products.
        """
        tensors = {id(tensor): tensor for tensor in args if isinstance(tensor, Tensor)}.values()
        wide = any(tensor.dtype == torch.float32 for tensor in list(tensors)[:1])
        self.work.append(Work(name, flops, sum(map(_bytes, tensors)), wide))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        known = {storage_id(x) for x in inputs}
        allocates = False
        for tensor in outputs:
            if storage_id(tensor) not in known and tensor.device.type == self.device:
                allocates = True
                self._see(tensor)
        name = func.overloadpacket.__name__
        if (allocates or func._schema.is_mutable) and name not in _EMPTY:
            self._count(func, name, args, kwargs, out, inputs, outputs)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, rounded(storage.nbytes())
        if key in self._known:
            return
        op = self._owner()
        self._known[key] = weakref.ref(storage, self._on_free(key, size, op))
        self.live += size
        self.live_by_op[op] += size
        if self.live > self.peak:
            self.peak, self.peak_by_op = self.live, self.live_by_op.copy()

    def _owner(self) -> str:
        if self._op:
            return self._op
        node = torch._C._current_autograd_node()
        return "" if node is None else self._nodes.get(node.name(), "")

    def _on_free(self, key: int, size: int, op: str) -> Callable[[Any], None]:
        def freed(_: Any) -> None:
            self._known.pop(key, None)
            self.live -= size
            self.live_by_op[op] -= size

        return freed

    def _count(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: Any,
        out: Any,
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> None:
        counted = [x for x in inputs + outputs if x.device.type == self.device]
        if not counted or not outputs:
            return
        if func.overloadpacket in flop_registry or name in _PRODUCTS or func._schema.is_mutable:
            pass
        elif not any(isinstance(x, Tensor) for x in args) or name in _LIKE:
            counted = [
                x for x in outputs if x.device.type == self.device
            ]  # the argument of a `like` op is not read
        tensors = {id(x): x for x in counted}.values()
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
