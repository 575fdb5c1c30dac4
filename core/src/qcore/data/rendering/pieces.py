"""Encoding of samples: text that the samples of a row share is tokenized once, prompts as served.

This file decides where a text may be cut so that its pieces are tokenized as the whole is: before
the token that opens a turn, if that is a special token of the tokenizer. A tokenizer splits a text
at its special tokens before it does anything else, so that no other token spans them. The samples
of a row share most of their turns, and rows share their system prompts and tools.

A model reads the tokens of its prompt and then produces its own. Where the tokenizer merges the end
of the prompt with the reply (``<think>`` and two newlines), the prompt of a sample is therefore
tokenized apart from the reply.
"""

from __future__ import annotations

import unicodedata
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_HEADERS: Final = 64  # headers of turns that are remembered
_KEPT: Final = 1 << 17  # tokens of pieces that are remembered; 100 bytes each at most


def normalized(text: str, tokenizer: Tokenizer) -> str:
    """Apply the tokenizer's NFC normalization, so that offsets refer to the returned text."""
    normalizer = tokenizer.normalizer
    if normalizer is None or type(normalizer).__name__ != "NFC":
        return text
    if text.isascii() or unicodedata.is_normalized("NFC", text):
        return text
    done: str = normalizer.normalize_str(text)
    return done


class _Piece:
    """An encoded piece of a text, and its ids, which the encoding copies at every use."""

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


class Tokens:
    """The token ids of a text, and where its characters are among them.

    Args:
        pieces: the pieces of the text, encoded.

    Attributes:
        ids: token ids.
    """

    def __init__(self, pieces: Iterable[tuple[str, _Piece]]) -> None:
        self.ids = array("i")
        self._pieces: list[_Piece] = []
        self._characters: list[int] = []  # of the text before each piece
        self._tokens: list[int] = []  # before each piece
        at = 0
        for text, piece in pieces:
            self._pieces.append(piece)
            self._characters.append(at)
            self._tokens.append(len(self.ids))
            self.ids += piece.ids
            at += len(text)

    def index(self, position: int) -> int:
        """Number of tokens that start before a character of the text."""
        at = bisect_right(self._characters, position) - 1
        if at < 0:  # no text
            return 0
        return self._tokens[at] + self._pieces[at].index(position - self._characters[at])

    def offsets(self) -> list[tuple[int, int]]:
        """The characters of each token."""
        return [
            (before + start, before + end)
            for before, piece in zip(self._characters, self._pieces, strict=True)
            for start, end in piece.offsets()
        ]


class PieceEncoder:
    """Encodes texts and remembers the pieces that it has encoded last.

    Args:
        tokenizer: from `load_tokenizer`.
        boundary: the text that opens a turn.
    """

    def __init__(self, tokenizer: Tokenizer, boundary: str) -> None:
        self._tokenizer = tokenizer
        self._boundary = boundary if _splits(tokenizer, boundary) else ""
        self._known: dict[str, _Piece] = {}
        self._tokens = 0
        self._headers: dict[str, array[int]] = {}

    def prepare(self, texts: Iterable[str]) -> None:
        """Encode the pieces of some texts together, which takes less time than one by one.

        Args:
            texts: the texts, which need not be normalized.
        """
        wanted = dict.fromkeys(
            piece
            for text in texts
            for piece in self._pieces(normalized(text, self._tokenizer), None)
        )
        known = {piece: self._known.pop(piece) for piece in wanted if piece in self._known}
        self._forget()
        self._known |= known  # used last
        new = [piece for piece in wanted if piece not in known]
        encodings = self._tokenizer.encode_batch(new, add_special_tokens=False) if new else ()
        for piece, encoding in zip(new, encodings, strict=True):
            self._known[piece] = _Piece(encoding)
            self._tokens += len(encoding)

    def _forget(self) -> None:
        """Drop the pieces that were not used for the longest time."""
        for piece in list(self._known):
            if self._tokens <= _KEPT:
                return
            self._tokens -= len(self._known.pop(piece).ids)

    def encode(self, text: str, turn: tuple[int, int] | None = None) -> Tokens:
        """Token ids of a text, and where its characters are among them.

        Args:
            text: the text, normalized.
            turn: where a turn begins and where its prompt ends: the tokens of the prompt are those
                that it has alone.
        """
        return Tokens((piece, self._piece(piece)) for piece in self._pieces(text, turn))

    def splits(self, text: str, turn: tuple[int, int]) -> bool:
        """Whether the prompt of a turn has the same tokens alone as in a text.

        Args:
            text: the text, which need not be normalized.
            turn: where the turn begins and where its prompt ends.
        """
        start, reply = turn
        if not self._boundary:
            start, end = 0, len(text)
        else:
            end = text.find(self._boundary, reply)
        whole = normalized(text[start : end if end >= 0 else None], self._tokenizer)
        prompt = normalized(text[start:reply], self._tokenizer)
        header = self._header(prompt)
        return whole.startswith(prompt) and self._piece(whole).ids[: len(header)] == header

    def _header(self, text: str) -> array[int]:
        """Ids of the header of a turn with the tail of its prompt; there are few of them."""
        if not self._boundary:  # a whole prompt
            return _Piece(encode_whole(self._tokenizer, text)).ids
        if text not in self._headers:
            if len(self._headers) >= _HEADERS:
                self._headers.clear()
            self._headers[text] = _Piece(encode_whole(self._tokenizer, text)).ids
        return self._headers[text]

    def _piece(self, piece: str) -> _Piece:
        known = self._known.get(piece)
        if known is None:
            known = self._known[piece] = _Piece(encode_whole(self._tokenizer, piece))
            self._tokens += len(known.ids)
        return known

    def _pieces(self, text: str, turn: tuple[int, int] | None) -> Iterator[str]:
        reply = -1 if turn is None or self.splits(text, turn) else turn[1]
        start = 0
        while start < len(text):
            end = text.find(self._boundary, start + 1) if self._boundary else -1
            end = len(text) if end < 0 else end
            if start < reply < end:
                end = reply
            yield text[start:end]
            start = end


def encode_whole(tokenizer: Tokenizer, text: str) -> Encoding:
    """Encode a text as it is."""
    return tokenizer.encode(text, add_special_tokens=False)


def _splits(tokenizer: Tokenizer, token: str) -> bool:
    """Whether a tokenizer splits a text at this token and takes nothing around it."""
    for added in tokenizer.get_added_tokens_decoder().values():
        if added.content == token:
            apart = not (added.lstrip or added.rstrip or added.single_word or added.normalized)
            return bool(added.special and apart)
    return False
