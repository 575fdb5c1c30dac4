"""Activation checkpointing of a layer: what forward saves and backward recomputes, by policy.

This file decides what is saved under each policy (the setting ``recompute``):

``none``         whatever autograd saves.
``elementwise``  as none, but the result of a *cheap* function (`recompute`: norms, convolutions,
                 activations, gathers) is recomputed from its inputs. Results of matrix products
                 are saved, and none of these is computed twice.
``full``         only a layer's input; the layer runs again in backward (Chen et al. 2016,
                 arXiv:1604.06174), and that run saves what it saves under elementwise.
``offload``      as full, and the input waits in pinned host memory (`offload`).

Blocks mark cheap functions where they call them. The planner or the user chooses the policy of a
run. All policies compute the same numbers, bit for bit.

Shapes: T tokens, W width of what a layer reads.
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
from .offload import LayerInput, OffloadedInput
from .sharding.gathers import Gathers
from .storage import storage_id

POLICIES = ("none", "elementwise", "full", "offload")

Guard = AbstractContextManager[None]
_UNGUARDED: Guard = nullcontext()

_R = TypeVar("_R", Tensor, tuple[Tensor, ...])
_B = TypeVar("_B", bound=Shared)


def recompute(function: Callable[..., _R], *args: Any) -> _R:
    """``function(*args)``, whose result may be recomputed in backward instead of saved.

    Args:
        function: cheap, and deterministic (no dropout). Returns a tensor or a tuple of tensors,
            none of them a view of an argument.
        args: its arguments; tensors among them are saved in place of the result.
    """
    return recomputable(function(*args), function, *args)


def recomputable(result: _R, function: Callable[..., _R], *args: Any) -> _R:
    """Mark `result` as recomputable by ``function(*args)``, which must return the same numbers.

    For a result that a fused function computed together with others.
    """
    scope = _scope.get()
    if scope is not None:
        scope.add(result, function, args)
    return result


@contextmanager
def recompute_cheap() -> Iterator[None]:
    """In this context autograd saves how to compute a cheap result, not the result."""
    scope = _Scope()
    token = _scope.set(scope)
    try:
        with torch.autograd.graph.saved_tensors_hooks(scope.pack, _unpack):
            yield
    finally:
        _scope.reset(token)
        scope.close()


class _Recipe:
    """A call that is repeated in backward, once for all saved tensors that are its results.

    The results are held from the first unpacking to the last: a function that saved five results
    unpacks them one at a time, and torch does not say that it still holds the first.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._function = function
        self._args = args
        self._made: tuple[Tensor, ...] | None = None
        self._waiting = 0

    def make(self) -> tuple[Tensor, ...]:
        if self._made is not None:
            return self._made
        args = [arg.unpack() if isinstance(arg, _Result) else arg for arg in self._args]
        with torch.no_grad():
            result = self._function(*args)
        results = (result,) if isinstance(result, Tensor) else tuple(result)
        if self._waiting:
            self._made = results
        return results

    def wait(self) -> None:
        """Count one more saved tensor that is a result."""
        self._waiting += 1

    def served(self) -> None:
        """Count one less; free the results when no saved tensor needs them."""
        self._waiting -= 1
        if not self._waiting:
            self._made = None


class _Result:
    """A result of a recipe, or a view of one."""

    def __init__(self, recipe: _Recipe, number: int, view: tuple[Any, ...] | None = None) -> None:
        self._recipe = recipe
        self._number = number
        self._view = view

    def of(self, tensor: Tensor) -> _Result:
        """The view of this result that `tensor`, which shares its storage, is."""
        return _Result(self._recipe, self._number, _shown(tensor))

    def saved(self, tensor: Tensor) -> _SavedResult:
        """The same as `of`, in place of a saved tensor."""
        return _SavedResult(self._recipe, self._number, _shown(tensor))

    def unpack(self) -> Tensor:
        whole = self._recipe.make()[self._number]
        return whole if self._view is None else whole.as_strided(*self._view)


class _SavedResult(_Result):
    """A result that autograd has saved for a backward function."""

    def __init__(self, recipe: _Recipe, number: int, view: tuple[Any, ...] | None = None) -> None:
        super().__init__(recipe, number, view)
        self._waits = True
        recipe.wait()

    def unpack(self) -> Tensor:
        tensor = super().unpack()
        self._settle()
        return tensor

    def __del__(self) -> None:
        self._settle()  # the graph was freed, or backward did not need this tensor

    def _settle(self) -> None:
        if self._waits:
            self._waits = False
            self._recipe.served()


