"""The training step of transformers + peft + bitsandbytes that benchmarks measure.

The step is written as their documentation has it, on random weights made on the GPU. ``hf``
computes the delta rule in torch: fla and causal-conv1d are hidden from transformers.
``hf-fla`` uses flash-linear-attention; on Hopper with Triton before 3.7.1 that needs TileLang.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import nn

from .measure import Side, Step
from .shapes import ALPHA, RANK, TARGETS, Job

#: What is not put in 4 bit, as `qcore` has it; the rest of the linear maps is.
KEPT = ("lm_head", "in_proj_a", "in_proj_b", "gate", "shared_expert_gate")


def hide_fla() -> None:
    """Make transformers compute the delta rule and the convolution in torch."""
    for name in ("fla", "causal_conv1d"):
        sys.modules[name] = None  # type: ignore[assignment]


def make(job: Job, *, fla: bool) -> Side:
    """A model with adapters, and a step of it."""
    if not fla:
        hide_fla()
    model = adapted(job)
    rule = (
        "fla where transformers finds it usable" if fla else "torch; fla and causal-conv1d hidden"
    )
    return Side(step_of(model, job), (f"delta rule: {rule}",))


def causal_lm(job: Job) -> nn.Module:
    """The text class with random bfloat16 weights, its maps put in NF4 one by one."""
    import transformers

    kind = "Qwen3_5Moe" if job.moe else "Qwen3_5"
    config = getattr(transformers, f"{kind}TextConfig")(
        **job.text, eos_token_id=None, bos_token_id=None, pad_token_id=None, use_cache=False
    )
    config._attn_implementation = "sdpa"
    device = torch.device(job.device)
    was = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    torch.set_default_dtype(was)
    generator = torch.Generator(device).manual_seed(0)
    for name, module in list(model.named_modules()):
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            value = _random(leaf, parameter.shape, device, generator, "linear_attn.norm" in name)
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        if "rotary" in type(module).__name__.lower():  # its buffers are computed, not loaded
            path, _, leaf = name.rpartition(".")
            fresh = type(module)(config).to(device)
            setattr(model.get_submodule(path), leaf, fresh)
        if job.quantize and isinstance(module, nn.Linear) and name.split(".")[-1] not in KEPT:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, _four_bit(module, device))
    model.tie_weights()
    if job.quantize:
        model.is_loaded_in_4bit = model.is_quantized = True
    return model  # type: ignore[no-any-return]


def _random(
    leaf: str, shape: Any, device: torch.device, generator: torch.Generator, ones: bool
) -> torch.Tensor:
    value = torch.empty(shape, device=device, dtype=torch.bfloat16)
    if leaf == "A_log":
        return value.uniform_(0.1, 16, generator=generator).log_()
    if leaf == "dt_bias" or ones:
        return value.fill_(1)
    return value.zero_() if len(shape) == 1 else value.normal_(0, 0.02, generator=generator)


def _four_bit(linear: nn.Linear, device: torch.device) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    held = Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16,
        compress_statistics=True, quant_type="nf4", device="meta",
    )  # fmt: skip
    held.weight = Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
    ).to(device)
    return held  # type: ignore[no-any-return]


def adapted(job: Job, model: nn.Module | None = None) -> nn.Module:
    """`model` prepared for training and with LoRA on `TARGETS`."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = causal_lm(job) if model is None else model
    experts = {n: p.data for n, p in model.named_parameters() if ".experts." in n}
    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=job.checkpoint,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    for name, parameter in model.named_parameters():
        if name in experts:
            parameter.data = experts[name]
        elif parameter.dtype == torch.float32 and parameter.numel() > 1_000_000:
            # Most recipes undo peft's float32 copy of the embedding.
            parameter.data = parameter.data.to(torch.bfloat16)
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, lora).train()  # type: ignore[no-any-return]


def step_of(model: nn.Module, job: Job, ids: torch.Tensor | None = None, **arguments: Any) -> Step:
    """One optimizer step on the n-th ids; mean loss, clipped at 1, fused AdamW.

    Args:
        model: with adapters.
        job: names the device.
        ids: ``[steps, batch, seq]``; ``None``: those of the job.
        arguments: of the model.
    """
    device = torch.device(job.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=device.type == "cuda")
    ids = job.ids() if ids is None else ids

    def step(number: int) -> float:
        rows = ids[number].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=rows, labels=rows, **arguments).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


hf = functools.partial(make, fla=False)
hf_fla = functools.partial(make, fla=True)
