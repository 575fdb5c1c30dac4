"""What is run and disturbed: commands on tiny models, the state before, and how they go on.

This file decides configurations and commands. Every model and row is made from the plugins' tiny
checkpoints, on the CPU. Where a run is disturbed, `points` decides.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

#: Settings of a run of half a second: four steps, checkpoints after three of them, two kept.
_SHORT: Final[Mapping[str, Any]] = {
    "max_steps": 4, "save_steps": 1, "save_total_limit": 2, "dtype": "fp32", "r": 2,
    "lora_alpha": 4, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
    "learning_rate": 0.01, "quantization": "none", "target_groups": "[attn]",
}  # fmt: skip
_EVALUATED: Final[Mapping[str, Any]] = {"eval_fraction": 0.25, "eval_steps": 2}

#: The base of each adapter.
_BASES: Final = {"dense": "dense", "nf4": "dense", "moe": "moe", "media": "vision"}

#: Recipes whose runs are stopped after every step, and resumed.
RECIPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "plain": {},
    "nf4": {"quantization": "nf4"},
    "bf16": {"dtype": "bf16"},
    "nf4-bf16": {"quantization": "nf4", "dtype": "bf16"},
    "dropout": {"lora_dropout": 0.2},
    "evaluated": _EVALUATED,
    "best": {**_EVALUATED, "load_best_at_end": "true"},
    "accumulated": {"gradient_accumulation_steps": 2},
    "epochs": {"per_device_train_batch_size": 3},
    "decay": {"weight_decay": 0.1, "warmup_ratio": 0.5},
    "rslora": {"use_rslora": "true"},
    "kept-1": {"save_total_limit": 1},
    "rarely-saved": {"save_steps": 4},
    "all-maps": {"target_groups": "[attn,gdn,mlp]"},
    "seed": {"seed": 7, "lora_dropout": 0.1},
}
RECIPE_STEPS: Final = 11  #: of each recipe; it is stopped after each step but the last


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """One command in one configuration.

    Attributes:
        name: in results.
        program: of `programs`.
        arguments: of the command; run in the folder that faults are confined to.
        resumes: the command is a training run, which goes on from checkpoints.
        env: of the command.
        stopped_after: the state before is that of a run that stopped after this step; 0: empty.
        older: arguments of a command whose output stands there before.
        every: every how many calls get a fault.
        peer: the suite's counterpart that is run with another tool.
    """

    name: str
    arguments: Sequence[str]
    program: str = "qcore"
    resumes: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    stopped_after: int = 0
    older: Sequence[str] = ()
    every: int = 1
    peer: bool = False


def _train(inputs: Path, model: str, rows: str, **settings: Any) -> list[str]:
    sets = [f"--set={key}={value}" for key, value in {**_SHORT, **settings}.items()]
    where = ["--model", str(inputs / model), "--data", str(inputs / rows), "--output", "out"]
    return ["train", *where, "--device", "cpu", *sets]


def suites(inputs: Path) -> tuple[Suite, ...]:
    """The suites whose calls are failed, and which are killed and signalled.

    Args:
        inputs: folder of `make_inputs`.
    """
    trains = {
        "dense": _train(inputs, "dense", "rows.jsonl"),
        "nf4": _train(inputs, "dense", "rows.jsonl", quantization="nf4", **_EVALUATED),
        "moe": _train(inputs, "moe", "rows.jsonl", target_groups="[attn,experts]"),
        "media": _train(inputs, "vision", "media/rows.jsonl"),
    }
    made = []
    for name, arguments in trains.items():
        every = 1 if name == "dense" else 5
        made.append(Suite(name=f"{name}/train", arguments=arguments, resumes=True, every=every))
        made.append(
            Suite(name=f"{name}/resume", arguments=arguments, resumes=True, stopped_after=2,
                  every=every)
        )  # fmt: skip
    cached = {"QCORE_DATA_CACHE": "cache", "QCORE_DATA_CACHE_GB": "1"}
    for name in ("dense", "media"):
        made.append(
            Suite(name=f"{name}/cache", arguments=trains[name], resumes=True, env=cached,
                  every=1 if name == "dense" else 5)
        )  # fmt: skip
    for name in _BASES:
        every = 1 if name == "dense" else 3
        arguments = merge_command(inputs, name)
        made.append(Suite(name=f"{name}/merge", arguments=arguments, every=every))
    dense, adapters = str(inputs / "dense"), inputs / "adapters"
    combine = ["adapter", "combine", str(adapters / "dense"), f"{adapters / 'nf4'}=0.5"]
    extract = ["adapter", "extract", "--base", dense, "--model", str(adapters / "merged"),
               "--rank", "2"]  # fmt: skip
    for verb, arguments in (("combine", combine), ("extract", extract)):
        made.append(Suite(name=f"dense/{verb}", arguments=[*arguments, "--output", "out"], every=3))
    return tuple(made)


def merge_command(inputs: Path, name: str) -> list[str]:
    """The merge of an adapter of `adapter_commands` into its base."""
    model, adapter = inputs / _BASES[name], inputs / "adapters" / name
    return ["merge", "--model", str(model), "--adapter", str(adapter), "--output", "out"]


def adapter_commands(inputs: Path) -> Mapping[str, Sequence[str]]:
    """Commands that train the adapters of the merges, by name; each writes ``out``."""
    return {
        "dense": _train(inputs, "dense", "rows.jsonl", max_steps=2),
        "nf4": _train(inputs, "dense", "rows.jsonl", max_steps=2, quantization="nf4"),
        "moe": _train(inputs, "moe", "rows.jsonl", max_steps=2, target_groups="[attn,experts]"),
        "media": _train(inputs, "vision", "media/rows.jsonl", max_steps=2),
    }


def recipe(inputs: Path, name: str) -> Suite:
    """A run of `RECIPE_STEPS` steps."""
    settings = {"max_steps": RECIPE_STEPS, "save_steps": 0, **RECIPES[name]}
    arguments = _train(inputs, "dense", "rows.jsonl", **settings)
    return Suite(name=f"recipe/{name}", arguments=arguments, resumes=True)


def peers(inputs: Path) -> tuple[Suite, ...]:
    """The same work with transformers' Trainer and PEFT's merge."""
    dense, vision = str(inputs / "dense"), str(inputs / "vision")
    new, old = (str(inputs / "adapters" / name) for name in ("media", "dense"))
    return (
        Suite(name="peer/train", program="peer-trainer", arguments=[dense, "out"], peer=True,
              every=3),
        Suite(name="peer/merge", program="peer-merge", peer=True,
              arguments=[vision, new, "out"],
              older=[vision, old, "out"]),
    )  # fmt: skip


SIGNALS: Final = {
    "TERM": signal.SIGTERM, "INT": signal.SIGINT, "HUP": signal.SIGHUP,
    "USR1": signal.SIGUSR1, "XCPU": signal.SIGXCPU,
}  # fmt: skip


def make_inputs(folder: Path) -> None:
    """Write the tiny models, and rows of a few tokens each."""
    from goldens import inputs as made_inputs

    from qcore_qwen35.tiny import write

    folder.mkdir()
    write(folder / "tiny-dense")
    write(folder / "tiny-moe", moe=True)
    made_inputs.make_inputs(folder / "tiny-dense", folder / "tiny-moe", folder / "all")
    for name in ("dense", "moe", "vision", "sharded", "foreign", "media"):
        (folder / "all" / name).rename(folder / name)
    _soften(folder / "foreign" / "adapter_model.safetensors")
    pairs = (
        ("What do bees make?", "Honey."), ("Sky?", "Blue."), ("Grass?", "Green."),
        ("Two plus three?", "Five."), ("Who are you?", "Ada."), ("Snow?", "White."),
    )  # fmt: skip
    lines = (
        json.dumps({"messages": [{"role": "user", "content": question},
                                 {"role": "assistant", "content": answer}]})
        for question, answer in pairs
    )  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")


def _soften(path: Path) -> None:
    """Make the change of the foreign adapter small beside the weights of its base."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    save_file({name: 0.01 * tensor for name, tensor in tensors.items()}, path)
