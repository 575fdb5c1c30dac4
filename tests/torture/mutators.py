"""Random changes of a file: of its bytes, of its text, of a value of its JSON, of a header.

This file decides what a mutation is. A seed gives the same change of the same bytes; most changes
keep the file close to valid, because those are the ones that a reader may take.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any, Final

#: Values that take the place of another.
_VALUES: Final[tuple[Any, ...]] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 10**12, 2**63, -(2**63), 0.5, 1e-300, 1e300, "", "x", "0",
    "1", "../x", "/etc/passwd", "a\x00b", "\ud800", [], [0], [1, 2], [-1], [[]], {}, {"a": 1},
    "BF16", "F32", "F4", "linear_attention", "full_attention", "LORA", "q_proj", "(a+)+$",
)  # fmt: skip
_TEXTS: Final = (
    "null", "NaN", "1e999", "-Infinity", "9" * 5000, "[" * 3000, '"', "{", "}", ",", ":", "\\",
    "\x00", '"a": 1, "a": 2', "true", "0", "-0", "1.0", " ", "\n", "\ufeff", "0x10", "1_000",
)  # fmt: skip


def mutate(data: bytes, form: str, rng: random.Random) -> bytes:
    """A changed copy.

    Args:
        data: the good bytes.
        form: ``json``, ``safetensors`` or ``bytes``.
        rng: decides.
    """
    ways: list[Callable[[bytes, random.Random], bytes]] = [_flip, _replace, _insert, _delete, _cut]
    if form == "json":
        ways += [_value] * 8 + [_text] * 4 + [_key] * 3 + [_nudge] * 4
    elif form == "safetensors":
        ways += [_header_value] * 8 + [_header_text] * 4 + [_length] * 2 + [_nudge] * 2
    changed = rng.choice(ways)(data, rng)
    while rng.random() < 0.15:
        changed = rng.choice(ways)(changed, rng)
    return changed


# -- bytes


def _at(data: bytes, rng: random.Random) -> int:
    return rng.randrange(len(data)) if data else 0


def _flip(data: bytes, rng: random.Random) -> bytes:
    at = _at(data, rng)
    return (
        data[:at]
        + bytes([byte ^ (1 << rng.randrange(8)) for byte in data[at : at + 1]])
        + (data[at + 1 :])
    )


def _replace(data: bytes, rng: random.Random) -> bytes:
    at = _at(data, rng)
    return data[:at] + rng.randbytes(1) + data[at + 1 :]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = _at(data, rng)
    return data[:at] + rng.randbytes(rng.choice((1, 1, 2, 8))) + data[at:]


def _delete(data: bytes, rng: random.Random) -> bytes:
    at = _at(data, rng)
    return data[:at] + data[at + rng.choice((1, 1, 2, 8, 64)) :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: _at(data, rng)] if rng.random() < 0.5 else data + rng.randbytes(rng.randrange(9))


def _nudge(data: bytes, rng: random.Random) -> bytes:
    """Another digit in the place of one."""
    places = [at for at, byte in enumerate(data[:20_000]) if byte in b"0123456789"]
    if not places:
        return _flip(data, rng)
    at = rng.choice(places)
    return data[:at] + rng.choice("0123456789").encode() + data[at + 1 :]


# -- JSON


def _paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value below the root."""
    keys: Any = ()
    if isinstance(tree, dict):
        keys = tree.keys()
    elif isinstance(tree, list):
        keys = range(min(len(tree), 8))
    found = []
    for key in list(keys)[:200]:
        found.append((*path, key))
        found += _paths(tree[key], (*path, key))
    return found


def _parent(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        tree = tree[key]
    return tree


def _dumped(tree: Any) -> bytes:
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def _value(data: bytes, rng: random.Random) -> bytes:
    """Another value, one less, two exchanged, or one more."""
    try:
        tree = json.loads(data)
        path = rng.choice(_paths(tree))
    except (ValueError, IndexError, RecursionError):
        return _flip(data, rng)
    parent, key = _parent(tree, path), path[-1]
    way = rng.randrange(5)
    if way == 0:
        del parent[key]
    elif way == 1:
        other = rng.choice(_paths(tree))
        holder = _parent(tree, other)
        if path[: len(other)] == other or other[: len(path)] == path:
            parent[key] = rng.choice(_VALUES)
        else:
            parent[key], holder[other[-1]] = holder[other[-1]], parent[key]
    elif way == 2 and isinstance(parent[key], int | float):
        parent[key] = parent[key] + rng.choice((1, -1, 0.5, 16, -16))
    elif way == 3 and isinstance(parent[key], str):
        text = parent[key]
        at = rng.randrange(len(text) + 1)
        parent[key] = text[:at] + rng.choice(("x", "", "/", "..", " ", "\n", "é")) + text[at + 1 :]
    else:
        parent[key] = rng.choice(_VALUES)
    return _dumped(tree)


def _key(data: bytes, rng: random.Random) -> bytes:
    """Another name of a key, or one more key."""
    try:
        tree = json.loads(data)
        path = rng.choice([path for path in _paths(tree) if isinstance(path[-1], str)])
    except (ValueError, IndexError, RecursionError):
        return _flip(data, rng)
    parent, key = _parent(tree, path), path[-1]
    name = rng.choice((key + "x", key[:-1], key.upper(), "acme", "", "__metadata__", f" {key}"))
    parent[name] = parent[key] if rng.random() < 0.7 else rng.choice(_VALUES)
    if rng.random() < 0.7 and name != key:
        del parent[key]
    return _dumped(tree)


def _text(data: bytes, rng: random.Random) -> bytes:
    """Text in the place of a token, or before it."""
    at = _at(data, rng)
    marks = [n for n in range(at, min(at + 400, len(data))) if data[n] in b",:{}[]"]
    place = rng.choice(marks) if marks else at
    more = rng.choice(_TEXTS).encode()
    keep = data[place:] if rng.random() < 0.6 else data[place + 1 :]
    return data[:place] + more + keep


# -- safetensors


def _with_header(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    if len(data) < 8:
        return data
    length = min(struct.unpack("<Q", data[:8])[0], len(data) - 8)
    header = change(data[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _header_value(data: bytes, rng: random.Random) -> bytes:
    way = rng.choice((_value, _value, _key))
    return _with_header(data, lambda header: way(header, rng))


def _header_text(data: bytes, rng: random.Random) -> bytes:
    way = rng.choice((_text, _nudge, _flip, _delete))
    return _with_header(data, lambda header: way(header, rng))


def _length(data: bytes, rng: random.Random) -> bytes:
    if len(data) < 8:
        return data
    length = struct.unpack("<Q", data[:8])[0]
    other = rng.choice((length + 1, length - 1, length + 8, 0, 2**63, 2**64 - 1, len(data), 10**8))
    return struct.pack("<Q", other % 2**64) + data[8:]
