"""Encoding by pieces gives the ids and the offsets of the whole text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support.chat_kit import FORMAT, FakeCheckpoint, own_tokenizer
from tokenizers import AddedToken, Tokenizer

from qcore.checkpoint.tokenizer import load_tokenizer
from qcore.data.rendering.pieces import PieceEncoder, encode_whole

START = FORMAT.turn_start
PARTS = (
    START, "<|im_end|>", "user\n", "\n", "\n\n", " ", "  x", "<think>\n", "हिन्दी", "e\u0301",
    "\u0301", "👩🏽‍🚀", "word " * 3, "<|im_st", "art|>", "मُ",
)  # fmt: skip


def agree(tokenizer: Tokenizer) -> None:
    rng, encoder = random.Random(4), PieceEncoder(tokenizer, START)
    for number in range(300):
        text = "".join(rng.choice(PARTS) for _ in range(rng.randrange(1, 30)))
        if number % 3 == 0:
            encoder.prepare([text])
        pieces, whole = encoder.encode(text), encode_whole(tokenizer, text)
        assert (list(pieces.ids), pieces.offsets()) == (whole.ids, whole.offsets), repr(text)
        starts = [start for start, _ in whole.offsets]
        for place in range(len(text) + 1):
            assert pieces.index(place) == sum(start < place for start in starts), (text, place)


def test_pieces_are_encoded_as_the_whole_is() -> None:
    agree(own_tokenizer())
    assert PieceEncoder(own_tokenizer(), START)._boundary == START


def test_pieces_of_the_real_tokenizer(shared: Path) -> None:
    tokenizer = load_tokenizer(FakeCheckpoint(shared / "skus" / "tokenizer", None))  # type: ignore[arg-type]
    agree(tokenizer)
    assert PieceEncoder(tokenizer, START)._boundary == START


@pytest.mark.parametrize("odd", ["lstrip", "rstrip", "single_word", "normalized"])
def test_a_token_that_takes_what_is_around_it_is_not_a_boundary(odd: str) -> None:
    tokenizer = own_tokenizer()
    token = "<|turn|>"
    assert PieceEncoder(tokenizer, token)._boundary == ""
    tokenizer.add_special_tokens([AddedToken(token, special=True, **{odd: True})])
    assert PieceEncoder(tokenizer, token)._boundary == ""


@pytest.mark.parametrize("boundary", [START, "no token"])
def test_a_prompt_has_the_tokens_that_it_has_alone(shared: Path, boundary: str) -> None:
    tokenizer = load_tokenizer(FakeCheckpoint(shared / "skus" / "tokenizer", None))  # type: ignore[arg-type]
    encoder = PieceEncoder(tokenizer, boundary)
    before, header = f"{START}user\nहि<|im_end|>\n", f"{START}assistant\n<think>\n"
    for reply, splits in (("because", True), ("\n</think>\n\nyes", False)):
        text = f"{before}{header}{reply}<|im_end|>\n{before}"
        turn = len(before), len(before + header)
        assert encoder.splits(text, turn) == splits
        tokens = encoder.encode(text, turn)
        ids, offsets = list(tokens.ids), tokens.offsets()
        prompt = encode_whole(tokenizer, before + header).ids
        rest = encode_whole(tokenizer, text[turn[1] :]).ids
        assert ids == prompt + rest
        assert offsets[len(prompt)][0] == turn[1]
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert (ids == encode_whole(tokenizer, text).ids) == splits
