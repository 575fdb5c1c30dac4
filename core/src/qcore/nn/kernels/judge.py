"""Whether one backend of an op may be used on the device at hand, and why not.

This file decides that a backend passes only where what it requires is installed, it is not known
to be bad, refuses neither device nor model, and has just been verified (or was, on the same card
with the same versions and sources: `kernel_cache`). Whatever of a plugin raises is contained
here. Which of those that pass is taken is `kernels`' decision.

Codes: ``QC-KERNEL-003`` it cannot run here, ``-004`` it computes something else than its
reference, ``-005`` its own code raised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

from ...api.records import Kernel, KnownBad, Op, Verdict
from ...errors import NumericError, PluginError, QcoreError, UsageError
from ...plugins.info import Failure
from ...plugins.manager import contained
from . import cache as kernel_cache

if TYPE_CHECKING:
    import torch

REFERENCE = "reference"  #: the backend that every op has
SETTING = "kernels"


class State(str, Enum):
    """What became of a backend."""

    CHOSEN = "chosen"
    AVAILABLE = "available"  #: could run; another is taken
    REFUSED = "refused"  #: cannot run here, or does not compute what the reference does


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
        state: what became of it.
        reason: why, in a clause; empty where there is nothing to say.
        verdict: how far it is from the reference, where that was measured.
        owner: who brought it.
        alarming: it was about to be used and did not compute what it should.
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
    """Whether a backend may be used, and the error that it is where the user asked for it.

    Args:
        backend: the backend.
        device: where it would run.
        config: config.json of the model that it would compute, where there is one.
        fresh: verify it whatever the cache says.
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
    """The error for who asked for a backend that cannot run: ``QC-KERNEL-003``."""
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
    """Whether the environment and the card are those of a known fault."""
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
    """The verdict, from the cache where it is of this very situation."""
    key = kernel_cache.key(backend.kernel, backend.owner, device)
    if not fresh and key is not None and (known := kernel_cache.get(key)) is not None:
        return known

    def verify() -> Verdict | Failure:
        import torch

        # A run must not depend on whether the cache was warm.
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
    """What a backend's own code raised, as the error that it is where it was asked for."""
    kernel = backend.kernel
    return PluginError(
        "QC-KERNEL-005",
        f"kernel of {backend.owner} does not run",
        field=f"{SETTING}.{kernel.op}",
        found=f"{kernel.backend}: {failure}",
        fix=f"ask for {kernel.op}={REFERENCE}, and report this to {backend.owner}",
    )
