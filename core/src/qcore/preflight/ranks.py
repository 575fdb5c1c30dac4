"""``qcore doctor`` under torchrun: compares versions, plugins, drivers and model files of ranks.

This file decides what a rank reports and what must be equal. Versions, plugins and files must be,
because ranks that differ compute different numbers or wait for each other for ever; a GPU or a
driver that differs is a warning. A file is compared by its size and a hash of its first and last
MiB, which includes the header of safetensors. Rank 0 reports for all.

Codes: ``QC-DOCTOR-008`` a rank differs from rank 0, ``-009`` files to compare without other ranks.
"""

from __future__ import annotations

import hashlib
import platform
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..api.records import Finding, Severity
from ..checkpoint.identity import versions_of
from ..errors import UsageError
from ..parallel.agreement import together
from ..parallel.world import World
from ..plugins.manager import Plugins
from .environment import PACKAGES, findings
from .links import judged, measure

_END = 2**20  # bytes at either end of a file that are hashed
_DRIVER = Path("/proc/driver/nvidia/version")
_MAY_DIFFER = ("GPU", "driver")
_SHOWN = 5  # ranks that a finding names
_FOLDER = "model folder"


def need_ranks(folder: Path | None) -> None:
    """Refuse to compare files where there are no other ranks.

    Raises:
        UsageError: ``QC-DOCTOR-009``.
    """
    if folder is not None:
        raise UsageError(
            "QC-DOCTOR-009",
            "compares files between ranks, and this process has no others",
            field="--model",
            found=folder,
            fix="start it on every machine: torchrun ... -m qcore doctor --model FOLDER",
        )


def facts(device: str, folder: Path | None = None) -> dict[str, str]:
    """Return what this rank reports, by name.

    Args:
        device: ``cuda`` or ``cpu``.
        folder: model folder whose files are compared.
    """
    reported = {name: version or "missing" for name, version in versions_of(PACKAGES).items()}
    reported["python"] = platform.python_version()
    for info in Plugins.discover().load_all().infos:
        reported[f"plugin {info.name}"] = f"{info.distribution} {info.version}, {info.status.value}"
    if device == "cuda":
        reported |= _of_gpu()
    return reported if folder is None else reported | files_of(folder)


def _of_gpu() -> dict[str, str]:
    import torch

    version = torch.cuda.nccl.version()
    driver = _DRIVER.read_text().splitlines()[0] if _DRIVER.exists() else "unknown"
    return {
        "CUDA": str(torch.version.cuda),
        "NCCL": ".".join(map(str, version)) if isinstance(version, tuple) else str(version),
        "GPU": torch.cuda.get_device_name(),
        "driver": " ".join(driver.split()),
    }


def files_of(folder: Path) -> dict[str, str]:
    """Return size and hash of each file of a folder; without the folder, that it is missing."""
    if not folder.is_dir():
        return {_FOLDER: "missing"}
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {f"file {path.relative_to(folder)}": _identity(path) for path in paths}


def _identity(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_END))
        file.seek(max(0, size - _END))
        digest.update(file.read(_END))
    return f"{size} bytes, {digest.hexdigest()[:12]}"


def differences(reports: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> Iterator[Finding]:
    """Yield a finding for each fact in which a rank differs from rank 0, or a missing folder.

    Args:
        reports: `facts` of each rank.
        hosts: name of the machine of each rank.
    """
    for name in dict.fromkeys(name for report in reports for name in report):
        values = [report.get(name, "missing") for report in reports]
        others = [rank for rank, value in enumerate(values) if value != values[0]]
        if not others:
            if name == _FOLDER and all(name in report for report in reports):
                yield Finding(
                    code="QC-DOCTOR-008",
                    severity=Severity.ERROR,
                    field=name,
                    what="is missing on all ranks",
                    fix="pass --model a folder that every machine sees",
                )
            continue
        named = ", ".join(
            f"rank {rank} on {hosts[rank]}: {values[rank]}" for rank in others[:_SHOWN]
        )
        more = f" and {len(others) - _SHOWN} more ranks" if others[_SHOWN:] else ""
        warning = name in _MAY_DIFFER
        yield Finding(
            code="QC-DOCTOR-008",
            severity=Severity.WARNING if warning else Severity.ERROR,
            field=name,
            what=f"differs between ranks: rank 0 on {hosts[0]}: {values[0]}; {named}{more}",
            fix=None if warning else "install the same versions and copy the same files everywhere",
        )


def findings_of_ranks(world: World, device: Any, folder: Path | None) -> list[Finding]:
    """Return the findings of all ranks; every rank calls this.

    Args:
        world: the ranks.
        device: of this rank, a `torch.device`.
        folder: model folder whose files are compared.

    Returns:
        On rank 0 its own findings, errors and warnings of other ranks, differences, and the rates
        of the links; on another rank none.
    """
    own: list[Finding] = []
    reported: dict[str, str] = {}
    with together(world):
        own, reported = list(findings()), facts(device.type, folder)
    packed = [[f.code, f.severity.value, f.field, f.what, f.fix] for f in own]
    everyone: list[Any] = world.gather([socket.gethostname(), reported, packed])
    rates = measure(world, device)
    if not world.first:
        return []
    hosts, reports, others = zip(*everyone, strict=True)
    report = [*own]
    for rank, found in enumerate(others[1:], 1):
        where = f"rank {rank} on {hosts[rank]}"
        report += [
            Finding(code=code, severity=Severity(severity), field=f"{where}: {field}", what=what,
                    fix=fix)
            for code, severity, field, what, fix in found
            if severity != Severity.NOTE.value
        ]  # fmt: skip
    report += differences(reports, hosts)
    return [*report, *judged(rates, reports[0].get("GPU", ""))]
