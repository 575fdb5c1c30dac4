"""Tiny checkpoints written by transformers' own writer, and our model loaded from them.

Both sides read the same folder: the stock class is the reference, so a name, a layout or a
dtype that we read otherwise shows as a difference of logits.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from support.real_shapes import add_shard, mtp_shapes, randomise
from torch import Tensor, nn
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
)

from qcore.adapter.targets import targets
from qcore.api.blocks import Packed
from qcore.checkpoint.tokenizer import load_tokenizer
from qcore.nn.load import load
from qcore.nn.model import Model
from qcore.nn.qlora.lora_layer import Lora
from qcore.plugins.resolve_model import identify
from qcore_qwen35.tiny import tiny_config, write

CPU = torch.device("cpu")
ROOT = "model.language_model."
STOCK = {"text": Qwen3_5ForCausalLM, "vl": Qwen3_5ForConditionalGeneration}
MOE_STOCK = {"text": Qwen3_5MoeForCausalLM, "vl": Qwen3_5MoeForConditionalGeneration}
PREFIX = {"text": "model.", "vl": ROOT}  # of the trunk's modules in either class
OTHER = {"text": "vl", "vl": "text"}  # the class that an adapter is not for
LENGTHS = (33, 7, 70)  # of `documents` by which logits are compared
SIDECARS = (
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
)  # fmt: skip
#: The ten linear maps that training hits by default, and the two that it hits when asked.
LINEARS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj",
    "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
GATES = ("in_proj_a", "in_proj_b")
#: Smaller than the plugin's tiny checkpoint; no two sizes alike.
SMALL: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "head_dim": 16, "num_attention_heads": 4,
    "num_key_value_heads": 2, "linear_key_head_dim": 12, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_value_head_dim": 20,
}  # fmt: skip
#: What a small mixture of experts has in place of ``intermediate_size``.
SMALL_MOE: dict[str, Any] = {
    "moe_intermediate_size": 24, "num_experts": 6, "shared_expert_intermediate_size": 40,
}  # fmt: skip


@functools.cache
def tiny_folder() -> Path:
    """The plugin's own tiny checkpoint; not to be changed, gone with the process."""
    holder = tempfile.TemporaryDirectory(prefix="qcore-tiny-")
    _KEPT.append(holder)
    write(Path(holder.name))
    return Path(holder.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def vocabulary() -> int:
    """Rows of the embedding of the tiny checkpoint: its tokenizer, rounded up."""
    size: int = load_tokenizer(identify(str(tiny_folder())).checkpoint).get_vocab_size()
    return 64 * math.ceil((size + 1) / 64)


def write_stock(
    folder: Path,
    kind: str = "vl",
    *,
    tied: bool = True,
    mtp: bool = False,
    moe: bool = False,
    shard: str = "1GB",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **text: Any,
) -> Path:
    """A checkpoint of the text or the vision-language class, as `save_pretrained` leaves it.

    Every value is random, so that no rule of the blocks is hidden by a norm at its initial
    value. `mtp` adds a shard with the tensors that transformers drops. A mixture of experts
    that was built from a config is saved one tensor per expert.
    """
    vocab = vocabulary()
    raw = tiny_config(
        vocab_size=vocab, moe=moe, **(SMALL | (SMALL_MOE if moe else {}) | text),
        tie_word_embeddings=tied, mtp_num_hidden_layers=int(mtp),
    )  # fmt: skip
    section = raw["text_config"]
    if kind == "text":
        text_config: Any = Qwen3_5MoeTextConfig if moe else Qwen3_5TextConfig
        model: Any = (MOE_STOCK if moe else STOCK)[kind](text_config(**section))
    else:
        tower = {
            "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
            "out_hidden_size": section["hidden_size"], "patch_size": 4,
            "num_position_embeddings": 16,
        }  # fmt: skip
        config = (Qwen3_5MoeConfig if moe else Qwen3_5Config)(
            text_config=section, vision_config=tower, tie_word_embeddings=tied,
            image_token_id=vocab - 4, video_token_id=vocab - 3,
            vision_start_token_id=vocab - 2, vision_end_token_id=vocab - 1,
        )  # fmt: skip
        model = (MOE_STOCK if moe else STOCK)[kind](config)
    randomise(model, seed)
    model.tie_weights()
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    if mtp:
        generator = torch.Generator().manual_seed(seed + 1)
        add_shard(
            folder,
            {
                name: (torch.randn(shape, generator=generator) * 0.02).to(dtype)
                for name, shape in mtp_shapes(section).items()
            },
        )
    for name in SIDECARS:
        shutil.copyfile(tiny_folder() / name, folder / name)
    return folder


def ours(
    folder: Path,
    *,
    lora: Lora | None = None,
    groups: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    quantize: bool = False,
    seed: int = 42,
    **numbers: Any,
) -> Model:
    """Our model from the folder; with `lora`, A as training starts it and B zero.

    `numbers` are those of groups: ``group_r``, ``group_lora_alpha``.
    """
    found = identify(str(folder))
    architecture = found.decision.architecture
    chosen = targets(found.layout, groups, lora, **numbers) if lora else {}
    model = Model(architecture, found.checkpoint.config, found.layout, dtype, chosen)
    load(model, found.layout, found.checkpoint, device=CPU, quantize=quantize)
    for name, module in model.adapters():
        module.reset_lora(name, seed, CPU)
    return model


def stock(folder: Path, kind: str, dtype: torch.dtype = torch.float32, *, moe: bool = False) -> Any:
    """The stock class loaded from the folder, whatever class saved it."""
    built = (MOE_STOCK if moe else STOCK)[kind]
    return built.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def documents(lengths: Sequence[int], seed: int = 3) -> list[Tensor]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    high = vocabulary() - 4  # the last four stand for images
    return [torch.randint(high, (length,), generator=generator) for length in lengths]


def wanted(docs: Sequence[Tensor], seed: int = 5) -> list[Tensor]:
    """Targets: the next token where supervised, about half of the positions, else -100."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for ids in docs:
        target = torch.cat([ids[1:], ids.new_full((1,), -100)])
        hidden = torch.rand(len(ids), generator=generator) < 0.5
        found.append(target.masked_fill(hidden, -100))
    return found


def our_logits(model: Model, docs: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval().logits(Packed.of(list(docs)))


def stock_logits(model: nn.Module, docs: Sequence[Tensor]) -> Tensor:
    """Each document alone, laid end to end."""
    with torch.no_grad():
        return torch.cat([model(input_ids=d[None], use_cache=False).logits[0] for d in docs])


def wrapped(model: Any, **lora: Any) -> Any:
    """Stock PEFT on a stock model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(**lora))


