"""Encoding of texts in pieces: what several texts share is tokenized once.

This file decides where a text may be cut so that its pieces are tokenized as the whole is: before
the token that opens a turn, if that is a special token of the tokenizer. A tokenizer splits a text
at its special tokens before it does anything else, so that no other token spans them. The samples
of a row share most of their turns, and rows share their system prompts and tools.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_KEPT: Final = 1 << 17  # tokens of pieces that are remembered; about 100 bytes each


class Tokens:
    """The token ids of a text, and where its characters are among them.

    Args:
        pieces: the pieces of the text with their encodings.

    Attributes:
        ids: token ids.
    """

    def __init__(self, pieces: Iterable[tuple[str, Encoding]]) -> None:
        self.ids = array("i")
        self._pieces: list[Encoding] = []
        self._characters: list[int] = []  # of the text before each piece
        self._tokens: list[int] = []  # before each piece
        at = 0
        for text, encoding in pieces:
            self._pieces.append(encoding)
            self._characters.append(at)
            self._tokens.append(len(self.ids))
            self.ids.extend(encoding.ids)
            at += len(text)

    def index(self, position: int) -> int:
        """Number of tokens that start before a character of the text."""
        at = bisect_right(self._characters, position) - 1
        return self._tokens[at] + _index(self._pieces[at], position - self._characters[at])

    def offsets(self) -> list[tuple[int, int]]:
        """The characters of each token."""
        return [
            (before + start, before + end)
            for before, piece in zip(self._characters, self._pieces, strict=True)
            for start, end in piece.offsets
        ]


def _index(encoding: Encoding, position: int) -> int:
    """`Tokens.index` of one piece.

    The tokenizer is asked, because a list of all offsets takes longer than the encoding itself.
    """
    token = encoding.char_to_token(position)
    if token is None:  # between two tokens, or at the end
        return bisect_right([start for start, _ in encoding.offsets], position - 1)
    while token < len(encoding) and _start(encoding, token) < position:
        token += 1
    return token


def _start(encoding: Encoding, token: int) -> int:
    place = encoding.token_to_chars(token)
    assert place is not None, "only texts without padding are encoded"
    return int(place[0])


class PieceEncoder:
    """Encodes texts and remembers the pieces that it has encoded last.

    Args:
        tokenizer: from `load_tokenizer`.
        boundary: the text that opens a turn.
    """

    def __init__(self, tokenizer: Tokenizer, boundary: str) -> None:
        self._tokenizer = tokenizer
        self._boundary = boundary if _splits(tokenizer, boundary) else ""
        self._known: dict[str, Encoding] = {}
        self._tokens = 0

    def prepare(self, texts: Iterable[str]) -> None:
        """Encode the pieces of some texts together, which takes less time than one by one."""
        wanted = dict.fromkeys(piece for text in texts for piece in self._split(text))
        known = {piece: self._known.pop(piece) for piece in wanted if piece in self._known}
        new = [piece for piece in wanted if piece not in known]
        self._forget()
        self._known |= known  # used last
        encodings = self._tokenizer.encode_batch(new, add_special_tokens=False) if new else ()
        for piece, encoding in zip(new, encodings, strict=True):
            self._known[piece] = encoding
            self._tokens += len(encoding)

    def _forget(self) -> None:
        """Drop the pieces that were not used for the longest time."""
        for piece in list(self._known):
            if self._tokens <= _KEPT:
                return
            self._tokens -= len(self._known.pop(piece))

    def encode(self, text: str) -> Tokens:
        """Token ids of a text, and where its characters are among them."""
        return Tokens((piece, self._encoding(piece)) for piece in self._split(text))

    def _encoding(self, piece: str) -> Encoding:
        known = self._known.get(piece)
        if known is None:
            known = self._known[piece] = encode(self._tokenizer, piece)
            self._tokens += len(known)
        return known

    def _split(self, text: str) -> Iterator[str]:
        start = 0
        while self._boundary and (end := text.find(self._boundary, start + 1)) >= 0:
            yield text[start:end]
            start = end
        yield text[start:]


def encode(tokenizer: Tokenizer, text: str) -> Encoding:
    """Encode a text as it is."""
    return tokenizer.encode(text, add_special_tokens=False)


def _splits(tokenizer: Tokenizer, token: str) -> bool:
    """Whether a tokenizer splits a text at this token and takes nothing around it."""
    for added in tokenizer.get_added_tokens_decoder().values():
        if added.content == token:
            apart = not (added.lstrip or added.rstrip or added.single_word or added.normalized)
            return bool(added.special and apart)
    return False
