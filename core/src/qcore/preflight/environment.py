"""Checks for ``qcore doctor``: package versions, GPUs, NF4, template rendering, plugins, kernels.

This file decides the checks of core; plugins add checks through ``qcore_doctor``. Each check runs
what it checks: NF4 is quantized and decoded, a template is rendered in the bounded worker. Nothing
is modified.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from ..api.records import Finding, Severity
from ..errors import QcoreError
from ..io.entry_points import DISABLE, unknown_disabled
from ..plugins.manager import Plugins

if TYPE_CHECKING:
    from ..nn.kernels.registry import Line

#: Distributions whose versions are reported.
PACKAGES = (
    "qcore-framework", "torch", "transformers", "safetensors", "bitsandbytes", "tokenizers",
    "huggingface_hub", "peft", "triton",
)  # fmt: skip
_OPTIONAL = ("transformers", "peft", "triton")  # transformers and peft read the results


def findings() -> Iterator[Finding]:
    """The result of every check; an error would stop a verb."""
    yield _note("python", f"{platform.python_version()} on {platform.platform()}")
    for name in PACKAGES:
        yield _package(name)
    yield from _device()
    yield from _nf4()
    yield from _worker()
    yield from _plugins()


def kernel_table() -> tuple[str, list[Line], list[QcoreError]]:
    """Verify every kernel backend anew; returns the device, the backends and the problems."""
    import torch

    from ..nn.device import pick_device
    from ..nn.kernels.registry import survey, surveyed

    device = pick_device("auto")
    kernels, problems = surveyed(Plugins.discover().load_all())
    lines, wrong = survey(kernels, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name, lines, [*problems, *wrong]


def _note(field: str, what: str) -> Finding:
    return Finding(code="QC-DOCTOR-001", severity=Severity.NOTE, field=field, what=what)


def _package(name: str) -> Finding:
    try:
        return _note(name, version(name))
    except PackageNotFoundError:
        if name in _OPTIONAL:
            return _note(name, "not installed (optional)")
        return Finding(
            code="QC-DOCTOR-002",
            severity=Severity.ERROR,
            field=name,
            what="is not installed",
            fix=f"pip install {name}",
        )


def _device() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield _note("device", f"cpu, {torch.get_num_threads()} threads; no CUDA device")
        return
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        size = card.total_memory / 2**30
        yield _note(f"cuda:{index}", f"{card.name}, {size:.1f} GiB, CUDA {torch.version.cuda}")


def _nf4() -> Iterator[Finding]:
    """Quantize and decode on every device; the relative error of NF4 is about 9 %."""
    import torch

    from ..nn.qlora.nf4 import NF4

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(device)
        try:
            back = NF4(weight, torch.float32).dense()
            error = float((back - weight).norm() / weight.norm())
            what = f"NF4 relative error {error:.3f}"
            bad = not 0.05 < error < 0.15
        except (ImportError, RuntimeError, AttributeError, OSError) as cause:
            what, bad = f"NF4 does not run ({cause})", True
        yield Finding(
            code="QC-DOCTOR-003",
            severity=Severity.ERROR if bad else Severity.NOTE,
            field=f"bitsandbytes on {device}",
            what=what,
            fix="reinstall bitsandbytes, or train with quantization=none" if bad else None,
        )


def _worker() -> Iterator[Finding]:
    from ..checkpoint.chat_template import Template

    try:
        with Template("{{ messages[0].content }}", "doctor") as template:
            text = template.render([{"role": "user", "content": "ok"}])
        yield _note("template worker", "renders" if text == "ok" else f"rendered {text!r}")
    except QcoreError as error:
        yield Finding(
            code="QC-DOCTOR-004",
            severity=Severity.ERROR,
            field="template worker",
            what=error.message,
            fix=error.fix,
        )


def _plugins() -> Iterator[Finding]:
    for name, near in unknown_disabled():
        yield Finding(
            code="QC-DOCTOR-005",
            severity=Severity.ERROR,
            field=DISABLE,
            what=f"names {name}, which is not installed",
            fix=f"write {near} if you mean it, or take {name} out" if near else f"take {name} out",
        )
    plugins = Plugins.discover().load_all()
    for info in plugins.infos:
        well = info.usable
        yield Finding(
            code="QC-DOCTOR-005",
            severity=Severity.NOTE if well else Severity.WARNING,
            field=f"plugin {info.name}",
            what=f"{info.distribution} {info.version}: {info.status.value}"
            + (f" ({info.reason})" if info.reason else ""),
        )
    for info, found in plugins.survey("qcore_doctor"):
        if not isinstance(found, QcoreError):
            # Every line of the report has a subject.
            yield from (replace(f, field=f.field or f"plugin {info.name}") for f in found)
            continue
        yield Finding(
            code=found.code,
            severity=Severity.ERROR,
            field=f"plugin {info.name}",
            what=found.message,
            fix=found.fix,
        )
