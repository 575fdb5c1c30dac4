"""Whether a tokenizer fits a model: every id has an embedding, every special token exists.

This file decides both checks and their errors; `qcore.preflight.checks` asks them of a run
before any row is read, `qcore.data.rendering.template_check` of the tokens that it proves a mask
with. Loading a tokenizer is `qcore.data.rendering.masking`'s business.

Codes: ``QC-PRE-002`` an id beyond the embedding, ``-003`` a token that the tokenizer lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
_FIX = "use the tokenizer that came with the weights"


def id_beyond(ids: Mapping[str, int], rows: int, folder: Path) -> InputError | None:
    """The error for the largest id, if the embedding has no row for it.

    Args:
        ids: ids by token, all of the tokenizer's.
        rows: rows of the embedding.
        folder: the checkpoint, for the error.
    """
    largest = max(ids, key=lambda token: (ids[token], token), default=None)
    if largest is None or ids[largest] < rows:
        return None
    return InputError(
        "QC-PRE-002",
        "has an id beyond the embedding",
        file=folder / TOKENIZER,
        field=repr(largest),
        found=ids[largest],
        expected=f"< {rows} (vocab_size)",
        fix=_FIX,
    )


def unknown_tokens(
    tokens: Iterable[str],
    lookup: Callable[[str], int | None],
    *,
    file: Path | str = TOKENIZER,
    purpose: str = "as the chat format needs",
) -> Iterator[InputError]:
    """An error for each token that the tokenizer does not have as one token.

    Args:
        tokens: what must exist; one that is listed twice counts once.
        lookup: id of a token, or ``None``.
        file: the tokenizer's, for the errors.
        purpose: what the tokens are for.
    """
    for token in dict.fromkeys(tokens):
        if lookup(token) is None:
            yield InputError(
                "QC-PRE-003",
                "is not in the tokenizer",
                file=file,
                field=repr(token),
                expected=f"one token, {purpose}",
                fix=_FIX,
            )


def special_texts(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Special tokens of the tokenizer, which become control tokens in any text."""
    added = tokenizer.get_added_tokens_decoder().values()
    return tuple(token.content for token in added if token.special)
