"""Decides whether a run may resume: same base, data, template, settings, plugins and versions.

`qcore.checkpoint.identity.RUN` lists the fields of a run's identity. This file decides their
values, and which settings may change because they compute the same numbers: the activation
checkpointing policy and the size of the media cache. Everything but the bytes of the base is known,
and compared, before a weight is read; the base is compared once it has been read. A checkpoint of
an earlier build records fewer fields: those that it lacks are not compared, which a line says.

Codes: ``QC-RESUME-002`` something changed since the run was stopped, ``-005`` the run is finished,
``-007`` a checkpoint has the name of another step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, Final

import torch

from ..checkpoint.identity import (
    RUN,
    Identity,
    code_of,
    config_of,
    flat,
    ordered,
    run_files,
    versions_of,
)
from ..config.settings import in_bytes
from ..errors import InputError, QcoreError, UsageError
from ..io.artifact import MANIFEST, read_manifest
from ..io.entry_points import Status
from ..io.version import __version__
from .run import Run

#: Settings that may change, since every policy computes the same numbers.
SAME_NUMBERS: Final = (
    "settings.gradient_checkpointing", "settings.recompute", "settings.dataset_num_proc",
    "settings.shard_base",
)  # fmt: skip
#: What a guard does about a step: a run that it stopped must be able to go on.
GUARDS: Final = ("settings.on_spike",)
#: Sizes: any value above 0 computes the same numbers.
HOW_MUCH: Final = ("settings.media_cache_gb",)
#: Settings that compute nothing.
NO_NUMBERS: Final = frozenset(("grace_seconds", "rank_timeout", "publish_without_gain"))
#: Fields that checkpoints of earlier builds lack.
_LATER: Final = ("config", "files", "code", "versions")
#: Libraries beside torch that compute: kernels, and the format of 4-bit weights.
_LIBRARIES: Final = ("bitsandbytes", "triton")
_NAME: Final = re.compile(r"checkpoint-(\d+)")
_SHOWN: Final = 80  # characters of a value in an error
#: What ends the learning rate schedule.
_LENGTH: Final = ("settings.max_steps", "settings.num_train_epochs")


def identity(run: Run, base: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What makes a run the same run.

    Args:
        run: its model, rows, settings, device and kernels count.
        base: fingerprints by part; ``None`` before they are known: they are left out.
    """
    model, data = run.model, run.summary
    provenance = model.provenance()
    loaded = [info.module for info in model.plugins.infos if info.status is Status.LOADED]
    fields = ({} if base is None else {"base": dict(base)}) | {
        "config": config_of(model.checkpoint.config),
        "template": provenance["template_sha256"],
        "files": run_files(model.checkpoint),
        "plugins": provenance["plugins"],
        "code": code_of(("qcore", *loaded)),
        "versions": versions_of(_LIBRARIES),
        "data": data["sha256"],
        "eval_data": data.get("eval_sha256"),
        **({"media": data["media_sha256"]} if data.get("media_sha256") else {}),
        "init_adapter": run.initial.sha256 if run.initial is not None else None,
        "settings": {k: v for k, v in run.settings.to_dict().items() if k not in NO_NUMBERS},
        "samples": data["samples_sha256"],
        "eval_samples": data.get("eval_samples_sha256"),
        "device": run.device.type,
        "kernels": run.kernels.backends,
        "torch": torch.__version__,
        "qcore": __version__,
    }
    return ordered(RUN, fields)


def compare(checkpoint: Path, present: Mapping[str, Any]) -> dict[str, str]:
    """Changes that are allowed: a line for each, by its key in the identity.

    Args:
        checkpoint: of the run that was stopped.
        present: `identity` now; fingerprints of the base are compared where it has them.

    Raises:
        InputError: ``QC-RESUME-002`` naming the first thing that changed and may not.
    """
    recorded = read_manifest(checkpoint).meta.get("identity", {})
    missing = [field for field in _LATER if field not in recorded]
    before = flat(recorded)
    now = flat({key: value for key, value in present.items() if key not in missing})
    if "base" not in present:
        before = {key: value for key, value in before.items() if not key.startswith("base.")}
    allowed = {}
    if missing:
        allowed["fields"] = (
            f"{checkpoint.name} is of an earlier build of qcore, which did not record "
            f"{', '.join(missing)}: these are not compared"
        )
    for key in Identity(now).differing(before):
        value, was = now.get(key), before.get(key)
        if key not in (*SAME_NUMBERS, *GUARDS) and not (
            key in HOW_MUCH and _some(value) and _some(was)
        ):
            raise InputError(
                "QC-RESUME-002",
                "changed since the run was stopped",
                file=checkpoint,
                field=key,
                found=_word(value),
                expected=_word(was),
                fix=_fix(key, checkpoint),
            )
        name = key.removeprefix("settings.")
        allowed[key] = (
            f"{name} is {_word(value)} now and was {_word(was)} before the run was stopped"
        )
        if key not in GUARDS:
            allowed[key] += ": it computes the same numbers"
    return allowed


def _fix(key: str, checkpoint: Path) -> str:
    """The fix for a change that is not allowed."""
    if key in _LENGTH:
        return (
            "restore it and resume, or start a new run from this checkpoint with "
            f"--init-adapter {checkpoint} and another --output"
        )
    restore = "pass the --init-adapter of that run" if key == "init_adapter" else "restore it"
    return f"{restore}, or start a new run with another --output"


def step_of(path: Path) -> int | None:
    """The step in the name of a checkpoint folder; ``None`` for another name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def refuse_renamed(checkpoint: Path, meta: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose folder has the name of another step than it holds.

    A run that resumed from it would skip or repeat steps.

    Args:
        checkpoint: the folder.
        meta: what its manifest records.

    Raises:
        InputError: ``QC-RESUME-007``.
    """
    step = meta.get("step")
    if step == step_of(checkpoint):
        return
    right = checkpoint.with_name(f"checkpoint-{step}")
    raise InputError(
        "QC-RESUME-007",
        "has the name of another step",
        file=checkpoint,
        found=f"the state after step {step}",
        expected=f"that after step {step_of(checkpoint)}",
        fix=f"rename it to {right.name}" if not right.exists() else "move it out of the run folder",
    )


def refuse_finished(output: Path) -> None:
    """Refuse to resume a run that has published its adapter.

    Raises:
        UsageError: ``QC-RESUME-005``.
    """
    if not (output / MANIFEST).is_file():
        return
    try:
        meta = read_manifest(output).meta
    except QcoreError:  # it is not an adapter of a run, so `check_target` says what it is
        return
    if meta.get("verb") != "train":
        return
    steps = (meta.get("result") or {}).get("steps")
    raise UsageError(
        "QC-RESUME-005",
        f"is the adapter of a finished run: its learning rate schedule ended with step {steps}",
        file=output,
        field="--resume",
        fix=f"start a new run from it: --init-adapter {output} --output {free_name(output)}",
    )


def free_name(output: Path) -> Path:
    """``OUTPUT-2``, or the first such name that is free."""
    names = (output.with_name(f"{output.name}-{number}") for number in count(2))
    return next(
        path for path in names if not (path.exists() or path.with_name(path.name + ".run").exists())
    )


def _some(gigabytes: Any) -> bool:
    return isinstance(gigabytes, int | float) and in_bytes(gigabytes) > 0


def _word(value: Any) -> str:
    """As the setting is written."""
    if value is None:
        return "unset"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
