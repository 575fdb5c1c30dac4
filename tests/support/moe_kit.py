"""Random mixture-of-experts models of transformers, ours on the same weights, and their layouts.

`twins` uses nothing of core's loading; `write_moe`, `fuse` and `split` give folders in the three
layouts that exist on disk, renamed by hand.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from support.blocks_kit import GivenWeights, randomise
from support.blocks_kit import tiny_config as dense_config
from torch import Tensor, nn
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from qcore.api.blocks import Packed
from qcore.nn.moe.experts import Experts, Routing, Tokens
from qcore_qwen35.model import Trunk

ROOT = "model.language_model."
INDEX = "model.safetensors.index.json"
#: What a mixture of experts has in place of ``intermediate_size``; no two sizes alike.
EXPERTS: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text", "moe_intermediate_size": 24, "num_experts": 7,
    "num_experts_per_tok": 2, "shared_expert_intermediate_size": 40,
    "router_aux_loss_coef": 0.001,
}  # fmt: skip


def moe_config(**changes: Any) -> dict[str, Any]:
    """The text section of a config.json: three delta layers, then one of attention."""
    config = dense_config(**(EXPERTS | changes))
    del config["intermediate_size"]
    return config


class Differentiable(nn.Module):
    """Experts by autograd alone, one matrix product each, so that the stack gets a gradient."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach())

    def forward(self, x: Tensor, routing: Routing, tokens: Tokens = None) -> Tensor:
        rows = x[routing.tokens] if tokens == "in" else x
        pieces = rows.split(routing.counts.tolist())
        y = torch.cat([F.linear(x, w) for x, w in zip(pieces, self.weight, strict=True)])
        if tokens == "out":
            return y.new_zeros(len(y) // routing.k, y.shape[1]).index_add(0, routing.tokens, y)
        return y


class GivenExperts(GivenWeights):
    """A `BuildContext` over a state dict; experts are core's own, or `Differentiable`."""

    compute: Any = None  #: the backend of core's own; by default the reference

    def __init__(
        self, config: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype,
        *, core: bool,
    ) -> None:  # fmt: skip
        super().__init__(config, weights, dtype)
        self.core = core

    def experts(self, name: str) -> nn.Module:
        weight = self.weights[name]
        if not self.core:
            return Differentiable(weight)
        made = Experts(tuple(weight.shape), self.dtype, None, compute=self.compute)
        made.weight = nn.Parameter(weight.detach(), requires_grad=False)  # shared, not copied
        return made


@dataclass
class MoeTwins:
    """The reference and ours, on the same numbers."""

    theirs: Qwen3_5MoeForCausalLM
    ours: Trunk

    @property
    def head(self) -> Tensor:
        return self.theirs.lm_head.weight.detach()

    def hidden(
        self, batch: Packed, embedded: Tensor | None = None, caches: list[Any] | None = None
    ) -> Tensor:
        x = self.ours.embed(batch) if embedded is None else embedded
        for number, layer in enumerate(self.ours.layers):
            x = layer(x, batch, None if caches is None else caches[number])
        return self.ours.final(x)

    def logits(
        self, batch: Packed, embedded: Tensor | None = None, caches: list[Any] | None = None
    ) -> Tensor:
        """Our logits ``[T, V]``."""
        return self.hidden(batch, embedded, caches) @ self.head.t()

    def reference(self, ids: Tensor, **more: Any) -> Tensor:
        """Their logits ``[T, V]`` of one unpadded document."""
        return self.theirs(ids[None], use_cache=False, **more).logits[0]

    def weights(self) -> dict[str, nn.Parameter]:
        """Our parameters under the reference's names."""
        return {
            re.sub(r"(gate_up_proj|(?<=experts\.)down_proj)\.weight$", r"\1", name): parameter
            for name, parameter in self.ours.named_parameters()
        }


def twins(
    config: dict[str, Any], *, dtype: torch.dtype = torch.float32, core: bool = True,
    seed: int = 0, like: MoeTwins | None = None,
) -> MoeTwins:  # fmt: skip
    """Both on random weights; logits of order 0.6, where float32 is a few 1e-7 off float64.

    `core` builds our experts with core's module, which gives stacks no gradient. `like` takes
    another pair's weights.
    """
    torch.manual_seed(seed)
    hf_config = Qwen3_5MoeTextConfig(**config)
    hf_config._attn_implementation = "eager"
    with torch.device("meta"):
        theirs = Qwen3_5MoeForCausalLM(hf_config)
    rotary = theirs.model.rotary_emb
    theirs.to_empty(device="cpu").eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".experts." in name:
                parameter.uniform_(-1, 1).mul_((1.5 / parameter.shape[-1]) ** 0.5)
            elif name.endswith("mlp.gate.weight"):
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
            else:
                randomise(name, parameter)
        theirs.lm_head.weight.mul_(0.25)
        if like is not None:
            theirs.load_state_dict(like.theirs.state_dict())
    theirs.to(dtype)
    theirs.model.rotary_emb = type(rotary)(hf_config)
    context = GivenExperts(config, theirs.model.state_dict(), dtype, core=core)
    return MoeTwins(theirs, Trunk(context))


# -- folders


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by its name on disk."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


_ONE = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")


def fused(tensors: Mapping[str, Tensor], *, mtp: bool = True) -> dict[str, Tensor]:
    """Per-expert tensors stacked as the hub has them; those of ``mtp.*`` only with `mtp`."""
    out: dict[str, Tensor] = {}
    stacks: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name, value in tensors.items():
        found = _ONE.match(name)
        if found is None or (name.startswith("mtp.") and not mtp):
            out[name] = value
        else:
            stacks.setdefault(found[1], {})[int(found[2]), found[3]] = value
    for module, pieces in stacks.items():
        numbers = range(1 + max(number for number, _ in pieces))
        out[f"{module}.gate_up_proj"] = torch.stack(
            [torch.cat([pieces[n, "gate_proj"], pieces[n, "up_proj"]]) for n in numbers]
        )
        out[f"{module}.down_proj"] = torch.stack([pieces[n, "down_proj"] for n in numbers])
    return out


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stacks as one tensor per expert and map, as transformers saves them."""
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        if not module.endswith(".experts"):
            out[name] = value
            continue
        for number, one in enumerate(value):
            halves = {"down_proj": one}
            if leaf == "gate_up_proj":
                gate, up = one.chunk(2)
                halves = {"gate_proj": gate, "up_proj": up}
            out |= {f"{module}.{number}.{n}.weight": v.contiguous() for n, v in halves.items()}
    return out


def as_layout(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """``fused``, ``apart``, or ``mixed``: the trunk fused, the prediction layer per expert."""
    one_by_one = apart(tensors)
    return one_by_one if layout == "apart" else fused(one_by_one, mtp=layout == "fused")


def rewrite(source: Path, folder: Path, layout: str, *, shards: int = 1) -> Path:
    """The same checkpoint in another layout, in so many files."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    tensors = as_layout(tensors_of(source), layout)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, places = list(tensors), {}
    for number in range(shards):
        mine = names[number::shards]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: tensors[n] for n in mine}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(mine, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


# -- adapters, read by hand


def exact(base: Path, adapter: Path) -> dict[str, Tensor]:
    """``W + s B A`` in float64 of every weight that an adapter names, by its fused canonical name.

    Of experts, by the layout that PEFT 0.21 writes: A's row ``e r + k`` and B's column
    ``k E + e`` are expert e's; of two adapted stacks gate_up_proj is the inner one.
    """
    config = json.loads((adapter / "adapter_config.json").read_text())
    found, weights = tensors_of(adapter), canonical(tensors_of(base))
    parameters = config.get("target_parameters") or []
    result = {}
    for name, a in found.items():
        if not name.endswith(".lora_A.weight"):
            continue
        b = found[name.replace("lora_A", "lora_B")].double()
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if module.endswith((".experts", ".experts.base_layer")):
            stack = stack_of(module, parameters)
            path = f"{module.removesuffix('.base_layer')}.{stack}"
        else:
            path = f"{module}.weight"
        weight = f"{ROOT}{path.removeprefix(ROOT).removeprefix('model.')}"
        value = weights[weight].double()
        # Patterns are met with a module's path, of a parameter with the parameter's own.
        spelt = path if module.endswith((".experts", ".base_layer", "mlp.gate")) else module
        if value.ndim == 2:
            s, _ = scaling(config, spelt)
            result[weight] = value + s * (b @ a.double())
            continue
        s, r = scaling(config, spelt)
        experts = len(value)
        deltas = [
            b[:, [k * experts + e for k in range(r)]] @ a[e * r : (e + 1) * r].double()
            for e in range(experts)
        ]
        result[weight] = value + s * torch.stack(deltas)
    return result


def stack_of(module: str, parameters: list[str]) -> str:
    """Which stack an adapter's expert tensors belong to."""
    named = {name.rpartition(".")[2] for name in parameters} & {"gate_up_proj", "down_proj"}
    if len(named) == 1:
        return named.pop()
    return "gate_up_proj" if module.endswith(".base_layer") else "down_proj"


def scaling(config: dict[str, Any], path: str) -> tuple[float, int]:
    """PEFT's rule, by hand: the end of a path; lora_alpha / r or / sqrt r; and r."""

    def of(pattern: str, default: float) -> float:
        for key, value in (config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", path):
                return float(value)
        return default

    r = int(of("rank_pattern", config["r"]))
    alpha = of("alpha_pattern", config["lora_alpha"])
    return alpha / (r**0.5 if config.get("use_rslora") else r), r


def canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stacks fused, and the text class's names as the hub's."""
    flat = not any(name.startswith(ROOT) for name in tensors)
    return {
        ROOT + name.removeprefix("model.") if flat and name.startswith("model.") else name: value
        for name, value in fused(tensors, mtp=False).items()
    }
