"""``adapter_config.json``: which fields qcore acts on, and which it refuses.

This file decides that a field which would change what an adapter computes is either applied or
refused, never ignored, and that r and lora_alpha have no default. `qcore.adapter.reader` checks the
tensors. It imports no torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, QcoreError

#: Fields without an effect on what the adapter computes; any value is accepted.
DESCRIPTIVE = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "peft_version",
        "inference_mode",
        "task_type",
        "lora_dropout",
        "loftq_config",
        "eva_config",
        "corda_config",
        "arrow_config",
        "ensure_weight_tying",
        "runtime_config",
        "velora_config",
        "qalora_group_size",
        "megatron_core",  # a module name, in every config; only megatron_config has an effect
    )
)
#: Fields that qcore applies.
ACTIVE = frozenset(
    (
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "modules_to_save",
        "trainable_token_indices",
    )
)
#: Fields that change the adapter and must be off.
REFUSED = frozenset(
    (
        "alora_invocation_tokens", "bias", "fan_in_fan_out", "kasa_config", "layer_replication",
        "lora_bias", "lora_ga_config", "megatron_config", "monteclora_config", "use_bdlora",
        "use_qalora",
    )
)  # fmt: skip
#: Initializations that leave the base unchanged; the others (pissa, olora, ...) change it.
_INITS = (True, False, "gaussian", "orthogonal", "eva")


_LONGEST = 500  # characters of a key of a pattern


def check_config(path: Path, config: Mapping[str, Any]) -> list[QcoreError]:
    """Check that every field is applied, descriptive, or off; r and lora_alpha are required.

    Args:
        path: path of the file, for errors.
        config: its content.

    Returns:
        One ``QC-ADAPTER-004`` error for each field that is missing or not supported.
    """

    def problem(field: str, what: str, expected: str) -> QcoreError:
        return InputError(
            "QC-ADAPTER-004",
            what,
            file=path,
            field=field,
            found=repr(config.get(field, "nothing")),
            expected=expected,
            fix="merge it with PEFT (PeftModel.from_pretrained, then merge_and_unload)",
        )

    problems = [problem(*fault) for fault in _faults(config)]
    for field, value in config.items():
        off = value in (None, False, [], {}, "none", "LORA")
        if field not in DESCRIPTIVE | ACTIVE and not off:
            problems.append(problem(field, "changes the adapter and is not supported", "off"))
    return problems


def _faults(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield each field that cannot be applied, what is wrong with it and what is expected."""
    if config.get("peft_type") != "LORA":
        yield "peft_type", "is not supported", "LORA"
    if type(config.get("r")) is not int or config["r"] < 1:
        yield "r", "is not a rank", "a positive integer"
    if not _is_number(config.get("lora_alpha")):
        yield "lora_alpha", "is not a number", "a finite number"
    elif config["lora_alpha"] == 0:
        yield "lora_alpha", "switches the adapter off", "a number other than 0"
    elif config["lora_alpha"] < 0:
        yield "lora_alpha", "turns the adapter around", "a number above 0"
    for field in ("target_modules", "exclude_modules"):
        names = config.get(field) or []
        if not isinstance(names, str | list) or not all(isinstance(name, str) for name in names):
            yield field, "is not a list of names", "a list of names or an expression"
        elif isinstance(config.get(field), str) and not _compiles(config[field]):
            yield field, "is not a valid regular expression", "a list of names or an expression"
    for field in ("use_rslora", "use_dora"):
        if not isinstance(config.get(field, False), bool):
            yield field, "is not a boolean", "true or false"
    if config.get("init_lora_weights", True) not in _INITS:
        yield "init_lora_weights", "changes the base", "true"
    for field, kinds in (("rank_pattern", int), ("alpha_pattern", int | float)):
        pattern = config.get(field) or {}
        if not isinstance(pattern, dict) or not all(
            _is_key(key) and isinstance(n, kinds) and _is_number(n) and n > 0
            for key, n in pattern.items()
        ):
            yield field, "is not supported", "names or expressions, and numbers"
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(n, str) for n in saved):
        yield "modules_to_save", "is not a list of names", "module names"
    if not isinstance(config.get("trainable_token_indices") or [], list | dict):
        yield "trainable_token_indices", "is not supported", "lists of ids"
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(n, str) for n in parameters):
        yield "target_parameters", "is not a list of names", "parameter names"
    if not all(type(layer) is int for layer in layers_of(config)):
        yield "layers_to_transform", "is not supported", "a list of numbers"


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _is_key(key: str) -> bool:
    """Whether a key of a pattern is a regular expression of a length that PEFT's users write."""
    return 0 < len(key) <= _LONGEST and _compiles(rf"(.*\.)?({key})$")


def _is_number(value: object) -> bool:
    """Whether a value is a number that stays finite as a float; NaN compares as false."""
    whole = isinstance(value, int | float) and not isinstance(value, bool)
    return whole and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def layers_of(config: Mapping[str, Any]) -> list[Any]:
    """Return ``layers_to_transform`` as a list; empty means all layers."""
    layers = config.get("layers_to_transform")
    return layers if isinstance(layers, list) else [] if layers is None else [layers]
