"""Paths of media files in rows: their spelling, and the folders in which they may lie.

This file decides that a path is relative to the folder of the data file, or absolute (also as a
``file://`` URL) below a media root that the user declared, and that a file lies in one of these
two folders after following links. A relative path with no file in the data file's folder is looked
up in the media root. `qcore.data.media.files` opens the file.

Codes: ``QC-MEDIA-001`` not a path of this kind, ``-004`` outside of the folders.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

from ...api.media import RowError
from ...io.safe_path import unnameable

#: A scheme, as RFC 3986 has it; a file that is called so is named with ``./`` before it.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_FILE_URL = re.compile(r"file:(?://(?:localhost(?=/))?|(?=/))", re.IGNORECASE)
WANTED = "a path relative to the data file, or data:TYPE;base64,..."
ROOT = "name the folder that holds it with --media-root (media_root in a mix file)"


class Folders:
    """The folders in which the media of one data file may lie.

    Args:
        folder: of the data file.
        media_root: declared by the user; without it paths are relative.
    """

    def __init__(self, folder: Path, media_root: Path | None = None) -> None:
        self._root = media_root
        self._folders = [os.path.realpath(folder)]
        self._spelled = [os.path.abspath(folder)]
        if media_root is not None:
            self._folders.append(os.path.realpath(media_root))
            self._spelled.append(os.path.abspath(media_root))

    def find(self, given: str) -> Path:
        """Where a path of a row leads, every link followed; the file need not exist.

        A path that leaves the folders by its spelling is not looked at on disk, so the answer says
        nothing about other files.

        Raises:
            RowError: ``QC-MEDIA-001``, ``QC-MEDIA-004``.
        """
        candidates: list[str] = []
        for name in _names(given):
            self._check(name, given)
            if os.path.isabs(name):
                candidates.append("/" + name.lstrip("/"))
            else:
                candidates += [os.path.join(folder, name) for folder in self._spelled]
        missing, outside = None, False
        for path in candidates:
            spelled = os.path.normpath(path)
            if not any(_below(spelled, folder) for folder in (*self._spelled, *self._folders)):
                continue
            real = os.path.realpath(path)
            if not any(_below(real, folder) for folder in self._folders):
                outside = True
            elif os.path.lexists(real):
                return Path(real)
            else:
                missing = missing or Path(real)
        if missing is not None and not outside:
            return missing
        raise self._outside(given)

    def _check(self, name: str, given: str) -> None:
        """Refuse anything but a path that may be looked up (``QC-MEDIA-001``)."""
        what, fix = "", "write the relative path of a file"
        if not name.strip():
            what = "is empty"
        elif name.lower().startswith(("http:", "https:")):
            what = "is not a relative path but a URL; nothing is fetched"
            fix = "download it first, then write the path of the file"
        elif _SCHEME.match(name):
            what = "is not a relative path; nothing is fetched"
            fix = "put the file beside the data file; before a name with a colon write ./"
        elif name.startswith("~"):
            what, fix = "is not a relative path", "write it relative to the data file"
        elif name.startswith("/") and self._root is None:
            what = "is not a relative path, and no media root is declared"
            fix = f"{ROOT}, or write the path relative to the data file"
        elif "\\" in name:
            what, fix = "has a backslash", "write / between folders"
        elif unnameable(name):
            what = "has a control character or a lone surrogate"
        if what:
            raise RowError("QC-MEDIA-001", what, found=shown(given), expected=WANTED, fix=fix)

    def _outside(self, given: str) -> RowError:
        if self._root is None:
            return RowError(
                "QC-MEDIA-004",
                "leads outside the folder of the data file",
                found=shown(given),
                expected="a file in the folder or below it, links followed",
                fix=f"put the file there, or {ROOT}",
            )
        return RowError(
            "QC-MEDIA-004",
            "leads outside the folder of the data file and the media root",
            found=shown(given),
            expected=f"a file below one of them, links followed; the media root is {self._root}",
            fix="put the file there, or name another folder with --media-root",
        )


def _names(given: str) -> list[str]:
    """The paths that a string may spell, without the head of a ``file:`` URL."""
    head = _FILE_URL.match(given)
    if head is None:
        return [given]
    name = given[head.end() :]
    # Some loaders take what follows file:// as it is; other writers encode it as RFC 8089 has it.
    return [name, unquote(name)] if "%" in name else [name]


def shown(given: str | bytes) -> str:
    """A path or data URL for an error, shortened."""
    if isinstance(given, bytes):
        return f"{len(given)} bytes in the row"
    return repr(given if len(given) <= 80 else f"{given[:77]}...")


def _below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)
