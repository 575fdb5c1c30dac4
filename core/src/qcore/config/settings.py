"""The settings of a run: names, types, ranges and help, and the check of a value.

This file decides what a setting may be. It leaves to `qcore.config.resolve` where values come from,
and to the verb that reads a setting what it does.

Codes: ``QC-CONFIG-001`` unknown key, ``-002`` wrong type, ``-003`` out of range or not one of
the choices, ``-004`` fp16, ``-005`` given twice, ``-007`` settings that contradict each other.
Whether a template reads what ``chat_template_kwargs`` sets is `qcore.data.template_kwargs`'
business, which backends ``kernels`` may name is `qcore.nn.kernels.registry`'.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..errors import UsageError
from .frozen_map import Entries, Plain

Value = int | float | bool | str | tuple[str, ...] | Entries[Any]
_Type = type  # `Spec` has a field of that name
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-/]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LONGEST_TEXT = 4096  #: characters of a text in a mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Words that a setting refuses with an error of their own.

    Attributes:
        words: in lower case.
        code: the error's code.
        what: why they are refused.
        fix: what to write instead.
    """

    words: tuple[str, ...]
    code: str
    what: str
    fix: str


_FP16 = Refusal(
    words=("fp16", "float16", "half"),
    code="QC-CONFIG-004",
    what="fp16 ends at 65504 and a recurrent state of linear attention goes beyond it",
    fix="dtype: bf16",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What one setting may be.

    Attributes:
        name: the key in YAML and in ``--set``.
        type: ``int``, ``float``, ``bool``, ``str``, ``tuple`` (of names) or `Entries`.
        default: the value where nobody gives one.
        help: one line for docs and errors.
        low: smallest allowed number.
        high: largest allowed number.
        above: number that the value must exceed, where ``low`` itself is not allowed.
        below: number that the value must stay under.
        also: numbers outside the range that have a meaning of their own.
        choices: the allowed words; empty where any word is.
        refused: words that are no choice and have an error of their own.
        each: of `Entries`: type of every value, whose range the limits above are; ``object``
            is true, false, a number or a text.
        key: of `Entries`: what its names are, ``group``, ``variable`` or ``op``.
    """

    name: str
    type: type
    default: Value
    help: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    also: tuple[int, ...] = ()
    choices: tuple[str, ...] = ()
    refused: tuple[Refusal, ...] = ()
    each: _Type | None = None
    key: str = ""

    @property
    def entry(self) -> Spec:
        """What one value of `Entries` may be."""
        assert self.each is not None
        return replace(self, type=self.each, each=None)

    @property
    def expected(self) -> str:
        """Type and range in words: ``a whole number from 1 to 1024``."""
        if self.each is not None:
            return f"a mapping of {self.key} to {self.entry.expected}"
        if self.choices:
            return " or ".join(choice or '""' for choice in self.choices)
        words = [_TYPE_WORDS[self.type]]
        if self.above is not None:
            words.append(f"above {self.above:g}")
        if self.low is not None:
            words.append(
                f"from {self.low:g}" if self.high is not None else f"of at least {self.low:g}"
            )
        if self.high is not None:
            words.append(
                f"to {self.high:.10g}" if self.low is not None else f"and at most {self.high:g}"
            )
        if self.below is not None:
            words.append(f"and below {self.below:g}" if len(words) > 1 else f"below {self.below:g}")
        return " ".join(words) + "".join(f", or {value}" for value in self.also)


_TYPE_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a name",
    tuple: "a list of names",
    object: "true, false, a number or a text",
}


def _s(default: Value, help: str, **limits: Any) -> Any:  # `help` as in click and argparse
    """A dataclass field that carries its `Spec`."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting of a run, under the names of transformers, peft and trl.

    A value of the wrong type or out of range raises `UsageError`, from whatever source.
    """

    max_steps: int = _s(-1, "optimizer steps; -1: as num_train_epochs says", low=1, also=(-1,))
    num_train_epochs: float = _s(
        1.0, "passes over the data, where max_steps is -1", above=0, high=10000
    )
    max_length: int = _s(2048, "most tokens of a row; a longer one is refused", low=2, high=1 << 20)
    per_device_train_batch_size: int = _s(1, "rows packed into a micro-step", low=1, high=65536)
    gradient_accumulation_steps: int = _s(8, "micro-steps of an optimizer step", low=1, high=65536)
    learning_rate: float = _s(2e-4, "peak learning rate of AdamW", above=0, high=1)
    warmup_ratio: float = _s(0.03, "share of the steps that warm up", low=0, below=1)
    weight_decay: float = _s(0.0, "decoupled weight decay of AdamW", low=0, high=1)
    max_grad_norm: float = _s(1.0, "gradient norm to clip at; 0: no clipping", low=0, high=1e6)
    r: int = _s(16, "rank of the LoRA matrices", low=1, high=4096)
    lora_alpha: int = _s(32, "LoRA scaling is lora_alpha / r", low=1, high=65536)
    lora_dropout: float = _s(0.0, "dropout before LoRA's A", low=0, below=1)
    target_groups: tuple[str, ...] = _s(
        (), "LoRA groups to train; empty: those that the architecture has on"
    )
    seed: int = _s(42, "seed of initialisation, order and dropout", low=0, high=2**32 - 1)
    dtype: str = _s("bf16", "compute dtype", choices=("bf16", "fp32"), refused=(_FP16,))
    quantize_groups: tuple[str, ...] = _s(
        (), "LoRA groups that are held in 4 bit too, beside those that the architecture has so"
    )
    quantization: str = _s("nf4", "storage of frozen weights", choices=("nf4", "none"))
    save_steps: int = _s(100, "optimizer steps between checkpoints; 0: none", low=0, high=10**9)
    save_total_limit: int = _s(2, "checkpoints to keep", low=1, high=10000)
    logging_steps: int = _s(1, "optimizer steps between rows of metrics", low=1, high=10**9)
    eval_fraction: float = _s(0.0, "share of the rows held out for evaluation", low=0, high=0.5)
    eval_steps: int = _s(
        0, "optimizer steps between evaluations; 0: once an epoch and at the end", low=0, high=10**9
    )
    join_micro_batches: bool = _s(
        True, "on a card, run short micro-batches of a step together where that is faster"
    )
    gradient_checkpointing: bool = _s(
        True, "recompute layers to save memory; false: recompute none"
    )
    recompute: str = _s(
        "auto",
        "what backward computes again: nothing (none), elementwise ops, full layers, those with "
        "their inputs offloaded; auto: the fastest that fits the card, full on the CPU",
        choices=("auto", "none", "elementwise", "full", "offload"),
    )
    media_cache_gb: float = _s(
        4.0,
        "GB of the host's memory for what a frozen tower made of media, so that it is computed "
        "once; 0: in every step",
        low=0,
        high=1e6,
    )
    adapter_class: str = _s("", "class whose names the adapter carries; empty: the checkpoint's")
    generation: str = _s("", "generation to take an unproven checkpoint for; empty: as detected")
    loss_chunk_size: int = _s(
        0,
        "supervised positions whose logits exist at a time; 0: as many as a fixed budget holds",
        low=0,
        high=1 << 20,
    )
    router_aux_loss_coef: float = _s(
        0.0,
        "weight of the load-balancing loss of a mixture of experts; 0: off",
        low=0,
        high=1,
    )
    group_r: Entries[int] = _s(  # noqa: RUF009
        Entries(), "rank of a LoRA group, in place of r", each=int, key="group", low=1, high=1024
    )
    group_lora_alpha: Entries[float] = _s(  # noqa: RUF009
        Entries(),
        "lora_alpha of a LoRA group, in place of lora_alpha",
        each=float,
        key="group",
        above=0,
        high=65536,
    )
    chat_template_kwargs: Entries[Plain] = _s(  # noqa: RUF009
        Entries(),
        "variables that the checkpoint's chat template is rendered with",
        each=object,
        key="variable",
    )
    kernels: Entries[str] = _s(  # noqa: RUF009
        Entries(),
        "backend of an op, in place of the best that passes; reference is one of every op",
        each=str,
        key="op",
    )

    def __post_init__(self) -> None:
        for name, spec in SPECS.items():
            value = check(spec, getattr(self, name), Origin(field=name))
            object.__setattr__(self, name, value)
        if self.eval_steps and not self.eval_fraction:
            raise UsageError(
                "QC-CONFIG-007",
                "acts on held-out rows and none are held out",
                field="eval_steps",
                found=f"{self.eval_steps} with eval_fraction 0",
                fix="set eval_fraction, or leave eval_steps out",
            )
        if self.recompute not in ("auto", "none") and not self.gradient_checkpointing:
            raise UsageError(
                "QC-CONFIG-007",
                "says what is computed again, and gradient_checkpointing that nothing is",
                field="recompute",
                found=f"{self.recompute} with gradient_checkpointing false",
                fix="leave one of the two out",
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: object | None = None) -> Settings:
        """Read back what `to_dict` gave, for example from a manifest.

        Raises:
            UsageError: an unknown key, or a value that is not allowed.
        """
        values: dict[str, Value] = {}
        for key, value in data.items():
            origin = Origin(file=source, field=key)
            values[key] = check(spec_of(key, origin), value, origin)
        return cls(**values)  # type: ignore[arg-type]  # each is checked against its own field

    def to_dict(self) -> dict[str, Any]:
        """Every setting by name, as JSON has it."""
        return {name: plain(getattr(self, name)) for name in SPECS}

    def to_yaml(self) -> str:
        """A file that ``--config`` accepts, each setting with its help; any YAML reader agrees."""
        return "".join(
            f"{line_of(name, getattr(self, name))}  # {spec.help}\n" for name, spec in SPECS.items()
        )


SPECS: Mapping[str, Spec] = {
    f.name: Spec(name=f.name, type=type(f.default), default=f.default, **f.metadata)  # type: ignore[arg-type]
    for f in fields(Settings)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a value stands, for the error."""

    file: object | None = None
    field: str
    line: int | None = None

    def error(self, code: str, what: str, **facts: Any) -> UsageError:
        where = what if self.line is None else f"line {self.line} {what}"
        return UsageError(code, where, file=self.file, field=self.field, **facts)


def in_bytes(gigabytes: float) -> int:
    """Bytes of a setting in GB; below one it keeps nothing."""
    return int(gigabytes * 1e9)


def check(spec: Spec, value: object, origin: Origin) -> Value:
    """The value, of the right type and in range.

    A list becomes a tuple and a whole number a float where the setting wants one.

    Raises:
        UsageError: ``QC-CONFIG-002`` to ``-005``.
    """
    if spec.type is tuple and isinstance(value, list | tuple):
        return _names(spec, tuple(value), origin)
    if spec.type is Entries and isinstance(value, Mapping):
        return _entries(spec, value, origin)
    if spec.type is float and type(value) is int and abs(value) < 1 << 53:
        value = float(value)
    if type(value) is not spec.type:
        raise origin.error(
            "QC-CONFIG-002", "has the wrong type", found=repr(value), expected=spec.expected
        )
    if isinstance(value, str):
        return _checked_word(spec, value, origin)
    assert isinstance(value, bool | int | float)
    if type(value) is not bool and not _in_range(spec, value):
        raise origin.error(
            "QC-CONFIG-003", "is out of range", found=str(value)[:40], expected=spec.expected
        )
    return value


def _checked_word(spec: Spec, value: str, origin: Origin) -> str:
    for refusal in spec.refused:
        if value.lower() in refusal.words:
            raise origin.error(
                refusal.code, refusal.what, found=value, expected=spec.expected, fix=refusal.fix
            )
    if spec.choices and value not in spec.choices:
        near = difflib.get_close_matches(value.lower(), spec.choices, n=1)
        fix = f"did you mean {near[0]}?" if near else None
        raise origin.error(
            "QC-CONFIG-003",
            "is not one of the choices",
            found=value,
            expected=spec.expected,
            fix=fix,
        )
    if not spec.choices and value and not _NAME.fullmatch(value):
        raise origin.error(
            "QC-CONFIG-003", "is not a name", found=repr(value), expected="letters, digits, _ . - /"
        )
    return value


def _names(spec: Spec, values: tuple[Any, ...], origin: Origin) -> tuple[str, ...]:
    for value in values:
        if not isinstance(value, str) or not _NAME.fullmatch(value):
            raise origin.error(
                "QC-CONFIG-002", "holds something else", found=repr(value), expected=spec.expected
            )
    if len(set(values)) != len(values):
        twice = next(v for v in values if values.count(v) > 1)
        raise origin.error("QC-CONFIG-005", "names one twice", found=twice)
    return values


def _entries(spec: Spec, values: Mapping[Any, Any], origin: Origin) -> Entries[Plain]:
    checked: dict[str, Plain] = {}
    for name, value in values.items():
        at = replace(origin, field=f"{origin.field}.{str(name)[:60]}")
        _check_key(spec, name, at)
        checked[name] = (
            _plain(spec.entry, value, at) if spec.each is object else _one(spec.entry, value, at)
        )
    return Entries(checked)


def _check_key(spec: Spec, name: object, origin: Origin) -> None:
    """Refuse a name that no entry of this setting can have.

    Raises:
        UsageError: ``QC-CONFIG-003``.
    """
    pattern = _VARIABLE if spec.key == "variable" else _NAME
    if not isinstance(name, str) or not pattern.fullmatch(name):
        raise origin.error(
            "QC-CONFIG-003",
            f"names no {spec.key}",
            found=repr(name)[:60],
            expected=f"{spec.name}.NAME, a name of letters, digits and _",
        )


def _one(spec: Spec, value: object, origin: Origin) -> Plain:
    checked = check(spec, value, origin)
    assert not isinstance(checked, tuple | Entries)  # the spec of an entry has a plain type
    return checked


def _plain(spec: Spec, value: object, origin: Origin) -> Plain:
    """True, false, a number or a text, as a template variable."""
    if type(value) not in (bool, int, float, str):
        raise origin.error(
            "QC-CONFIG-002",
            "has the wrong type",
            found=repr(value)[:60],
            expected=spec.expected,
        )
    assert isinstance(value, bool | int | float | str)
    if isinstance(value, str):
        if len(value) > _LONGEST_TEXT or any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            raise origin.error(
                "QC-CONFIG-003",
                "is no text for a template",
                found=f"{len(value)} characters",
                expected=f"at most {_LONGEST_TEXT}, no NUL and no lone surrogate",
            )
    elif abs(value) >= 1 << 53 or not math.isfinite(value):
        raise origin.error(
            "QC-CONFIG-003", "is out of range", found=str(value)[:40], expected="below 2**53"
        )
    return value


def _in_range(spec: Spec, value: float) -> bool:
    if value in spec.also:
        return True
    return (
        (isinstance(value, int) or math.isfinite(value))
        and (spec.low is None or value >= spec.low)
        and (spec.high is None or value <= spec.high)
        and (spec.above is None or value > spec.above)
        and (spec.below is None or value < spec.below)
    )


# Other tools' words for our settings, where spelling alone would not lead there.
_OTHER_WORDS = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "seq_len": "max_length",
    "max_seq_length": "max_length",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "target_groups",
    "load_in_4bit": "quantization",
    "bf16": "dtype",
    "fp16": "dtype",
    "precision": "dtype",
    "warmup_steps": "warmup_ratio",
    "val_set_size": "eval_fraction",
    "clip_grad": "max_grad_norm",
}


