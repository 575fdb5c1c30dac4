"""The pattern by which a tokenizer divides a text into words, as a pattern of `re`.

This file decides which patterns can be translated: those of classes of characters, ASCII letters
and the operators on which the regular expressions of `tokenizers` and of Python agree (ordered
alternatives, greedy repetition, lookahead). Classes are spelled out, because the two libraries may
know different versions of Unicode; `ClassCheck` compares them on the characters that occur.
`qcore.data.rendering.words` encodes the words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import groupby
from typing import Final

_SPACE: Final = "\\s"  # what the engine of `tokenizers` calls a space; Python counts more
_BREAKS: Final = frozenset("\x1c\x1d\x1e\x1f")
_END: Final = 1 << 16  # `re` looks up the characters below, and searches the others one by one
_ESCAPES: Final = {"r": "\r", "n": "\n", "t": "\t"}
_PLAIN: Final = re.compile(r"[A-Za-z0-9 '\"_#%&,/:;<=>@`~!-]")
_PROPERTY: Final = re.compile(r"\\p\{([A-Z][a-z]?)\}")
_QUANTIFIER: Final = re.compile(r"[?*+]|\{\d{1,2}(?:,\d{0,2})?\}")
_MORE: Final = frozenset("?*+{")  # possessive and lazy forms differ between the libraries
_OPERATOR: Final = re.compile(r"\(\?[:!=]|\)|\|")
_FOLDED: Final = re.compile(r"\(\?i:((?:[A-Za-z']|\|)+)\)")


class _Unknown(ValueError):
    """A pattern that cannot be translated."""


def translated(pattern: str, ascii_only: bool) -> re.Pattern[str] | None:
    """The pattern for `re`; ``None`` if it cannot be translated.

    Args:
        pattern: as `tokenizers` reads it.
        ascii_only: whether it is for ASCII texts only, which makes it faster.
    """
    try:
        return re.compile("".join(_parts(pattern, _ascii_ranges if ascii_only else _ranges)))
    except _Unknown:
        return None


def classes(pattern: str) -> tuple[str, ...]:
    """The classes of characters that a pattern uses: properties, and spaces."""
    names = [f"\\p{{{name}}}" for name in dict.fromkeys(_PROPERTY.findall(pattern))]
    return (*names, _SPACE)


def folded(pattern: str) -> str:
    """What a pattern matches without regard to case, in lower case."""
    return "|".join(_FOLDED.findall(pattern)).lower()


def _parts(pattern: str, ranges: Callable[[str], str]) -> Iterator[str]:
    """The parts of the translated pattern."""
    at, open_groups, repeatable = 0, 0, False
    while at < len(pattern):
        if repeatable and (found := _QUANTIFIER.match(pattern, at)):
            repeatable, part = False, found.group()
            if pattern[found.end() : found.end() + 1] in _MORE and found.end() < len(pattern):
                raise _Unknown
        elif found := _FOLDED.match(pattern, at):
            repeatable = True
            letters = (f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in found.group(1))
            part = f"(?:{''.join(letters)})"
        elif found := _OPERATOR.match(pattern, at):
            part = found.group()
            open_groups += {")": -1, "|": 0}.get(part, 1)
            repeatable = part == ")"
        else:
            part, end = (_set if pattern[at] == "[" else _class)(pattern, at, ranges)
            yield part
            at, repeatable = end, True
            continue
        if open_groups < 0:
            raise _Unknown
        yield part
        at = found.end()
    if open_groups:
        raise _Unknown


def _class(pattern: str, at: int, ranges: Callable[[str], str]) -> tuple[str, int]:
    """A character or a class outside of brackets, and where it ends."""
    part, end = _member(pattern, at, ranges)
    negated = pattern.startswith("\\S", at)
    return (f"[{'^' if negated else ''}{part}]" if part else "(?!)"), end


def _set(pattern: str, at: int, ranges: Callable[[str], str]) -> tuple[str, int]:
    """A class in brackets, and where it ends."""
    start = at = at + 1
    negated = pattern.startswith("^", at)
    at += negated
    members = []
    while not pattern.startswith("]", at):
        if pattern.startswith("\\S", at) or pattern.startswith("-", at) or at >= len(pattern):
            raise _Unknown
        member, at = _member(pattern, at, ranges)
        members.append(member)
    if at == start + negated:
        raise _Unknown
    inside = "".join(members)
    if not inside:
        return ("(?s:.)" if negated else "(?!)"), at + 1
    return f"[{'^' if negated else ''}{inside}]", at + 1


def _member(pattern: str, at: int, ranges: Callable[[str], str]) -> tuple[str, int]:
    """A character or a class as members of a set, and where it ends."""
    if found := _PROPERTY.match(pattern, at):
        return ranges(found.group()), found.end()
    if pattern[at] == "\\" and at + 1 < len(pattern):
        letter = pattern[at + 1]
        if letter in "sS":
            return ranges(_SPACE), at + 2
        if letter in _ESCAPES:
            return re.escape(_ESCAPES[letter]), at + 2
        if not letter.isalnum() and letter.isascii():
            return re.escape(letter), at + 2
    elif _PLAIN.match(pattern, at):
        return re.escape(pattern[at]), at + 1
    raise _Unknown


@cache
def _ranges(name: str) -> str:
    """The characters of a class as ranges."""
    if name == _SPACE:
        return _spelled((code, code) for code in range(_END) if _is_space(chr(code)))
    return _spelled(at for category, at in _categories() if category.startswith(name[3:-1]))


@cache
def _ascii_ranges(name: str) -> str:
    return _spelled((code, code) for code in range(128) if _belongs(chr(code), name))


@cache
def _categories() -> tuple[tuple[str, tuple[int, int]], ...]:
    """Ranges of characters of one category, in order."""
    found, first = [], 0
    for category, run in groupby(map(unicodedata.category, map(chr, range(_END)))):
        last = first + sum(1 for _ in run) - 1
        found.append((category, (first, last)))
        first = last + 1
    return tuple(found)


def _spelled(ranges: Iterable[tuple[int, int]]) -> str:
    """Ranges of characters as members of a set; neighbors are joined."""
    joined: list[tuple[int, int]] = []
    for first, last in ranges:
        if joined and joined[-1][1] == first - 1:
            joined[-1] = joined[-1][0], last
        else:
            joined.append((first, last))
    return "".join(f"\\u{first:04x}-\\u{last:04x}" for first, last in joined)


def _is_space(char: str) -> bool:
    return char.isspace() and char not in _BREAKS


def _belongs(char: str, name: str) -> bool:
    """Whether a character belongs to a class."""
    if name == _SPACE:
        return _is_space(char)
    return unicodedata.category(char).startswith(name[3:-1])


class ClassCheck:
    """Which characters belong to the same classes for Python and for `tokenizers`.

    A character whose case folds to what a pattern matches without regard to case counts as one on
    which they differ; so does one of a class that `translated` leaves out.

    Args:
        pattern: whose classes are compared.
    """

    def __init__(self, pattern: str) -> None:
        from tokenizers import Regex, normalizers  # not needed to import this module

        self._folded = folded(pattern)
        self._same: set[str] = set()
        self._other: set[str] = set()
        self._classes = [
            (name, normalizers.Replace(Regex(f"[^{name}]"), "")) for name in classes(pattern)
        ]

    def __call__(self, text: str) -> bool:
        """Whether all characters of a text are the same for both."""
        chars = set(text)
        new = chars - self._same - self._other
        if new:
            self._compare(new)
        return chars.isdisjoint(self._other)

    def _compare(self, chars: set[str]) -> None:
        joined = "".join(sorted(chars))
        other = {
            c for c in chars if not c.isascii() and self._folded and c.casefold() in self._folded
        }
        for name, members in self._classes:
            theirs = set(members.normalize_str(joined))
            ours = {c for c in chars if ord(c) < _END and _belongs(c, name)}
            other |= theirs ^ ours
        self._other |= other
        self._same |= chars - other
