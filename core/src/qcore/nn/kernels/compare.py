"""Error measures that backends' `verify` functions call: outputs and gradients against float32.

This file decides the measure by which kernels are verified. The backend gets the inputs as they are
(bf16); the reference gets the same values in float32. Both get the same cotangents. An error is the
norm of the difference over the norm of the reference's value, the largest of all outputs or
gradients. Free GPU memory is filled with NaN first, so that a kernel which reads memory that it has
not written is found.

The caller chooses shapes and values of the inputs: odd lengths, several documents, the dtypes of a
run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...api.records import Verdict

_POISON = 64 << 20  # bytes; more than the buffers of any op on the small inputs of a check


def compare(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    output: float,
    gradient: float,
    gradients_of: Sequence[int] | None = None,
    **more: Any,
) -> Verdict:
    """Measure `function` against `reference` on `inputs`.

    Args:
        function: the backend.
        reference: the op as torch computes it; called with floating inputs in float32.
        inputs: positional arguments; tensors on the device.
        output: bound of the outputs' relative error.
        gradient: bound of the gradients' relative error.
        gradients_of: positions whose gradient is compared; ``None``: every floating tensor's,
            ``()``: none, the op has no backward.
        more: keyword arguments of both.
    """
    if gradients_of is None:
        gradients_of = [n for n, value in enumerate(inputs) if _floating(value)]
    device = next((value.device for value in inputs if isinstance(value, Tensor)), None)
    if device is not None:
        poison(device)
    got, got_grads = _run(function, inputs, gradients_of, more, wide=False)
    expected, grads = _run(reference, inputs, gradients_of, more, wide=True)
    return Verdict(
        output=_worst(got, expected),
        output_bound=output,
        gradient=_worst(got_grads, grads) if grads else 0.0,
        gradient_bound=gradient if grads else 0.0,
    )


def worst_verdict(*verdicts: Verdict) -> Verdict:
    """The worst of several verdicts with the same bounds: NaN before any number."""
    bad = [verdict for verdict in verdicts if not verdict.good]
    first = (bad or verdicts)[0]
    return Verdict(
        output=_max(verdict.output for verdict in verdicts),
        output_bound=first.output_bound,
        gradient=_max(verdict.gradient for verdict in verdicts),
        gradient_bound=first.gradient_bound,
    )


def relative_error(got: Tensor, expected: Tensor) -> float:
    """``|got - expected| / |expected|``; infinite where the shapes differ."""
    if got.shape != expected.shape:
        return math.inf
    wide = torch.promote_types(expected.dtype, torch.float32)
    got, expected = got.detach().to(wide), expected.detach().to(wide)
    size = float(expected.norm())
    error = float((got - expected).norm())
    return error / size if size else error


def _run(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    gradients_of: Sequence[int],
    more: dict[str, Any],
    *,
    wide: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and the requested gradients; cotangents are the same for the same shapes."""
    arguments = []
    for number, value in enumerate(inputs):
        if isinstance(value, Tensor):
            value = value.detach()
            if wide and _floating(value):
                value = value.to(torch.promote_types(value.dtype, torch.float32))
            value = value.requires_grad_(number in gradients_of)
        arguments.append(value)
    result = function(*arguments, **more)
    outputs = [
        value
        for value in (result if isinstance(result, tuple | list) else [result])
        if value is not None
    ]
    if not gradients_of:
        return outputs, []
    generator = torch.Generator().manual_seed(len(outputs))
    cotangents, roots = [], []
    for value in outputs:
        cotangent = torch.randn(value.shape, generator=generator)
        if value.requires_grad:
            # Rounded as the backend's is, so that the reference gets the same values.
            rounded = cotangent.to(torch.bfloat16) if _lowest(inputs) < 4 else cotangent
            cotangents.append(rounded.to(value.device, value.dtype))
            roots.append(value)
    wrt = [arguments[number] for number in gradients_of]
    grads = torch.autograd.grad(roots, wrt, cotangents, allow_unused=True)
    return outputs, [
        torch.zeros_like(value) if grad is None else grad
        for grad, value in zip(grads, wrt, strict=True)
    ]


def _lowest(inputs: Sequence[Any]) -> int:
    return min((value.element_size() for value in inputs if _floating(value)), default=4)


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _worst(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    if len(got) != len(expected):
        return math.inf
    return _max(relative_error(value, two) for value, two in zip(got, expected, strict=True))


def _max(values: Any) -> float:
    worst = 0.0
    for value in values:
        if not value <= worst:  # true of NaN, which then stays
            worst = value
            if math.isnan(worst):
                break
    return worst


def poison(device: torch.device) -> None:
    """Leave NaN in the memory that the next allocations are made from."""
    if device.type != "cuda":
        return
    held = [torch.full((size // 4,), math.nan, device=device) for size in (_POISON, _POISON)]
    # The allocator serves small requests from blocks of their own.
    held += [torch.full((n,), math.nan, device=device) for n in (64, 1024, 16384, 131072) * 8]
    del held
