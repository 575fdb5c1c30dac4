"""The commands that a forked process runs: qcore's own, and the same work with its peers.

This file decides what is replaced in a run: the memory plan of a training run is computed once per
suite, because it takes two thirds of the time of a run of this size and writes nothing. The peers
are transformers' Trainer and PEFT's merge, used as their documentation says.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

_STEPS: Final = 4  #: of the peers' training, with a checkpoint after each


def qcore(arguments: Sequence[str], options: Mapping[str, Any]) -> None:
    """``qcore ARGUMENTS``.

    Args:
        arguments: of the command line.
        options: ``plan``: file of the memory plan, written by the first run that needs it;
            ``stop``: (step, signal) that the process sends itself as the step begins;
            ``cold``: start a Python that has imported nothing, with neither of these.
    """
    if options.get("cold"):
        os.execv(sys.executable, [sys.executable, "-m", "qcore", *arguments])
    from qcore.cli.main import main

    if "plan" in options:
        _keep_plan(Path(options["plan"]))
    if "stop" in options:
        _stop_at(*options["stop"])
    sys.argv = ["qcore", *arguments]
    main()


def _keep_plan(path: Path) -> None:
    module: Any = importlib.import_module("qcore.training.train")
    real: Callable[..., Any] = module.plan_memory

    def planned(*args: Any, **more: Any) -> Any:
        if path.exists():
            return pickle.loads(path.read_bytes())  # our own, of this process's parent
        plan = real(*args, **more)
        fresh = path.with_suffix(".new")
        fresh.write_bytes(pickle.dumps(plan))
        os.replace(fresh, path)
        return plan

    module.plan_memory = planned


def _stop_at(step: int, number: int) -> None:
    from qcore.training.step import Loop

    real = Loop.step

    def stepped(self: Loop, *args: Any) -> dict[str, Any]:
        if args[0] + 1 == step:
            os.kill(os.getpid(), number)
        return real(self, *args)

    Loop.step = stepped  # type: ignore[method-assign, assignment]


def peer_trainer(arguments: Sequence[str], options: Mapping[str, Any]) -> None:
    """LoRA with transformers' Trainer: MODEL OUTPUT; goes on from its last checkpoint."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    model_folder, output = arguments
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(model, config)
    rows = [{"input_ids": [n + 1, n + 2, n + 3, 7], "labels": [n + 1, n + 2, n + 3, 7]}
            for n in range(8)]  # fmt: skip
    run = Path(output + ".run")
    settings = TrainingArguments(
        output_dir=str(run), max_steps=_STEPS, save_steps=1, save_total_limit=2, seed=0,
        per_device_train_batch_size=1, learning_rate=0.01, report_to=[], disable_tqdm=True,
        use_cpu=True, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model=model, args=settings, train_dataset=rows)
    last = get_last_checkpoint(str(run)) if run.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(output)


def peer_merge(arguments: Sequence[str], options: Mapping[str, Any]) -> None:
    """PEFT's merge: MODEL ADAPTER OUTPUT."""
    import peft
    import torch
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model_folder, adapter, output = arguments
    model = AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(output, max_shard_size="1MB")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(output)


def peer_load(arguments: Sequence[str], options: Mapping[str, Any]) -> None:
    """What stock transformers reads from FOLDER, as a digest in FILE; fails where it refuses."""
    import hashlib

    from transformers import AutoModelForImageTextToText

    folder, file = arguments
    digest = hashlib.sha256()
    for name, tensor in sorted(AutoModelForImageTextToText.from_pretrained(folder)
                               .state_dict().items()):  # fmt: skip
        digest.update(name.encode() + tensor.float().numpy().tobytes())
    Path(file).write_text(digest.hexdigest(), "utf-8")


def mutations(arguments: Sequence[str], options: Mapping[str, Any]) -> None:
    """A batch of `mutations`."""
    from torture.mutations import run_batch

    run_batch(arguments, options)


PROGRAMS: Final[Mapping[str, Callable[[Sequence[str], Mapping[str, Any]], None]]] = {
    "qcore": qcore,
    "peer-trainer": peer_trainer,
    "peer-merge": peer_merge,
    "peer-load": peer_load,
    "mutations": mutations,
}
