"""Preflight checks of Qwen 3.5's config.json beyond tensor shapes; one function per error code.

- ``QC-QWEN35-010`` an unsupported value: an activation, gate, bias or router.
- ``QC-QWEN35-011`` rotary parameters that are unsupported, or that transformers and other libraries
  read differently.
- ``QC-QWEN35-012`` numbers out of range (eps, theta, heads, experts per token).
- ``QC-QWEN35-013`` prediction layers that the config declares and the files lack.
- ``QC-QWEN35-014`` a YaRN factor that is not the ratio of the two context lengths.

The checks apply to every verb. A merge needs none of these values to write its tensors, but it
verifies the result by logits, and logits of other blocks would verify another model.

Keys that transformers ignores are checked too if another value would mean another model
(``output_gate_type``, ``mlp_only_layers``): the ignored value would not describe the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from qcore.api import Finding, PreflightRequest, Severity

from .detect import MOE
from .table import prediction_layers, rope_type, rotary_factor, text_config

#: Hard-coded in the blocks, as in transformers: any other value would be ignored.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attn_output_gate": (True,),
    "output_gate_type": (None, "swish"),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
}
_FIXED_DENSE: dict[str, tuple[Any, ...]] = {"model_type": (None, "qwen3_5", "qwen3_5_text")}
#: transformers makes every layer an MoE layer and normalizes the weights, whatever these keys say.
_FIXED_MOE: dict[str, tuple[Any, ...]] = {
    "model_type": (None, "qwen3_5_moe", "qwen3_5_moe_text"),
    "mlp_only_layers": (None, []),
    "decoder_sparse_step": (None, 1),
    "norm_topk_prob": (None, True),
}
#: Optional YaRN keys (null means absent) and their minimum values.
_YARN_NUMBERS = {
    "beta_fast": 1e-6, "beta_slow": 1e-6, "attention_factor": 1e-6, "mscale": 0.0,
    "mscale_all_dim": 0.0,
}  # fmt: skip
_YARN_KEYS = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section",
    "mrope_interleaved", "factor", "original_max_position_embeddings", "truncate", *_YARN_NUMBERS,
}  # fmt: skip


def findings(request: PreflightRequest) -> Iterator[Finding]:
    """All findings about the config and the prediction layers."""
    text = text_config(request.checkpoint.config)
    yield from config_findings(text, moe=request.architecture == MOE)
    yield from _mtp(request, text)


def config_findings(text: Mapping[str, Any], *, moe: bool = False) -> Iterator[Finding]:
    """Check the text config alone: every variant that the blocks do not support."""
    yield from _fixed(text, _FIXED | (_FIXED_MOE if moe else _FIXED_DENSE))
    yield from _rotary(text)
    yield from _ranges(text)
    if moe:
        yield from _routing(text)


def _error(code: str, field: str, value: object, expected: str, fix: str | None = None) -> Finding:
    return Finding(
        code=code,
        severity=Severity.ERROR,
        what="unsupported value for this architecture",
        file="config.json",
        field=field,
        found=repr(value),
        expected=expected,
        fix=fix or "use the config.json that came with the weights",
    )


def _fixed(text: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> Iterator[Finding]:
    for key, allowed in fixed.items():
        value = text.get(key, allowed[0])
        if value not in allowed:
            expected = " or ".join(map(repr, allowed))
            yield _error("QC-QWEN35-010", key, value, expected)


def _rotary(text: Mapping[str, Any]) -> Iterator[Finding]:
    code, rope, kind = "QC-QWEN35-011", text.get("rope_parameters"), rope_type(text)
    if text.get("rope_scaling"):
        # transformers uses it in place of rope_parameters, including theta.
        fix = "move its values into rope_parameters, together with rope_theta"
        yield _error(
            code,
            "rope_scaling",
            text["rope_scaling"],
            "no such key: use rope_parameters",
            fix,
        )
    if not isinstance(rope, Mapping):
        yield _error(code, "rope_parameters", rope, "a mapping")
        return
    if kind not in ("default", "yarn"):
        yield _error(code, "rope_parameters.rope_type", kind, "'default' or 'yarn'")
    factor = rotary_factor(text)
    size = text.get("head_dim", 0) * factor if _finite(factor) else 0
    if not (_finite(factor) and 0 < factor <= 1 and size == int(size) and int(size) % 2 == 0):
        expected = "a share of head_dim that gives an even number of dimensions"
        yield _error(code, "rope_parameters.partial_rotary_factor", factor, expected)
    yield from _axes(rope)
    if kind == "yarn":
        yield from _yarn(text, rope)


def _axes(rope: Mapping[str, Any]) -> Iterator[Finding]:
    code, section = "QC-QWEN35-011", rope.get("mrope_section")
    counts = section if isinstance(section, list) else []
    if section is not None and not (
        len(counts) == 3 and all(type(n) is int and 0 <= n < 2**20 for n in counts)
    ):
        expected = "three counts: time, height, width"
        yield _error(code, "rope_parameters.mrope_section", section, expected)
    if rope.get("mrope_interleaved", True) is not True:
        value = rope["mrope_interleaved"]
        yield _error(code, "rope_parameters.mrope_interleaved", value, "true")


def _yarn(text: Mapping[str, Any], rope: Mapping[str, Any]) -> Iterator[Finding]:
    """Check the range of each YaRN number, and refuse keys that would be ignored."""
    code, where = "QC-QWEN35-011", "rope_parameters."
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if not (_finite(factor) and factor >= 1):
        yield _error(code, f"{where}factor", factor, "a number of at least 1")
    if type(original) is not int or not 0 < original < 2**31:
        # Without it transformers uses max_position_embeddings, whether trained or extended.
        expected = "the trained context in tokens"
        yield _error(code, f"{where}original_max_position_embeddings", original, expected)
    outer = text.get("original_max_position_embeddings", original)
    if outer != original:  # transformers uses the outer key
        field = "original_max_position_embeddings"
        yield _error(code, field, outer, f"{original} as in rope_parameters, or no such key")
    for key, least in _YARN_NUMBERS.items():
        value = rope.get(key)
        if value is not None and not (_finite(value) and value >= least):
            yield _error(
                code, f"{where}{key}", value, f"a number of at least {least:g}, or no such key"
            )
    if type(rope.get("truncate", True)) is not bool:
        yield _error(code, f"{where}truncate", rope["truncate"], "true or false")
    fast, slow = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
    if _finite(fast) and _finite(slow) and fast < slow:
        yield _error(code, f"{where}beta_fast", fast, f"at least beta_slow ({slow})")
    for key in sorted(rope.keys() - _YARN_KEYS):
        yield _error(code, f"{where}{key}", rope[key], "only YaRN keys", "remove the key")
    yield from _ratio(text, factor, original)


def _ratio(text: Mapping[str, Any], factor: object, original: object) -> Iterator[Finding]:
    """Compare factor and lengths as transformers does; equal lengths are allowed."""
    longest = text.get("max_position_embeddings")
    if not (_finite(longest) and _finite(original) and _finite(factor) and original > 0):
        return
    if longest / original not in (1, factor):
        yield Finding(
            code="QC-QWEN35-014",
            severity=Severity.WARNING,
            what="differs from max_position_embeddings / original_max_position_embeddings; "
            "the factor is used",
            file="config.json",
            field="rope_parameters.factor",
            found=str(factor),
            expected=f"{longest / original:g}",
        )


def _ranges(text: Mapping[str, Any]) -> Iterator[Finding]:
    eps = text.get("rms_norm_eps")
    if not (_finite(eps) and 0 < eps < 1):
        yield _error("QC-QWEN35-012", "rms_norm_eps", eps, "a number between 0 and 1")
    rope = text.get("rope_parameters")
    theta = rope.get("rope_theta") if isinstance(rope, Mapping) else None
    if not (_finite(theta) and theta > 1):
        # Without it transformers uses 10000, whatever the model was trained with.
        yield _error("QC-QWEN35-012", "rope_parameters.rope_theta", theta, "a number above 1")
    for many, few in (
        ("num_attention_heads", "num_key_value_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    ):
        if text[many] % text[few]:
            yield _error("QC-QWEN35-012", many, text[many], f"a multiple of {few} ({text[few]})")


def _routing(text: Mapping[str, Any]) -> Iterator[Finding]:
    """Check the experts per token; without the key transformers uses 8 for every model."""
    picked, experts = text.get("num_experts_per_tok"), text["num_experts"]
    if type(picked) is not int or not 0 < picked <= experts:
        expected = f"1 to {experts} (num_experts)"
        yield _error("QC-QWEN35-012", "num_experts_per_tok", picked, expected)


def _mtp(request: PreflightRequest, text: Mapping[str, Any]) -> Iterator[Finding]:
    """Report missing prediction layers; core does not repeat a field that names the part."""
    if "mtp" in request.layout.absent:
        yield Finding(
            code="QC-QWEN35-013",
            severity=Severity.WARNING,
            what=f"config.json claims it (mtp_num_hidden_layers {prediction_layers(text)}), but "
            "the checkpoint has none of its tensors: speculative decoding will not work",
            field="mtp",
        )


def _finite(value: object) -> TypeGuard[int | float]:
    """Whether a value is a finite number of a plausible size; JSON integers are unbounded."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return -1e30 < value < 1e30
