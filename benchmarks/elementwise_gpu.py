"""Times each elementwise op on a GPU, against a copy of as many bytes.

    python benchmarks/elementwise_gpu.py [--tokens 8192]

Sizes are the 9B's. Bytes are the fewest that the op must move: every input read once, every
output written once. Prints forward and backward in microseconds and the share of the copy rate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.elementwise_kit import Case, cases, outputs

from qcore.nn.grad_buffers import GradBuffers


def microseconds(functions: Sequence[Callable[[], object]], rounds: int = 20) -> float:
    """Median time of one call; the functions take turns, so that the cache holds none's data."""
    for function in functions:
        function()
    flush = torch.empty(2**27, dtype=torch.uint8, device="cuda")
    times = []
    for number in range(rounds):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(3_000_000)  # so that launches wait in the queue: the host is not timed
        begin.record()
        functions[number % len(functions)]()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    return sorted(1000 * a.elapsed_time(b) for a, b in times)[rounds // 2]


def copy_rate() -> float:
    """Bytes a microsecond, read and written, of a large copy."""
    one = torch.empty(2**29, dtype=torch.uint8, device="cuda").random_()
    other = torch.empty_like(one)
    return 2 * len(one) / microseconds([lambda: other.copy_(one)])


def size(*tensors: Tensor) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)


def frozen(case: Case) -> list[Tensor]:
    """The inputs; weights want no gradient."""
    first = len(case.tensors) - case.weights
    return [x.detach().requires_grad_(n < first) for n, x in enumerate(case.tensors)]


def moved(name: str, x: list[Tensor], made: list[Tensor]) -> tuple[int, int]:
    """Fewest bytes, forwards and backwards."""
    if name == "add_rms_norm":
        return size(*x[:2], *made), 4 * size(x[0])
    if name == "rms_norm and residual":
        return 2 * size(x[0]), 4 * size(x[0])
    read, computed = x, made
    if name == "delta_inputs":  # z passes through
        read, computed = [x[0], x[2], x[3]], made[:-1]
    if name == "attention_inputs":  # half of q_proj's output is the gate, which passes through
        read, computed = [x[0][:, : x[0].shape[1] // 2], x[1]], made[:2]
    if name == "output_gate":
        read = [x[0], x[0]]
    return size(*read, *computed), 2 * size(*read) + size(*computed)


def in_place(name: str, case: Case, made: list[Tensor]) -> list[Tensor]:
    """Gradients of outputs; of what passes through, where the neighbour's kernel leaves them."""
    given = [torch.randn_like(one) for one in made]
    if name == "delta_inputs":
        _, given[-1], *_ = GradBuffers(*case.tensors[:4]).gradients(
            made[0], None, given[-1], None, None
        )
    if name == "attention_inputs":
        q, k, v = case.tensors[:3]
        d = made[0].shape[-1]
        gate, v = q.unflatten(1, (-1, 2 * d))[..., d:], v.unflatten(1, (-1, d))
        *_, given[2], given[3] = GradBuffers(q, k, v, gate).gradients(q, None, None, *given[2:])
    return given


def row(name: str, case: Case, rate: float) -> str:
    tensors = frozen(case)
    kernel = case.kernel()
    made = outputs(case, kernel, tensors)
    forward = microseconds([lambda: outputs(case, kernel, tensors)])
    given = in_place(name, case, made)
    wanted = [x for x in tensors if x.requires_grad]
    backward = microseconds([lambda: torch.autograd.grad(made, wanted, given, retain_graph=True)])
    forth, back = moved(name, tensors, made)
    shares = forth / forward / rate, back / backward / rate
    return (
        f"{name:22s} {forward:8.1f} us {100 * shares[0]:4.0f} %   "
        f"{backward:8.1f} us {100 * shares[1]:4.0f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    tokens = parser.parse_args().tokens
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name()}, copy {rate / 1e6:.2f} TB/s, {tokens} tokens")
    print(f"{'op':22s}  forward    of copy    backward    of copy")
    for name, case in cases(
        (tokens - 1000, 1000), device="cuda", dtype=torch.bfloat16, big=True
    ).items():
        print(row(name, case, rate))


if __name__ == "__main__":
    main()
