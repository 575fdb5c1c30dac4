"""Parameter table of Qwen 3.5, dense and MoE: every tensor's name, shape, LoRA group, storage.

This file decides which tensors a checkpoint of these architectures has, their LoRA groups, and how
each is stored in training. The architectures differ only in the feed-forward rows; each experts
tensor may be fused or split by expert. Nothing is transformed: names and layouts are those on the
hub, and the names of the text class differ in one prefix.

What is not quantized to 4 bit, and why:

- ``in_proj_a``, ``in_proj_b``: one row per value head; they set decay and write strength of the
  recurrent state, where an error accumulates over the sequence, and they are tiny.
- ``conv1d``: not a linear layer; its rounding error reaches every token of q, k and v.
- ``A_log``, ``dt_bias``: exponentiated state parameters, always float32.
- norms: vectors.
- embeddings and head: looked up and scored by row; 4 bit costs quality there, and a tied head must
  have the same values as the embedding.
- the router and the shared expert's gate: their rounding decides which experts a token gets, and
  they are tiny.
- mtp: not loaded in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qcore.api import (
    EXPERTS,
    FP32,
    LINEAR,
    NF4,
    PARAMETER,
    Aim,
    Namespace,
    Part,
    Row,
    cat,
    stack,
)
from qcore.errors import InputError

ROOT = "model.language_model"
EMBED = f"{ROOT}.embed_tokens.weight"
#: Far above any real model: a table lists every tensor, so an absurd count would exhaust memory.
_MAX_LAYERS, _MAX_EXPERTS = 1000, 4096

#: LoRA groups. `gdn_gates` are the two small projections that control the recurrent state.
GROUPS: dict[str, Aim] = {
    "attn": Aim.ON,
    "gdn": Aim.ON,
    "mlp": Aim.ON,
    "gdn_gates": Aim.ASKED,
}
MOE_GROUPS: dict[str, Aim] = {
    "attn": Aim.ON,
    "gdn": Aim.ON,
    "experts": Aim.ON,
    "shared_expert": Aim.ON,
    "gdn_gates": Aim.ASKED,
    "router": Aim.ASKED,
}


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's section: ``text_config``, or the whole config of a text-only save."""
    section = config.get("text_config")
    return section if isinstance(section, Mapping) else config


def rotary_factor(text: Mapping[str, Any]) -> Any:
    """The rotating share of a head: from ``rope_parameters``, else the outer key, else a quarter.

    Re-saves move or drop the key; transformers falls back in the same order.
    """
    rope = text.get("rope_parameters")
    factor = rope.get("partial_rotary_factor") if isinstance(rope, Mapping) else None
    return factor if factor is not None else text.get("partial_rotary_factor", 0.25)


def rope_type(text: Mapping[str, Any]) -> Any:
    """The rope type: ``rope_type``, or ``type`` in older files, else ``default``."""
    rope = text.get("rope_parameters")
    return rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else None


def prediction_layers(text: Mapping[str, Any]) -> int:
    """The number of multi-token-prediction layers in config.json; 0 without the key.

    Raises:
        InputError: ``QC-QWEN35-001`` an invalid number of layers.
    """
    value = text.get("mtp_num_hidden_layers")
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value <= _MAX_LAYERS:
        expected = f"a whole number from 0 to {_MAX_LAYERS}"
        raise _config_error("QC-QWEN35-001", "mtp_num_hidden_layers", repr(value), expected)
    return value


def parts(config: Mapping[str, Any], *, moe: bool = False) -> Iterator[Part]:
    """Yield the text part and, if the config declares it, the multi-token-prediction part.

    Args:
        config: config.json.
        moe: whether the feed-forward layers are mixtures of experts.

    Raises:
        InputError: ``QC-QWEN35-001`` a dimension that is missing or not a positive integer,
            ``-002`` ``layer_types`` of the wrong length, ``-003`` an unknown layer type.
    """
    text = text_config(config)
    predicted = prediction_layers(text)
    kinds = layer_types(text)
    dims = _dims(text) | (_moe_dims(text) if moe else _ffn_dims(text))
    experts = {"expert": tuple(range(dims["experts"]))} if moe else {}
    by_type = {
        kind: tuple(n for n, layer_kind in enumerate(kinds) if layer_kind == kind)
        for kind in ("linear_attention", "full_attention")
    }
    tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    yield Part(
        name="text",
        rows=tuple(_text_rows(tied, moe)),
        dims=dims,
        axes={
            "layer": tuple(range(len(kinds))),
            "linear": by_type["linear_attention"],
            "full": by_type["full_attention"],
            **experts,
        },
        namespaces=_namespaces("Moe" if moe else ""),
        groups=MOE_GROUPS if moe else GROUPS,
        section="text_config",
    )
    if predicted:
        yield Part(
            name="mtp",
            rows=tuple(_mtp_rows(moe)),
            dims=dims,
            axes={"mtp": tuple(range(predicted)), **experts},
            namespaces=(Namespace(name="hub"),),
            groups={"mtp": Aim.NEVER},
            optional=True,
            loaded=False,
        )


