"""Whether a stopped run may go on: what makes it the same run, compared by name.

This file decides what a run's identity is, and which changes compute the same numbers and are
only told: how much of a layer backward computes again, how much of media is kept. All but the
base's own bytes is known before a weight is read and is compared then; the base is, once it has
been read.

Codes: ``QC-RESUME-002`` something changed since the run was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from .. import __version__
from ..config.settings import Settings, in_bytes
from ..errors import InputError
from ..io.artifact import read_manifest
from ..plugins.resolve_model import Identified

#: Settings that may change, since every policy computes the same numbers.
SAME_NUMBERS: Final = ("settings.gradient_checkpointing", "settings.recompute")
#: Settings that say how much is kept: all but nothing gives the same numbers.
HOW_MUCH: Final = ("settings.media_cache_gb",)


def identity(
    found: Identified,
    settings: Settings,
    data: Mapping[str, Any],
    device: str,
    kernels: Mapping[str, str],
    base: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What makes a run the same run.

    Args:
        found: the base.
        settings: the run's.
        data: the manifest's summary of the rows; their digest counts, and that of their media.
        device: type of the device.
        kernels: backend of every op.
        base: fingerprints by part; ``None`` before they are known, and then they are left out.
    """
    provenance = found.provenance()
    return ({} if base is None else {"base": dict(base)}) | {
        "template": provenance["template_sha256"],
        "plugins": provenance["plugins"],
        "data": data["sha256"],
        **({"media": data["media_sha256"]} if data.get("media_sha256") else {}),
        "settings": settings.to_dict(),
        "device": device,
        "kernels": dict(kernels),
        "torch": torch.__version__,
        "qcore": __version__,
    }


def compare(checkpoint: Path, present: Mapping[str, Any]) -> dict[str, str]:
    """What changed and may: a line by its name in the identity.

    Args:
        checkpoint: of the run that was stopped.
        present: `identity` now; without the base's fingerprints they are not compared.

    Raises:
        InputError: ``QC-RESUME-002`` naming the first thing that changed and may not.
    """
    before, now = _flat(read_manifest(checkpoint).meta.get("identity", {})), _flat(present)
    if "base" not in present:
        before = {key: value for key, value in before.items() if not key.startswith("base.")}
    told = {}
    for key in (*now, *(key for key in before if key not in now)):
        is_, was = now.get(key), before.get(key)
        # Python takes True and 1 for the same; a template does not.
        if was == is_ and isinstance(was, bool) == isinstance(is_, bool):
            continue
        if key not in SAME_NUMBERS and not (key in HOW_MUCH and _some(is_) and _some(was)):
            raise InputError(
                "QC-RESUME-002",
                "changed since the run was stopped",
                file=checkpoint,
                field=key,
                found=_word(is_),
                expected=_word(was),
                fix="restore it, or start a new run with another --output",
            )
        name = key.removeprefix("settings.")
        told[key] = (
            f"{name} is {_word(is_)} now and was {_word(was)} before the run was stopped: it "
            "computes the same numbers"
        )
    return told


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