def _shown(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset()


class _Scope:
    """The cheap results of one layer's forward, by the storage that holds them."""

    def __init__(self) -> None:
        # Holds the results too: another tensor could get a storage that is freed.
        self._known: dict[int, tuple[_Result, Tensor]] = {}

    def add(self, result: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        recipe = _Recipe(function, tuple(self._argument(arg) for arg in args))
        for number, tensor in enumerate((result,) if isinstance(result, Tensor) else result):
            self._known[storage_id(tensor)] = (_Result(recipe, number), tensor.detach())

    def close(self) -> None:
        """Free the results: each saved tensor holds this scope as long as the graph lives."""
        self._known.clear()

    def pack(self, tensor: Tensor) -> Tensor | _Result:
        known = self._known.get(storage_id(tensor))
        return tensor if known is None else known[0].saved(tensor)

    def _argument(self, arg: Any) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        known = self._known.get(storage_id(arg))
        return arg.detach() if known is None else known[0].of(arg)


_scope: ContextVar[_Scope | None] = ContextVar("qcore cheap results", default=None)


def _unpack(saved: Tensor | _Result) -> Tensor:
    return saved.unpack() if isinstance(saved, _Result) else saved


def run_layers(
    layers: Sequence[Callable[[Tensor, _B], Tensor]],
    x: Tensor,
    batch: _B,
    policies: Sequence[str],
    *,
    dropout: bool = False,
    guards: Sequence[Guard] | None = None,
    gathers: Gathers | None = None,
) -> Tensor:
    """Apply all layers to x, each under its own policy.

    Args:
        layers: in order; of a trunk or of a tower.
        x: what the first layer reads, ``[T, W]`` for a trunk. Do not bind it to a name in the
            caller: it must be freed once the first layer has run.
        batch: the pack, or the media of one.
        policies: one of `POLICIES` for each layer.
        dropout: whether a layer draws random numbers, which a second run must draw again.
        guards: a context for each layer, entered whenever it runs (`layer_errors.LayerGuard`).
        gathers: gathers the weights of each layer, where these are sharded.

    Raises:
        ValueError: for another policy.
        PluginError: of a guard, for what a layer raises.
    """
    if unknown := set(policies) - set(POLICIES):
        raise ValueError(f"unknown recompute policy {', '.join(sorted(unknown))}")
    before: OffloadedInput | None = None
    guards = [_UNGUARDED] * len(layers) if guards is None else guards
    for number, (layer, policy, guard) in enumerate(zip(layers, policies, guards, strict=True)):
        if gathers is not None:
            gathers.before(number)
        if policy == "none" or not torch.is_grad_enabled() or not _has_backward(layer, x):
            with guard:
                x = layer(x, batch)
        elif policy == "elementwise":
            with guard, recompute_cheap():
                x = layer(x, batch)
        else:
            held = OffloadedInput(x, before) if policy == "offload" and x.is_cuda else LayerInput(x)
            before = held if isinstance(held, OffloadedInput) else None
            with guard:
                x = _run_recomputed(layer, x, batch, held, dropout, guard)
        if gathers is not None:
            x = gathers.after(number, x)
    return x


def _has_backward(layer: object, x: Tensor) -> bool:
    """Whether this layer has a backward: not if it lies below everything that is trained."""
    if x.requires_grad or not isinstance(layer, nn.Module):
        return True
    return any(parameter.requires_grad for parameter in layer.parameters())


def _run_recomputed(
    layer: Callable[[Tensor, _B], Tensor],
    x: Tensor,
    batch: _B,
    held: LayerInput,
    dropout: bool,
    guard: Guard,
) -> Tensor:
    """``layer(x, batch)``, saving only `held`.

    What the layer leaves in the batch (`Shared.keep`) is replaced by tensors with a gradient.
    """
    # autograd needs an input that requires a gradient; that of the first layer does not.
    anchor = x.new_empty(0).requires_grad_()
    known = set(batch.kept())
    spec: list[Any] = []
    y, *kept = _Recomputed.apply(x, anchor, layer, batch, held, dropout, guard, spec)  # type: ignore[no-untyped-call]
    if kept:
        keys = [key for key in batch.kept() if key not in known]
        batch.replace_kept(dict(zip(keys, tree_unflatten(kept, spec[0]), strict=True)))
    return y  # type: ignore[no-any-return]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        layer: Callable[[Tensor, Any], Tensor],
        batch: Shared,
        held: LayerInput,
        dropout: bool,
        guard: Guard,
        spec: list[Any],
    ) -> tuple[Any, ...]:
        # Not the batch itself: it holds what the layer leaves in it, whose graph would then refer
        # to itself, a cycle that the garbage collector cannot see.
        ctx.layer, ctx.batch, ctx.held, ctx.guard = layer, batch.alone(), held, guard
        ctx.random = _RngState(x.device) if dropout else None
        known = set(batch.kept())
        y = layer(x.detach(), batch)
        kept, shape = tree_flatten([v for key, v in batch.kept().items() if key not in known])
        spec.append(shape)
        return (y, *kept)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *dkept: Tensor | None) -> tuple[Any, ...]:
        with ctx.guard:
            dx = _Recomputed.run_again(ctx, dy, *dkept)
        return dx, None, None, None, None, None, None, None

    @staticmethod
    def run_again(ctx: Any, dy: Tensor, *dkept: Tensor | None) -> Tensor | None:
        """The layer's forward once more, and its backward; the gradient of its input."""
        x = ctx.held.take().requires_grad_(ctx.needs_input_grad[0])
        alone = ctx.batch.alone()
        with torch.enable_grad(), recompute_cheap():
            if ctx.random is None:
                y = ctx.layer(x, alone)
            else:
                with ctx.random:
                    y = ctx.layer(x, alone)
        kept, _ = tree_flatten(list(alone.kept().values()))
        pairs = [(y, dy)]
        for value, gradient in zip(kept, dkept, strict=True):
            if isinstance(value, Tensor) and value.requires_grad and gradient is not None:
                pairs.append((value, gradient))
        torch.autograd.backward([v for v, _ in pairs], [g for _, g in pairs])
        grad: Tensor | None = x.grad
        return grad


class _RngState:
    """The random number generators' state at creation, restored inside the context."""

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
