"""The same slice computed by transformers' own class, with LoRA beside its maps.

This file decides what qcore is measured against. In float32 it is the reference, in bfloat16
under autocast with float32 adapters it is what people train with. Weights are those that qcore
holds, read back from 4 bit. Documents of a pack go through one by one, padded rows as one batch
with a mask: nothing of qcore's packing is on this side.

LoRA is ``y + s (x A^T) B^T`` beside every map, as PEFT has it in linear layers. For experts and
router PEFT adds ``s B A`` to the weight and rounds the sum, in bfloat16 a larger error than that
of products apart; here they are apart too, so that the bound is the stricter one. A test without
a card proves that in float32 both are PEFT's. Experts run in a loop of one product each.

The router is transformers' code; its linear map and its softmax are met on their way (the first
gets LoRA, the second the scores of `Routes`), so that it need not be written again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from support.gradient_cases import Case, Gradients, Routes
from support.gradient_slices import Slice
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qcore.nn.moe.experts import Experts
from qcore.nn.qlora.linear import Linear

_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


class Twin:
    """transformers' model of a slice, in `dtype`, with its own adapters.

    Attributes:
        model: ``Qwen3_5ForCausalLM``, or that of experts.
        lora: the adapters, float32, by `Slice.sides`' names.
    """

    def __init__(self, ours: Slice, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.moe = ours.device, dtype, ours.moe
        self.model = fresh_model(ours, dtype)
        self.lora = {
            name: nn.Parameter(side.detach().float().clone()) for name, side in ours.sides()
        }
        self.routes: Routes | None = None
        modules = dict(self.model.named_modules())
        for name, holder in ours.model.adapters():
            assert holder.lora is not None
            s, pair = holder.lora.scaling, (self.lora[f"{name} A"], self.lora[f"{name} B"])
            path, _, leaf = _theirs(name).rpartition(".")
            module = modules[path]
            if isinstance(holder, Experts):
                continue
            if isinstance(module, nn.Linear):
                module.register_forward_hook(_beside(*pair, s))
            else:
                assert leaf == "weight"
                module.forward = self._gate(module, *pair, s)
        for path, module in modules.items():
            if path.endswith(".experts"):
                self._give_experts(ours, path, module)

    def copy_from(self, ours: Slice) -> None:
        """Take the adapters and the decays that `ours` has now."""
        with torch.no_grad():
            for name, side in ours.sides():
                self.lora[name].copy_(side)
            mine = dict(self.model.named_parameters())
            for name, parameter in ours.model.named_parameters():
                if name.endswith(("A_log", "dt_bias")):
                    mine[_theirs(name)].copy_(parameter)

    def gradients(self, case: Case, routes: Routes | None = None) -> Gradients:
        """Of the mean loss over targets."""
        self.routes = routes
        rows = case.rows()
        count = sum(int((want >= 0).sum()) for _, want in rows)
        for side in self.lora.values():
            side.grad = None
        batches = [torch.stack(one) for one in zip(*rows, strict=True)] if case.padded else None
        if batches is not None:
            mask = case.real().view(batches[0].shape).long()
            self._backward(*batches, mask, count)
        else:
            for ids, want in rows:
                self._backward(ids[None], want[None], None, count)
        self.routes = None
        found = {}
        for name, side in self.lora.items():
            # A map that no token reached has no gradient here, and zeros in qcore's vector.
            found[name] = torch.zeros_like(side) if side.grad is None else side.grad.clone()
        return found

    def _backward(self, ids: Tensor, want: Tensor, mask: Tensor | None, count: int) -> None:
        ids, want = ids.to(self.device), want.to(self.device)
        mask = None if mask is None else mask.to(self.device)
        mixed = self.dtype == torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            flat = logits.float().flatten(0, 1)
            loss = F.cross_entropy(flat, want.flatten(), ignore_index=-100, reduction="sum")
        (loss / count).backward()
        if self.routes is not None:
            self.routes.at += ids.numel()

    def _gate(self, module: nn.Module, a: Tensor, b: Tensor, s: float) -> Callable[..., Any]:
        """The router's own forward, met on its way."""
        inner = module.forward
        number = next(
            n for n, layer in enumerate(self.model.model.layers) if layer.mlp.gate is module
        )

        def forward(x: Tensor) -> Any:
            met = _Met(a, b, s, number, self.routes)
            with met:
                out = inner(x)
            assert met.linear == met.softmax == 1, "another router than the one this was made for"
            if self.routes is not None:
                chosen = next(one for one in out if not one.is_floating_point())
                self.routes.note(number, chosen)
            return out

        return forward

    def _give_experts(self, ours: Slice, path: str, module: Any) -> None:
        stacks = []
        for leaf in ("gate_up_proj", "down_proj"):
            name = _ours(f"{path}.{leaf}")
            holder = ours.model.lora_layers[name]
            assert holder.lora is not None
            pair = self.lora[f"{name} A"], self.lora[f"{name} B"]
            stacks.append((getattr(module, leaf), *pair, holder.lora.scaling))
        module.forward = _experts(*stacks)


