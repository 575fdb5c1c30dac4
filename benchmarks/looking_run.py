"""Runs the proof that image input has an effect: one model sees pictures, its twin blanks.

This file decides the two forms, small for the CPU and large for a GPU, and the run: a random
checkpoint, `qcore.training.train` on rows with pictures and again on their blank twins, and what
each adapter then answers on pictures that neither saw. Bases are random, so LoRA of high rank in
tower, merger and text does all the learning; embeddings of patches and of tokens stay as they are
drawn.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from looking import Asked, Task, accuracy, blanked, write

#: What is alike in both forms.
_ALIKE: dict[str, Any] = {
    "gradient_accumulation_steps": 1, "warmup_ratio": 0.05, "max_grad_norm": 0.5, "save_steps": 0,
    "gradient_checkpointing": False, "target_groups": ("attn", "gdn", "mlp", "vision", "merger"),
}  # fmt: skip

SEED = 31  #: of pictures that no setting was chosen by


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A size of the experiment.

    Attributes:
        task: what there is to see.
        text: overrides keys of ``text_config`` of the tiny checkpoint.
        vision: overrides keys of its ``vision_config``.
        settings: of the run.
        each: pictures of a combination to train on.
        held_out: the same, to ask of.
    """

    task: Task
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    settings: Mapping[str, Any]
    each: int
    held_out: int


SMALL = Form(
    task=Task(
        colours=("red", "green", "blue"), shapes=("circle", "square", "triangle"), sides=(48, 64),
        sizes=(0.8, 0.95),
    ),
    text={
        "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 1, "linear_num_value_heads": 2,
    },
    vision={
        "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "patch_size": 8, "depth": 2,
    },
    settings=_ALIKE | {
        "max_steps": 400, "per_device_train_batch_size": 24, "learning_rate": 2e-3,
        "r": 32, "lora_alpha": 32, "dtype": "fp32", "quantization": "none",
    },
    each=80,
    held_out=6,
)  # fmt: skip
LARGE = Form(
    task=Task(
        colours=("red", "green", "blue", "yellow", "purple", "orange", "white", "cyan"),
        shapes=("circle", "square", "triangle", "cross", "ring", "star"),
        counts=(1, 2, 3, 4), sides=(96, 128), sizes=(0.6, 0.95),
    ),
    text={"hidden_size": 512, "intermediate_size": 1024},
    vision={
        "hidden_size": 256, "intermediate_size": 512, "num_heads": 4, "patch_size": 8, "depth": 4,
    },
    settings=_ALIKE | {
        "max_steps": 2000, "per_device_train_batch_size": 64, "learning_rate": 7e-4,
        "r": 64, "lora_alpha": 64, "dtype": "bf16", "quantization": "nf4",
    },
    each=48,
    held_out=1,
)  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Seen:
    """What came out, by question.

    Attributes:
        asked: questions of each kind.
        looking: share of right answers, trained on pictures, shown pictures.
        shown_blanks: trained on pictures, shown blanks.
        blank: trained on blanks, shown blanks.
        seconds: of each station.
    """

    asked: dict[str, int]
    looking: dict[str, float] = field(default_factory=dict)
    shown_blanks: dict[str, float] = field(default_factory=dict)
    blank: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def checkpoint(folder: Path, form: Form) -> None:
    """Write the random base."""
    from qcore_multimodal.tiny import add_tower
    from qcore_qwen35.tiny import write as write_text

    write_text(folder, **form.text)
    add_tower(folder, **form.vision)


def run(folder: Path, form: Form, *, device: str, seed: int = SEED, reporter: Any = None) -> Seen:
    """Train on pictures and on blanks, and ask about pictures that neither run saw.

    Args:
        folder: where everything is written; absent or empty.
        form: the size.
        device: ``cpu`` or ``cuda``.
        seed: of the pictures; those asked about have the next.
        reporter: who is told of the training.
    """
    from qcore.config.settings import Settings
    from qcore.training.train import train

    base = folder / "base"
    checkpoint(base, form)
    write(folder / "train", form.task, form.each, seed=seed)
    held = write(folder / "held", form.task, form.held_out, seed=seed + 1)
    out = Seen(asked={name: sum(one.about == name for one in held) for name in form.task.choices})
    for side in ("seen", "blank"):
        began = time.perf_counter()
        rows = folder / "train" / side / "rows.jsonl"
        settings = Settings(**form.settings)
        train(str(base), rows, folder / side, settings, device=device, reporter=reporter)
        out.seconds[f"train {side}"] = time.perf_counter() - began
    out.looking = _ask(folder, "seen", held, form, device, out)
    out.shown_blanks = _ask(folder, "seen", blanked(held), form, device, out)
    out.blank = _ask(folder, "blank", blanked(held), form, device, out)
    return out


def _ask(
    folder: Path, side: str, held: list[Asked], form: Form, device: str, out: Seen
) -> dict[str, float]:
    from qcore.inference.generate import Generator

    began = time.perf_counter()
    generator = Generator(
        str(folder / "base"), adapter=folder / side, media=True, device=device,
        dtype=form.settings["dtype"], quantization=form.settings["quantization"],
    )  # fmt: skip
    found = accuracy(generator, held)
    spent = out.seconds.get("ask", 0.0)
    out.seconds["ask"] = spent + time.perf_counter() - began
    return found
