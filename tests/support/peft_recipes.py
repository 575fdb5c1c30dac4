"""Adapters that stock PEFT writes, with its own float32 merge of each: 40 recipes.

This file decides what the recipes of `tests/merging/test_adapter_matrix.py` are. It imports PEFT
and transformers and nothing of the project, so that it also runs with another version of PEFT in a
process of its own: ``python peft_recipes.py JOB``, where JOB is JSON (`Job`).

Head and embedding of a tied base are trained apart, so that the merge of PEFT, which would add both
changes to the one weight, is made on a copy with two weights. Names that other trainers write are
made of the tensors that PEFT has saved; their values are the same.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = "model.language_model."
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_FAMILY = {"text": "ForCausalLM", "vl": "ForConditionalGeneration"}
LINEAR = [
    "q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj", "gate_proj",
    "up_proj", "down_proj",
]  # fmt: skip
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
#: What `get_peft_regex` of Unsloth makes for language layers.
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
)
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Job:
    """What one process makes.

    Attributes:
        base: a model folder in bfloat16.
        moe: whether it is a mixture of experts.
        out: receives a folder for each recipe: ``adapter``, ``merged.safetensors``, or
            ``error.txt`` if PEFT does not make it.
        recipes: names.
    """

    base: str
    moe: bool
    out: str
    recipes: list[str]


@dataclass(frozen=True)
class Recipe:
    """One adapter.

    Attributes:
        options: of `LoraConfig`.
        moe: needs experts.
        kind: ``text`` or ``vl``, the class that the adapter is trained under.
        heads: changes the head or the embedding apart from each other.
        save: options of `save_pretrained`.
        dtype: of the adapter's tensors.
        convert: makes the tensors of another trainer of PEFT's and the sizes of the base.
        config: fields that the other trainer writes otherwise.
        shards: number of files.
        made_of: class of PEFT's config.
    """

    options: Mapping[str, Any]
    moe: bool = False
    kind: str = "vl"
    heads: bool = False
    save: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    convert: Callable[[Tensors, Mapping[str, int]], Tensors] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    shards: int = 1
    made_of: str = "LoraConfig"


def renamed(*pairs: tuple[str, str]) -> Callable[[Tensors, Mapping[str, int]], Tensors]:
    """Every name with some parts replaced."""

    def convert(tensors: Tensors, _: Mapping[str, int]) -> Tensors:
        made = {}
        for name, value in tensors.items():
            for old, new in pairs:
                name = re.sub(old, new, name)
            made[name] = value
        return made

    return convert


def by_expert(tensors: Tensors, sizes: Mapping[str, int], *, each: bool) -> Tensors:
    """Stacks of experts as w1, w2 and w3: of three dims, or a module for each expert (`each`).

    PEFT 0.19.1 and later: row ``e r + k`` of A and column ``k E + e`` of B are expert e's.
    """
    made: Tensors = {}
    experts = sizes["experts"]
    for name, a in tensors.items():
        if ".mlp.experts." not in name:
            made[name] = a
        if ".mlp.experts." not in name or ".lora_A." not in name:
            continue
        flat = tensors[name.replace("lora_A", "lora_B")]
        first = a.reshape(experts, -1, a.shape[1])
        second = torch.stack([flat[:, e::experts] for e in range(experts)])
        root = name.partition(".mlp.experts.")[0] + ".mlp.experts"
        parts = {"down_proj": second}
        if "base_layer" in name:  # of two stacks, gate_up_proj is wrapped first
            half = second.shape[1] // 2
            parts = {"gate_proj": second[:, :half], "up_proj": second[:, half:]}
        for word, b in parts.items():
            if not each:
                tinker = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[word]
                made[f"{root}.{tinker}.lora_A.weight"] = first
                made[f"{root}.{tinker}.lora_B.weight"] = b
            for e in range(experts if each else 0):
                made[f"{root}.{e}.{word}.lora_A.weight"] = first[e]
                made[f"{root}.{e}.{word}.lora_B.weight"] = b[e]
    return made


def tinker(tensors: Tensors, sizes: Mapping[str, int]) -> Tensors:
    """The input projection of the delta rule as q, k and v; experts as w1, w2 and w3."""
    made: Tensors = {}
    for name, value in by_expert(tensors, sizes, each=False).items():
        if "in_proj_qkv" not in name:
            made[name] = value
            continue
        parts = (
            value.split([sizes["keys"], sizes["keys"], sizes["values"]])
            if "lora_B" in name
            else [value] * 3
        )
        made |= {name.replace("_qkv", f"_{x}"): part for x, part in zip("qkv", parts, strict=True)}
    return made


ALL: dict[str, Any] = {"target_modules": LINEAR}
BOTH: dict[str, Any] = {"target_modules": ["q_proj"], "target_parameters": STACKS}
HEADS = ["q_proj"]
RECIPES: dict[str, Recipe] = {
    # which weights
    "q and v": Recipe({"target_modules": ["q_proj", "v_proj"]}),
    "linear": Recipe(ALL),
    "gates": Recipe({"target_modules": [*LINEAR, "in_proj_a", "in_proj_b"]}),
    "all-linear": Recipe({"target_modules": "all-linear"}, kind="text"),
    "expression": Recipe({"target_modules": r".*layers\.\d+\.(mlp|self_attn)\.\w*(up|k|o)_proj"}),
    "some layers": Recipe(ALL | {"layers_to_transform": [0, 3]}),
    "excluded": Recipe(ALL | {"exclude_modules": ["out_proj", "layers.1.mlp.up_proj"]}),
    # numbers
    "rslora": Recipe(ALL | {"use_rslora": True, "r": 8, "lora_alpha": 4}),
    "patterns": Recipe(
        ALL | {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 9},
               "alpha_pattern": {"down_proj": 3, "in_proj_qkv": 11}}
    ),
    "regex patterns": Recipe(
        ALL | {"rank_pattern": {r"layers\.[01]\..*(q|z)": 2, r"^model\..*\.3\..*\.k_proj": 3},
               "alpha_pattern": {r"(mlp|shared_expert)\.(up|down)_proj": 9, "up_proj": 1}}
    ),
    "bfloat16": Recipe(ALL, dtype=torch.bfloat16),
    "float16": Recipe(ALL, dtype=torch.float16),
    # DoRA
    "dora": Recipe(ALL | {"use_dora": True}),
    "dora patterns": Recipe(
        ALL | {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}}
    ),
    # experts
    "experts": Recipe(BOTH, moe=True),
    "gate_up": Recipe({"target_modules": ["q_proj"], "target_parameters": STACKS[:1]}, moe=True),
    "down": Recipe({"target_modules": ["q_proj"], "target_parameters": STACKS[1:]}, moe=True),
    "experts rslora": Recipe(BOTH | {"use_rslora": True, "lora_alpha": 2}, moe=True),
    "experts patterns": Recipe(
        BOTH | {"rank_pattern": {"experts.down_proj": 3}, "alpha_pattern": {"gate_up_proj": 2}},
        moe=True,
    ),
    "router": Recipe(
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}, moe=True
    ),
    # head and embedding
    "head": Recipe({"target_modules": [*HEADS, "lm_head"]}, heads=True),
    "embedding": Recipe({"target_modules": [*HEADS, "embed_tokens"]}, heads=True),
    "head and embedding": Recipe(
        {"target_modules": [*HEADS, "lm_head", "embed_tokens"]}, heads=True
    ),
    "saved head": Recipe({"target_modules": HEADS, "modules_to_save": ["lm_head"]}, heads=True),
    "saved embedding": Recipe(
        {"target_modules": HEADS, "modules_to_save": ["embed_tokens"]}, heads=True
    ),
    "saved both": Recipe(
        {"target_modules": HEADS, "modules_to_save": ["embed_tokens", "lm_head"]}, heads=True
    ),
    "token rows": Recipe({"target_modules": HEADS, "trainable_token_indices": [3, 5, 250]}),
    "unchanged embedding": Recipe({"target_modules": HEADS}, save={"save_embedding_layers": True}),
    # what PEFT's merge needs more for than the weights, or what is no LoRA
    "pissa": Recipe({"target_modules": HEADS, "init_lora_weights": "pissa"}),
    "lora_bias": Recipe({"target_modules": HEADS, "lora_bias": True}),
    "biases": Recipe({"target_modules": HEADS, "bias": "all"}),
    "ia3": Recipe({"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
                  made_of="IA3Config"),
    "loha": Recipe({"target_modules": HEADS}, made_of="LoHaConfig"),
    # names of other trainers
    "Unsloth": Recipe({"target_modules": UNSLOTH, "task_type": "CAUSAL_LM"}),
    "LLaMA-Factory": Recipe(ALL | {"task_type": "CAUSAL_LM"}, kind="text"),
    "Axolotl": Recipe(ALL, convert=renamed((r"(layers\.\d+)", r"\1._checkpoint_wrapped_module"))),
    "FSDP": Recipe(ALL, convert=renamed((r"^", "_fsdp_wrapped_module."))),
    "compiled": Recipe(ALL, convert=renamed((r"^", "_orig_mod."))),
    "state dict": Recipe(ALL, convert=renamed((r"(lora_[AB])\.", r"\1.default."))),
    "shards": Recipe(ALL, shards=3),
    "Tinker": Recipe(ALL, kind="text", convert=tinker, config={"target_modules": "all-linear"}),
    "Tinker experts": Recipe(
        BOTH, moe=True, kind="text", convert=tinker,
        config={"target_modules": "all-linear", "target_parameters": None},
    ),
    "per expert": Recipe(
        BOTH, moe=True, convert=lambda tensors, sizes: by_expert(tensors, sizes, each=True),
        config={"target_modules": "all-linear", "target_parameters": None},
    ),
}  # fmt: skip


def main(job: Job) -> None:
    """Make the adapters of a job."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    base = Path(job.base)
    models: dict[tuple[str, bool], Any] = {}
    for name in job.recipes:
        recipe = RECIPES[name]
        folder = Path(job.out, name)
        folder.mkdir(parents=True)
        key = recipe.kind, recipe.heads
        if key not in models:
            models[key] = _model(base, recipe.kind, moe=job.moe, apart=recipe.heads)
        try:
            merged = _make(copy.deepcopy(models[key]), recipe, folder / "adapter", _sizes(base))
        except (ValueError, NotImplementedError, RuntimeError, KeyError, TypeError) as error:
            (folder / "error.txt").write_text(f"{type(error).__name__}: {error}")
            continue
        named = {_hub(n, recipe.kind): v for n, v in merged.items()}
        save_file(named, folder / "merged.safetensors")


