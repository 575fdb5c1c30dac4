"""Preflight checks of ``vision_config`` and the media tokens; one function per error code.

- ``QC-VISION-001`` warning: config.json has a ``vision_config`` that does not describe a tower.
- ``QC-VISION-010`` an activation that the blocks do not support; as a warning, a different kind of
  tower.
- ``QC-VISION-011`` unsupported rotary parameters.
- ``QC-VISION-012`` inconsistent sizes (heads, position embeddings).
- ``QC-VISION-053`` config.json and the tokenizer disagree about media tokens (`placeholders`).

After a warning, images and videos cannot be read, and the tensors of the section are copied
unchanged. Errors apply to runs that load the tower; a text-only run does not load it and does not
check it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from qcore.api import Finding, PreflightRequest, Severity
from qcore.errors import InputError

from .placeholders import token_findings
from .table import NAME, SECTION, THETA, parts, vision_config

#: Hard-coded in the blocks, as in transformers: any other value would be ignored.
_ACTIVATION: Final = "gelu_pytorch_tanh"
_ROPE_KEYS = {"rope_type", "type", "rope_theta"}


def findings(request: PreflightRequest) -> Iterator[Finding]:
    """All findings about the vision tower."""
    layout, config = request.layout, request.checkpoint.config
    if config.get(SECTION) is not None:
        try:
            list(parts(config))
        except InputError as error:
            yield Finding(
                code=error.code,
                severity=Severity.WARNING,
                what=f"{error.what}: media cannot be read, and its tensors are copied unchanged",
                file=error.file,
                field=error.field,
                found=str(error.found),
                expected=str(error.expected),
            )
    if any(part.name == NAME and layout.loads(part) for part in layout.table.parts):
        yield from config_findings(vision_config(config))
        if request.token_ids:
            yield from token_findings(config, request.token_ids)


def config_findings(vision: Mapping[str, Any]) -> Iterator[Finding]:
    """Check `vision` alone: every variant that the blocks do not support."""
    if (activation := vision.get("hidden_act", _ACTIVATION)) != _ACTIVATION:
        yield _error("QC-VISION-010", "hidden_act", activation, repr(_ACTIVATION))
    yield from _rotary(vision.get("rope_parameters"))
    yield from _numbers(vision)


def _error(code: str, key: str, value: object, expected: str) -> Finding:
    return Finding(
        code=code,
        severity=Severity.ERROR,
        what="unsupported value for this vision tower",
        file="config.json",
        field=f"{SECTION}.{key}",
        found=repr(value),
        expected=expected,
        fix="use the config.json that came with the weights",
    )


def _rotary(rope: object) -> Iterator[Finding]:
    """Check the rotary parameters; hub files omit them, transformers writes them on save."""
    code = "QC-VISION-011"
    if rope is None:
        return
    if not isinstance(rope, Mapping):
        yield _error(code, "rope_parameters", rope, "a mapping, or no such key")
        return
    kind = rope.get("rope_type", rope.get("type", "axial"))
    if kind != "axial":
        yield _error(code, "rope_parameters.rope_type", kind, "'axial'")
    theta = rope.get("rope_theta", THETA)
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1 < theta < 1e30:
        yield _error(code, "rope_parameters.rope_theta", theta, "a number above 1")
    for key in sorted(rope.keys() - _ROPE_KEYS):
        yield _error(code, f"rope_parameters.{key}", rope[key], "only rope_type and rope_theta")


def _numbers(vision: Mapping[str, Any]) -> Iterator[Finding]:
    """Check the heads and position embeddings, which the table's shape checks do not cover."""
    code, heads, hidden = "QC-VISION-012", vision.get("num_heads"), vision["hidden_size"]
    if type(heads) is not int or heads <= 0 or hidden % heads or hidden // heads % 4:
        # Rotary pairs for height and width: the head size must be a multiple of 4.
        expected = f"a number of heads that divides {hidden} (hidden_size) into multiples of 4"
        yield _error(code, "num_heads", heads, expected)
    elif vision.get("head_dim", hidden // heads) != hidden // heads:
        expected = f"{hidden // heads} (hidden_size / num_heads), or no such key"
        yield _error(code, "head_dim", vision["head_dim"], expected)
    count = vision["num_position_embeddings"]
    if math.isqrt(count) ** 2 != count:
        yield _error(code, "num_position_embeddings", count, "a square number")
