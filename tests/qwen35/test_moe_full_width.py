"""Layers of 35B-A3B's shape: parity in float32, and a QLoRA step from disk with its memory.

Both run in processes of their own, so that no worker of the tests holds gigabytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import e2e_kit
from support.conversations import conversations, write_rows
from support.e2e_kit import figure, one_thread

pytestmark = pytest.mark.slow
#: Of Qwen3.5-35B-A3B's config.json; the vocabulary is shorter.
WIDTH: dict[str, Any] = {
    "hidden_size": 2048, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    "num_experts": 256, "num_experts_per_tok": 8, "num_attention_heads": 16,
    "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10], "mrope_interleaved": True,
    },
}  # fmt: skip
KINDS = ["linear_attention", "full_attention"]
EXPERTS_OF_A_LAYER = 256 * 3 * 512 * 2048  # parameters


_PARITY = """
import json, sys
import torch
from support.blocks_kit import documents, relative
from support.moe_kit import moe_config, twins
from qcore.api.blocks import Packed
width = json.loads(sys.argv[2])
pair = twins(moe_config(layers=[sys.argv[1]], vocab_size=512, **width))
for parameter in (*pair.theirs.parameters(), *pair.ours.parameters()):
    parameter.requires_grad_(False)  # the experts' gradients would be 3.2 GB
docs = documents(70, 9, vocab=512)
batch = Packed.of(docs)
embedded = pair.ours.embed(batch)
mine, other = embedded.clone().requires_grad_(), embedded.clone().requires_grad_()
weights = torch.randn(79, 512, generator=torch.Generator().manual_seed(3))
logits = pair.logits(batch, mine)
(logits * weights).sum().backward()
wanted = torch.cat(
    [pair.theirs(inputs_embeds=x[None], use_cache=False).logits[0] for x in other.split([70, 9])]
)
(wanted * weights).sum().backward()
print(json.dumps({
    "off": float((logits - wanted).detach().abs().max()),
    "gradient": relative(mine.grad, other.grad),
    "size": float(wanted.detach().abs().max()),
    "aux": float(pair.ours.aux_loss(batch)),
}))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_parity_in_float32(kind: str) -> None:
    """One copy of a layer, 3.3 GB, that both sides read; logits and the trunk input's gradient."""
    seen = json.loads(run(_PARITY, kind, json.dumps(WIDTH)))
    figure(
        f"full width, {kind}: logits off by {seen['off']:.1e} of {seen['size']:.2f}, "
        f"input's gradient {seen['gradient']:.1e}"
    )
    assert 0.2 < seen["size"] < 2
    assert seen["off"] <= 1e-5
    assert seen["gradient"] <= 1e-4
    assert 8 <= seen["aux"] < 10  # 8 where 79 tokens load all experts alike


_WRITE = """
import json, sys
from pathlib import Path
import torch
from qcore_qwen35.tiny import write
torch.set_num_threads(2)
write(Path(sys.argv[1]), moe=True, num_hidden_layers=2, mtp_num_hidden_layers=0,
      **json.loads(sys.argv[2]))
"""
#: Not ru_maxrss: that one survives exec, so a child would report the peak of pytest.
_TRAIN = """
import json, re, sys, time
def status(field):
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(field + r":\\s+(\\d+) kB", file.read())[1])
import torch, bitsandbytes.functional
import qcore.training.train, qcore.training.step, qcore.plugins, qcore_qwen35.model
from qcore.config.settings import Settings
torch.set_num_threads(2)
seen = {"imported": status("VmHWM")}
real = qcore.training.train.load_base
def load(*args, **options):
    began = time.perf_counter()
    result = real(*args, **options)
    seen["loaded"], seen["after"] = status("VmHWM"), status("VmRSS")
    seen["load_seconds"] = time.perf_counter() - began
    return result
qcore.training.train.load_base = load
notes = []
from qcore.reporting import Note, Reporter
class Heard:
    def handle(self, event):
        if isinstance(event, Note):
            notes.append(event.text)
began = time.perf_counter()
report = qcore.training.train.train(sys.argv[1], sys.argv[2], sys.argv[3], Settings(
    max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=1, r=4,
    max_length=512, save_steps=0, warmup_ratio=0.0), device="cpu", reporter=Reporter(Heard()))
seen["peak"], seen["seconds"] = status("VmHWM"), time.perf_counter() - began
lines = report.coverage
seen["held"] = sum(line.bits * line.parameters / 8 for line in lines)
seen["trained"] = sum(line.trained for line in lines)
seen["experts"] = [[l.parameters, l.four_bit, l.bits] for l in lines if l.group == "experts"][0]
seen["loss"], seen["note"] = report.first_loss, [n for n in notes if "4 bit" in n][0]
print(json.dumps(seen))
"""


def run(script: str, *arguments: object) -> str:
    """What a script prints that may import `support`."""
    tests = str(Path(e2e_kit.__file__).parents[1])
    ended = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True, text=True, env=one_thread() | {"PYTHONPATH": tests}, timeout=900,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def test_a_qlora_step_from_disk(tmp_path: Path) -> None:
    """Beside the held model there is never as much as one layer's experts in bfloat16."""
    base = tmp_path / "base"
    run(_WRITE, base, json.dumps(WIDTH))
    size = (base / "model.safetensors").stat().st_size
    assert size > 2 * 2 * EXPERTS_OF_A_LAYER
    rows = write_rows(tmp_path / "rows.jsonl", conversations(4))
    seen = json.loads(run(_TRAIN, base, rows, tmp_path / "adapter"))
    layer = 2 * EXPERTS_OF_A_LAYER
    load = seen["loaded"] - seen["imported"] - seen["held"] - 4 * seen["trained"]
    step = seen["peak"] - seen["imported"] - seen["held"] - 4 * seen["trained"]
    figure(
        f"{size / 1e9:.2f} GB on disk, held {seen['held'] / 1e9:.2f} GB, adapter "
        f"{seen['trained'] / 1e6:.1f} M; imports {seen['imported'] / 1e9:.2f} GB; over all that "
        f"loading {load / 1e9:.2f} GB, the run {step / 1e9:.2f} GB (a layer's experts in bf16 "
        f"{layer / 1e9:.2f}); load {seen['load_seconds']:.0f} s, run {seen['seconds']:.0f} s"
    )
    figure(f"{seen['note']}; experts {seen['experts']}; loss {seen['loss']:.3f}")
    parameters, four_bit, bits = seen["experts"]
    assert parameters == four_bit == 2 * EXPERTS_OF_A_LAYER
    assert bits < 4.2
    assert seen["loaded"] > seen["imported"]
    assert load < layer
    assert step < layer + 5 * 4 * seen["trained"]  # gradients, moments and what they are made of