def _model(base: Path, kind: str, *, moe: bool, apart: bool) -> Any:
    """The stock class in float32; with `apart` the head is never the embedding."""
    cls = getattr(transformers, f"Qwen3_5{'Moe' if moe else ''}{_FAMILY[kind]}")
    model = cls.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    if apart and model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return model


def _make(model: Any, recipe: Recipe, adapter: Path, sizes: Mapping[str, int]) -> Tensors:
    """Write an adapter, and return PEFT's merge in float32."""
    config = getattr(peft, recipe.made_of)
    numbers = {"LoraConfig": {"r": 4, "lora_alpha": 6}, "LoHaConfig": {"r": 4, "alpha": 6}}
    wrapped = peft.get_peft_model(
        model, config(**(numbers.get(recipe.made_of, {}) | dict(recipe.options)))
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if not parameter.requires_grad:
                continue
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_((0.1 * noise).to(recipe.dtype).float())
            else:  # magnitudes, saved modules, rows, biases: near what they begin as
                parameter.mul_(1 + 0.2 * noise)
    wrapped.save_pretrained(str(adapter), **({"save_embedding_layers": False} | dict(recipe.save)))
    tensors = load_file(adapter / FILE)
    if recipe.convert is not None:
        tensors = recipe.convert(tensors, sizes)
    if recipe.dtype is not torch.float32:
        tensors = {name: value.to(recipe.dtype) for name, value in tensors.items()}
    _write(adapter, tensors, recipe.shards)
    if recipe.config:
        path = adapter / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(recipe.config)))
    merged = wrapped.merge_and_unload().state_dict()
    return {name: value.float().clone().contiguous() for name, value in merged.items()}