def _namespaces(kind: str) -> tuple[Namespace, ...]:
    """The two transformers classes of these blocks, and their prefixes."""
    return (
        Namespace(name="vl", classes=(f"Qwen3_5{kind}ForConditionalGeneration",)),
        Namespace(
            name="text",
            classes=(f"Qwen3_5{kind}ForCausalLM",),
            prefixes=((f"{ROOT}.", "model."),),
        ),
    )


def _text_rows(tied: bool, moe: bool) -> Iterator[Row]:
    yield Row(EMBED, "vocab hidden", "embed")
    layer = f"{ROOT}.layers.{{layer}}"
    yield Row(f"{layer}.input_layernorm.weight", "hidden", "norm")
    yield from delta_rows(f"{ROOT}.layers.{{linear}}")
    yield from attention_rows(f"{ROOT}.layers.{{full}}", "attn", "norm")
    yield Row(f"{layer}.post_attention_layernorm.weight", "hidden", "norm")
    yield from moe_rows(layer) if moe else mlp_rows(f"{layer}.mlp", "ffn", "mlp")
    yield Row(f"{ROOT}.norm.weight", "hidden", "norm")
    yield Row("lm_head.weight", "vocab hidden", "head", tie=EMBED if tied else None)


def delta_rows(p: str) -> Iterator[Row]:
    """Rows of the gated delta net below layer prefix `p`, which includes the index axis."""
    m = f"{p}.linear_attn"
    yield Row(f"{m}.in_proj_qkv.weight", "conv hidden", "gdn", NF4, kind=LINEAR)
    yield Row(f"{m}.in_proj_z.weight", "v_heads*v_dim hidden", "gdn", NF4, kind=LINEAR)
    yield Row(f"{m}.in_proj_a.weight", "v_heads hidden", "gdn_gates", kind=LINEAR)
    yield Row(f"{m}.in_proj_b.weight", "v_heads hidden", "gdn_gates", kind=LINEAR)
    yield Row(f"{m}.conv1d.weight", "conv 1 kernel", "conv")
    yield Row(f"{m}.A_log", "v_heads", "state", FP32)
    yield Row(f"{m}.dt_bias", "v_heads", "state", FP32)
    yield Row(f"{m}.norm.weight", "v_dim", "norm")
    yield Row(f"{m}.out_proj.weight", "hidden v_heads*v_dim", "gdn", NF4, kind=LINEAR)


def attention_rows(p: str, group: str, norm: str) -> Iterator[Row]:
    """Rows of gated attention below layer prefix `p`; `group` and `norm` are their groups."""
    m = f"{p}.self_attn"
    # Rows of q_proj: query and output gate, interleaved per head.
    yield Row(f"{m}.q_proj.weight", "heads*2*head_dim hidden", group, NF4, kind=LINEAR)
    yield Row(f"{m}.k_proj.weight", "kv_heads*head_dim hidden", group, NF4, kind=LINEAR)
    yield Row(f"{m}.v_proj.weight", "kv_heads*head_dim hidden", group, NF4, kind=LINEAR)
    yield Row(f"{m}.o_proj.weight", "hidden heads*head_dim", group, NF4, kind=LINEAR)
    yield Row(f"{m}.q_norm.weight", "head_dim", norm)
    yield Row(f"{m}.k_norm.weight", "head_dim", norm)


def mlp_rows(m: str, ffn: str, group: str) -> Iterator[Row]:
    """Rows of a SwiGLU layer named `m`; `ffn` is the name of its width dimension."""
    yield Row(f"{m}.gate_proj.weight", f"{ffn} hidden", group, NF4, kind=LINEAR)
    yield Row(f"{m}.up_proj.weight", f"{ffn} hidden", group, NF4, kind=LINEAR)
    yield Row(f"{m}.down_proj.weight", f"hidden {ffn}", group, NF4, kind=LINEAR)


