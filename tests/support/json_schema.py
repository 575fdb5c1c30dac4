"""A validator for the part of JSON Schema that the published schema uses."""

from __future__ import annotations

import re
from typing import Any

TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}
KNOWN = {
    "$schema", "$id", "$ref", "$defs", "title", "description", "version", "type", "required",
    "additionalProperties", "properties", "items", "minItems", "minLength", "anyOf", "oneOf",
    "const", "enum", "pattern",
}  # fmt: skip


def problems(value: Any, schema: dict[str, Any], root: dict[str, Any] | None = None) -> list[str]:
    """What is wrong with a value; raises for a keyword that is not supported here."""
    root = schema if root is None else root
    assert schema.keys() <= KNOWN, schema.keys() - KNOWN
    if "$ref" in schema:
        target: Any = root
        for step in schema["$ref"].removeprefix("#/").split("/"):
            target = target[step]
        return problems(value, target, root)
    found: list[str] = []
    if "type" in schema:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        fits = any(isinstance(value, TYPES[kind]) for kind in kinds)
        if not fits or (isinstance(value, bool) and "boolean" not in kinds):
            return [f"{value!r} is not {kinds}"]
    if "const" in schema and value != schema["const"]:
        found.append(f"{value!r} is not {schema['const']!r}")
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{value!r} is not one of {schema['enum']}")
    for word in ("anyOf", "oneOf"):
        if word in schema:
            fitting = sum(not problems(value, one, root) for one in schema[word])
            if fitting == 0 or (word == "oneOf" and fitting > 1):
                found.append(f"{value!r} fits {fitting} of {word}")
    if isinstance(value, str):
        if len(value) < schema.get("minLength", 0):
            found.append("too short")
        if "pattern" in schema and not re.search(schema["pattern"], value):
            found.append(f"{value!r} does not match")
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            found.append("too few items")
        for item in value:
            found += problems(item, schema.get("items", {}), root)
    if isinstance(value, dict):
        known = schema.get("properties", {})
        found += [f"{key} is missing" for key in schema.get("required", ()) if key not in value]
        for key, item in value.items():
            if key in known:
                found += problems(item, known[key], root)
            elif schema.get("additionalProperties") is False:
                found.append(f"{key} is not allowed")
    return found
