"""Preflight checks of Qwen 3.6 beyond those of its architecture; one function per error code.

- ``QC-QWEN36-001`` a template switch that is neither true nor false.

qcore-qwen35 owns the architecture, and its checks (config values, rotary parameters, prediction
layers) apply to 3.6 unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator

from qcore.api import Finding, PreflightRequest
from qcore_qwen35.api import switch_findings

from .chat import SWITCHES


def findings(request: PreflightRequest) -> Iterator[Finding]:
    """Findings about the template switches of Qwen 3.6."""
    yield from switch_findings(request, SWITCHES, "QC-QWEN36-001")
