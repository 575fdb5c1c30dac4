"""Slices of published shapes with random values, and the gradients that qcore gives their LoRA.

This file decides the model: four layers (three of the delta rule, one of attention) as wide as
the record of a SKU says, with a small vocabulary; how fast a state decays; LoRA on every map that
may carry it, B not zero. `gradient_cases` has the documents, `gradient_twin` computes the same
with transformers, `gradient_proof` compares. Values go through the loader's own door, those of no
map are exact in bfloat16.

Which random values was decided by transformers' error alone, qcore's was not looked at: with
embeddings as small as the maps' weights the first norm makes every error large, and transformers
in bfloat16 itself has cosines of 0.997 (0.8B, 278 tokens, on a CPU), so that none could pass;
as they are, 0.9996 and more. No slice ties its head to embeddings of that size, whatever the
record says: neither carries LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from support.gradient_cases import VOCABULARY, Case, Gradients, Routes
from torch import Tensor

from qcore.adapter.targets import targets
from qcore.api.blocks import Packed
from qcore.api.parameters import Store, Table
from qcore.api.parameters import Tensor as Entry
from qcore.checkpoint.checkpoint import Header
from qcore.checkpoint.layout import Layout, Located, Place
from qcore.nn.kernels.registry import Chosen, choose, installed
from qcore.nn.load import place, slabs
from qcore.nn.model import Model, ops_of
from qcore.nn.optim import FlatAdamW
from qcore.nn.qlora.lora_layer import Lora
from qcore.plugins.manager import Plugins
from qcore.skus.registry import load_skus
from qcore_qwen35.plugin import DENSE, MOE
from qcore_qwen35.table import parts
from qcore_qwen35.tiny import tiny_config

SKUS = ("0.8B", "2B", "4B", "9B", "27B", "35B-A3B")
LAYERS = 4


def text_of(sku: str) -> dict[str, Any]:
    """Sizes of a slice, by the record of the SKU: keys of ``text_config``."""
    shape = load_skus().get(f"Qwen3.5-{sku}").facts["shape"]
    sizes = {key: fact.value for key, fact in shape.items()}
    rope = {
        "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10], "mrope_interleaved": True,
    }  # fmt: skip
    sizes |= {"num_hidden_layers": LAYERS, "rope_parameters": rope, "tie_word_embeddings": False}
    for key in ("vocab_size", "layer_types", "mtp_num_hidden_layers"):
        sizes.pop(key, None)
    return sizes


class Slice:
    """qcore's model of a shape, filled.

    Args:
        text: keys of ``text_config``.
        device: where it computes.
        dtype: of the run.
        kernels: whether the chosen kernels compute it, or the references in torch.
        quantize: NF4, or the weights as they are drawn.
        dora: DoRA on linear layers, experts and router frozen.
    """

    def __init__(
        self, text: dict[str, Any], device: torch.device, dtype: torch.dtype, *,
        kernels: bool, quantize: bool = True, dora: bool = False,
    ) -> None:  # fmt: skip
        self.moe = "num_experts" in text
        self.config = tiny_config(vocab_size=VOCABULARY, moe=self.moe, **text)
        self.config["text_config"]["mtp_num_hidden_layers"] = 0
        self.device = device
        layout = _layout(self.config, self.moe)
        architecture = MOE if self.moe else DENSE
        self.chosen = _chosen(architecture, self.config, layout, device) if kernels else None
        groups = [name for name, aim in layout.table.groups.items() if aim.value != "never"]
        ranks = {"experts": 4} if self.moe else {}
        if dora:
            groups = [name for name in groups if name not in ("experts", "router")]
            ranks = {}
        lora = targets(layout, groups, Lora(r=8, lora_alpha=16, use_dora=dora), group_r=ranks)
        self.model = Model(architecture, self.config, layout, dtype, lora, self.chosen)
        _fill(layout, self.model, device, quantize=quantize)
        self.draw_lora(0)
        adapters = [module for _, module in self.model.adapters()]
        # Gradients are added where the optimiser keeps them, as in a run.
        self.optimizer = FlatAdamW(adapters, lr=1e-3, weight_decay=0.0)
        self.model.train()

    def sides(self) -> Iterator[tuple[str, Tensor]]:
        """``NAME A`` and ``NAME B`` of every map that carries LoRA, the masters."""
        for name, module in self.model.adapters():
            assert module.lora_A is not None
            assert module.lora_B is not None
            yield f"{name} A", module.lora_A
            yield f"{name} B", module.lora_B

    @torch.no_grad()
    def draw_lora(self, seed: int, *, fresh: bool = False) -> None:
        """A as a run begins, B drawn; `fresh`: B zero."""
        draw = torch.Generator().manual_seed(seed)
        first = not hasattr(self, "optimizer")
        for name, module in self.model.adapters():
            if first:
                module.reset_lora(name, seed, self.device)
            a, b = module.lora_A, module.lora_B
            assert a is not None
            assert b is not None
            # In place: the optimiser's vector holds them.
            a.copy_((2 * torch.rand(a.shape, generator=draw) - 1) / math.sqrt(a.shape[1]))
            noise = torch.randn(b.shape, generator=draw)
            b.copy_(0.0 * noise if fresh else 0.05 * noise)

    @torch.no_grad()
    def set_decay(self, kind: str) -> None:
        """Log decays ``-exp(A_log) softplus(a + dt_bias)`` of about unit a.

        ``usual``: -4 to -0.02; ``forgets``: -60 to -3, after which nothing is left of a state;
        ``keeps``: -3e-3 to -5e-5, so that a state outlives every document.
        """
        draw = torch.Generator().manual_seed(7)
        for name, parameter in self.model.named_parameters():
            n = parameter.numel()
            if name.endswith("A_log"):
                least, most = {"usual": (0.5, 8), "forgets": (1, 16), "keeps": (1e-3, 0.05)}[kind]
                value = torch.linspace(least, most, n).log()[torch.randperm(n, generator=draw)]
            elif name.endswith("dt_bias"):
                value = torch.full((n,), {"usual": -2.0, "forgets": 3.0, "keeps": -3.0}[kind])
            else:
                continue
            parameter.copy_(value.bfloat16())

    def gradients(
        self, case: Case, routes: Routes | None = None, *, policy: str = "none"
    ) -> Gradients:
        """Of the mean loss over targets, in float32."""
        rows = case.rows()
        batch = Packed.of([ids for ids, _ in rows], [want for _, want in rows]).to(self.device)
        count = sum(int((want >= 0).sum()) for _, want in rows)
        self.optimizer.zero_grad()
        with routed(self.model, routes):
            (self.model.loss(batch, recompute=policy) / count).backward()
        found = {}
        for name, master in self.sides():
            assert master.grad is not None
            found[name] = master.grad.detach().float().clone()
        return found

    def train(self, steps: int, seed: int = 0) -> list[float]:
        """So many steps from a fresh adapter on eight batches in turn; the losses."""
        self.draw_lora(seed, fresh=True)
        self.optimizer = FlatAdamW((m for _, m in self.model.adapters()), lr=1e-3, weight_decay=0.0)
        losses = []
        for step in range(steps):
            rows = Case(lengths=(97, 1, 158), seed=1000 + 8 * seed + step % 8).rows()
            batch = Packed.of([ids for ids, _ in rows], [want for _, want in rows])
            count = sum(int((want >= 0).sum()) for _, want in rows)
            loss = self.model.loss(batch.to(self.device)) / count
            loss.backward()
            self.optimizer.clip(1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses).tolist()

    def attend(self, function: Callable[..., Tensor]) -> list[Callable[..., Tensor]]:
        """Let `function` compute attention; what did before."""
        mixers = [layer.self_attn for layer in _layers(self.model) if hasattr(layer, "self_attn")]
        before = [mixer._attend for mixer in mixers]
        for mixer in mixers:
            mixer._attend = function
        return before


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Sequence[int], scale: float
) -> Tensor:
    """Causal attention of each document by products and a softmax: nothing adds in any order."""
    group = q.shape[1] // k.shape[1]
    outputs = []
    for start, end in pairwise(cu_seqlens):
        one, keys, values = (x[start:end].transpose(0, 1).float() for x in (q, k, v))
        keys, values = (x[:, None].expand(-1, group, -1, -1).flatten(0, 1) for x in (keys, values))
        future = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        scores = (one @ keys.transpose(1, 2) * scale).masked_fill(future, -torch.inf)
        outputs.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs).to(q.dtype)


class routed:  # noqa: N801  # a context manager
    """Routers of a model that note, and obey, `routes`."""

    def __init__(self, model: Model, routes: Routes | None) -> None:
        self.moes = [] if routes is None else [(n, m.mlp) for n, m in enumerate(_layers(model))]
        self.moes = [(n, moe) for n, moe in self.moes if hasattr(moe, "_router")]
        self.before = [moe._router for _, moe in self.moes]
        self.routes = routes

    def __enter__(self) -> None:
        for (number, moe), inner in zip(self.moes, self.before, strict=True):
            assert self.routes is not None
            moe._router = _router(inner, number, self.routes)

    def __exit__(self, *_: object) -> None:
        for (_, moe), inner in zip(self.moes, self.before, strict=True):
            moe._router = inner


def _router(inner: Callable[..., Any], layer: int, routes: Routes) -> Callable[..., Any]:
    def router(scores: Tensor, k: int) -> Any:
        out = inner(routes.mask(layer, scores), k)
        routes.note(layer, out[1])
        return out

    return router


def _layers(model: Model) -> Sequence[Any]:
    return model.trunk.layers


def _chosen(architecture: Any, config: Any, layout: Layout, device: torch.device) -> Chosen:
    plugins = Plugins.discover().for_model_type("qwen3_5")
    assert plugins.infos, "qcore-qwen35 is not installed: its kernels would not be found"
    return choose(installed(plugins), device, {}, ops_of(architecture, config, layout))


def _layout(config: dict[str, Any], moe: bool) -> Layout:
    """The text part of a checkpoint of this config, as if it lay in one file."""
    table = Table([part for part in parts(config, moe=moe) if part.loaded])
    located = {}
    for tensor in table:
        if tensor.row.tie is None:
            header = Header(tensor.name, "BF16", tensor.shape, "none", 0, 0)
            region = tuple(slice(0, n) for n in tensor.shape)
            located[tensor.name] = Located(tensor, (Place(header, region),))
    return Layout(table=table, located=located, by_disk={}, namespaces={})


def _fill(layout: Layout, model: Model, device: torch.device, *, quantize: bool) -> None:
    modules = dict(model.named_modules())
    draw = torch.Generator(device).manual_seed(0)
    for item in layout.located.values():
        for rows in slabs(item):
            value = _random(item.tensor, rows, draw, device)
            in_nf4 = quantize and item.tensor.row.store is Store.NF4
            place(model, modules, item, rows, value, quantize=in_nf4)


def _random(entry: Entry, rows: slice, draw: torch.Generator, device: torch.device) -> Tensor:
    """Values on which every rule of the blocks matters.

    Maps give outputs of one; those that end a branch are smaller by ``sqrt(2 layers)`` and
    embeddings are of one, as in GPT-2's initialisation.
    """
    shape = (rows.stop - rows.start, *entry.shape[1:])
    noise = torch.randn(shape, generator=draw, device=device)
    if len(shape) == 1:
        value = 0.1 * noise + float(entry.name.endswith("linear_attn.norm.weight"))
    elif "embed_tokens" in entry.name:
        value = noise
    else:
        value = noise / math.sqrt(shape[-1])
        if any(end in entry.name for end in ("o_proj", "out_proj", "down_proj")):
            value /= math.sqrt(2 * LAYERS)
    return value.to(torch.bfloat16)
