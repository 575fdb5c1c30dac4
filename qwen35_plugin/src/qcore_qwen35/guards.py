"""Guards of Qwen 3.5, one function a code: what the shapes cannot show.

- ``QC-QWEN35-010`` an activation, gate or bias that the blocks do not implement.
- ``QC-QWEN35-011`` rotary parameters that the blocks do not implement.
- ``QC-QWEN35-012`` numbers that are out of range (eps, theta).
- ``QC-QWEN35-013`` a multi-token-prediction head that the config claims and the files lack.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from qcore.records import Finding, PreflightRequest, Severity

from .table import rotary_factor, text_config

#: What the blocks hard-code, as transformers' module does: anything else would be ignored.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attn_output_gate": (True,),
    "output_gate_type": (None, "swish"),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
}


def findings(request: PreflightRequest) -> Iterator[Finding]:
    """All findings of all guards."""
    text = text_config(request.checkpoint.config)
    yield from config_findings(text)
    yield from _mtp(request, text)


def config_findings(text: Mapping[str, Any]) -> Iterator[Finding]:
    """What the config alone shows: every form that the blocks do not compute."""
    yield from _fixed(text)
    yield from _rotary(text)
    yield from _ranges(text)


def _error(code: str, field: str, found: object, expected: str) -> Finding:
    return Finding(
        code=code,
        severity=Severity.ERROR,
        what="is not what this architecture computes",
        file="config.json",
        field=field,
        found=repr(found),
        expected=expected,
        fix="use the config.json that came with the weights",
    )


def _fixed(text: Mapping[str, Any]) -> Iterator[Finding]:
    for key, allowed in _FIXED.items():
        value = text.get(key, allowed[0])
        if value not in allowed:
            expected = " or ".join(map(repr, allowed))
            yield _error("QC-QWEN35-010", key, value, expected)


def _rotary(text: Mapping[str, Any]) -> Iterator[Finding]:
    rope = text.get("rope_parameters")
    if not isinstance(rope, Mapping):
        yield _error("QC-QWEN35-011", "rope_parameters", rope, "a mapping")
        return
    if rope.get("rope_type", "default") != "default":
        yield _error(
            "QC-QWEN35-011", "rope_parameters.rope_type", rope.get("rope_type"), "'default'"
        )
    factor = rotary_factor(text)
    size = text.get("head_dim", 0) * factor if _finite(factor) else 0
    if not (_finite(factor) and 0 < factor <= 1 and size == int(size) and int(size) % 2 == 0):
        expected = "a share of head_dim that is an even number"
        yield _error("QC-QWEN35-011", "rope_parameters.partial_rotary_factor", factor, expected)


def _ranges(text: Mapping[str, Any]) -> Iterator[Finding]:
    eps = text.get("rms_norm_eps")
    if not (_finite(eps) and 0 < eps < 1):
        yield _error("QC-QWEN35-012", "rms_norm_eps", eps, "a number between 0 and 1")
    rope = text.get("rope_parameters")
    theta = rope.get("rope_theta") if isinstance(rope, Mapping) else None
    if not (_finite(theta) and theta > 1):
        yield _error("QC-QWEN35-012", "rope_parameters.rope_theta", theta, "a number above 1")
    for many, few in (
        ("num_attention_heads", "num_key_value_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    ):
        if text[many] % text[few]:
            yield _error("QC-QWEN35-012", many, text[many], f"a multiple of {few} ({text[few]})")


def _mtp(request: PreflightRequest, text: Mapping[str, Any]) -> Iterator[Finding]:
    if "mtp" in request.layout.absent:
        yield Finding(
            code="QC-QWEN35-013",
            severity=Severity.WARNING,
            what="the checkpoint has no mtp.* tensors: speculative decoding with it will not work",
            file="config.json",
            field="mtp_num_hidden_layers",
            found=str(text.get("mtp_num_hidden_layers")),
            expected="mtp.* in the files",
        )


def _finite(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
