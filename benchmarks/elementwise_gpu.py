"""Time of each elementwise op on this card, against a copy of as many bytes.

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


def microseconds(functions: Sequence[Callable[[], object]], rounds: int = 20) -> float:
    """Median time of one call; the functions take turns, so that the cache holds none's data."""
    for function in functions:
        function()
    flush = torch.empty(2**27, dtype=torch.uint8, device="cuda")
    times = []
    for number in range(rounds):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(200_000)  # so that launches wait in the queue: the host is not timed
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
    """The inputs; weights, which have no tokens, want no gradient."""
    tokens = case.tensors[0].shape[0]
    return [x.detach().requires_grad_(x.shape[0] == tokens) for x in case.tensors]


def passed(name: str) -> int:
    """Outputs at the end that are inputs."""
    return {"delta_inputs": 1, "attention_inputs": 2}.get(name, 0)


def row(name: str, case: Case, rate: float) -> str:
    tensors = frozen(case)
    kernel = case.kernel()
    made = outputs(case, kernel, tensors)
    forward = microseconds([lambda: outputs(case, kernel, tensors)])
    given = [torch.randn_like(one) for one in made]
    wanted = [x for x in tensors if x.requires_grad]
    backward = microseconds([lambda: torch.autograd.grad(made, wanted, given, retain_graph=True)])
    computed = made[: len(made) - passed(name)]
    if name == "rms_norm and residual":
        computed = made[1:]
    read = {"delta_inputs": [tensors[i] for i in (0, 2, 3)],
            "attention_inputs": [tensors[0][:, : tensors[0].shape[1] // 2], tensors[1]],
            "output_gate": [tensors[0], tensors[0]]}.get(name, tensors)  # fmt: skip
    moved = size(*read, *computed)
    # Backwards: inputs again, the gradients of outputs, the gradients of inputs.
    if name == "add_rms_norm" or name == "rms_norm and residual":
        back = 4 * size(made[0])
    else:
        back = 2 * size(*read) + size(*computed)
    shares = moved / forward / rate, back / backward / rate
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
