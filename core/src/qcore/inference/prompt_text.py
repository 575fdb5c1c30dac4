"""The text of a prompt: refused where a row with the same text would be.

This file decides that a prompt may not hold what only the chat template writes: control strings of
the chat format and special tokens of the tokenizer, which the tokenizer would take for the end of a
turn. `qcore.data.rows` decides which strings these are.
"""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import Tokenizer

from ..api.media import RowError
from ..api.records import ChatFormat
from ..data.rendering.tokenizer_check import special_texts
from ..data.rows import RowCheck
from ..errors import UsageError


def check_prompt(chat: ChatFormat, tokenizer: Tokenizer, texts: Mapping[str, str]) -> None:
    """Refuse control strings, special tokens and NUL in what the user typed.

    Args:
        chat: the chat format of the model.
        tokenizer: the tokenizer of the model.
        texts: by the option that gave it.

    Raises:
        UsageError: ``QC-GENERATE-006``.
    """
    check = RowCheck(chat, special_texts(tokenizer))
    for field, text in texts.items():
        try:
            check.check_text(text, field)
        except RowError as error:
            raise UsageError(
                "QC-GENERATE-006", error.what, field=field, found=error.found,
                expected=error.expected, fix="leave it out of the prompt",
            ) from None  # fmt: skip
