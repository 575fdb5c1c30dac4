"""The spec of a setting: its type, range and choices, and the check of a value against them.

This file decides how a value is checked and displayed. `qcore.config.settings` lists the
settings; `qcore.config.convert` turns text into values.

Codes: ``QC-CONFIG-002`` wrong type, ``-003`` out of range or not one of the choices, ``-004`` a
value that a setting refuses with its own reason (fp16), ``-005`` given twice.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UsageError, nearest
from .frozen_map import Entries, Plain

Value = int | float | bool | str | tuple[str, ...] | tuple[int, ...] | Entries[Any]
_Type = type  # `Spec` has a field of that name
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-/]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OP = re.compile(rf"{_NAME.pattern}(?:::{_NAME.pattern})*")
_LONGEST_TEXT = 4096  #: characters of a text in a mapping
_LONGEST_PATTERN = 500  #: characters of an expression for the names of modules


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedWords:
    """Values that a setting refuses with its own reason and fix (``QC-CONFIG-004``)."""

    words: tuple[str, ...]
    what: str
    fix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """The type, range and help of one setting.

    Attributes:
        name: the key in YAML and in ``--set``.
        type: ``int``, ``float``, ``bool``, ``str``, ``tuple`` (of names) or `Entries`.
        default: the value if no source sets it.
        help: one line for docs and errors.
        low: smallest allowed number.
        high: largest allowed number.
        above: exclusive lower bound.
        below: exclusive upper bound.
        also: allowed numbers outside the range.
        choices: the allowed words; empty if any word is allowed.
        refused: words that are refused with a reason, in lower case.
        each: for `Entries`: type of every value, to which the limits above apply; ``object``
            allows true, false, a number or a text.
        items: for ``tuple``: ``str``, or ``int``, to which the limits above apply.
        key: for `Entries`: what its keys name, ``group``, ``module``, ``variable`` or ``op``.
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
    refused: RefusedWords | None = None
    each: _Type | None = None
    items: _Type = str
    key: str = ""

    @property
    def entry(self) -> Spec:
        """The spec of one value of `Entries`."""
        assert self.each is not None
        return replace(self, type=self.each, each=None)

    @property
    def expected(self) -> str:
        """Type and range in words: ``a whole number from 1 to 1024``."""
        if self.each is not None:
            return f"a mapping of {self.key} to {self.entry.expected}"
        if self.type is tuple and self.items is int:
            return f"a list of whole numbers from {self.low:g} to {self.high:.10g}"
        if self.choices and self.type is tuple:
            return f"a list of {', '.join(self.choices)}"
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

    @property
    def advice(self) -> str:
        """The fix for a value that is not `expected`, with a value that is."""
        if self.each is not None:
            return f"write --set {self.name}.NAME=VALUE, or a mapping in the file"
        if self.choices or self.type in (bool, object):
            return f"write {self.expected}"
        if self.type is tuple and self.items is int:
            return "write numbers with commas, such as 1,2"
        if self.type is tuple:
            names = self.default if isinstance(self.default, tuple) else ()
            return f"write names with commas, such as {','.join(map(str, names)) or 'a,b'}"
        if self.type is str:
            example = f", such as {self.default}" if self.default else ""
            return f"write a name of letters, digits, _ . - /{example}"
        values = [v for v in (self.default, self.low, 1, self.high) if type(v) in (int, float)]
        number = next(v for v in values if isinstance(v, int | float) and _in_range(self, v))
        return f"write {self.expected}, such as {number}"


