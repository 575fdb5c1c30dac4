"""Encoding of the samples of one row: text that they share is tokenized once.

This file decides where a text may be cut so that its pieces are tokenized as the whole is: before
the token that opens a turn, if that is a special token of the tokenizer. A tokenizer splits a text
at its special tokens before it does anything else, so that no other token spans them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Encoding = tuple[list[int], list[tuple[int, int]]]  #: ids, and the characters of each


class PieceEncoder:
    """Encodes texts and remembers the pieces of the last row.

    Args:
        tokenizer: from `load_tokenizer`.
        boundary: the text that opens a turn.
    """

    def __init__(self, tokenizer: Tokenizer, boundary: str) -> None:
        self._tokenizer = tokenizer
        self._boundary = boundary if _splits(tokenizer, boundary) else ""
        self._known: dict[str, Encoding] = {}

    def forget(self) -> None:
        """Drop the pieces: the next row shares nothing with the last one."""
        self._known = {}

    def encode(self, text: str) -> Encoding:
        """Token ids of a text and the characters of each token."""
        if not self._boundary:
            return encode_whole(self._tokenizer, text)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for piece in self._pieces(text):
            if piece not in self._known:
                self._known[piece] = encode_whole(self._tokenizer, piece)
            found, places = self._known[piece]
            ids += found
            offsets += [(start + first, start + last) for first, last in places]
            start += len(piece)
        return ids, offsets

    def _pieces(self, text: str) -> Iterator[str]:
        start = 0
        while (end := text.find(self._boundary, start + 1)) >= 0:
            yield text[start:end]
            start = end
        yield text[start:]


def encode_whole(tokenizer: Tokenizer, text: str) -> Encoding:
    """Token ids of a text and the characters of each token."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets


def _splits(tokenizer: Tokenizer, token: str) -> bool:
    """Whether a tokenizer splits a text at this token and takes nothing around it."""
    for added in tokenizer.get_added_tokens_decoder().values():
        if added.content == token:
            apart = not (added.lstrip or added.rstrip or added.single_word or added.normalized)
            return bool(added.special and apart)
    return False
