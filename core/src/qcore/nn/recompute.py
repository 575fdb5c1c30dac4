"""What is computed again in backward: cheap results, whole layers, layers whose input is parked.

This file decides what a forward pass keeps for its backward, by policy:

``none``         whatever autograd saves.
``elementwise``  as none, but what a *cheap* function made (`recompute`: norms, convolutions,
                 activations, gathers) is computed again from its inputs: products of matrices
                 are kept, none is computed twice.
``full``         a layer's input; the layer runs again in backward (Chen et al. 2016,
                 arXiv:1604.06174), and what it then saves is as under elementwise.
``offload``      as full, and the input waits in pinned memory of the host (`parked`).

Which function is cheap is said where it is called, by the plugin's blocks. Which policy a run
has is `plan`'s choice or the user's. Every policy computes the same numbers, bit for bit.

Shapes: T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..api.blocks import Shared
from .offload import Held, Parked
from .storage import storage_id

POLICIES = ("none", "elementwise", "full", "offload")

Guard = AbstractContextManager[None]
_UNGUARDED: Guard = nullcontext()

_R = TypeVar("_R", Tensor, tuple[Tensor, ...])
_B = TypeVar("_B", bound=Shared)


def recompute(function: Callable[..., _R], *args: Any) -> _R:
    """``function(*args)``, whose result may be computed again instead of kept.

    Args:
        function: cheap, and the same for the same arguments (no dropout). Returns a tensor or a
            tuple of tensors, none of them a view of an argument.
        args: its arguments; tensors among them are kept in place of the result.
    """
    return recomputable(function(*args), function, *args)


def recomputable(result: _R, function: Callable[..., _R], *args: Any) -> _R:
    """`result`, known to equal ``function(*args)``: for what a fused function made on the side."""
    scope = _scope.get()
    if scope is not None:
        scope.add(result, function, args)
    return result


@contextmanager
def recompute_cheap() -> Iterator[None]:
    """Under it, what is saved of a cheap result is how to compute it."""
    scope = _Scope()
    token = _scope.set(scope)
    try:
        with torch.autograd.graph.saved_tensors_hooks(scope.pack, _unpack):
            yield
    finally:
        _scope.reset(token)
        scope.close()


class _Recipe:
    """How to compute some results again, once for all who saved one of them.

    They are held from the first unpacking to the last: a function that saved five results gets
    them one by one, and nothing of torch's tells that it still holds the first.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._function = function
        self._args = args
        self._made: tuple[Tensor, ...] | None = None
        self._waiting = 0

    def make(self) -> tuple[Tensor, ...]:
        if self._made is not None:
            return self._made
        args = [arg.unpack() if isinstance(arg, _Part) else arg for arg in self._args]
        with torch.no_grad():
            result = self._function(*args)
        results = (result,) if isinstance(result, Tensor) else tuple(result)
        if self._waiting:
            self._made = results
        return results

    def wait(self) -> None:
        """One more saved tensor is a result."""
        self._waiting += 1

    def served(self) -> None:
        """One less; what nobody waits for is let go."""
        self._waiting -= 1
        if not self._waiting:
            self._made = None


class _Part:
    """A result of a recipe, or a view of one."""

    def __init__(self, recipe: _Recipe, number: int, view: tuple[Any, ...] | None = None) -> None:
        self._recipe = recipe
        self._number = number
        self._view = view

    def of(self, tensor: Tensor) -> _Part:
        """The part that `tensor`, which shares its storage, shows."""
        return _Part(self._recipe, self._number, _shown(tensor))

    def saved(self, tensor: Tensor) -> _Saved:
        """The same, in place of a saved tensor."""
        return _Saved(self._recipe, self._number, _shown(tensor))

    def unpack(self) -> Tensor:
        whole = self._recipe.make()[self._number]
        return whole if self._view is None else whole.as_strided(*self._view)


class _Saved(_Part):
    """A part that a backward function waits for."""

    def __init__(self, recipe: _Recipe, number: int, view: tuple[Any, ...] | None = None) -> None:
        super().__init__(recipe, number, view)
        self._waits = True
        recipe.wait()

    def unpack(self) -> Tensor:
        tensor = super().unpack()
        self._settle()
        return tensor

    def __del__(self) -> None:
        self._settle()  # the graph was freed, or this part of it never asked

    def _settle(self) -> None:
        if self._waits:
            self._waits = False
            self._recipe.served()