def spec_of(key: str, origin: Origin) -> Spec:
    """The spec of a key.

    Raises:
        UsageError: ``QC-CONFIG-001``, with the nearest key.
    """
    if key in SPECS:
        return SPECS[key]
    near = difflib.get_close_matches(key.replace("-", "_").lower(), SPECS, n=1, cutoff=0.6)
    guess = _OTHER_WORDS.get(key) or (near[0] if near else None)
    fix = f"did you mean {guess}? ({SPECS[guess].help})" if guess else "docs/training.md lists them"
    raise origin.error("QC-CONFIG-001", "is no setting", fix=fix)


def plain(value: Value) -> Any:
    """A value as JSON has it."""
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Entries) else value


def line_of(name: str, value: Value) -> str:
    """A setting as a line of YAML."""
    return f"{name}: {_yaml(plain(value))}"


def _yaml(value: Any) -> str:
    """A value in the form that YAML 1.1, YAML 1.2 and this file read alike."""
    if isinstance(value, float):
        text = repr(value)
        mantissa, e, exponent = text.partition("e")
        return f"{mantissa if '.' in mantissa else mantissa + '.0'}{e}{exponent}"
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(f"{json.dumps(name)}: {_yaml(item)}" for name, item in value.items())
            + "}"
        )
    return json.dumps(value)
