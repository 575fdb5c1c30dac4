"""The stock class of a folder: whether transformers is installed, which class, what it refuses.

This file decides how a class is named (a class of transformers, or an Auto class resolved by the
config), and that the libraries' own output stays off the terminal. `stock_model` loads the class.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import read_json, safe_file
from ..errors import InputError, UsageError

#: Files that may name code in ``auto_map``.
_WITH_CODE = (
    "config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
    "adapter_config.json",
)  # fmt: skip
INSTALL = 'pip install "qcore-framework[interop]"'


def require_interop() -> None:
    """Raise ``QC-STOCK-001`` unless transformers, PEFT and accelerate are installed."""
    missing = [
        name
        for name in ("transformers", "peft", "accelerate")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise UsageError(
            "QC-STOCK-001",
            "needs packages that are not installed",
            field="--against stock",
            found=f"no {', no '.join(missing)}",
            fix=INSTALL,
        )


def refuse_code(folder: Path) -> None:
    """Refuse a folder that names Python code of its own, which transformers could run.

    Raises:
        InputError: ``QC-STOCK-004``.
    """
    for name in _WITH_CODE:
        if (folder / name).is_file() and read_json(safe_file(folder, name)).get("auto_map"):
            raise InputError(
                "QC-STOCK-004",
                "names code of its own, which is never run",
                file=folder / name,
                field="auto_map",
                fix="use a checkpoint of a class that transformers has",
            )


def stock_class(folder: Path, name: str | None) -> tuple[Any, Any]:
    """The class of transformers that loads a folder, and its config.

    Args:
        folder: with config.json.
        name: of a class, or of an Auto class, which is resolved by the config.

    Raises:
        InputError: ``QC-STOCK-004``.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    asked, name = name, name or next(iter(config.architectures or []), "")
    cls: Any = getattr(transformers, name, None) if name else None
    mapping = getattr(cls, "_model_mapping", None)
    if mapping is not None:
        cls = mapping.get(type(config), None)
    if not hasattr(cls, "from_pretrained") or not hasattr(cls, "base_model_prefix"):
        raise InputError(
            "QC-STOCK-004",
            "names no class of the installed transformers that loads this model",
            file=folder / "config.json",
            field="--stock-class" if asked else "architectures",
            found=name or "none",
            fix="leave --stock-class out, or name a class with a head for language modeling"
            if asked
            else "pass --stock-class, or upgrade transformers",
        )
    if not isinstance(config, cls.config_class):
        config = config.get_text_config()
    return cls, config


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' progress bars and warnings off the terminal; findings are reported."""
    from transformers.utils import logging as their_logging

    verbosity, bars = their_logging.get_verbosity(), their_logging.is_progress_bar_enabled()
    # PEFT imports bitsandbytes, which warns of a kernel that nothing here uses.
    bnb = logging.getLogger("bitsandbytes")
    bnb_level = bnb.level
    bnb.setLevel(logging.CRITICAL)
    their_logging.set_verbosity(logging.CRITICAL)
    their_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        their_logging.set_verbosity(verbosity)
        bnb.setLevel(bnb_level)
        if bars:
            their_logging.enable_progress_bar()


@contextmanager
def refusals(folder: Path) -> Iterator[None]:
    """What the stock libraries refuse, as an error of the folder."""
    try:
        yield
    except (
        ValueError,
        TypeError,
        KeyError,
        RuntimeError,
        OSError,
        ImportError,
        AttributeError,
    ) as error:
        raise InputError(
            "QC-STOCK-004",
            "is not loaded by stock transformers and PEFT",
            file=folder,
            found=f"{type(error).__name__}: {str(error)[:300]}",
            fix="correct the folder, or upgrade the packages",
        ) from error
