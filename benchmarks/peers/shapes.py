"""Model sizes, token ids and LoRA targets, the same for every implementation measured.

Sizes are those of the published config.json of each model; values of weights are each side's own
random ones, which changes no time but that of an uneven router.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

VOCABULARY = 248320
#: Names that PEFT is given; of a mixture of experts they match the shared expert's maps too.
TARGETS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    "in_proj_qkv", "in_proj_z", "out_proj",
)  # fmt: skip
RANK, ALPHA = 16, 32


def _dense(h: int, ffn: int, layers: int, heads: int, kv: int, values: int, tied: bool) -> Any:
    return {
        "hidden_size": h, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": 256,
        "linear_num_key_heads": 16, "linear_num_value_heads": values,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "tie_word_embeddings": tied,
    }  # fmt: skip


def _moe(h: int, inner: int, layers: int, heads: int, values: int, experts: int, top: int) -> Any:
    dense = _dense(h, 0, layers, heads, 2, values, False)
    del dense["intermediate_size"]
    return dense | {
        "moe_intermediate_size": inner, "num_experts": experts, "num_experts_per_tok": top,
        "shared_expert_intermediate_size": inner,
    }  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "0.8b": _dense(1024, 3584, 24, 8, 2, 16, True),
    "2b": _dense(2048, 6144, 24, 8, 2, 16, True),
    "4b": _dense(2560, 9216, 32, 16, 4, 32, True),
    "9b": _dense(4096, 12288, 32, 16, 4, 32, False),
    "27b": _dense(5120, 17408, 64, 24, 4, 48, False),
    "35b-a3b": _moe(2048, 512, 40, 16, 32, 256, 8),
    "122b-a10b": _moe(3072, 1024, 48, 32, 64, 256, 8),
    "397b-a17b": _moe(4096, 1024, 60, 32, 64, 512, 10),
    # For a run on the CPU that shows that the harness works; its figures say nothing.
    "tiny": {
        **_dense(128, 256, 4, 4, 2, 8, True), "head_dim": 32, "linear_num_key_heads": 4,
        "linear_key_head_dim": 32, "linear_value_head_dim": 32, "vocab_size": 1024,
    },
    "tiny-moe": {
        **_moe(128, 32, 4, 4, 8, 8, 2), "shared_expert_intermediate_size": 48,
        "head_dim": 32, "linear_num_key_heads": 4, "linear_key_head_dim": 32,
        "linear_value_head_dim": 32, "vocab_size": 1024,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one side does in one process.

    Attributes:
        shape: one of `SHAPES`.
        layers: of the slice; 0: all.
        batch: rows of a step.
        seq: tokens of a row.
        steps: timed steps.
        device: ``cuda``, or ``cpu`` to see that the harness runs.
        policy: of qcore, one of `qcore.nn.recompute.POLICIES`.
        kernels: of qcore, ``op=backend``.
        expert_rank: of qcore, LoRA rank of each expert; 0: frozen, as the peers have it.
        checkpoint: of the peers, whether layers run again in backward.
        quantize: NF4; else bf16 weights.
        profile: whether kernels are listed.
    """

    shape: str = "4b"
    layers: int = 0
    batch: int = 2
    seq: int = 4096
    steps: int = 6
    device: str = "cuda"
    policy: str = "elementwise"
    kernels: tuple[str, ...] = ()
    expert_rank: int = 0
    checkpoint: bool = True
    quantize: bool = True
    profile: bool = False

    @property
    def text(self) -> dict[str, Any]:
        """Keys of ``text_config``."""
        sizes = {"vocab_size": VOCABULARY} | SHAPES[self.shape]
        if self.layers:
            sizes["num_hidden_layers"] = self.layers
        wide = sizes["head_dim"] == 256
        rope = {
            "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10] if wide else [2, 1, 1], "mrope_interleaved": True,
        }  # fmt: skip
        return sizes | {"max_position_embeddings": 262144, "rope_parameters": rope}

    @property
    def moe(self) -> bool:
        """Whether it is a mixture of experts."""
        return "num_experts" in SHAPES[self.shape]

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.seq

    @property
    def active(self) -> int:
        """Weights that a token meets in matrix products, head included: N of ``4 N`` operations."""
        t: dict[str, int] = self.text
        h, d = t["hidden_size"], t["head_dim"]
        heads, kv = t["num_attention_heads"] * d, t["num_key_value_heads"] * d
        keys = t["linear_num_key_heads"] * t["linear_key_head_dim"]
        values = t["linear_num_value_heads"] * t["linear_value_head_dim"]
        full = h * (2 * heads + 2 * kv) + heads * h
        delta = h * (2 * keys + 2 * values + 2 * t["linear_num_value_heads"]) + values * h
        if self.moe:
            ffn = 3 * h * t["moe_intermediate_size"] * t["num_experts_per_tok"]
            ffn += h * (3 * t["shared_expert_intermediate_size"] + t["num_experts"] + 1)
        else:
            ffn = 3 * h * t["intermediate_size"]
        layers = t["num_hidden_layers"]
        quarter = layers // 4
        return quarter * full + (layers - quarter) * delta + layers * ffn + h * t["vocab_size"]

    def ids(self) -> Any:
        """``[steps + 3, batch, seq]`` int64 on the CPU: two warm-ups, the timed, one counted."""
        import torch

        generator = torch.Generator().manual_seed(1)
        most = self.text["vocab_size"] - 320
        return torch.randint(0, most, (self.steps + 3, self.batch, self.seq), generator=generator)

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)
