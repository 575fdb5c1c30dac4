"""An architecture that is no real one: its residual stream is four hidden sizes wide.

`embed` gives ``[T, 4 H]``, each layer reads and writes that, `final` gives ``[T, H]``. Tokenizer,
template and chat format are those of the first-party tiny checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qcore import hookimpl
from qcore.api.blocks import BuildContext, DecodeCache, Packed
from qcore.api.parameters import LINEAR, NF4, Aim, Namespace, Part, Row, Table
from qcore.api.records import Architecture, ChatFormat, Claim, Evidence, Generation
from qcore.ops import recompute
from qcore_qwen35.chat import QWEN35
from qcore_qwen35.tiny import write

STREAMS, HIDDEN, INNER, LAYERS = 4, 24, 40, 3


class Cache:
    """Nothing is carried from token to token."""

    def reset(self) -> None: ...

    def hold(self, at: Tensor, span: int) -> None: ...


class Layer(nn.Module):
    """``x_s += gate_s down(tanh(up(mean_s x)))`` for each of the streams s."""

    def __init__(self, context: BuildContext, number: int) -> None:
        super().__init__()
        self.number = number
        self.up = context.linear(f"layers.{number}.up")
        self.down = context.linear(f"layers.{number}.down")
        self.gate = context.tensor(f"layers.{number}.gate")

    def forward(self, x: Tensor, batch: Packed, cache: DecodeCache | None = None) -> Tensor:
        y = self.down(recompute(torch.tanh, self.up(x.view(-1, STREAMS, HIDDEN).mean(1))))
        return x + (y.unsqueeze(1) * self.gate.to(y.dtype).unsqueeze(1)).flatten(1)

    def new_cache(self, tokens: int, device: torch.device) -> DecodeCache:
        return Cache()


class Trunk(nn.Module):
    """Embedding, layers and norm."""

    def __init__(self, context: BuildContext) -> None:
        super().__init__()
        self.dtype = context.dtype
        self.embed_tokens = nn.Module()
        self.embed_tokens.weight = context.tensor("embed_tokens.weight")
        self.layers = nn.ModuleList(Layer(context, number) for number in range(LAYERS))
        self.norm = nn.Module()
        self.norm.weight = context.tensor("norm.weight")

    def embed(self, batch: Packed) -> Tensor:
        weight = self.embed_tokens.get_parameter("weight")
        return nn.functional.embedding(batch.ids, weight).to(self.dtype).repeat(1, STREAMS)

    def final(self, x: Tensor) -> Tensor:
        x = x.view(-1, STREAMS, HIDDEN).mean(1)
        return x * self.norm.get_parameter("weight").to(x.dtype)

    def aux_loss(self, batch: Packed) -> Tensor | None:
        return None


def _build(context: BuildContext) -> Any:
    return Trunk(context)


def part(vocab: int) -> Part:
    """The rows."""
    layer = "model.layers.{layer}"
    return Part(
        name="text", owner="qcore-wide",
        rows=(
            Row("model.embed_tokens.weight", "vocab hidden", "embed"),
            Row(f"{layer}.up.weight", "inner hidden", "mix", NF4, kind=LINEAR),
            Row(f"{layer}.down.weight", "hidden inner", "mix", NF4, kind=LINEAR),
            Row(f"{layer}.gate", "streams", "gate"),
            Row("model.norm.weight", "hidden", "norm"),
            Row("lm_head.weight", "vocab hidden", "head"),
        ),
        dims={"vocab": vocab, "hidden": HIDDEN, "inner": INNER, "streams": STREAMS},
        axes={"layer": tuple(range(LAYERS))},
        namespaces=(Namespace(name="text", classes=("WideForCausalLM",)),),
        groups={"mix": Aim.ON},
    )  # fmt: skip


@hookimpl
def qcore_describe() -> Iterator[Architecture | Generation]:
    yield Architecture(name="wide", model_types=("wide",), root="model", build=_build)
    yield Generation(name="wide-1", architectures=("wide",))


@hookimpl
def qcore_detect(checkpoint: Any) -> Iterator[Claim]:
    evidence = Evidence(field="model_type", value="wide", supports=True)
    yield Claim(generation="wide-1", evidence=(evidence,))


@hookimpl
def qcore_parameters(architecture: str, config: Mapping[str, Any]) -> Iterator[Part]:
    if architecture == "wide":
        yield part(config["vocab_size"])


@hookimpl
def qcore_chat_format(generation: str, checkpoint: Any) -> Iterator[ChatFormat]:
    if generation == "wide-1":
        yield QWEN35


def install(folder: Path) -> Path:
    """The plugin's distribution, as an installer leaves it."""
    info = folder / "qcore_wide-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: qcore-wide\nVersion: 1.0\n"
        "Requires-Dist: qcore-framework>=0.1,<0.2\n"
    )
    (info / "entry_points.txt").write_text(
        "[qcore.plugins]\nwide = support.wide_arch\n[qcore.model_types]\nwide = support.wide_arch\n"
    )
    return folder


def checkpoint(folder: Path) -> Path:
    """A tiny checkpoint, with random values."""
    write(folder)
    vocab = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    config = {
        "model_type": "wide", "architectures": ["WideForCausalLM"], "vocab_size": vocab,
        "hidden_size": HIDDEN, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(1)
    tensors = {
        entry.name: torch.randn(entry.shape, generator=generator) / entry.shape[-1] ** 0.5
        for entry in Table([part(vocab)])
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
