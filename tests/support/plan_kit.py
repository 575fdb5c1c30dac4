"""Models of published sizes without a file: what the planner reads of an identified one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qcore.api.parameters import Table
from qcore.checkpoint.checkpoint import Header
from qcore.checkpoint.layout import Layout, Located, Place
from qcore.plugins.manager import Plugins
from qcore.plugins.resolve_model import Identified
from qcore_qwen35.plugin import DENSE, MOE
from qcore_qwen35.table import parts
from qcore_qwen35.tiny import tiny_config

_ROPE = {
    "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
    "mrope_section": [11, 11, 10], "mrope_interleaved": True,
}  # fmt: skip
_COMMON: dict[str, Any] = {
    "vocab_size": 248320, "head_dim": 256, "linear_num_key_heads": 16,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_value_heads": 32,
    "max_position_embeddings": 262144, "rope_parameters": _ROPE,
}  # fmt: skip
DENSE_4B: dict[str, Any] = _COMMON | {
    "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32,
    "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip
MOE_35B: dict[str, Any] = _COMMON | {
    "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16,
    "num_key_value_heads": 2, "tie_word_embeddings": False, "moe_intermediate_size": 512,
    "num_experts": 256, "num_experts_per_tok": 8, "shared_expert_intermediate_size": 512,
}  # fmt: skip


@contextmanager
def shared_measures() -> Iterator[None]:
    """Planners of one model, on one device, with the same adapters share what they measured."""
    from qcore.planning.measure import Measure

    made: dict[Any, tuple[Measure, object]] = {}

    def measure(make: Any, device: str) -> Measure:
        found, settings, lora, taken, _ = make.args
        storage = (settings.dtype, settings.quantization)
        key = (id(found), storage, repr(sorted(lora.items())), repr(taken.backends), device)
        if key not in made:
            made[key] = Measure(make, device), found  # held, so that no other model gets its id
        return made[key][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qcore.planning.step.Measure", measure)
        yield


def found_of(sizes: dict[str, Any], *, moe: bool = False) -> Identified:
    """As identification would give it, every tensor in bf16 in one file."""
    text = dict(sizes)
    config = tiny_config(vocab_size=text.pop("vocab_size"), moe=moe, **text)
    config["text_config"]["mtp_num_hidden_layers"] = 0
    table = Table([part for part in parts(config, moe=moe) if part.loaded])
    located = {}
    for tensor in table:
        if tensor.row.tie is None:
            header = Header(tensor.name, "BF16", tensor.shape, "none", 0, 0)
            region = tuple(slice(0, n) for n in tensor.shape)
            located[tensor.name] = Located(tensor, (Place(header, region),))
    found = SimpleNamespace(
        layout=Layout(table=table, located=located, by_disk={}, namespaces={}),
        checkpoint=SimpleNamespace(config=config),
        decision=SimpleNamespace(architecture=MOE if moe else DENSE),
        plugins=Plugins.discover().for_model_type("qwen3_5"),
        modality=None,
    )
    return cast(Identified, found)
