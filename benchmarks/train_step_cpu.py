"""Times one QLoRA training step on the CPU: qcore and transformers + peft + bitsandbytes.

A four-layer slice of Qwen3.5-0.8B at full width (random weights, full vocabulary), one row of
1024 tokens, every second position supervised, NF4 with double quantization, LoRA r=16 on ten
kinds of linear map, AdamW. Both sides load the same checkpoint and train on the same tokens,
each in a process of its own, in turn (A B A B), so that the machine's drift hits both.

    python benchmarks/train_step_cpu.py [--rounds 3] [--tokens 1024]

Prints median seconds, tokens/s, peak resident memory and the ratio round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

LAYERS = ["linear_attention"] * 3 + ["full_attention"]
TARGETS = [
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    "in_proj_qkv", "in_proj_z", "out_proj",
]  # fmt: skip


def write_base(folder: Path) -> None:
    """The slice, written by transformers."""
    import torch
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(
        vocab_size=248320, hidden_size=1024, intermediate_size=3584, num_hidden_layers=4,
        layer_types=LAYERS, num_attention_heads=8, num_key_value_heads=2, head_dim=256,
        linear_num_key_heads=16, linear_num_value_heads=16, linear_key_head_dim=128,
        linear_value_head_dim=128, max_position_embeddings=262144, eos_token_id=248044,
        bos_token_id=None, pad_token_id=None, tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10], "mrope_interleaved": True,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    Qwen3_5ForCausalLM(config).save_pretrained(folder)


def batch(tokens: int) -> tuple[Any, Any]:
    """Token ids and labels (not shifted), half of them -100."""
    import torch

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 248000, (tokens,), generator=generator)
    labels = ids.clone()
    labels[::2] = -100
    return ids, labels


def qcore_step(folder: Path, tokens: int, recompute: bool) -> Callable[[], float]:
    """A step of qcore's own model, load and loss."""
    import torch

    from qcore.adapter.targets import targets
    from qcore.api.blocks import Packed
    from qcore.nn.load import load
    from qcore.nn.model import Model
    from qcore.nn.qlora.lora_layer import Lora
    from qcore.plugins.resolve_model import identify

    found = identify(str(folder))
    architecture = found.decision.architecture
    lora = targets(found.layout, (), Lora(r=16, lora_alpha=32))
    config = found.checkpoint.config
    model = Model(architecture, config, found.layout, torch.bfloat16, lora)
    cpu = torch.device("cpu")
    load(model, found.layout, found.checkpoint, device=cpu, quantize=True)
    for name, module in model.adapters():
        module.reset_lora(name, 0, cpu)
    optimizer = torch.optim.AdamW([p for _, p in model.trainable()], lr=1e-4)
    ids, labels = batch(tokens)
    shifted = torch.cat([labels[1:], labels.new_full((1,), -100)])

    packed = Packed.of([ids], [shifted])

    def step() -> float:
        policy = "full" if recompute else "none"
        loss, count = model.loss(packed, recompute=policy), len(packed.supervised())
        loss = loss / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in model.trainable()], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def peer_step(folder: Path, tokens: int, recompute: bool) -> Callable[[], float]:
    """The same with the stock stack, as its documentation has it."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    model.config.use_cache = False
    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=recompute,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    for parameter in model.parameters():  # most recipes undo the float32 copy of the embedding
        if parameter.dtype == torch.float32 and parameter.numel() > 1_000_000:
            parameter.data = parameter.data.to(torch.bfloat16)
    lora = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids, labels = batch(tokens)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids[None], labels=labels[None]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


SIDES = {"qcore": qcore_step, "peer": peer_step}


def measure(side: str, folder: Path, tokens: int, recompute: bool, steps: int) -> None:
    """Run one side and print a JSON line; the body of a child process."""
    step = SIDES[side](folder, tokens, recompute)
    losses, seconds = [step()], []
    for _ in range(steps):
        began = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": statistics.median(seconds), "peak": peak, "loss": losses[0]}))


def child(arguments: list[str]) -> dict[str, float]:
    """One side in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Parse, then either measure one side or run both in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a round")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--no-recompute", action="store_true", help="qcore without checkpointing")
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.side:
        recompute = not (given.no_recompute and given.side == "qcore")
        measure(given.side, given.folder, given.tokens, recompute, given.steps)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "base"
        write_base(folder)
        common = ["--folder", str(folder), "--tokens", str(given.tokens)]
        common += ["--steps", str(given.steps)]
        common += ["--no-recompute"] if given.no_recompute else []
        report(
            given, [{s: child(["--side", s, *common]) for s in SIDES} for _ in range(given.rounds)]
        )


def report(given: argparse.Namespace, rounds: list[dict[str, dict[str, float]]]) -> None:
    """The table: machine and versions, a line a side, the ratio round by round."""
    names = ("torch", "transformers", "peft", "bitsandbytes")
    print(platform.processor() or platform.machine(), f"{os.cpu_count()} cores", end="; ")
    print(", ".join(f"{name} {version(name)}" for name in names))
    print(f"{'side':<8}{'s/step':>8}{'tokens/s':>10}{'peak GB':>9}{'first loss':>12}")
    for side in SIDES:
        seconds = statistics.median(r[side]["seconds"] for r in rounds)
        peak = max(r[side]["peak"] for r in rounds) / 1e9
        loss = rounds[0][side]["loss"]
        print(f"{side:<8}{seconds:>8.2f}{given.tokens / seconds:>10.1f}{peak:>9.2f}{loss:>12.4f}")
    ratios = [r["peer"]["seconds"] / r["qcore"]["seconds"] for r in rounds]
    print(f"qcore is {statistics.median(ratios):.2f}x the peer (", end="")
    print(", ".join(f"{ratio:.2f}" for ratio in ratios) + ")")


if __name__ == "__main__":
    main()
