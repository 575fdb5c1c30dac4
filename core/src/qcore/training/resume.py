"""Decides whether a run may resume: same base, data, template, settings, plugins and versions.

This file decides what a run's identity is, and which settings may change because they compute
the same numbers: the activation checkpointing policy and the size of the media cache. Everything
but the bytes of the base is known, and compared, before a weight is read; the base is compared
once it has been read.

Codes: ``QC-RESUME-002`` something changed since the run was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from ..config.settings import in_bytes
from ..errors import InputError
from ..io.artifact import read_manifest
from ..io.version import __version__
from .run import Run

#: Settings that may change, since every policy computes the same numbers.
SAME_NUMBERS: Final = ("settings.gradient_checkpointing", "settings.recompute")
#: Sizes: any value above 0 computes the same numbers.
HOW_MUCH: Final = ("settings.media_cache_gb",)


def identity(run: Run, base: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What makes a run the same run.

    Args:
        run: its model, rows, settings, device and kernels count.
        base: fingerprints by part; ``None`` before they are known: they are left out.
    """
    provenance, data = run.model.provenance(), run.summary
    return ({} if base is None else {"base": dict(base)}) | {
        "template": provenance["template_sha256"],
        "plugins": provenance["plugins"],
        "data": data["sha256"],
        **({"media": data["media_sha256"]} if data.get("media_sha256") else {}),
        "settings": run.settings.to_dict(),
        "device": run.device.type,
        "kernels": run.kernels.backends,
        "torch": torch.__version__,
        "qcore": __version__,
    }


def compare(checkpoint: Path, present: Mapping[str, Any]) -> dict[str, str]:
    """Changes that are allowed: a line for each, by its key in the identity.

    Args:
        checkpoint: of the run that was stopped.
        present: `identity` now; fingerprints of the base are compared where it has them.

    Raises:
        InputError: ``QC-RESUME-002`` naming the first thing that changed and may not.
    """
    before, now = _flat(read_manifest(checkpoint).meta.get("identity", {})), _flat(present)
    if "base" not in present:
        before = {key: value for key, value in before.items() if not key.startswith("base.")}
    allowed = {}
    for key in (*now, *(key for key in before if key not in now)):
        value, was = now.get(key), before.get(key)
        # In Python True equals 1; in a chat template it does not.
        if was == value and isinstance(was, bool) == isinstance(value, bool):
            continue
        if key not in SAME_NUMBERS and not (key in HOW_MUCH and _some(value) and _some(was)):
            raise InputError(
                "QC-RESUME-002",
                "changed since the run was stopped",
                file=checkpoint,
                field=key,
                found=_word(value),
                expected=_word(was),
                fix="restore it, or start a new run with another --output",
            )
        name = key.removeprefix("settings.")
        allowed[key] = (
            f"{name} is {_word(value)} now and was {_word(was)} before the run was stopped: it "
            "computes the same numbers"
        )
    return allowed


def _some(gigabytes: Any) -> bool:
    return isinstance(gigabytes, int | float) and in_bytes(gigabytes) > 0


def _word(value: Any) -> str:
    """As the setting is written."""
    if value is None:
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        # Manifests are JSON: a tuple comes back as a list.
        value = list(value) if isinstance(value, tuple) else value
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
