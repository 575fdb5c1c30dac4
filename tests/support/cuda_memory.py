"""What a CUDA device's memory holds: free blocks to fill with NaN, live tensors with their holders.

`fill_free` is for tests that must notice a read of memory that nothing wrote. `holders` is for
tests that measure memory: it says which tensors live and what refers to them.

torch keeps freed memory in segments. ``torch.cuda.empty_cache`` returns a segment to the driver
only if all of it is free; in a segment with one live tensor the free blocks stay, and torch
prefers the smallest block that is large enough to any other. So whoever wants to know what a new
tensor holds must fill these blocks too: how many there are depends on what ran before.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

MIB, GIB = 2**20, 2**30
SMALL = MIB  #: bytes; requests up to this size are served from small segments, and no other


def fill_free(value: float, more: int = 0) -> None:
    """Fill all memory that torch has free on the current stream, and `more` of the driver's.

    Args:
        value: float32 value that fills it.
        more: bytes that are taken from the driver, as free memory of torch, in pieces of 1 GiB.
    """
    for tensor in take_free(more):
        tensor.fill_(value)


def take_free(more: int = 0) -> list[Tensor]:
    """Every free block of the current stream as a float32 tensor, and `more` bytes beside."""
    device = torch.device("cuda", torch.cuda.current_device())
    stream = torch.cuda.current_stream().cuda_stream
    taken: list[Tensor] = []
    for _ in range(16):  # a large free block of a small segment takes several requests
        sizes = list(requests(torch.cuda.memory_snapshot(), device.index, stream))
        if not sizes:
            break
        taken += [torch.empty(size // 4, device=device) for size in sizes]
    piece = min(more, GIB)
    if piece:
        taken += [torch.empty(piece // 4, device=device) for _ in range(more // piece)]
        small = min(64 * MIB, more)
        taken += [torch.empty(SMALL // 8, device=device) for _ in range(small // (SMALL // 2))]
    return taken


def requests(
    snapshot: Iterable[Mapping[str, Any]], device: int = 0, stream: int = 0
) -> Iterator[int]:
    """The sizes to ask for so that torch gives out all of its free blocks.

    A request of a block's own size gets that block, or another of the same size.

    Args:
        snapshot: what ``torch.cuda.memory_snapshot`` returns.
        device: index of the device.
        stream: the stream's handle. Blocks of another stream, or of a CUDA graph's pool, are not
            given to it.
    """
    for segment in snapshot:
        pool = tuple(segment.get("segment_pool_id", (0, 0)))
        if (segment["device"], segment["stream"], pool) != (device, stream, (0, 0)):
            continue
        for block in segment["blocks"]:
            if block["state"] != "inactive":
                continue
            if segment["segment_type"] == "small":
                yield min(block["size"], SMALL)
            elif block["size"] > SMALL:
                yield block["size"]


def holders(device_type: str = "cuda", most: int = 12) -> str:
    """The live tensors of a device by size, and a chain of objects that refer to each.

    Objects that are frozen (``gc.freeze``) are given back to the collector, which does not list
    them otherwise.

    Args:
        device_type: ``cuda``, or ``cpu``.
        most: how many tensors are listed.
    """
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    enabled = gc.isenabled()
    gc.disable()  # so that what only a collection would free is still there
    try:
        return "\n".join(_lines(device_type, most, frozen))
    finally:
        if enabled:
            gc.enable()


def _lines(device_type: str, most: int, frozen: int) -> list[str]:
    tensors = _by_storage(device_type)
    sizes = {key: one.untyped_storage().nbytes() for key, one in tensors.items()}
    total = sum(sizes.values())
    lines = [f"{len(tensors)} live storages on {device_type}, {total / GIB:.3f} GiB in all"]
    lines.append(f"{frozen} objects were frozen")
    if device_type == "cuda":
        rest = torch.cuda.memory_allocated() - total
        lines.append(f"{rest / GIB:.3f} GiB belong to no tensor of Python's (workspaces, graphs)")
        lines.append(f"live blocks by size: {_blocks(torch.cuda.memory_snapshot())}")
    for key in sorted(sizes, key=lambda one: -sizes[one])[:most]:
        tensor = tensors[key]
        what = f"{type(tensor).__name__} {tuple(tensor.shape)} {tensor.dtype}"
        lines.append(f"{sizes[key] / MIB:10.2f} MiB  {what} <- {_chain(tensor, tensors)}")
    return lines


def _by_storage(device_type: str) -> dict[int, Tensor]:
    """One tensor of each storage; of several the last."""
    found = {}
    for one in gc.get_objects():
        # By exact type: a lazy module answers isinstance with an import, and fake tensors of a
        # plan have no storage.
        if type(one) in (Tensor, nn.Parameter) and one.device.type == device_type:
            found[one.untyped_storage().data_ptr()] = one
    return found


def _blocks(snapshot: Iterable[Mapping[str, Any]]) -> str:
    """The sizes of live blocks of 1 MiB and more, with their number."""
    counts = Counter(
        block["size"]
        for segment in snapshot
        for block in segment["blocks"]
        if block["state"] != "inactive" and block["size"] >= MIB
    )
    top = sorted(counts.items(), key=lambda item: -item[0] * item[1])[:12]
    return ", ".join(f"{count} x {size / MIB:.1f} MiB" for size, count in top)


def _chain(start: object, *hidden: object, depth: int = 8) -> str:
    """The types on one way from an object to what refers to it, up to a module or `depth`."""
    names: list[str] = []
    seen, one = {id(start), *map(id, hidden)}, start
    while len(names) < depth and type(one) is not ModuleType:
        referrers = gc.get_referrers(one)
        seen.add(id(referrers))
        further = [each for each in referrers if id(each) not in seen]
        del referrers
        if not further:
            break
        seen |= {id(further), *map(id, further)}
        one = further[0]
        names.append(_name(one))
    return " <- ".join(names) or "nothing that Python lists"


def _name(one: object) -> str:
    """A type, with the first keys of a dict, or the name of a function, class or module."""
    if isinstance(one, dict):
        return f"dict({', '.join(str(key)[:24] for key in list(one)[:3])})"
    if type(one) in (FunctionType, ModuleType, type):
        return f"{type(one).__name__} {one.__name__}"
    return type(one).__qualname__
