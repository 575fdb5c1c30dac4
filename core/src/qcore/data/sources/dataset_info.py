"""LLaMA-Factory's dataset_info.json: a list of data sets by name, read as a mix.

This file decides where the rows of an entry lie: a hub dataset (``hf_hub_url``), else a file or
folder beside the list (``file_name``). How the rows are read (``formatting``, ``columns``,
``tags``) is passed on as field mapping. Codes: ``QC-DATA-035``, ``QC-DATA-001``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ...api.media import RowError
from ...errors import UsageError, nearest
from .hub_files import ID, REVISION
from .jsonl import parse
from .mix import Entry
from .streams import opened

NAME: Final = "dataset_info.json"
_MAX_BYTES: Final = 4 << 20
#: Keys of an entry that state where its rows lie.
PLACES: Final = (
    "file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name",
    "subset", "split", "folder", "num_samples",
)  # fmt: skip


def split_word(word: str) -> tuple[Path, tuple[str, ...]] | None:
    """The path and the names of ``PATH/dataset_info.json[:NAME,...]``; ``None`` for others."""
    head, colon, names = word.rpartition(f"{NAME}:")
    if not colon:
        head, names = word.removesuffix(NAME), ""
        if head == word:
            return None
    if head and not head.endswith("/"):
        return None
    return Path(head + NAME).expanduser(), tuple(name for name in names.split(",") if name)


def read_dataset_info(path: Path, names: tuple[str, ...] = ()) -> tuple[Entry, ...]:
    """Read the entries of a dataset_info.json.

    Args:
        path: the file.
        names: entries that are used, in this order; empty for all.

    Raises:
        InputError: ``QC-DATA-001`` it cannot be read.
        UsageError: ``QC-DATA-035`` it is not a dataset_info.json, or has no such entry.
    """
    with opened(path) as file:
        raw = file.read(_MAX_BYTES + 1) or b""
    try:
        if len(raw) > _MAX_BYTES:
            raise RowError("QC-DATA-004", "is too long", expected=f"at most {_MAX_BYTES} bytes")
        entries = parse(raw)
    except RowError as bad:
        raise _wrong(path, None, bad.what, found=bad.found, expected="a JSON object") from None
    if not isinstance(entries, dict) or not entries or not all(map(_is_entry, entries.values())):
        raise _wrong(path, None, "is not a dataset_info.json of LLaMA-Factory")
    for name in names:
        if name not in entries:
            near = nearest(name, entries)
            fix = f"did you mean {near}?" if near else None
            known = ", ".join(list(entries)[:20])
            raise _wrong(path, name, "has no entry of that name", expected=known, fix=fix)
    return tuple(_entry(path, name, entries[name]) for name in names or tuple(entries))


def _is_entry(value: Any) -> bool:
    return isinstance(value, dict) and any(key in value for key in PLACES)


def _entry(path: Path, name: str, value: Mapping[str, Any]) -> Entry:
    fields = {key: entry for key, entry in value.items() if key not in PLACES}
    options: dict[str, Any] = {"fields": fields or {"formatting": "alpaca"}}
    if (count := value.get("num_samples")) is not None:
        if type(count) is not int or count < 1:
            raise _wrong(path, f"{name}.num_samples", "is not a number of rows", found=repr(count))
        options["count"] = count
    words = {key: _word(path, name, value, key) for key in ("hf_hub_url", "subset", "split")}
    if hub := words["hf_hub_url"]:
        if "folder" in value:
            raise _wrong(path, f"{name}.folder", "cannot be read", fix="download the folder")
        repository, _, revision = hub.partition("@")
        if not ID.fullmatch(repository) or (revision and not REVISION.fullmatch(revision)):
            raise _wrong(path, f"{name}.hf_hub_url", "is not a hub id", expected="ORG/NAME")
        return Entry(
            place=name, hub=repository, revision=revision, config=words["subset"],
            split=words["split"], options=options,
        )  # fmt: skip
    file = _word(path, name, value, "file_name")
    if not file:
        key = next(key for key in PLACES if key in value)
        raise _wrong(
            path, f"{name}.{key}", "cannot be read", expected="file_name or hf_hub_url",
            fix="download the rows and set file_name",
        )  # fmt: skip
    return Entry(place=name, path=path.parent / file, options=options)


def _word(path: Path, name: str, value: Mapping[str, Any], key: str) -> str:
    word = value.get(key) or ""
    if not isinstance(word, str) or "\0" in word:
        raise _wrong(path, f"{name}.{key}", "is not a name", found=repr(word)[:60])
    return word


def _wrong(
    path: Path,
    field: str | None,
    what: str,
    *,
    found: object | None = None,
    expected: object | None = None,
    fix: str | None = None,
) -> UsageError:
    fix = fix or 'write entries as in {"chats": {"file_name": "chats.json"}}'
    return UsageError(
        "QC-DATA-035", what, file=path, field=field, found=found, expected=expected, fix=fix
    )
