"""Encoding of texts word by word: the token ids of a word that was seen before are looked up.

This file decides for which tokenizers that gives the ids of the whole text: those that divide a
text at added tokens that are matched verbatim, then into words by a pattern that Python's `re`
knows too (`qcore.data.rendering.word_pattern`), and then encode each word by itself as bytes. The
ids of a word always come from the tokenizer. A text with a character that the two libraries put
into different classes, and any text of another tokenizer, is encoded whole.

Words of most texts are few and frequent, so that looking them up takes a fraction of the time.
"""

from __future__ import annotations

import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, Protocol

from .word_pattern import ClassCheck, translated

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_MOST: Final = 1 << 17  # words that are remembered; about 250 bytes each
_LONGEST: Final = 48  # characters of a word that is remembered
_RARE: Final = 5  # a text with one new word in so many is encoded whole, which takes less time
_SHORT: Final = 16  # words of a text whose new words are encoded one by one
_BYTES: Final = 4  # of an id
#: Words of all kinds, on which the pattern and the tokenizer must agree.
_PROBE: Final = (
    "It's  a probe:\n\n\tI'LL try 12345 (3.14) e-mails_x@y.z,\r\n  \xe9t\xe9 \u4e2d\u6587 "
    "{\"key\": [1, -2]} don't </div>  \n !? \U0001f600\U0001f600 caf\xe9's \xa0 \u0e01\u0e33 x  "
)


class Piece(Protocol):
    """An encoded text.

    Attributes:
        ids: its token ids.
    """

    ids: array[int]

    def index(self, position: int) -> int:
        """Number of tokens that start before a character of the text."""

    def offsets(self) -> list[tuple[int, int]]:
        """The characters of each token."""


class WholePiece:
    """A text that the tokenizer has encoded whole."""

    __slots__ = ("_encoding", "ids")

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self.ids = array("i", encoding.ids)

    def index(self, position: int) -> int:
        """Number of tokens that start before a character of the text.

        The tokenizer is asked, because a list of all offsets takes longer than the encoding itself.
        """
        encoding = self._encoding
        token = encoding.char_to_token(position)
        if token is None:  # between two tokens, or at the end
            return bisect_left([start for start, _ in encoding.offsets], position)
        while token < len(encoding) and _start(encoding, token) < position:
            token += 1
        return token

    def offsets(self) -> list[tuple[int, int]]:
        """The characters of each token."""
        return list(self._encoding.offsets)


def _start(encoding: Encoding, token: int) -> int:
    place = encoding.token_to_chars(token)
    assert place is not None, "only texts without padding are encoded"
    return int(place[0])


class WordPiece:
    """A text that was encoded word by word."""

    __slots__ = ("_length", "_parts", "_tokenizer", "_words", "ids")

    def __init__(self, words: list[str], parts: list[bytes], tokenizer: Tokenizer) -> None:
        self.ids = array("i", b"".join(parts))
        self._length = sum(map(len, words))
        self._words = words
        self._parts = parts
        self._tokenizer = tokenizer

    def index(self, position: int) -> int:
        """Number of tokens that start before a character of the text."""
        if 2 * position > self._length:  # prompts end near the start, replies near the end
            return len(self.ids) - self._from(self._length - position)
        tokens = at = 0
        for word, part in zip(self._words, self._parts, strict=True):
            if at >= position:
                break
            at += len(word)
            tokens += len(part) // _BYTES
            if at > position:
                tokens -= self._starting(word, position - at + len(word))
        return tokens

    def _from(self, characters: int) -> int:
        """Number of tokens that start in the last characters of the text."""
        tokens = at = 0
        for word, part in zip(reversed(self._words), reversed(self._parts), strict=True):
            if at >= characters:
                break
            at += len(word)
            tokens += len(part) // _BYTES
            if at > characters:
                tokens -= len(part) // _BYTES - self._starting(word, at - characters)
        return tokens

    def _starting(self, word: str, position: int) -> int:
        """Number of tokens of a word that start at one of its characters or after it."""
        encoding = encode_whole(self._tokenizer, word)
        return len(encoding) - WholePiece(encoding).index(position)

    def offsets(self) -> list[tuple[int, int]]:
        """The characters of each token."""
        encoding = encode_whole(self._tokenizer, "".join(self._words))
        assert array("i", encoding.ids) == self.ids, "words have the ids of the whole text"
        return list(encoding.offsets)


def encode_whole(tokenizer: Tokenizer, text: str) -> Encoding:
    """Encode a text as it is."""
    return tokenizer.encode(text, add_special_tokens=False)


@dataclass(frozen=True, slots=True)
class _Missed:
    """A text with words that are not known.

    Attributes:
        at: its place among the texts.
        text: the text.
        words: its words, if it may be encoded by them.
        new: those that are not known.
    """

    at: int
    text: str
    words: list[str] | None
    new: set[str]