def _shown(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset()


class _Scope:
    """The cheap results of one layer's forward, by the storage that holds them."""

    def __init__(self) -> None:
        # The results are held too: a storage that is freed could be another tensor's.
        self._known: dict[int, tuple[_Part, Tensor]] = {}

    def add(self, result: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        recipe = _Recipe(function, tuple(self._argument(arg) for arg in args))
        for number, one in enumerate((result,) if isinstance(result, Tensor) else result):
            self._known[storage_id(one)] = (_Part(recipe, number), one.detach())

    def close(self) -> None:
        """Let the results go: each tensor that was saved holds this scope as long as the graph."""
        self._known.clear()

    def pack(self, tensor: Tensor) -> Tensor | _Part:
        known = self._known.get(storage_id(tensor))
        return tensor if known is None else known[0].saved(tensor)

    def _argument(self, arg: Any) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        known = self._known.get(storage_id(arg))
        return arg.detach() if known is None else known[0].of(arg)


_scope: ContextVar[_Scope | None] = ContextVar("qcore cheap results", default=None)


def _unpack(saved: Tensor | _Part) -> Tensor:
    return saved.unpack() if isinstance(saved, _Part) else saved


def run_layers(
    layers: Sequence[Callable[[Tensor, _B], Tensor]],
    x: Tensor,
    batch: _B,
    policies: Sequence[str],
    *,
    dropout: bool = False,
    guards: Sequence[Guard] | None = None,
) -> Tensor:
    """All layers over x, each under its own policy.

    Args:
        layers: in order; of a trunk or of a tower.
        x: what the first one reads, ``[T, H]`` of a trunk.
        batch: the pack, or the media of one.
        policies: one of `POLICIES` for each layer.
        dropout: whether a layer draws random numbers, which a second run must draw again.
        guards: a context for each layer, entered whenever it runs (`layer_errors.LayerGuard`).

    Raises:
        ValueError: for another policy.
        PluginError: of a guard, for what a layer raises.
    """
    if unknown := set(policies) - set(POLICIES):
        raise ValueError(f"no recompute policy is called {', '.join(sorted(unknown))}")
    before: Parked | None = None
    guards = [_UNGUARDED] * len(layers) if guards is None else guards
    for layer, policy, guard in zip(layers, policies, guards, strict=True):
        if policy == "none" or not torch.is_grad_enabled() or not _back(layer, x):
            with guard:
                x = layer(x, batch)
        elif policy == "elementwise":
            with guard, recompute_cheap():
                x = layer(x, batch)
        else:
            held = Parked(x, before) if policy == "offload" and x.is_cuda else Held(x)
            before = held if isinstance(held, Parked) else None
            with guard:
                x = _twice(layer, x, batch, held, dropout, guard)
    return x


def _back(layer: object, x: Tensor) -> bool:
    """Whether there is a backward to keep anything for: none below all that is trained."""
    if x.requires_grad or not isinstance(layer, nn.Module):
        return True
    return any(parameter.requires_grad for parameter in layer.parameters())


def _twice(
    layer: Callable[[Tensor, _B], Tensor],
    x: Tensor,
    batch: _B,
    held: Held,
    dropout: bool,
    guard: Guard,
) -> Tensor:
    """``layer(x, batch)`` that keeps `held` alone; what it leaves in the batch has its gradient."""
    # The graph needs an input that has a gradient; the first layer's has none.
    spark = x.new_empty(0).requires_grad_()
    known = set(batch.kept())
    spec: list[Any] = []
    y, *left = _Twice.apply(x, spark, layer, batch, held, dropout, guard, spec)  # type: ignore[no-untyped-call]
    if left:
        keys = [key for key in batch.kept() if key not in known]
        batch.replace_kept(dict(zip(keys, tree_unflatten(left, spec[0]), strict=True)))
    return y  # type: ignore[no-any-return]


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        spark: Tensor,
        layer: Callable[[Tensor, Any], Tensor],
        batch: Shared,
        held: Held,
        dropout: bool,
        guard: Guard,
        spec: list[Any],
    ) -> tuple[Any, ...]:
        # Not the batch itself: it holds what is left in it, whose graph would then hold itself,
        # and no collector sees that.
        ctx.layer, ctx.batch, ctx.held, ctx.guard = layer, batch.alone(), held, guard
        ctx.random = _Random(x.device) if dropout else None
        known = set(batch.kept())
        y = layer(x.detach(), batch)
        left, shape = tree_flatten([v for key, v in batch.kept().items() if key not in known])
        spec.append(shape)
        ctx.left = len(left)
        ctx.known = known
        return (y, *left)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *dleft: Tensor | None) -> tuple[Any, ...]:
        with ctx.guard:
            dx = _Twice.run_again(ctx, dy, *dleft)
        return dx, None, None, None, None, None, None, None

    @staticmethod
    def run_again(ctx: Any, dy: Tensor, *dleft: Tensor | None) -> Tensor | None:
        """The layer's forward once more, and its backward; the gradient of its input."""
        x = ctx.held.take().requires_grad_(ctx.needs_input_grad[0])
        alone = ctx.batch.alone()
        with torch.enable_grad(), recompute_cheap():
            if ctx.random is None:
                y = ctx.layer(x, alone)
            else:
                with ctx.random:
                    y = ctx.layer(x, alone)
        left, _ = tree_flatten(list(alone.kept().values()))
        pairs = [(y, dy)]
        for value, gradient in zip(left, dleft, strict=True):
            if isinstance(value, Tensor) and value.requires_grad and gradient is not None:
                pairs.append((value, gradient))
        torch.autograd.backward([v for v, _ in pairs], [g for _, g in pairs])
        grad: Tensor | None = x.grad
        return grad


class _Random:
    """The state of the generators now, put back while it is entered."""

    def __init__(self, device: torch.device) -> None:
        self._devices = [device.index or 0] if device.type == "cuda" else []
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(index) for index in self._devices]

    def __enter__(self) -> None:
        self._fork = torch.random.fork_rng(devices=self._devices)
        self._fork.__enter__()
        torch.set_rng_state(self._cpu)
        for index, state in zip(self._devices, self._cuda, strict=True):
            torch.cuda.set_rng_state(state, index)

    def __exit__(self, *error: Any) -> None:
        self._fork.__exit__(*error)
