"""The sources of rows: files, folders, hub datasets and mix files, as a user names them.

This file decides what a word of ``--data`` means: a path that exists (a YAML file is a mix,
``dataset_info.json[:NAME,...]`` a list of data sets), else ``ORG/NAME[@REVISION]`` on the hub; and
which files of a folder are read. Every file is looked at before the first row is read, so that a
missing or foreign file is reported at once. `qcore.data.sources.mix` and
`qcore.data.sources.dataset_info` read lists of sources, `qcore.data.sources.hub_files` resolves hub
datasets.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Final

from ...errors import InputError, QcoreError, UsageError, nearest, raise_all
from ...io.artifact import MANIFEST
from ..formats import Formats, load_formats
from .dataset_info import NAME, read_dataset_info, split_word
from .file_kinds import (
    COLUMN_SUFFIXES,
    COMPRESSED,
    TEXT_SUFFIXES,
    file_kind,
    is_data_name,
    suffixes,
)
from .hub_files import ID, REVISION, hub_files
from .mix import SUFFIXES, Entry, read_mix
from .source import Source
from .streams import opened, unreadable

_MAX_FILES: Final = 100_000
_MISSING: Final = os.strerror(errno.ENOENT)
_NAMED: Final = 5  # files that a note names
# What `convert`, `save_to_disk`, LLaMA-Factory and the hub write beside the rows.
_NOT_ROWS: Final = frozenset(
    (MANIFEST, NAME, "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
)
_SPLITS: Final = frozenset(("train", "test", "validation", "valid", "val", "dev", "eval"))
_WORD_ENDS: Final = re.compile(r"[-_. ]+")


def read_sources(
    data: Sequence[str | Path],
    *,
    format: str = "",
    media_root: Path | None = None,
    command: str = "--data",
) -> tuple[Source, ...]:
    """Make sources of what a user named, in that order.

    Args:
        data: files, folders, hub ids or mix files.
        format: row format of every source that does not name its own.
        media_root: folder of absolute media paths, of every source that does not name its own.
        command: the flag, for errors.

    Raises:
        UsageError: ``QC-DATA-038`` a word cannot be a path; ``QC-DATA-035`` and ``QC-YAML-*`` a mix
            file; ``QC-DATA-060`` a media root that is not a folder; ``-027`` an unknown
            format; ``-028`` an invalid field mapping.
        InputError: ``QC-DATA-001`` to ``-003``, ``-030``, ``-031``, ``-033``, ``-037``, ``-039`` a
            folder of several splits, and ``QC-HUB-*``; a `PreflightError` for several.
    """
    sources: list[Source] = []
    problems: list[QcoreError] = []
    formats = load_formats()
    for word in data:
        try:
            mix, entries = _entries(str(word), command)
        except QcoreError as error:
            problems.append(error)
            continue
        listed = None if mix is None else (mix, _sha256(mix))
        for entry in entries:
            try:
                sources.append(replace(_source(entry, mix), mix=listed))
                _check_format(entry, mix, formats)
            except QcoreError as error:
                problems.extend(getattr(error, "errors", (error,)))
    if format and data:
        formats.check(format)
    raise_all(problems)
    sources = [
        replace(each, format=each.format or format, media_root=each.media_root or media_root)
        for each in sources
    ]
    _check_roots(sources)
    return tuple(_note_repeated(sources))


def _check_format(entry: Entry, mix: Path | None, formats: Formats) -> None:
    """Refuse an unknown format and a wrong field mapping before anything is opened for the rows."""
    try:
        formats.check(entry.options.get("format", ""), entry.options.get("fields"))
    except QcoreError as error:
        raise error.replace(file=mix, field=f"{entry.place}.{error.field}") from None


def _check_roots(sources: Sequence[Source]) -> None:
    """Refuse a media root that is not a folder, before a row is read (``QC-DATA-060``)."""
    for root in dict.fromkeys(source.media_root for source in sources):
        if root is not None and not os.path.isdir(root):
            raise UsageError(
                "QC-DATA-060",
                "the media root is not a folder",
                field="--media-root",
                found=str(root),
                fix="name the folder that holds the images and videos",
            )


def _entries(word: str, command: str) -> tuple[Path | None, tuple[Entry, ...]]:
    """The mix file, if it is one, and the entries that a word names."""
    path = Path(word).expanduser()
    if "\0" in word or not word.strip():
        raise UsageError(
            "QC-DATA-038",
            "is not a path",
            field=command,
            found=repr(word[:40]),
            fix="name a file, a folder, a hub id or a mix file",
        )
    if (info := split_word(word)) is not None:
        return info[0], read_dataset_info(*info)
    if (reason := _unreachable(path)) is None:
        if path.suffix.lower() in SUFFIXES and not path.is_dir():
            with opened(path):  # a pipe or a device would block the YAML reader
                return path, read_mix(path)
        return None, (Entry(place="", path=path),)
    name, at, revision = word.partition("@")
    is_id = ID.fullmatch(name) and (not at or REVISION.fullmatch(revision))
    if reason != _MISSING or _names_a_file(word) or not is_id:
        raise unreadable(path, reason, _near(path) if reason == _MISSING else None)
    return None, (Entry(place="", hub=name, revision=revision),)


def _sha256(path: Path) -> str:
    with opened(path) as file:
        return hashlib.sha256(file.read()).hexdigest()


def _unreachable(path: Path) -> str | None:
    """Why a path cannot be reached; ``None`` if something is there."""
    try:
        os.lstat(path)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _names_a_file(word: str) -> bool:
    path = Path(word)
    suffix = path.suffix.lower()
    known = (*TEXT_SUFFIXES, *COLUMN_SUFFIXES, *COMPRESSED, *SUFFIXES)
    near = nearest(suffix, known, cutoff=0.75) if suffix else None
    return near is not None or word.startswith((".", "~", "/"))


def _near(path: Path) -> str | None:
    """The name of an existing neighbor that was probably meant."""
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in islice(entries, 10_000)]
    except OSError:
        missing = path.parent
        while not missing.parent.is_dir():
            missing = missing.parent
        return f"there is no folder {missing}"
    near = nearest(path.name, names)
    return f"did you mean {path.with_name(near)}?" if near else None


def _source(entry: Entry, mix: Path | None) -> Source:
    """Find the files of an entry and look at each."""
    if entry.path is None:
        return _hub_source(entry)
    path = entry.path
    if mix is not None and (reason := _unreachable(path)) is not None:
        raise InputError(
            "QC-DATA-030",
            "names a source that does not exist",
            file=mix,
            field=f"{entry.place}.{'file_name' if mix.name == NAME else 'path'}",
            found=f"{path}: {reason}",
            fix=_near(path) or "name a file or folder; paths are relative to the mix file",
        )
    notes: list[str] = []
    files = _folder(path, notes) if path.is_dir() else (path,)
    return _looked_at(
        Source(name=str(path), files=files, notes=tuple(notes), **entry.options), files
    )


def _hub_source(entry: Entry) -> Source:
    name = entry.hub + (f"@{entry.revision}" if entry.revision else "")
    more = ", ".join(
        f"{word} {value}" for word, value in (("config", entry.config), ("split", entry.split))
        if value
    )  # fmt: skip
    name = f"{name} ({more})" if more else name
    found = hub_files(
        entry.hub, entry.revision, config=entry.config, split=entry.split, source=name
    )
    source = Source(
        name=name,
        files=found.files,
        revision=found.revision,
        config=entry.config,
        split=entry.split,
        notes=(found.note,) if found.note else (),
        **entry.options,
    )
    return _looked_at(source, found.files)


def _looked_at(source: Source, files: Sequence[Path]) -> Source:
    """The source with a note for each file whose name and content disagree."""
    problems: list[QcoreError] = []
    notes = list(source.notes)
    for path in files:
        try:
            kind = file_kind(path)
        except QcoreError as error:
            problems.append(error)
        else:
            if kind.note:
                notes.append(f"{path.name} {kind.note}")
    raise_all(problems)
    return replace(source, notes=tuple(notes))


def _folder(folder: Path, notes: list[str]) -> tuple[Path, ...]:
    """The data files of a folder, by name; its subfolders are not read."""
    for config, what in (("adapter_config.json", "an adapter"), ("config.json", "a model")):
        if (folder / config).is_file() and next(folder.glob("*.safetensors"), None):
            raise InputError(
                "QC-DATA-030",
                f"is the folder of {what}",
                file=folder,
                expected="a folder with data files",
                fix="name the files with the rows",
            )
    files: list[Path] = []
    others: list[str] = []
    folders: list[str] = []
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise unreadable(folder, error.strerror or str(error)) from None
    for name in names[:_MAX_FILES]:
        path = folder / name
        if name.startswith("."):
            continue
        if path.is_dir():
            folders.append(name)
        elif is_data_name(path) and name not in _NOT_ROWS and not _is_other_type(path):
            files.append(path)
        else:
            others.append(name)
    if not files or len(names) > _MAX_FILES:
        many = f"more than {_MAX_FILES} entries"
        raise InputError(
            "QC-DATA-030",
            "is a folder without data files" if not files else "is a folder of too many files",
            file=folder,
            found=many if files else _listed([*others, *folders]) or "an empty folder",
            expected=", ".join((*TEXT_SUFFIXES, *COLUMN_SUFFIXES)),
            fix=f"name a folder below it: {folder / folders[0]}" if folders else "name the file",
        )
    _check_folder(folder, files)
    for what, some in (("files", others), ("subfolders", folders)):
        if some:
            notes.append(f"{len(some)} {what} are not read: {_listed(some)}")
    return tuple(files)


def _check_folder(folder: Path, files: Sequence[Path]) -> None:
    """Refuse a folder that is not one set of rows (``QC-DATA-039``).

    Reading all of it would train on the rows of an evaluation, or on the same rows twice.
    """
    splits: dict[str, str] = {}
    stems: dict[str, list[str]] = {}
    for path in files:
        stem = path.name.lower().removesuffix("".join(suffixes(path)))
        stems.setdefault(stem, []).append(path.name)
        words = _WORD_ENDS.split(stem)
        for word in (words[0], words[-1]):
            if word in _SPLITS:
                splits.setdefault(word, path.name)
    if len(splits) > 1:
        raise InputError(
            "QC-DATA-039",
            "has files of several splits",
            file=folder,
            found=_listed(list(dict.fromkeys(splits.values()))),
            expected="files of one split",
            fix="name the files to train on, and pass those to evaluate on with --eval-data",
        )
    for names in stems.values():
        if len(names) > 1:
            raise InputError(
                "QC-DATA-039",
                "has files of one name in several containers, which may hold the same rows",
                file=folder,
                found=_listed(names),
                expected="one of them",
                fix=f"name the files to read, such as {folder / names[0]}",
            )


def refuse_shared(train: Sequence[Source], evaluated: Sequence[Source]) -> None:
    """Refuse files that are trained and evaluated on.

    Args:
        train: the sources of ``--data``.
        evaluated: the sources of ``--eval-data``.

    Raises:
        InputError: ``QC-DATA-039``.
    """
    trained = {path.resolve() for source in train for path in source.files}
    shared = [p for source in evaluated for p in source.files if p.resolve() in trained]
    if shared:
        raise InputError(
            "QC-DATA-039",
            "is in --data and in --eval-data",
            file=shared[0],
            found=_listed([path.name for path in shared]) if len(shared) > 1 else None,
            fix="name it once; eval_fraction holds out rows of --data for the evaluation",
        )


def _is_other_type(path: Path) -> bool:
    """Whether a path is a pipe, a socket or a device; a broken link is not, and is reported."""
    return path.exists() and not path.is_file()


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _note_repeated(sources: Sequence[Source]) -> list[Source]:
    """Note files that are read more than once; their rows then count more."""
    seen: set[Path] = set()
    noted: list[Source] = []
    for source in sources:
        real = [path.resolve() for path in source.files]
        again = [path.name for path, at in zip(source.files, real, strict=True) if at in seen]
        seen.update(real)
        if again:
            note = f"{len(again)} files are read a second time: {_listed(again)}"
            source = replace(source, notes=(*source.notes, note))
        noted.append(source)
    return noted
