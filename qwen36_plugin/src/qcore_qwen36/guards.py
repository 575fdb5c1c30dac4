"""Guards of Qwen 3.6, one function a code: what is its own beside those of the blocks.

- ``QC-QWEN36-001`` a switch of the template that is neither true nor false.

The guards of the architecture (config values, rotary parameters, prediction layers) are
qcore-qwen35's, which owns it, and hold for 3.6 as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

from qcore.api import Finding, PreflightRequest
from qcore_qwen35.api import switch_findings

from .chat import SWITCHES


def findings(request: PreflightRequest) -> Iterator[Finding]:
    """All findings of all guards."""
    yield from switch_findings(request, SWITCHES, "QC-QWEN36-001")
