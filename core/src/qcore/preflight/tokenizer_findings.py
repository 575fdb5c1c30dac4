"""Warnings about a tokenizer that loads, and that other files or the text of rows contradict.

This file decides which contradictions are named before a token is trained or generated: a server
that does not stop at the end of a turn, ids that tokenizer_config.json gives to other tokens, and a
normalizer that changes text. `qcore.data.rendering.tokenizer_check` has the errors.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from ..api.records import Finding, Severity
from ..errors import Failure, contained
from ..plugins.resolve_model import Identified

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: Normalizes a text.
Normalize = Callable[[str], str]

_TOKENIZER, _CONFIG, _FIELD = "tokenizer.json", "tokenizer_config.json", "added_tokens_decoder"
#: What a normalizer may lose -> a text that has it.
_PROBES: Final = {"capital letters": "CAF", "accents": "\u00e9"}
_EXAMPLE: Final = "CAF\u00e9"


def tokenizer_findings(
    found: Identified, ids: Mapping[str, int], normalize: Normalize | None
) -> Iterator[Finding]:
    """Yield the warnings of a model.

    Args:
        found: the model.
        ids: ids by token, of tokenizer.json.
        normalize: normalizes text as the tokenizer does; ``None`` if it does not.
    """
    yield from _end_of_turn(found, ids)
    yield from _other_ids(found, ids)
    if normalize is not None:
        yield from _losses(normalize)


def normalize_of(tokenizer: Tokenizer) -> Normalize | None:
    """Return the normalizer of a tokenizer; ``None`` if it has none."""
    normalizer = tokenizer.normalizer
    return None if normalizer is None else normalizer.normalize_str


def normalize_of_content(content: Mapping[str, Any]) -> Normalize | None:
    """Return the normalizer of tokenizer.json without its vocabulary; ``None`` if it has none.

    Args:
        content: what the file holds; it need not be valid.
    """
    if not content.get("normalizer"):
        return None
    from tokenizers import Tokenizer

    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    text = json.dumps({"version": "1.0", "normalizer": content["normalizer"], "model": model})
    tokenizer = contained(lambda: Tokenizer.from_str(text))
    # Loading the tokenizer names what is wrong with it.
    return None if isinstance(tokenizer, Failure) else normalize_of(tokenizer)


def _end_of_turn(found: Identified, ids: Mapping[str, int]) -> Iterator[Finding]:
    """Warn if generation_config.json does not stop at the end of a turn."""
    chat = found.chat_format()
    eos = found.checkpoint.generation_config.get("eos_token_id")
    listed = eos if isinstance(eos, list) else [eos]
    if eos is not None and ids.get(chat.turn_end) not in listed:
        yield Finding(
            code="QC-PRE-004",
            severity=Severity.WARNING,
            what="lacks the end-of-turn token: servers will not stop there",
            file="generation_config.json",
            field="eos_token_id",
            found=str(listed),
            expected=f"{ids.get(chat.turn_end)} ({chat.turn_end}) among them",
            fix="add it",
        )


def _other_ids(found: Identified, ids: Mapping[str, int]) -> Iterator[Finding]:
    """Warn if tokenizer_config.json lists another id for a token; transformers reads both files."""
    listed = found.checkpoint.tokenizer_config.get(_FIELD)
    other = {}
    for number, token in listed.items() if isinstance(listed, Mapping) else ():
        text = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(text, str) and str(number) != str(ids.get(text)):
            other[text] = number
    if other:
        token, number = next(iter(other.items()))
        yield Finding(
            code="QC-PRE-005",
            severity=Severity.WARNING,
            what=f"has another id than {_TOKENIZER} for {len(other)} tokens: transformers and "
            "qcore may read different tokens",
            file=_CONFIG,
            field=f"{_FIELD}: {token}",
            found=number,
            expected=f"{ids[token]}" if token in ids else f"no such token, as in {_TOKENIZER}",
            fix=f"restore the {_TOKENIZER} and the {_CONFIG} that came with the weights",
        )


def _losses(normalize: Normalize) -> Iterator[Finding]:
    """Warn if text loses letters before it is tokenized: a model answers without them."""
    lost = [
        what
        for what, text in _PROBES.items()
        if text not in unicodedata.normalize("NFC", normalize(text))
    ]
    if lost:
        yield Finding(
            code="QC-PRE-006",
            severity=Severity.WARNING,
            what=f"removes {' and '.join(lost)} from all text, also from answers",
            file=_TOKENIZER,
            field="normalizer",
            found=f"{normalize(_EXAMPLE)!r} for {_EXAMPLE!r}",
            expected="text as it is written",
            fix=f"use the {_TOKENIZER} that came with the weights, unless they were trained with "
            "this one",
        )
