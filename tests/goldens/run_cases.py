"""The commands that must succeed, in chains whose cases build on one another.

This file decides what is run and in which order. Paths are relative to the scratch folder, which
holds the inputs as ``inputs``.
"""

from __future__ import annotations

from goldens.case import FAST, Case, Chain


def _verify(folder: str, name: str) -> Case:
    return Case(name=f"verify-{name}", command=f"verify {folder}")


DEMOS: tuple[Chain, ...] = (
    (Case(name="demo-dense", command="demo --output demo-dense", keeps=("demo-dense",)),),
    (
        Case(
            name="demo-moe",
            command="demo --architecture qwen3_5_moe --output demo-moe",
            keeps=("demo-moe",),
        ),
    ),
)

#: NF4 and bf16, as by default; the merge is verified and answers.
DENSE: Chain = (
    Case(
        name="train-dense",
        command="train --model inputs/dense --data inputs/rows.jsonl --output dense/adapter "
        "--device cpu --set max_steps=1 --set gradient_accumulation_steps=2 "
        "--set eval_fraction=0.2 --set learning_rate=0.01",
        keeps=("dense/adapter",),
    ),
    Case(
        name="merge-dense",
        command="merge --model inputs/dense --adapter dense/adapter --output dense/merged",
        keeps=("dense/merged",),
    ),
    _verify("dense/adapter", "adapter"),
    _verify("dense/merged", "merged"),
    Case(
        name="merge-sharded",
        command="merge --model inputs/sharded --adapter dense/adapter --output dense/sharded",
        keeps=("dense/sharded",),
    ),
    Case(
        name="generate-merged",
        command="generate dense/merged --prompt 'What do bees make?' --max-new-tokens 6 "
        "--dtype fp32",
    ),
    Case(
        name="generate-nf4",
        command="generate inputs/dense --adapter dense/adapter --prompt 'What do bees make?' "
        "--system 'Be brief.' --max-new-tokens 2 --quantization nf4",
    ),
    Case(
        name="generate-sampled",
        command="generate inputs/dense --prompt hi --max-new-tokens 6 --dtype fp32 "
        "--temperature 0.7 --seed 3 --chat-template-kwargs enable_thinking=true",
    ),
)

#: Settings from a file, the names of the text class, numbers of groups, evaluation.
TEXT_CLASS: Chain = (
    Case(
        name="train-text-class",
        command="train --model inputs/dense --data inputs/rows.jsonl --output text/adapter "
        "--device cpu --config inputs/run.yaml --adapter-class text",
        keeps=("text/adapter",),
    ),
    Case(
        name="merge-text-class",
        command="merge --model inputs/dense --adapter text/adapter --output text/merged --no-proof",
        keeps=("text/merged",),
    ),
    Case(
        name="merge-foreign",
        command="merge --model inputs/dense --adapter inputs/foreign --output text/foreign "
        "--trust-base",
        keeps=("text/foreign",),
    ),
    Case(
        name="train-preset",
        command="train --model inputs/dense --data inputs/rows.jsonl --output text/preset "
        f"--preset quick {FAST} --set save_steps=1",
        keeps=("text/preset",),
    ),
)

MOE: Chain = (
    Case(
        name="train-moe",
        command="train --model inputs/moe --data inputs/rows.jsonl --output moe/adapter "
        "--device cpu --set dtype=fp32 --set max_steps=2 --set gradient_accumulation_steps=2 "
        "--set learning_rate=0.01 --set target_groups=[attn,gdn,experts,router] --set r=4 "
        "--set router_aux_loss_coef=0.01",
        keeps=("moe/adapter",),
    ),
    Case(
        name="merge-moe",
        command="merge --model inputs/moe --adapter moe/adapter --output moe/merged",
        keeps=("moe/merged",),
    ),
    _verify("moe/merged", "moe"),
    Case(
        name="generate-moe",
        command="generate inputs/moe --adapter moe/adapter --prompt hi --max-new-tokens 4 "
        "--dtype fp32",
    ),
)

#: Images and a video, the tower trained; and text alone on the same checkpoint.
VISION: Chain = (
    Case(
        name="train-vision",
        command="train --model inputs/vision --data inputs/media/rows.jsonl "
        f"--output vision/adapter {FAST} --set target_groups=[attn,gdn,mlp,vision,merger]",
        keeps=("vision/adapter",),
    ),
    Case(
        name="merge-vision",
        command="merge --model inputs/vision --adapter vision/adapter --output vision/merged",
        keeps=("vision/merged",),
    ),
    _verify("vision/merged", "vision"),
    Case(
        name="generate-vision",
        command="generate inputs/vision --adapter vision/adapter --image inputs/media/1.png "
        "--video inputs/media/film.gif --prompt 'What is this?' --max-new-tokens 4 --dtype fp32",
    ),
    Case(
        name="train-frozen-tower",
        command="train --model inputs/vision --data inputs/media/rows.jsonl "
        f"--output vision/frozen {FAST}",
        keeps=("vision/frozen",),
    ),
    Case(
        name="train-text-rows",
        command="train --model inputs/vision --data inputs/rows.jsonl --output vision/text "
        f"{FAST} --set max_length=256",
        keeps=("vision/text",),
    ),
    Case(
        name="merge-vision-into-text",
        command="merge --model inputs/dense --adapter vision/adapter --output vision/bad",
        code="QC-ADAPTER-012",
    ),
)


def _report(name: str, command: str, *, cheap: bool = False) -> Chain:
    return (Case(name=name, command=command, cheap=cheap),)


_PRESETS = (
    "quick", "standard", "thorough", "long", "low-memory", "smoke", "qwen3.5-4b-24g",
    "qwen3.5-35b-a3b-48g", "qwen3.6-27b-80g",
)  # fmt: skip
_SKUS = ("Qwen/Qwen3.5-4B", "Qwen/Qwen3.5-35B-A3B", "Qwen/Qwen3.6-27B", "qwen3.6-plus")

REPORTS: tuple[Chain, ...] = (
    *(
        _report(f"inspect-{name}", f"inspect inputs/{name}", cheap=True)
        for name in ("dense", "moe", "sharded", "vision")
    ),
    _report("inspect-generation", "inspect inputs/dense --generation 3.5", cheap=True),
    _report("plan-every-gpu", "plan inputs/dense --max-length 4096"),
    _report(
        "plan-moe",
        "plan inputs/moe --gpu H100-80 --max-length 1024 --rows 2 --r 8 --groups attn,experts",
        cheap=True,
    ),
    _report(
        "plan-vision", "plan inputs/vision --gpu H100-80 --budget 20 --max-length 512 --media 128"
    ),
    _report("adapter-show", "adapter show inputs/foreign --norms", cheap=True),
    _report("adapter-show-model", "adapter show inputs/foreign --model inputs/dense", cheap=True),
    _report("adapter-diff", "adapter diff inputs/foreign inputs/foreign", cheap=True),
    (
        Case(
            name="adapter-extract",
            command="adapter extract --base inputs/dense --model inputs/bad/other-values --rank 2 "
            "--partial --output @out",
        ),
    ),
    _report("plugins-list", "plugins list", cheap=True),
    _report("presets-list", "presets list", cheap=True),
    *(_report(f"presets-show-{name}", f"presets show {name}", cheap=True) for name in _PRESETS),
    _report("skus-list", "skus list", cheap=True),
    *(
        _report(f"skus-show-{name.rpartition('/')[2]}", f"skus show {name}", cheap=True)
        for name in _SKUS
    ),
    _report("doctor", "doctor"),
    _report("doctor-kernels", "doctor --kernels"),
)