def pairs(model: Any, kind: str) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """(canonical name of the weight, A, B) of stock PEFT's layers on a class."""
    for path, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            name = path.removeprefix("base_model.model.").replace(PREFIX[kind], ROOT, 1)
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            yield f"{name}.weight", a, b


def random_b(model: Model, seed: int = 11, size: float = 0.1) -> None:
    """Give every B values, as if trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, module in model.adapters():
            assert module.lora_B is not None
            module.lora_B.copy_(size * torch.randn(module.lora_B.shape, generator=generator))


def loaded_adapter(model: Any, folder: Path) -> Any:
    """Stock PEFT reading an adapter folder; its warnings are the caller's to look at."""
    return peft.PeftModel.from_pretrained(model, str(folder)).eval()


def resave(folder: Path, tensors: dict[str, Tensor], name: str = "model.safetensors") -> None:
    """Replace a weights file."""
    save_file(tensors, folder / name, metadata={"format": "pt"})


def figure(line: str) -> None:
    """A measured number; shown by ``pytest --log-cli-level=INFO``."""
    logging.getLogger("figures").info(line)


_SIGNALLED = """
import os, signal, sys
from qcore.training import step as loop
from qcore.cli.main import main
real, at, number = loop.Loop.step, int(sys.argv[1]), int(sys.argv[2])
def step(self, n):
    if n + 1 == at:
        os.kill(os.getpid(), number)
    return real(self, n)
loop.Loop.step = step
sys.argv = ["qcore", *sys.argv[3:]]
main()
"""


def signalled(at: int, number: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """``qcore ARGUMENTS`` in a process that gets a signal as its step `at` (from 1) begins."""
    return subprocess.run(
        [sys.executable, "-c", _SIGNALLED, str(at), str(number), *map(str, arguments)],
        capture_output=True, text=True, env=one_thread(), timeout=300, check=False,
    )  # fmt: skip


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """``qcore ARGUMENTS`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "qcore", *map(str, arguments)],
        capture_output=True, text=True, env=one_thread(), timeout=300, check=False,
    )  # fmt: skip


def one_thread() -> Mapping[str, str]:
    """An environment in which sums are added in one order."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
