"""AdamW over adapters as one flat vector: one launch each for update, clipping and zeroing.

This file decides how trained parameters, gradients and moments are laid out: end to end in one
float32 buffer each, of which every parameter, its ``.grad`` and its moments are views. The
arithmetic is torch's own AdamW over that vector; it is elementwise, so each value equals that of
torch's AdamW over the list of parameters, bit for bit. The norm of the gradient is summed in
another order.

Gradients always exist: a parameter that a step does not reach has a gradient of zero, where torch
would skip it. `training.step` decides when a step is taken and at which rate;
`training.checkpoints` writes the state, in the same form as that of torch's optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .qlora.lora_layer import LoraLayer

_ALIGNED = 64  # values; a view starts at 256 bytes or right behind its neighbour


class FlatAdamW(torch.optim.Optimizer):
    """AdamW whose parameters live in one vector.

    Args:
        adapters: the maps whose ``lora_A``, ``lora_B`` and magnitudes are trained; these are moved
            into the vector, and the maps add gradients there themselves. All A, then all B, then
            all magnitudes: maps of one input that follow each other get theirs from one product.
        others: further parameters, whose gradients autograd adds there.
        lr: learning rate; set ``param_groups[0]["lr"]`` to change it.
        weight_decay: decoupled weight decay.

    Attributes:
        flat: the vector, whose ``.grad`` holds all gradients.
    """

    def __init__(
        self, adapters: Iterable[LoraLayer], others: Iterable[nn.Parameter] = (), *,
        lr: float, weight_decay: float,
    ) -> None:  # fmt: skip
        modules = list(adapters)
        parameters = [module.lora_A for module in modules if module.lora_A is not None]
        parameters += [module.lora_B for module in modules if module.lora_B is not None]
        magnitudes = (module.lora_magnitude_vector for module in modules)
        parameters += [magnitude for magnitude in magnitudes if magnitude is not None]
        parameters += others
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "fused": True})
        starts, size = _places(parameters)
        values = torch.zeros(size, device=parameters[0].device)
        self.flat = nn.Parameter(values)
        self.flat.grad = torch.zeros_like(values)
        fused = values.is_cuda
        self._inner = torch.optim.AdamW([self.flat], lr, weight_decay=weight_decay, fused=fused)
        moments = {
            "step": torch.zeros((), device=values.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(values),
            "exp_avg_sq": torch.zeros_like(values),
        }
        self._inner.state[self.flat] = moments
        self._parameters = parameters
        for parameter, start in zip(parameters, starts, strict=True):
            here = slice(start, start + parameter.numel())
            shape = parameter.shape
            home = values[here].view(shape)
            home.copy_(parameter.detach())
            parameter.data = home
            parameter.grad = self.flat.grad[here].view(shape)
            self.state[parameter] = _Views(
                step=moments["step"],
                exp_avg=moments["exp_avg"][here].view(shape),
                exp_avg_sq=moments["exp_avg_sq"][here].view(shape),
            )
        for module in modules:
            module.accumulates = True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters; `closure` is not called."""
        self._inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self._inner.step()
        # Bump versions, so that caches derived from parameters (`qlora.fused`) are invalidated.
        torch.autograd.graph.increment_version(self._parameters)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set gradients to zero in place, whatever `set_to_none` is."""
        assert self.flat.grad is not None
        self.flat.grad.zero_()

    def clip(self, limit: float) -> Tensor:
        """Scale the gradient down to a norm of `limit`; returns the norm that it had."""
        if self.flat.is_cuda:
            return nn.utils.clip_grad_norm_([self.flat], limit or math.inf)
        # A CPU adds many squares one after another, which float32 rounds too often.
        assert self.flat.grad is not None
        norm: Tensor = torch.linalg.vector_norm(self.flat.grad, dtype=torch.float64).float()
        nn.utils.clip_grads_with_norm_([self.flat], limit or math.inf, norm)
        return norm

    def largest(self) -> Tensor:
        """Largest absolute value of all parameters, on the device; NaN if any is."""
        largest: Tensor = torch.linalg.vector_norm(self.flat.detach(), math.inf)
        return largest


class _Views(dict[str, Any]):
    """A parameter's moments in the vector: what is assigned is copied there."""

    def __setitem__(self, key: str, value: Any) -> None:
        self[key].copy_(value)


def _places(parameters: list[nn.Parameter]) -> tuple[list[int], int]:
    """Where each parameter starts, and where the last ends.

    What is a multiple of 16 bytes long is followed at once, so that neighbours are one matrix.
    """
    starts, at = [], 0
    for parameter in parameters:
        starts.append(at)
        at += parameter.numel()
        if at % 4:
            at += -at % _ALIGNED
    return starts, at
