"""Values of tool-call parameters: the text between two tags gets the type of the tool's schema.

This file decides how a value that the chat template wrote as text is read again. The template
writes a string as it is and a list or an object as JSON; a number, boolean or null is written with
Python's ``str`` by Qwen 3.5 and as JSON by Qwen 3.6. So the text alone does not show the type:
``1`` may be a string. The schema decides; where it allows a string besides other types, a text is
read as the other type only if that is exactly how the generation writes it. A text that fits no
type of the schema, or for which there is no schema, stays a string. `qcore_qwen35.reply` finds the
calls and their parameters.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

#: Names of types that tool descriptions use besides those of JSON Schema.
_TYPES: Mapping[str, str] = {
    "int": "integer", "long": "integer", "float": "number", "double": "number",
    "decimal": "number", "bool": "boolean", "str": "string", "text": "string", "dict": "object",
    "map": "object", "list": "array", "tuple": "array", "none": "null", "nonetype": "null",
    **{name: name for name in
       ("string", "integer", "number", "boolean", "object", "array", "null")},
}  # fmt: skip
_WORDS: Mapping[str, tuple[str, str]] = {
    "null": ("null", "None"), "true": ("true", "True"), "false": ("false", "False"),
}  # fmt: skip
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_DEPTH = 8  #: references and alternatives that are followed inside one schema


def typed(text: str, schema: Any, root: Any, python_scalars: bool) -> Any:
    """Read a parameter's text as a value of its schema; the text itself where none fits.

    Args:
        text: the text between the tags, without the newlines of the markup.
        schema: JSON Schema of the parameter; anything else is a parameter without a schema.
        root: the schema that local references (``#/$defs/...``) point into.
        python_scalars: whether the generation writes scalars as Python does (``None``, ``True``).
    """
    schema = _resolved(schema, root)
    for other in (False, True):  # as the generation writes a value, then as the other one does
        for value in _listed(schema):
            if not isinstance(value, str) and text == _rendering(value, python_scalars ^ other):
                return value
        if text in [value for value in _listed(schema) if isinstance(value, str)]:
            return text
    kinds = types_of(schema, root)
    if kinds is None or kinds == {"string"}:
        return text
    exact = "string" in kinds
    found, value = _scalar(text, kinds, python_scalars, exact)
    if found:
        return value
    if kinds & {"object", "array"}:
        found, value = _nested(text, kinds)
        if found and (not exact or json.dumps(value, ensure_ascii=False) == text):
            return value
    return text


def types_of(schema: Any, root: Any = None, depth: int = _DEPTH) -> frozenset[str] | None:
    """The JSON types that a schema allows; ``None`` if it does not say.

    Args:
        schema: JSON Schema of one value.
        root: the schema that local references point into.
        depth: references and alternatives that may still be followed.
    """
    schema = _resolved(schema, root)
    if not isinstance(schema, Mapping) or depth <= 0:
        return None
    kinds = _named(schema.get("type"))
    if kinds is None and (values := _listed(schema)):
        kinds = frozenset(kind_of(value) for value in values)
    for word in ("anyOf", "oneOf"):
        if kinds is None and isinstance(schema.get(word), Sequence):
            some = [types_of(item, root, depth - 1) for item in schema[word]]
            known = [item for item in some if item is not None]
            kinds = frozenset().union(*known) if known and len(known) == len(some) else None
    if kinds is None and isinstance(schema.get("allOf"), Sequence):
        for item in schema["allOf"]:
            more = types_of(item, root, depth - 1)
            kinds = more if kinds is None else kinds if more is None else kinds & more
    if kinds is None:
        kinds = frozenset(
            kind for key, kind in (("properties", "object"), ("items", "array")) if schema.get(key)
        ) or None  # fmt: skip
    return kinds | {"null"} if kinds and schema.get("nullable") is True else kinds


def kind_of(value: Any) -> str:
    """The JSON type of a value."""
    if value is None:
        return "null"
    for kinds, name in (
        (bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"),
        (Mapping, "object"),
    ):  # fmt: skip
        if isinstance(value, kinds):
            return name
    return "array"


def _named(given: Any) -> frozenset[str] | None:
    """The types that the keyword ``type`` names, if they are all known."""
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not names:
        return None
    known = [_TYPES.get(name.lower()) if isinstance(name, str) else None for name in names]
    return frozenset(name for name in known if name) if all(known) else None


def _listed(schema: Any) -> Sequence[Any]:
    """The values that ``enum`` or ``const`` lists."""
    if not isinstance(schema, Mapping):
        return ()
    if isinstance(schema.get("enum"), list | tuple):
        values: Sequence[Any] = schema["enum"]
        return values
    return (schema["const"],) if schema.get("const") is not None else ()


def _resolved(schema: Any, root: Any) -> Any:
    """Follow local references."""
    for _ in range(_DEPTH):
        if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
            return schema
        path = schema["$ref"]
        if not path.startswith("#/"):
            return None
        target = root
        for step in path[2:].split("/"):
            step = step.replace("~1", "/").replace("~0", "~")
            target = target.get(step) if isinstance(target, Mapping) else None
        schema = target
    return None


def _rendering(value: Any, python_scalars: bool) -> str:
    """How a template writes a value that is not a string."""
    if python_scalars and not isinstance(value, Mapping | list | tuple):
        return str(value)
    return json.dumps(value, ensure_ascii=False)


def _scalar(
    text: str, kinds: frozenset[str], python_scalars: bool, exact: bool
) -> tuple[bool, Any]:
    """Whether the text is null, a boolean or a number of these types, and its value."""
    bare = text if exact else text.strip()
    for word, value in (("null", None), ("true", True), ("false", False)):
        if ("null" if value is None else "boolean") not in kinds:
            continue
        if bare in (_WORDS[word][python_scalars],) if exact else bare in _WORDS[word]:
            return True, value
    if not kinds & {"integer", "number"}:
        return False, None
    match = _NUMBER.fullmatch(bare)
    if match is None:
        return False, None
    try:
        number = float(bare) if match[1] or match[2] else int(bare)
    except ValueError:  # more digits than Python converts
        return False, None
    if isinstance(number, float):
        if not math.isfinite(number):
            return False, None
        if "number" not in kinds and (exact or not number.is_integer()):
            return False, None
    return (not exact or str(number) == bare), number


def _nested(text: str, kinds: frozenset[str]) -> tuple[bool, Any]:
    """Whether the text is a JSON object or array of these types, and its value."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):  # also lone surrogates and numbers of too many digits
        return False, None
    return kind_of(value) in kinds & {"object", "array"}, value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key is repeated, so that an object would lose a value")
    return made


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")