def moe_rows(p: str, mtp: str = "") -> Iterator[Row]:
    """Rows of router, experts, shared expert and its gate; `mtp`, if not empty, is their group."""
    m, expert = f"{p}.mlp", f"{p}.mlp.experts.{{expert}}"
    router, experts = mtp or "router", mtp or "experts"
    yield Row(f"{m}.gate.weight", "experts hidden", router, kind=PARAMETER)
    # Per expert: the rows of gate_proj, then those of up_proj.
    separate = stack("expert", cat(f"{expert}.gate_proj.weight", f"{expert}.up_proj.weight"))
    dims = "experts 2*expert_ffn hidden"
    yield Row(f"{m}.experts.gate_up_proj", dims, experts, NF4, kind=EXPERTS, also=separate)
    separate = stack("expert", f"{expert}.down_proj.weight")
    dims = "experts hidden expert_ffn"
    yield Row(f"{m}.experts.down_proj", dims, experts, NF4, kind=EXPERTS, also=separate)
    yield from mlp_rows(f"{m}.shared_expert", "shared_ffn", mtp or "shared_expert")
    yield Row(f"{m}.shared_expert_gate.weight", "1 hidden", router, kind=LINEAR)


def _mtp_rows(moe: bool) -> Iterator[Row]:
    p = "mtp.layers.{mtp}"
    yield Row("mtp.fc.weight", "hidden 2*hidden", "mtp")
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        yield Row(f"mtp.{name}.weight", "hidden", "mtp")
    yield Row(f"{p}.input_layernorm.weight", "hidden", "mtp")
    yield from attention_rows(p, "mtp", "mtp")
    yield Row(f"{p}.post_attention_layernorm.weight", "hidden", "mtp")
    yield from moe_rows(p, "mtp") if moe else mlp_rows(f"{p}.mlp", "ffn", "mtp")


def _dims(text: Mapping[str, Any]) -> dict[str, int]:
    heads = _size(text, "num_attention_heads")
    v_heads, v_dim = _size(text, "linear_num_value_heads"), _size(text, "linear_value_head_dim")
    keys = _size(text, "linear_num_key_heads") * _size(text, "linear_key_head_dim")
    hidden = _size(text, "hidden_size")
    return {
        "hidden": hidden,
        "vocab": _size(text, "vocab_size"),
        "heads": heads,
        "kv_heads": _size(text, "num_key_value_heads"),
        "head_dim": _size(text, "head_dim"),
        "v_heads": v_heads,
        "v_dim": v_dim,
        "conv": 2 * keys + v_heads * v_dim,
        "kernel": _size(text, "linear_conv_kernel_dim"),
    }


def _ffn_dims(text: Mapping[str, Any]) -> dict[str, int]:
    return {"ffn": _size(text, "intermediate_size")}


def _moe_dims(text: Mapping[str, Any]) -> dict[str, int]:
    return {
        "experts": _size(text, "num_experts", _MAX_EXPERTS),
        "expert_ffn": _size(text, "moe_intermediate_size"),
        "shared_ffn": _size(text, "shared_expert_intermediate_size"),
    }


def _size(text: Mapping[str, Any], key: str, most: int | None = None) -> int:
    value = text.get(key)
    if type(value) is not int or not 0 < value <= (most or 2**31 - 1):
        expected = f"a whole number from 1 to {most}" if most else "a positive integer"
        raise _config_error("QC-QWEN35-001", key, repr(value), expected)
    return value


def layer_types(text: Mapping[str, Any]) -> list[str]:
    """``linear_attention`` or ``full_attention``, per layer.

    Raises:
        InputError: see `parts`.
    """
    types = text.get("layer_types")
    layers = _size(text, "num_hidden_layers", _MAX_LAYERS if types is None else None)
    if types is None:
        # transformers derives them from the interval: every n-th layer is full attention.
        every = _size(text, "full_attention_interval")
        kinds = ("full_attention", "linear_attention")
        return [kinds[bool((n + 1) % every)] for n in range(layers)]
    if not isinstance(types, list) or len(types) != layers:
        value = f"{len(types)} entries" if isinstance(types, list) else repr(types)
        raise _config_error("QC-QWEN35-002", "layer_types", value, f"{layers} (num_hidden_layers)")
    for number, kind in enumerate(types):
        if kind not in ("linear_attention", "full_attention"):
            expected = "linear_attention or full_attention"
            raise _config_error("QC-QWEN35-003", f"layer_types[{number}]", repr(kind), expected)
    return types


def _config_error(code: str, key: str, value: str, expected: str) -> InputError:
    return InputError(
        code,
        "does not describe a model of this architecture",
        file="config.json",
        field=key,
        found=value,
        expected=expected,
        fix="use the config.json that came with the weights",
    )
