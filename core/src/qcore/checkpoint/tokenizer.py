"""Loads the tokenizer from tokenizer.json alone, with truncation and padding switched off.

This file decides which file defines the tokenizer and which of its settings are disabled. It does
not check whether the token ids fit the embedding.

Code: ``QC-TOKENIZER-001`` no tokenizer.json, or an invalid one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import Failure, InputError, contained
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
    # The class of a panic of the library's Rust code cannot be imported.
    tokenizer = contained(lambda: Tokenizer.from_file(str(path)))
    if isinstance(tokenizer, Failure):
        if isinstance(tokenizer.error, OSError | MemoryError):
            raise tokenizer.error
        raise InputError(
            "QC-TOKENIZER-001",
            "cannot be loaded as a tokenizer",
            file=path,
            found=str(tokenizer.error)[:200],
            fix=f"use {original}",
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
