"""Cache of verification results of kernel backends, in the user's cache folder between runs.

This file decides what a verdict is valid for: the GPU and its driver, the versions of torch,
Triton, CUDA, the plugin and whatever the backend requires, every source file of core and of the
backend's package, and the environment variables that change what is compiled. Each verdict is one
file, named by the hash of its key and holding the key in full; a file whose key differs in any way
is ignored. If part of a key is unknown, the verdict is not kept. A cache that cannot be read or
written costs time and is never an error.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...api.files import user_cache
from ...api.records import Kernel, Verdict
from ...errors import WriteError
from ...io.atomic import make_folders, rewrite
from ...io.source_digest import package_digest

if TYPE_CHECKING:
    import torch

Key = Mapping[str, Any]
_FORMAT = 1
_PREFIXES = ("TRITON_", "FLA_", "TILELANG_", "CUBLAS_", "NVIDIA_TF32", "TORCH_ALLOW_TF32")


def version_of(distribution: str) -> str | None:
    """The installed version, or ``None``."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def key(kernel: Kernel, owner: str, device: torch.device) -> Key | None:
    """Everything that a verdict depends on; ``None`` if part of it is unknown."""
    sources = [
        package_digest("qcore"),
        package_digest(_package(kernel.load)),
        package_digest(_package(kernel.verify)),
    ]
    card = _card(device)
    if None in sources or card is None:
        return None
    from packaging.requirements import Requirement

    named = {"torch", "triton", "bitsandbytes", *(Requirement(t).name for t in kernel.requires)}
    named |= {bad.package for bad in kernel.known_bad} | set(kernel.depends_on)
    named |= {bad.unless for bad in kernel.known_bad if bad.unless}
    return {
        "format": _FORMAT,
        "op": kernel.op,
        "backend": kernel.backend,
        "owner": owner,
        "card": card,
        "versions": {name: version_of(name) for name in sorted(named)},
        "python": sys.version,
        "sources": sources,
        "environment": {n: v for n, v in sorted(os.environ.items()) if n.startswith(_PREFIXES)},
    }


def get(key: Key) -> Verdict | None:
    """The verdict kept under exactly this key, if it is one that passes."""
    try:
        kept = json.loads(_path(key).read_bytes())
        if kept["key"] != json.loads(json.dumps(key)):
            return None
        verdict = Verdict(**{name: float(value) for name, value in kept["verdict"].items()})
    except (
        OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError,
    ):  # fmt: skip
        return None
    return verdict if verdict.good else None


def put(key: Key, verdict: Verdict) -> None:
    """Keep a verdict, as a whole or not at all; do nothing if that is impossible."""
    try:
        path = _path(key)
        text = json.dumps({"key": key, "verdict": asdict(verdict)}, allow_nan=False)
        make_folders(path.parent)
        rewrite(path, [text.encode()])
    except (OSError, ValueError, RuntimeError, WriteError):
        return


def folder() -> Path:
    """Where verdicts are kept. Raises `RuntimeError` where there is no home folder."""
    return user_cache("kernels")


def _path(key: Key) -> Path:
    text = json.dumps(key, sort_keys=True)
    return folder() / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def _card(device: torch.device) -> dict[str, str] | None:
    """Name, capability, CUDA and driver of a GPU; of CPUs nothing is kept."""
    if device.type != "cuda":
        return None
    import torch

    driver = _driver()
    if driver is None:
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory": str(properties.total_memory),
        "processors": str(properties.multi_processor_count),
        "cuda": str(torch.version.cuda or torch.version.hip),
        "driver": driver,
    }


@functools.cache
def _driver() -> str | None:
    """Version of the driver, from NVML, which comes with it, or from the kernel module."""
    import ctypes

    text = ctypes.create_string_buffer(96)
    with contextlib.suppress(OSError, AttributeError):
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() == 0:
            known = nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text))) == 0
            nvml.nvmlShutdown()
            if known:
                return text.value.decode(errors="replace")
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, ValueError, IndexError):
        return None


def _package(function: Callable[..., Any]) -> str:
    """The top-level package whose code a callable is."""
    while isinstance(function, functools.partial):
        function = function.func
    return (getattr(function, "__module__", None) or "").partition(".")[0]