class _Met(TorchFunctionMode):
    """LoRA beside the one linear map that is called, and `routes` before the one softmax."""

    def __init__(self, a: Tensor, b: Tensor, s: float, layer: int, routes: Routes | None) -> None:
        super().__init__()
        self.lora, self.layer, self.routes = (a, b, s), layer, routes
        self.linear = self.softmax = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _SOFTMAX and self.linear:
            self.softmax += 1
            if self.routes is not None:
                args = (self.routes.mask(self.layer, args[0]), *args[1:])
        out = func(*args, **(kwargs or {}))
        if func is F.linear:
            self.linear += 1
            out = out + _product(args[0], *self.lora)
        return out


def _product(x: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    return F.linear(F.linear(x, a), b) * s


def _beside(a: Tensor, b: Tensor, s: float) -> Callable[..., Tensor]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out + _product(args[0], a, b, s)

    return hook


Stack = tuple[Tensor, Tensor, Tensor, float]  #: weights ``[E, out, in]``, A, B in PEFT's layout, s


def _experts(first: Stack, second: Stack) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """transformers' loop over experts, with LoRA: ``[T, H], [T, k], [T, k] -> [T, H]``."""

    def by_expert(stack: Stack) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], float]:
        weight, a, b, s = stack
        experts, out, into = weight.shape
        apart = b.view(out, -1, experts).permute(2, 0, 1)
        return weight, a.view(experts, -1, into).unbind(), apart.unbind(), s

    def forward(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        w1, a1, b1, s1 = by_expert(first)
        w2, a2, b2, s2 = by_expert(second)
        out = torch.zeros_like(x)
        ordered, order = chosen.flatten().sort(stable=True)
        counts = torch.bincount(ordered, minlength=len(w1)).tolist()
        for e, places in enumerate(order.split(counts)):
            if not len(places):
                continue
            token = places // chosen.shape[1]
            rows = x[token]
            gate, up = (F.linear(rows, w1[e]) + _product(rows, a1[e], b1[e], s1)).chunk(2, -1)
            inner = F.silu(gate) * up
            rows = F.linear(inner, w2[e]) + _product(inner, a2[e], b2[e], s2)
            rows = rows * weights.flatten()[places, None]
            out = out.index_add(0, token, rows.to(out.dtype))
        return out

    return forward


def fresh_model(ours: Slice, dtype: torch.dtype) -> Any:
    """The text class with the values that qcore holds."""
    kind = "Qwen3_5Moe" if ours.moe else "Qwen3_5"
    text = dict(ours.config["text_config"])
    text.pop("mtp_num_hidden_layers", None)
    text["dtype"] = dtype
    config = getattr(transformers, f"{kind}TextConfig")(**text)
    # In float32 nothing but plain products; else what is trained with.
    config._attn_implementation = "eager" if dtype == torch.float32 else "sdpa"
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    values = {_theirs(name): value.to(dtype) for name, value in _values(ours)}
    modules = dict(model.named_modules())
    for name, parameter in list(model.named_parameters()):
        value = values.pop(name)
        assert value.shape == parameter.shape, name
        path, _, leaf = name.rpartition(".")
        setattr(modules[path], leaf, nn.Parameter(value, requires_grad=False))
    assert not values, sorted(values)
    if text["tie_word_embeddings"]:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(ours.device)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not left, left
    return model.train()


def _values(ours: Slice) -> Any:
    """Every frozen tensor of qcore's model, by canonical name, 4 bit read back."""
    held = ours.model.lora_layers
    for name, holder in held.items():
        if isinstance(holder, Experts):
            yield name, holder.dense_slices(slice(0, holder.shape[0])).clone()
        else:
            assert isinstance(holder, Linear)
            yield name, holder.dense().clone()
    for name, parameter in ours.model.named_parameters():
        owner = name.rpartition(".")[0]
        if parameter.requires_grad or name in held or owner in held:
            continue  # of an adapter, or a map's weight, which was given above
        yield name, parameter.detach().clone()


def _theirs(name: str) -> str:
    return name.replace("model.language_model.", "model.", 1)


def _ours(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1)
