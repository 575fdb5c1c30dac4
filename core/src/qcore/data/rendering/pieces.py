"""Encoding of samples: text that the samples of a row share is tokenized once, prompts as served.

This file decides where a text may be cut so that its pieces are tokenized as the whole is: before
the token that opens a turn, if that is a special token of the tokenizer. A tokenizer splits a text
at its special tokens before it does anything else, so that no other token spans them.

A model reads the tokens of its prompt and then produces its own. Where the tokenizer merges the end
of the prompt with the reply (``<think>`` and two newlines), the prompt of a sample is therefore
tokenized apart from the reply.
"""

from __future__ import annotations

from bisect import bisect_left
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
        self._shared = True

    def begin_row(self, *, shared: bool = True) -> None:
        """Drop the pieces: the next row shares nothing with the last one.

        Args:
            shared: whether the row may have several samples, so that its pieces are remembered.
        """
        self._known, self._shared = {}, shared

    def encode(self, text: str) -> Encoding:
        """Token ids of a text and the characters of each token."""
        if not self._boundary or not self._shared:
            return encode_whole(self._tokenizer, text)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for piece in self._pieces(text):
            found, places = self._piece(piece)
            ids += found
            offsets += [(start + first, start + last) for first, last in places]
            start += len(piece)
        return ids, offsets

    def encode_reply(self, text: str, start: int, reply: int) -> Encoding:
        """As `encode`, with the tokens of the prompt as the prompt alone has them.

        Args:
            text: the text, normalized.
            start: where the turn of the reply begins.
            reply: where the prompt ends.
        """
        ids, offsets = self.encode(text)
        start, end = self._turn(text, start, reply)
        starts = [first for first, _ in offsets]
        first, after = bisect_left(starts, start), bisect_left(starts, end)
        header = self._header(text[start:reply])
        if ids[first : first + len(header)] == header:
            return ids, offsets
        parts = [(start, *encode_whole(self._tokenizer, text[start:reply]))]
        parts.append((reply, *encode_whole(self._tokenizer, text[reply:end])))
        made = [id_ for _, some, _ in parts for id_ in some]
        places = [(at + a, at + b) for at, _, some in parts for a, b in some]
        return ids[:first] + made + ids[after:], offsets[:first] + places + offsets[after:]

    def splits(self, text: str, start: int, reply: int) -> bool:
        """Whether the prompt of a turn has the same tokens alone as in a text.

        Args:
            text: the text, which need not be normalized.
            start: where the turn begins.
            reply: where the prompt ends.
        """
        start, end = self._turn(text, start, reply)
        turn, prompt = (normalized(text[start:to], self._tokenizer) for to in (end, reply))
        header = self._header(prompt)
        return turn.startswith(prompt) and self._piece(turn)[0][: len(header)] == header

    def _turn(self, text: str, start: int, reply: int) -> tuple[int, int]:
        """Where a turn may be cut out of a text."""
        if not self._boundary:
            return 0, len(text)
        end = text.find(self._boundary, reply)
        return start, len(text) if end < 0 else end

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
