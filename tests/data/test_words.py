"""Encoding word by word gives the ids and the offsets of the tokenizer, or is not used."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from support.chat_kit import FakeCheckpoint, own_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from qcore.checkpoint.tokenizer import load_tokenizer
from qcore.data.rendering import words as words_module
from qcore.data.rendering.word_pattern import ClassCheck, translated
from qcore.data.rendering.words import WordEncoder, encode_whole, word_pattern

#: Patterns of published tokenizers.
PATTERNS = {
    "words with marks": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "three digits": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "case": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "contractions": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
PARTS = (
    "'s", "'S", "'\u017f", "\xdf", "\r\n", "\n", "\r", " ", "  ", "\t", "\xa0", "\u2003", "a",
    "Zz", "\xe9", "e\u0301", "\u4e2d", "\u306e", "0", "12", "\u0663", "\u2167", "\xb2", "_", "#",
    "...", "<think>", "<|im_end|>", "\x1c", "\x85", "\u200b", "\u0897", "\u0e01\u0e47",
    "\U0001f600", "\U00020000", "'ll", "don't", "\0", "\u0149", "\u212a", "word ", "<|im_",
)  # fmt: skip


def splitting(pattern: str) -> Tokenizer:
    own = own_tokenizer()
    tokenizer = Tokenizer(own.model)
    tokenizer.normalizer = own.normalizer
    added = own.get_added_tokens_decoder().values()
    tokenizer.add_tokens([AddedToken(token.content, normalized=False) for token in added])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return tokenizer


def agree(tokenizer: Tokenizer, texts: int) -> None:
    rng, encoder = random.Random(4), WordEncoder(tokenizer)
    for _ in range(texts // 3):
        some = [
            unicodedata.normalize("NFC", "".join(
                rng.choice(PARTS) if rng.random() < 0.8
                else chr(rng.choice([rng.randrange(32, 0x3000), rng.randrange(0xE000, 0x1FFFF)]))
                for _ in range(rng.randrange(40))
            ))
            for _ in range(3)
        ]  # fmt: skip
        for text, piece in zip(some, encoder.encode(some), strict=True):
            whole = encode_whole(tokenizer, text)
            assert (list(piece.ids), piece.offsets()) == (whole.ids, whole.offsets), repr(text)
            starts = [start for start, _ in whole.offsets]
            for place in range(len(text) + 1):
                assert piece.index(place) == sum(start < place for start in starts), (text, place)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_words_have_the_ids_of_the_text(pattern: str) -> None:
    tokenizer = splitting(pattern)
    assert WordEncoder(tokenizer).by_words
    agree(tokenizer, 600)


def test_words_of_the_real_tokenizer(shared: Path) -> None:
    tokenizer = load_tokenizer(FakeCheckpoint(shared / "skus" / "tokenizer", None))  # type: ignore[arg-type]
    assert WordEncoder(tokenizer).by_words
    agree(tokenizer, 900)


def test_words_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words_module, "_MOST", 50)
    agree(splitting(PATTERNS["words with marks"]), 150)


@pytest.mark.parametrize(
    "pattern",
    [r"\p{L}++|\s", r"\p{L}+?|\s", r"\w+|\W+", ".", r"^\p{L}|\s", r"(\p{L})+", r"[a-z]+|\s",
     r"[\p{L}&&[a]]", r"(?<=a)b", "\xe9+", r"\p{Greek}", r"(?i:\p{L})", r"(?:a", "a)"],
)  # fmt: skip
def test_an_unknown_pattern_is_not_translated(pattern: str) -> None:
    assert translated(pattern, ascii_only=True) is None
    assert translated(pattern, ascii_only=False) is None


def _prefix_space(tokenizer: Tokenizer) -> None:
    split = pre_tokenizers.Split(Regex(PATTERNS["case"]), "isolated")
    spaced = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, spaced])


def _removed(tokenizer: Tokenizer) -> None:
    split = pre_tokenizers.Split(Regex(PATTERNS["case"]), "removed")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])


CHANGES: dict[str, Callable[[Tokenizer], object]] = {
    "prefix space": _prefix_space,
    "removed": _removed,
    "normalizer": lambda one: setattr(one, "normalizer", normalizers.Lowercase()),
    "lstrip": lambda one: one.add_tokens([AddedToken("[x]", lstrip=True)]),
    "normalized": lambda one: one.add_tokens([AddedToken("[x]", normalized=True)]),
    "dropout": lambda one: setattr(one.model, "dropout", 0.5),
    "truncation": lambda one: one.enable_truncation(8),
    "padding": lambda one: one.enable_padding(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_tokenizer_encodes_whole_texts(change: Callable[[Tokenizer], object]) -> None:
    tokenizer = splitting(PATTERNS["case"])
    assert word_pattern(tokenizer)
    change(tokenizer)
    assert word_pattern(tokenizer) is None
    assert not WordEncoder(tokenizer).by_words


def test_characters_on_which_the_libraries_differ_are_encoded_whole() -> None:
    pattern = PATTERNS["words with marks"]
    check = ClassCheck(pattern)
    assert check("plain, \xe9\u0301 \u4e2d \xdf")
    assert not check("'\u017f")  # folds to s, which the pattern matches without regard to case
    assert not check("\U00020000")  # a letter that the translated pattern leaves out
    words = WordEncoder(splitting(pattern))
    assert words._may_divide({"caf\xe9"})
    assert not words._may_divide({"'\u017f"})
