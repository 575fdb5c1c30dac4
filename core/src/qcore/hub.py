"""Where a model comes from: a folder, or an id on the hub.

This file decides what ``--model`` may say (a folder that exists, else ``ORG/NAME`` or
``ORG/NAME@REVISION``), which files are fetched (config, tokenizer, chat template, processor,
generation config, safetensors and its index; never a pickle) and what each failure is called.
Downloading is huggingface_hub's, with its own cache, token, endpoint and offline variables;
its progress bar shows on a terminal only. It leaves what a folder must hold to
`qcore.checkpoint`.

Codes: ``QC-HUB-001`` neither a folder nor an id, ``-002`` a file, ``-003`` not on the hub,
``-004`` no access, ``-005`` no such revision, ``-006`` offline and not cached, ``-007`` the
hub cannot be reached, ``-008`` the download failed, ``-009`` nothing that qcore reads;
``QC-WRITE-*`` where the cache cannot be written.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from . import __version__
from .durable import write_error
from .errors import InputError, QcoreError, TrustError

FILES: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "*processor_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
)
_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION: Final = re.compile(r"[A-Za-z0-9_](?!.*\.\.)[\w./+-]*", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """A model's folder on this machine.

    Attributes:
        path: the folder.
        source: what the user named.
        revision: the commit on the hub; ``None`` for a folder of the user's.
    """

    path: Path
    source: str
    revision: str | None = None


def resolve_model(model: str | Path) -> ResolvedModel:
    """The folder of a model, fetched from the hub where it is not one already.

    Args:
        model: a folder, or ``ORG/NAME[@REVISION]``; a folder of that name wins.

    Raises:
        InputError: ``QC-HUB-*``.
        TrustError: ``QC-HUB-004``, when the hub wants a token or an accepted licence.
        WriteError: the hub's cache cannot be written.
    """
    source = str(model)
    path = Path(source).expanduser()
    if path.is_dir():
        return ResolvedModel(path=path, source=source)
    if os.path.lexists(path):
        fix = f"name the folder: {path.parent}"
        raise InputError("QC-HUB-002", "is not a folder", file=source, fix=fix)
    name, at, revision = source.partition("@")
    if not _ID.fullmatch(name) or (at and not _REVISION.fullmatch(revision)):
        raise InputError(
            "QC-HUB-001",
            "is neither a folder nor a hub id",
            file=source,
            expected="a folder, or ORG/NAME[@REVISION]",
            fix=_near(source, path) or "name a folder that exists",
        )
    return _download(name, revision or None, source)


def _download(name: str, revision: str | None, source: str) -> ResolvedModel:
    from huggingface_hub import constants, errors, snapshot_download

    try:
        with _quiet():
            found = snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(FILES),
                ignore_patterns=["*/*"],  # a pattern's * takes folders too
                library_name="qcore",
                library_version=__version__,
                tqdm_class=_bar(),
            )
    except (errors.HTTPError, errors.HFValidationError) as error:
        raise _refused(error, source, constants.ENDPOINT) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _not_cached(error, source, constants.ENDPOINT) from error
    except OSError as error:
        if error.errno is not None:
            raise write_error(error, Path(error.filename or constants.HF_HUB_CACHE)) from error
        raise _failed(error, source) from error
    except (RuntimeError, getattr(errors, "XetDownloadError", RuntimeError)) as error:
        raise _failed(error, source) from error
    folder = Path(found)
    if not folder.is_dir():
        what = "holds no config, tokenizer or safetensors file"
        raise InputError("QC-HUB-009", what, file=source, fix="name a model repository")
    return ResolvedModel(path=folder, source=source, revision=folder.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave the client's warnings out, where the user asked for none: we say what failed."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    if "HF_HUB_VERBOSITY" not in os.environ and "HF_DEBUG" not in os.environ:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _bar() -> Any:
    """The client's own progress bar, silent where nobody looks at it."""
    if sys.stderr is not None and sys.stderr.isatty():
        return None
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):  # type: ignore[misc]  # the client is not followed by mypy
        """A bar that draws nothing."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"disable": True}))

    return Silent


def _refused(error: Exception, source: str, endpoint: str) -> QcoreError:
    """What an answer of the hub, or the lack of one, means for the user."""
    from huggingface_hub import errors

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return TrustError(
            "QC-HUB-004",
            f"{endpoint} gives this token no access",
            file=source,
            fix=f"accept the licence at {endpoint}/{source.partition('@')[0]} and set HF_TOKEN",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        near = _near(source, Path(source))
        return InputError(
            "QC-HUB-003",
            f"is no folder, and {endpoint} has no public model of that name",
            file=source,
            fix=near or "check the name; for a private model set HF_TOKEN or run: hf auth login",
        )
    if status == 401:
        return TrustError(
            "QC-HUB-004",
            f"{endpoint} does not take this token",
            file=source,
            fix="set a valid HF_TOKEN, or run: hf auth login",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        what = f"{endpoint} has the model but not this revision"
        fix = "name a branch, tag or commit, or leave @REVISION out"
        return InputError("QC-HUB-005", what, file=source, fix=fix)
    if isinstance(error, errors.HFValidationError):
        return InputError("QC-HUB-001", "is no hub id", file=source, expected="ORG/NAME")
    if status is None:
        return _unreachable(error, source, endpoint)
    return InputError(
        "QC-HUB-008", f"{endpoint} answers with status {status}", file=source, fix="try again later"
    )


def _not_cached(error: Exception, source: str, endpoint: str) -> QcoreError:
    """Why the hub was not asked, where the cache could not serve instead."""
    from huggingface_hub import errors

    cause = error.__cause__ or error
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return InputError(
            "QC-HUB-006",
            "is no folder, is not (wholly) in the cache, and HF_HUB_OFFLINE is set",
            file=source,
            fix="unset HF_HUB_OFFLINE once, or name a folder",
        )
    if getattr(cause, "response", None) is not None:
        return _refused(cause if isinstance(cause, Exception) else error, source, endpoint)
    return _unreachable(cause, source, endpoint)


def _unreachable(error: BaseException, source: str, endpoint: str) -> QcoreError:
    return InputError(
        "QC-HUB-007",
        f"is no folder, is not in the cache, and {endpoint} cannot be reached",
        file=source,
        found=_line(error),
        fix="check the network and HF_ENDPOINT, or name a folder",
    )


def _failed(error: Exception, source: str) -> QcoreError:
    return InputError(
        "QC-HUB-008", "the download failed", file=source, found=_line(error), fix="run it again"
    )


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]


def _near(source: str, path: Path) -> str | None:
    """What a mistyped model was probably meant to be."""
    if "://" in source:
        tail = source.partition("://")[2].split("/")[1:3]
        return f"did you mean {'/'.join(tail)}?" if len(tail) == 2 else None
    missing = path
    while not missing.parent.is_dir():
        missing = missing.parent
    try:
        with os.scandir(missing.parent) as entries:
            names = [entry.name for entry in islice(entries, 10_000) if entry.is_dir()]
    except OSError:
        return None
    near = difflib.get_close_matches(missing.name, names, n=1)
    if not near:
        return None
    guess = missing.with_name(near[0])
    rest = path.relative_to(missing)
    return f"did you mean {guess / rest if (guess / rest).is_dir() else guess}?"