class WordEncoder:
    """Encodes texts, and remembers the ids of their words.

    Args:
        tokenizer: from `load_tokenizer`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        pattern = word_pattern(tokenizer)
        self._classes = None if pattern is None else ClassCheck(pattern)
        self._ascii = self._any = None
        if pattern is not None:
            self._ascii = translated(pattern, ascii_only=True)
            self._any = translated(pattern, ascii_only=False)
        added = {token.content: id_ for id_, token in _added(tokenizer).items()}
        longest_first = sorted(added, key=len, reverse=True)
        self._divide = re.compile(f"({'|'.join(map(re.escape, longest_first))})" if added else "()")
        self._added = {text: array("i", [id_]).tobytes() for text, id_ in added.items()}
        self._known = dict(self._added)
        if self._ascii is not None and not self._agrees(_PROBE):
            self._ascii = None

    @property
    def by_words(self) -> bool:
        """Whether texts are encoded word by word."""
        return self._ascii is not None

    def _agrees(self, text: str) -> bool:
        """Whether the words of a text are the tokenizer's own."""
        split = self._tokenizer.pre_tokenizer.pre_tokenize_str(text)
        return self._words(text) == [text[start:end] for _, (start, end) in split]

    def encode(self, texts: Sequence[str]) -> list[Piece]:
        """Encode some texts, which are normalized, together.

        Returns:
            a piece for each text.
        """
        if len(self._known) > _MOST:
            self._known = dict(self._added)
        known, tokenizer = self._known, self._tokenizer
        done: list[Piece | None] = []
        missed = []
        for at, text in enumerate(texts):
            words = self._words(text)
            try:
                parts = None if words is None else list(map(known.__getitem__, words))
            except KeyError:
                parts = None
            if words is None or parts is None:
                new = {word for word in words or () if word not in known}
                missed.append(_Missed(at, text, words if self._may_divide(new) else None, new))
                done.append(None)
            else:
                done.append(WordPiece(words, parts, tokenizer))
        for at, piece in self._encoded(missed):
            done[at] = piece
        return [piece for piece in done if piece is not None]

    def _words(self, text: str) -> list[str] | None:
        """The words of a text, added tokens among them; ``None`` if they cannot be found."""
        pattern = self._ascii if text.isascii() else self._any
        if pattern is None or self._ascii is None:
            return None
        words: list[str] = []
        for at, part in enumerate(self._divide.split(text)):
            if at % 2:
                words.append(part)
            elif part:
                words += pattern.findall(part)
        return words if sum(map(len, words)) == len(text) else None

    def _may_divide(self, new: set[str]) -> bool:
        """Whether a text with these new words has the words that the tokenizer sees.

        The characters of known words were compared when the words were new.
        """
        return self._classes is not None and "" not in new and self._classes("".join(new))

    def _encoded(self, missed: Sequence[_Missed]) -> Iterable[tuple[int, Piece]]:
        """Encode texts with new words, and remember the words."""
        whole = [
            one for one in missed
            if one.words is None or _SHORT < len(one.words) < _RARE * len(one.new)
        ]  # fmt: skip
        new = {id(one) for one in whole}
        rest = [one for one in missed if id(one) not in new]
        fresh = self._alone(set(chain.from_iterable(one.new for one in rest)))
        known = self._known
        for one in rest:
            assert one.words is not None
            try:
                parts = [fresh[word] if word in one.new else known[word] for word in one.words]
            except KeyError:
                whole.append(one)
            else:
                yield one.at, WordPiece(one.words, parts, self._tokenizer)
        texts = [one.text for one in whole]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False) if texts else ()
        for one, encoding in zip(whole, encodings, strict=True):
            yield one.at, self._learned(one.words, encoding)

    def _alone(self, words: set[str]) -> dict[str, bytes]:
        """The ids of some words; a word that the tokenizer divides further has none."""
        fresh = {}
        ordered = sorted(words)
        encodings = self._tokenizer.encode_batch(ordered, add_special_tokens=False) if words else ()
        for word, encoding in zip(ordered, encodings, strict=True):
            if encoding.ids and set(encoding.word_ids) == {0}:
                fresh[word] = array("i", encoding.ids).tobytes()
        self._remember(fresh)
        return fresh

    def _learned(self, words: list[str] | None, encoding: Encoding) -> Piece:
        """The piece of a text that was encoded whole; its words are remembered."""
        numbers = [n for n in encoding.word_ids if n is not None] if words else []
        if words is None or not numbers or numbers[-1] != len(words) - 1:
            return WholePiece(encoding)
        ids: list[list[int]] = [[] for _ in words]
        for id_, number in zip(encoding.ids, numbers, strict=True):
            ids[number].append(id_)
        parts = [array("i", one).tobytes() for one in ids]
        self._remember(dict(zip(words, parts, strict=True)))
        return WordPiece(words, parts, self._tokenizer)

    def _remember(self, words: dict[str, bytes]) -> None:
        self._known.update(one for one in words.items() if one[1] and len(one[0]) <= _LONGEST)


def _added(tokenizer: Tokenizer) -> dict[int, Any]:
    return dict(tokenizer.get_added_tokens_decoder())


def word_pattern(tokenizer: Tokenizer) -> str | None:
    """The pattern of the words that a tokenizer encodes one by one; ``None`` if it does not."""
    normalizer, splitter, model = tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.model
    if splitter is None or not (normalizer is None or type(normalizer).__name__ == "NFC"):
        return None
    if type(model).__name__ != "BPE" or model.dropout or tokenizer.encode_special_tokens:
        return None
    if tokenizer.truncation is not None or tokenizer.padding is not None:
        return None
    if any(
        token.lstrip or token.rstrip or token.single_word or token.normalized or not token.content
        for token in _added(tokenizer).values()
    ):
        return None
    match json.loads(splitter.__getstate__()):
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated",
                 "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:  # fmt: skip
            return pattern
    return None
