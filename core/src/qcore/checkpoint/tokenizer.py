"""The tokenizer of a checkpoint: tokenizer.json alone, read as it is written there.

This file decides which file makes the tokenizer and what is switched off in it. Whether its ids
fit the embedding is judged elsewhere.

Code: ``QC-TOKENIZER-001`` no tokenizer.json, or one that does not load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..api.views import CheckpointView
from ..errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_tokenizer(checkpoint: CheckpointView) -> Tokenizer:
    """The tokenizer of tokenizer.json, as it is written there.

    Not ``AutoTokenizer``: it chooses another pre-tokenizer by what lies beside the file.
    Truncation and padding that a re-save left in the file are switched off.

    Raises:
        InputError: ``QC-TOKENIZER-001`` no tokenizer.json, or none that loads.
    """
    from tokenizers import Tokenizer

    wanted = "the tokenizer.json that came with the weights"
    if "tokenizer.json" not in checkpoint.sidecars:
        raise InputError(
            "QC-TOKENIZER-001",
            "has no tokenizer.json",
            file=checkpoint.path,
            fix=f"add {wanted}",
        )
    path = checkpoint.file("tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        if type(error) is not Exception:  # the library raises the bare class, nothing else does
            raise
        raise InputError(
            "QC-TOKENIZER-001",
            "is no tokenizer that loads",
            file=path,
            found=str(error)[:200],
            fix=f"use {wanted}",
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
