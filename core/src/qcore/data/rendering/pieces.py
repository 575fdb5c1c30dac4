"""Encoding of samples: text that the samples of a row share is tokenized once, prompts as served.

This file decides where a text may be cut so that its pieces are tokenized as the whole is: before
the token that opens a turn, if that is a special token of the tokenizer. A tokenizer splits a text
at its special tokens before it does anything else, so that no other token spans them.

A model reads the tokens of its prompt and then produces its own. Where the tokenizer merges the end
of the prompt with the reply (``<think>`` and two newlines), the prompt of a sample is therefore
tokenized apart from the reply.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Encoding = tuple[list[int], list[tuple[int, int]]]  #: ids, and the characters of each
_HEADERS = 64  #: headers of turns that are remembered


def normalized(text: str, tokenizer: Tokenizer) -> str:
    """Apply the tokenizer's NFC normalization, so that offsets refer to the returned text."""
    normalizer = tokenizer.normalizer
    if normalizer is None or type(normalizer).__name__ != "NFC" or text.isascii():
        return text
    done: str = normalizer.normalize_str(text)
    return done


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
        self._headers: dict[str, list[int]] = {}

    def forget(self) -> None:
        """Drop the pieces: the next row shares nothing with the last one."""
        self._known = {}

    def encode(self, text: str, turn: tuple[int, int] | None = None) -> Encoding:
        """Token ids of a text and the characters of each token.

        Args:
            text: the text, normalized.
            turn: where a turn begins and where its prompt ends: the tokens of the prompt are those
                that it has alone.
        """
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for piece in self._pieces(text, turn):
            found, places = self._piece(piece)
            ids += found
            offsets += [(start + first, start + last) for first, last in places]
            start += len(piece)
        return ids, offsets

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
        return whole.startswith(prompt) and self._piece(whole)[0][: len(header)] == header

    def _header(self, text: str) -> list[int]:
        """Ids of the header of a turn with the tail of its prompt; there are few of them."""
        if not self._boundary:  # a whole prompt
            return encode_whole(self._tokenizer, text)[0]
        if text not in self._headers:
            if len(self._headers) >= _HEADERS:
                self._headers.clear()
            self._headers[text] = encode_whole(self._tokenizer, text)[0]
        return self._headers[text]

    def _piece(self, piece: str) -> Encoding:
        if piece not in self._known:
            self._known[piece] = encode_whole(self._tokenizer, piece)
        return self._known[piece]

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
