"""Loads the tokenizer from tokenizer.json alone, with truncation and padding switched off.

This file decides which file defines the tokenizer and which of its settings are disabled. It does
not check whether the token ids fit the embedding.

Code: ``QC-TOKENIZER-001`` no tokenizer.json, or an invalid one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import InputError
from .tokenizer_files import TOKENIZER, Files

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_tokenizer(checkpoint: Files) -> Tokenizer:
    """Load the tokenizer from tokenizer.json, exactly as the file defines it.

    ``AutoTokenizer`` is not used, because other files in the folder change its pre-tokenizer.
    Truncation and padding, which a re-save may leave in the file, are disabled.

    Raises:
        InputError: ``QC-TOKENIZER-001`` no tokenizer.json, or an invalid one.
    """
    from tokenizers import Tokenizer

    original = "the tokenizer.json that came with the weights"
    if TOKENIZER not in checkpoint.sidecars:
        raise InputError(
            "QC-TOKENIZER-001",
            "has no tokenizer.json",
            file=checkpoint.path,
            fix=f"add {original}",
        )
    path = checkpoint.file(TOKENIZER)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except BaseException as error:
        # Only the tokenizers library raises the bare class; a panic of its Rust code is no
        # Exception, and its class cannot be imported.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise InputError(
            "QC-TOKENIZER-001",
            "cannot be loaded as a tokenizer",
            file=path,
            found=str(error)[:200],
            fix=f"use {original}",
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
