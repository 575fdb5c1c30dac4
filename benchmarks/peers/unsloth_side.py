"""The training step of Unsloth that benchmarks measure, on a random checkpoint that it reads.

It reads checkpoints alone, so one is written to a temporary folder (a process of its own, for
Unsloth must be imported first) and removed with it. Parts of Unsloth are under the AGPL: it is
measured here, nothing of it is used.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from typing import Any

import torch

from .measure import Side
from .shapes import ALPHA, RANK, TARGETS, Job

_WORDS = ("<unk>", "<s>", "<pad>", "</s>")


def make(job: Job) -> Side:
    """A model with adapters, and a step of it."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_STUDIO_DISABLED": "1",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="qcore-bench-") as folder:
        code = "import sys; from peers import unsloth_side as u; u.write(*sys.argv[1:])"
        subprocess.run(
            [sys.executable, "-c", code, folder, json.dumps(job.to_json())], check=True
        )  # fmt: skip
        # It patches transformers, which must not have been imported before it.
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=job.seq, load_in_4bit=job.quantize, dtype=torch.bfloat16,
            local_files_only=True,
        )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, lora_dropout=0, bias="none", target_modules=list(TARGETS),
        use_gradient_checkpointing="unsloth" if job.checkpoint else False,
    )  # fmt: skip
    from .transformers_side import step_of

    return Side(step_of(model.train(), job, attention_mask=None))


def write(folder: str, fields: str) -> None:
    """A checkpoint of the job in `fields`, with a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from .transformers_side import causal_lm

    given = json.loads(fields)
    job = Job(**given | {"kernels": tuple(given["kernels"])})
    model: Any = causal_lm(replace(job, quantize=False))
    model.config.eos_token_id, model.config.pad_token_id = 3, 2
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    words = {word: number for number, word in enumerate((*_WORDS, "a", "b", "c"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>",
        bos_token="<s>",
    ).save_pretrained(folder)  # fmt: skip
