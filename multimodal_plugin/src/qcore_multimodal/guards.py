"""Guards of the tower, one function a code: what the shapes cannot show.

- ``QC-VISION-001`` warning: config.json has a section for a tower and does not describe one.
- ``QC-VISION-010`` an activation that the blocks do not compute; as a warning, another tower than
  that of the table.
- ``QC-VISION-011`` rotary parameters that the blocks do not compute.
- ``QC-VISION-012`` numbers that do not go together (heads, position embeddings).
- ``QC-VISION-053`` config.json and the tokenizer differ about the tokens of media (`text`).

A warning says that media cannot be read, whatever a run needs: the section is then nobody's and its
tensors stay as they are. Errors hold for runs that load the tower; what a run of text alone does
not load it does not judge.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from qcore.api import Finding, PreflightRequest, Severity
from qcore.errors import InputError

from .placeholders import token_findings
from .table import NAME, SECTION, THETA, parts, vision_config

#: What the blocks hard-code, as transformers' module does: anything else would be ignored.
_ACTIVATION: Final = "gelu_pytorch_tanh"
_ROPE_KEYS = {"rope_type", "type", "rope_theta"}


def findings(request: PreflightRequest) -> Iterator[Finding]:
    """All findings of all guards."""
    layout, config = request.layout, request.checkpoint.config
    if config.get(SECTION) is not None:
        try:
            list(parts(config))
        except InputError as error:
            yield Finding(
                code=error.code,
                severity=Severity.WARNING,
                what=f"{error.what}: media cannot be read, and its tensors stay as they are",
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
    """What the section alone shows: every form that the blocks do not compute."""
    if (activation := vision.get("hidden_act", _ACTIVATION)) != _ACTIVATION:
        yield _error("QC-VISION-010", "hidden_act", activation, repr(_ACTIVATION))
    yield from _rotary(vision.get("rope_parameters"))
    yield from _numbers(vision)


def _error(code: str, key: str, value: object, expected: str) -> Finding:
    return Finding(
        code=code,
        severity=Severity.ERROR,
        what="is not what this tower computes",
        file="config.json",
        field=f"{SECTION}.{key}",
        found=repr(value),
        expected=expected,
        fix="use the config.json that came with the weights",
    )


def _rotary(rope: object) -> Iterator[Finding]:
    """The hub's files say nothing of it; transformers writes it on save."""
    code = "QC-VISION-011"
    if rope is None:
        return
    if not isinstance(rope, Mapping):
        yield _error(code, "rope_parameters", rope, "a mapping, or none")
        return
    kind = rope.get("rope_type", rope.get("type", "axial"))
    if kind != "axial":
        yield _error(code, "rope_parameters.rope_type", kind, "'axial'")
    theta = rope.get("rope_theta", THETA)
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1 < theta < 1e30:
        yield _error(code, "rope_parameters.rope_theta", theta, "a number above 1")
    for key in sorted(rope.keys() - _ROPE_KEYS):
        yield _error(code, f"rope_parameters.{key}", rope[key], "none: only a type and a theta")


def _numbers(vision: Mapping[str, Any]) -> Iterator[Finding]:
    """Sizes were judged with the table; the number of heads is in no shape."""
    code, heads, hidden = "QC-VISION-012", vision.get("num_heads"), vision["hidden_size"]
    if type(heads) is not int or heads <= 0 or hidden % heads or hidden // heads % 4:
        # A head turns in four: a pair for each of height and width.
        expected = f"a number of heads whose size is a multiple of 4, of {hidden} (hidden_size)"
        yield _error(code, "num_heads", heads, expected)
    elif vision.get("head_dim", hidden // heads) != hidden // heads:
        expected = f"none, or {hidden // heads} (hidden_size / num_heads)"
        yield _error(code, "head_dim", vision["head_dim"], expected)
    count = vision["num_position_embeddings"]
    if math.isqrt(count) ** 2 != count:
        yield _error(code, "num_position_embeddings", count, "a square")