def _write(adapter: Path, tensors: Tensors, shards: int) -> None:
    """The weights in one file, or in several with an index, as transformers names them."""
    tensors = {name: value.clone().contiguous() for name, value in tensors.items()}
    if shards == 1:
        save_file(tensors, adapter / FILE, metadata={"format": "pt"})
        return
    (adapter / FILE).unlink()
    names, index = sorted(tensors), {}
    for number in range(shards):
        file = f"adapter_model-{number + 1:05}-of-{shards:05}.safetensors"
        some = names[number::shards]
        save_file({n: tensors[n] for n in some}, adapter / file, metadata={"format": "pt"})
        index |= dict.fromkeys(some, file)
    (adapter / f"{FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _hub(name: str, kind: str) -> str:
    """The name on the hub of a tensor of a stock class."""
    if kind == "text" and name.startswith("model."):
        return ROOT + name.removeprefix("model.")
    return name


def _sizes(base: Path) -> dict[str, int]:
    config = json.loads((base / "config.json").read_text())
    text = config.get("text_config", config)
    return {
        "keys": text["linear_num_key_heads"] * text["linear_key_head_dim"],
        "values": text["linear_num_value_heads"] * text["linear_value_head_dim"],
        "experts": text.get("num_experts", 0),
    }


if __name__ == "__main__":
    main(Job(**json.loads(sys.argv[1])))
