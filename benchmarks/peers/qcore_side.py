"""The training step of qcore that benchmarks measure, on random weights made on the GPU.

Nothing here computes: `Model` is built as `train` builds it, filled through the loader's own
`place`, and `Loop.step` runs, with rows laid so that step n trains on the n-th ids.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qcore.adapter.targets import targets
from qcore.api.parameters import Kind, Table
from qcore.api.records import Architecture
from qcore.checkpoint.checkpoint import Header
from qcore.checkpoint.layout import Layout, Located, Place
from qcore.config.settings import Settings
from qcore.data.dataset import Dataset
from qcore.data.rendering.chat_record import ChatRecord
from qcore.data.rendering.masking import Example
from qcore.data.sampler import Schedule
from qcore.data.store.write import store_of
from qcore.nn.kernels.registry import Chosen, choose, installed
from qcore.nn.load import place, slabs
from qcore.nn.model import Model, ops_of
from qcore.nn.qlora.lora_layer import Lora
from qcore.plugins.manager import Plugins
from qcore.training.step import Loop
from qcore_qwen35.plugin import DENSE, MOE
from qcore_qwen35.table import parts
from qcore_qwen35.tiny import tiny_config

from .measure import Side
from .shapes import ALPHA, RANK, Job


def make(job: Job) -> Side:
    """A loaded model and a step of its loop."""
    device = torch.device(job.device)
    chosen = backends(job, device)
    model = adapted(job, device, chosen)
    settings = Settings(
        max_steps=job.steps + 3, per_device_train_batch_size=job.batch,
        gradient_accumulation_steps=1, max_length=max(2, job.seq), learning_rate=1e-4,
        warmup_ratio=0.0, r=RANK, lora_alpha=ALPHA,
    )  # fmt: skip
    loop = Loop(model, rows(job.ids(), settings), settings, device, recompute=job.policy)

    def step(number: int) -> float:
        return float(loop.step(number)["loss"])

    return Side(step, tuple(chosen.lines()))


def adapted(job: Job, device: torch.device, chosen: Chosen) -> Model:
    """The model with random weights and fresh adapters."""
    config, layout = describe(job)
    groups: tuple[str, ...] = ("attn", "gdn", "shared_expert") if job.moe else ()
    if job.moe and job.expert_rank:
        groups += ("experts",)
    ranks = {"experts": job.expert_rank} if job.expert_rank else {}
    lora = targets(layout, groups, Lora(r=RANK, lora_alpha=ALPHA), group_r=ranks)
    model = Model(architecture(job), config, layout, torch.bfloat16, lora, chosen)
    fill(layout, model, device, quantize=job.quantize)
    for name, module in model.adapters():
        module.reset_lora(name, 0, device)
    return model


def architecture(job: Job) -> Architecture:
    """Of the job's shape."""
    return MOE if job.moe else DENSE


def backends(job: Job, device: torch.device) -> Chosen:
    """What a run without wishes takes, and what ``--kernels`` asks for."""
    plugins = Plugins.discover().for_model_type("qwen3_5")
    if not plugins.infos:  # on the path, but without the metadata that names its hooks
        raise RuntimeError("qcore-qwen35 is not installed: its kernels would not be found")
    wanted = dict(one.split("=", 1) for one in job.kernels)
    used = ops_of(architecture(job), *describe(job))
    return choose(installed(plugins), device, wanted, used)


def describe(job: Job) -> tuple[dict[str, Any], Layout]:
    """config.json and the layout of a checkpoint of it, as if it lay in one file."""
    text = dict(job.text)
    config = tiny_config(vocab_size=text.pop("vocab_size"), moe=job.moe, **text)
    config["text_config"]["mtp_num_hidden_layers"] = 0
    table = Table([part for part in parts(config, moe=job.moe) if part.loaded])

    def located() -> Iterator[tuple[str, Located]]:
        for tensor in table:
            if tensor.row.tie is None:
                header = Header(tensor.name, "BF16", tensor.shape, "none", 0, 0)
                region = tuple(slice(0, n) for n in tensor.shape)
                yield tensor.name, Located(tensor, (Place(header, region),))

    return config, Layout(table=table, located=dict(located()), by_disk={}, namespaces={})


def fill(layout: Layout, model: Model, device: torch.device, *, quantize: bool) -> None:
    """Random values a slab at a time, through the loader's own door."""
    modules = dict(model.named_modules())
    generator = torch.Generator(device).manual_seed(0)
    for item in layout.located.values():
        name, shape = item.tensor.name, item.tensor.shape
        for part in slabs(item):
            size = (part.stop - part.start, *shape[1:])
            value = torch.empty(size, device=device, dtype=torch.bfloat16)
            if name.endswith("A_log"):
                value.uniform_(0.1, 16, generator=generator).log_()
            elif name.endswith(("dt_bias", "linear_attn.norm.weight")):
                value.fill_(1)
            elif len(shape) == 1:
                value.zero_()  # norms hold what is added to 1
            else:
                value.normal_(0, 0.02, generator=generator)
            place(model, modules, item, part, value, quantize=quantize)
            assert item.tensor.row.kind is Kind.EXPERTS or size == tuple(shape)


def rows(ids: torch.Tensor, settings: Settings) -> Dataset:
    """``[steps, batch, seq]`` as a data set of which step n draws ``ids[n]``, all supervised."""
    steps, batch, seq = ids.shape
    train: list[Example | None] = [None] * (steps * batch)
    schedule = Schedule(len(train), settings)
    for step in range(steps):
        numbers = [number for part in schedule.micro_batches(step) for number in part]
        for row, number in zip(ids[step], numbers, strict=True):
            values = array("i", row.tolist())
            train[number] = Example(
                ids=values, labels=values, line=number, turns=1, supervised=seq - 1, row=number + 1
            )
    examples = tuple(one for one in train if one is not None)
    assert len(examples) == steps * batch
    total = steps * batch * seq
    return Dataset(
        samples_sha256="",
        train=store_of(examples).samples(), eval=store_of(()).samples(),
        path=Path("random"), sha256="", rows=steps * batch,
        tokens=total, supervised=total - steps * batch, turns=steps * batch, longest=seq,
        samples=steps * batch, chat=ChatRecord(template_sha256=""), sources=(),
    )  # fmt: skip