_TYPE_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a name",
    tuple: "a list of names",
    object: "true, false, a number or a text",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a value comes from, for the error."""

    file: object | None = None
    field: str
    line: int | None = None

    def error(self, code: str, what: str, **facts: Any) -> UsageError:
        where = what if self.line is None else f"line {self.line}: {what}"
        return UsageError(code, where, file=self.file, field=self.field, **facts)


def check(spec: Spec, value: object, origin: Origin) -> Value:
    """Check the type and range of a value.

    Lists are converted to tuples, and whole numbers to floats if the setting is a float.

    Raises:
        UsageError: ``QC-CONFIG-002`` to ``-005``.
    """
    if spec.type is tuple and isinstance(value, list | tuple):
        checked = _names if spec.items is str else _numbers
        return checked(spec, tuple(value), origin)
    if spec.type is Entries and isinstance(value, Mapping):
        return _entries(spec, value, origin)
    if spec.type is float and type(value) is int and abs(value) < 1 << 53:
        value = float(value)
    if type(value) is not spec.type:
        raise origin.error(
            "QC-CONFIG-002", "has the wrong type",
            found=repr(value), expected=spec.expected, fix=spec.advice,
        )  # fmt: skip
    if isinstance(value, str):
        return _checked_word(spec, value, origin)
    assert isinstance(value, bool | int | float)
    if type(value) is not bool and not _in_range(spec, value):
        raise origin.error(
            "QC-CONFIG-003", "is out of range",
            found=str(value)[:40], expected=spec.expected, fix=spec.advice,
        )  # fmt: skip
    return value


def _checked_word(spec: Spec, value: str, origin: Origin) -> str:
    if spec.refused is not None and value.lower() in spec.refused.words:
        refused = spec.refused
        raise origin.error(
            "QC-CONFIG-004",
            refused.what,
            found=value,
            expected=spec.expected,
            fix=refused.fix,
        )
    if spec.choices and value not in spec.choices:
        near = nearest(value.lower(), spec.choices)
        fix = f"did you mean {near}?" if near else spec.advice
        raise origin.error(
            "QC-CONFIG-003",
            "is not one of the choices",
            found=value or "no value",
            expected=spec.expected,
            fix=fix,
        )
    if not spec.choices and value and not _NAME.fullmatch(value):
        raise origin.error(
            "QC-CONFIG-003",
            "is not a valid name",
            found=repr(value),
            expected="letters, digits, _ . - /",
            fix=spec.advice,
        )
    return value


def _names(spec: Spec, values: tuple[Any, ...], origin: Origin) -> tuple[str, ...]:
    for value in values:
        if not isinstance(value, str) or not _NAME.fullmatch(value):
            raise origin.error(
                "QC-CONFIG-002",
                "contains an invalid entry",
                found=repr(value),
                expected=spec.expected,
                fix=spec.advice,
            )
        if spec.choices:
            _checked_word(spec, value, origin)
    if len(set(values)) != len(values):
        twice = next(v for v in values if values.count(v) > 1)
        raise origin.error("QC-CONFIG-005", "contains a duplicate", found=twice, fix="name it once")
    return values


def _numbers(spec: Spec, values: tuple[Any, ...], origin: Origin) -> tuple[int, ...]:
    for value in values:
        if type(value) is not int or not _in_range(spec, value):
            raise origin.error(
                "QC-CONFIG-002",
                "contains an invalid entry",
                found=repr(value)[:40],
                expected=spec.expected,
                fix=spec.advice,
            )
    if len(set(values)) != len(values):
        twice = next(v for v in values if values.count(v) > 1)
        raise origin.error("QC-CONFIG-005", "contains a duplicate", found=twice, fix="name it once")
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
    """Refuse a key that this setting cannot have.

    Raises:
        UsageError: ``QC-CONFIG-003``.
    """
    if spec.key == "module":
        _check_expression(name, origin)
        return
    pattern = {"variable": _VARIABLE, "op": _OP}.get(spec.key, _NAME)
    if not isinstance(name, str) or not pattern.fullmatch(name):
        full = f" or {spec.name}.NAMESPACE::NAME" if pattern is _OP else ""
        raise origin.error(
            "QC-CONFIG-003",
            f"is not a valid {spec.key} name",
            found=repr(name)[:60],
            expected=f"{spec.name}.NAME{full}, a name of letters, digits and _",
            fix=f"write {spec.name}.NAME=VALUE with the name of a {spec.key}",
        )


def _check_expression(name: object, origin: Origin) -> None:
    """Refuse a key that PEFT cannot compile as an expression for the names of modules.

    Raises:
        UsageError: ``QC-CONFIG-003``.
    """
    valid = isinstance(name, str) and 0 < len(name) <= _LONGEST_PATTERN and name.isprintable()
    if valid:
        try:
            re.compile(rf"(.*\.)?({name})$")
        except (re.error, RecursionError, OverflowError):
            valid = False
    if not valid:
        raise origin.error(
            "QC-CONFIG-003",
            "is not a valid name or expression of a module",
            found=repr(name)[:60],
            expected=f"a regular expression of at most {_LONGEST_PATTERN} characters",
            fix="write the end of the module's name, such as self_attn.q_proj",
        )


def _one(spec: Spec, value: object, origin: Origin) -> Plain:
    checked = check(spec, value, origin)
    assert not isinstance(checked, tuple | Entries)  # the spec of an entry has a plain type
    return checked


def _plain(spec: Spec, value: object, origin: Origin) -> Plain:
    """Check a template variable: true, false, a number or a text."""
    if type(value) not in (bool, int, float, str):
        raise origin.error(
            "QC-CONFIG-002",
            "has the wrong type",
            found=repr(value)[:60],
            expected=spec.expected,
            fix=spec.advice,
        )
    assert isinstance(value, bool | int | float | str)
    if isinstance(value, str):
        if len(value) > _LONGEST_TEXT or any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            raise origin.error(
                "QC-CONFIG-003",
                "is not a valid text for a template",
                found=f"{len(value)} characters",
                expected=f"at most {_LONGEST_TEXT}, no NUL and no lone surrogate",
                fix="write a shorter text without these characters",
            )
    elif abs(value) >= 1 << 53 or not math.isfinite(value):
        raise origin.error(
            "QC-CONFIG-003", "is out of range",
            found=str(value)[:40], expected="below 2**53", fix="write a smaller number",
        )  # fmt: skip
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


def plain(value: Value) -> Any:
    """Convert a value to plain JSON types."""
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Entries) else value


def line_of(name: str, value: Value) -> str:
    """Format a setting as a line of YAML."""
    return f"{name}: {_yaml(plain(value))}"


def _yaml(value: Any) -> str:
    """Format a value so that YAML 1.1, YAML 1.2 and `qcore.config.yaml` read it alike."""
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
