"""Verifies whether a backend may run on this GPU: requirements, known bugs, measured errors.

This file decides that a backend passes only if what it requires is installed, it is not known to be
bad, it refuses neither device nor model, and it has been verified now or before on the same GPU
with the same versions and sources (`cache`). Exceptions of a plugin's code are contained here.
`registry` decides which of the backends that pass is used.

Codes: ``QC-KERNEL-003`` a backend cannot run here, ``-004`` it disagrees with its reference,
``-005`` its own code raised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

from ...api.records import Kernel, KnownBad, Op, Verdict
from ...errors import Failure, NumericError, PluginError, QcoreError, UsageError, contained
from . import cache as kernel_cache

if TYPE_CHECKING:
    import torch

REFERENCE = "reference"  #: the backend that every op has
SETTING = "kernels"


class State(str, Enum):
    """Outcome of the checks of a backend."""

    CHOSEN = "chosen"
    AVAILABLE = "available"  #: could run; another is used
    REFUSED = "refused"  #: cannot run here, or disagrees with the reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A backend, who provides it, and the op that it computes.

    Attributes:
        owner: ``qcore`` or a plugin, in words.
        kernel: the backend.
        op: the op's record; the defaults where no plugin declares the op.
    """

    owner: str
    kernel: Kernel
    op: Op


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One backend of one op, as reports show it.

    Attributes:
        op: the op.
        backend: the backend.
        state: outcome of the checks.
        reason: why, in a clause; empty if there is nothing to say.
        verdict: how far it is from the reference, if that was measured.
        owner: who provides it.
        alarming: it was about to be used and disagreed with the reference, or raised.
        waits: the host waits for the device in it (`Kernel.waits`).
    """

    op: str
    backend: str
    state: State
    reason: str = ""
    verdict: Verdict | None = None
    owner: str = "qcore"
    alarming: bool = False
    waits: bool = False


def judge(
    backend: Listed, device: torch.device, config: Mapping[str, Any] | None, *, fresh: bool
) -> tuple[Line, QcoreError | None]:
    """Whether a backend may be used, and the error to raise if the user asked for it.

    Args:
        backend: the backend.
        device: where it would run.
        config: config.json of the model that it would compute, if there is one.
        fresh: verify it even if the cache has a verdict.
    """
    kernel = backend.kernel
    refusal = contained(partial(_refusal, kernel, device, config))
    if isinstance(refusal, Failure):
        return _refused(backend, str(refusal), alarming=True), raised(backend, refusal)
    if refusal is not None:
        reason, fix = refusal
        return _refused(backend, reason), cannot_run(backend, reason, fix)
    verdict = _verified(backend, device, fresh=fresh)
    if isinstance(verdict, Failure):
        return _refused(backend, str(verdict), alarming=True), raised(backend, verdict)
    if verdict.good:
        return line_of(backend, State.AVAILABLE, "", verdict=verdict), None
    reason = f"differs from its reference on this device: {verdict.text}"
    wrong = NumericError(
        "QC-KERNEL-004",
        reason,
        field=f"{SETTING}.{kernel.op}",
        found=kernel.backend,
        fix=f"ask for {kernel.op}={REFERENCE}, and report this to {backend.owner}",
    )
    return _refused(backend, reason, alarming=True, verdict=verdict), wrong


def cannot_run(backend: Listed, reason: str, fix: str | None = None) -> UsageError:
    """The error if the user asked for a backend that cannot run: ``QC-KERNEL-003``."""
    op = backend.kernel.op
    return UsageError(
        "QC-KERNEL-003",
        f"cannot run here: {reason}",
        field=f"{SETTING}.{op}",
        found=backend.kernel.backend,
        fix=fix or f"leave it out, or ask for {op}={REFERENCE}",
    )


def _refusal(
    kernel: Kernel, device: torch.device, config: Mapping[str, Any] | None
) -> tuple[str, str | None] | None:
    """Reason and fix, before anything of the backend is imported."""
    for text in kernel.requires:
        if lacking := _lacking(text):
            return lacking, f"pip install '{text}'"
    for bad in kernel.known_bad:
        if _matches(bad, device):
            version = kernel_cache.version_of(bad.package)
            return f"{bad.package} {version}: {bad.reason} ({bad.issue})", None
    reason = kernel.refuse(device)
    if reason is None and config is not None:
        reason = kernel.refuse_model(config)
    return None if reason is None else (reason, None)


def _lacking(text: str) -> str | None:
    from packaging.requirements import Requirement

    wanted = Requirement(text)
    version = kernel_cache.version_of(wanted.name)
    if version is None:
        return f"{wanted.name} is not installed"
    if not wanted.specifier.contains(version, prereleases=True):
        return f"{wanted.name} is {version} and it needs {wanted.specifier}"
    return None


def _matches(bad: KnownBad, device: torch.device) -> bool:
    """Whether environment and GPU match a known fault."""
    version = kernel_cache.version_of(bad.package)
    if version is None or (bad.unless and kernel_cache.version_of(bad.unless)):
        return False
    from packaging.specifiers import SpecifierSet

    if not SpecifierSet(bad.versions).contains(version, prereleases=True):
        return False
    if bad.capability is None:
        return True
    if device.type != "cuda":
        return False
    import torch

    return torch.cuda.get_device_capability(device) == bad.capability


def _verified(backend: Listed, device: torch.device, *, fresh: bool) -> Verdict | Failure:
    """The verdict, from the cache if it has one for exactly this situation."""
    key = kernel_cache.key(backend.kernel, backend.owner, device)
    if not fresh and key is not None and (known := kernel_cache.get(key)) is not None:
        return known

    def verify() -> Verdict | Failure:
        import torch

        # The run's random numbers must not depend on whether the cache was warm.
        cards = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(cards), torch.enable_grad():
            verdict = backend.kernel.verify(device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if isinstance(verdict, Verdict):
            return verdict
        return Failure(f"returned {type(verdict).__name__}")

    verdict = contained(verify)
    if isinstance(verdict, Verdict) and verdict.good and key is not None:
        kernel_cache.put(key, verdict)
    return verdict


# Lines and errors.


def line_of(backend: Listed, state: State, reason: str, **more: Any) -> Line:
    """The line of a backend."""
    kernel = backend.kernel
    return Line(
        op=kernel.op, backend=kernel.backend, state=state, reason=reason, owner=backend.owner,
        waits=kernel.waits, **more,
    )  # fmt: skip


def _refused(backend: Listed, reason: str, **more: Any) -> Line:
    return line_of(backend, State.REFUSED, reason, **more)


def reference(backends: Sequence[Listed], state: State, reason: str = "") -> Line:
    """The line of the reference of the op that `backends` compute."""
    op = backends[0].op
    return Line(op=op.name, backend=REFERENCE, state=state, reason=reason, waits=op.reference_waits)


def raised(backend: Listed, failure: Failure) -> PluginError:
    """The error if the user asked for a backend whose own code raised: ``QC-KERNEL-005``."""
    kernel = backend.kernel
    return PluginError(
        "QC-KERNEL-005",
        f"kernel of {backend.owner} does not run",
        field=f"{SETTING}.{kernel.op}",
        found=f"{kernel.backend}: {failure}",
        fix=f"ask for {kernel.op}={REFERENCE}, and report this to {backend.owner}",
    )
