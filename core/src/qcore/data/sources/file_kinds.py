"""What a data file is: decided by its first bytes, and by its name only where those are text.

This file decides which container a file is read as and which formats are refused with a fix. If
name and content disagree, the content decides and a note says so. It reads 64 KiB of a file.
`qcore.data.sources.containers` reads the records.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...errors import InputError
from .streams import Damaged, decompressed, opened

_MAX_HEADER: Final = 100_000_000  # bytes; that of safetensors itself
HEAD: Final = 1 << 16  #: bytes that are looked at
TEXT_SUFFIXES: Final = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
COLUMN_SUFFIXES: Final = (".parquet", ".arrow", ".feather")
COMPRESSED: Final = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}

_BOM: Final = b"\xef\xbb\xbf"
_SPACE: Final = b" \t\r\n"
_COLUMNAR: Final = {
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "arrow_stream",  # the marker of a message; `save_to_disk` writes it
}
_COMPRESSION: Final = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_CONVERT: Final = "convert it to .jsonl"
_FOREIGN: Final = {  # magic -> what it is, fix
    b"PK\x03\x04": ("zip (or Excel)", "unpack it, or save it as .csv"),
    b"BZh": ("bzip2", "unpack it with bunzip2"),
    b"\xfd7zXZ": ("xz", "unpack it with unxz"),
    b"7z\xbc\xaf": ("7z", "unpack it"),
    b"\x04\x22\x4d\x18": ("lz4", "unpack it with unlz4"),
    b"FEA1": ("Feather version 1", _CONVERT),
    b"PARE": ("encrypted Parquet", _CONVERT),
    b"ORC": ("ORC", _CONVERT),
    b"Obj\x01": ("Avro", _CONVERT),
    b"SQLite format 3": ("SQLite", _CONVERT),
    b"\x89HDF": ("HDF5", _CONVERT),
    b"\x80\x02": ("a pickle, which is not read", _CONVERT),
    b"\x80\x03": ("a pickle, which is not read", _CONVERT),
    b"\x80\x04": ("a pickle, which is not read", _CONVERT),
    b"\x80\x05": ("a pickle, which is not read", _CONVERT),
    b"\xff\xfe": ("UTF-16", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16", "save it as UTF-8"),
    b"%PDF": ("PDF", _CONVERT),
    b"version https://git-lfs": ("a Git LFS pointer", "run: git lfs pull"),
    b"<!DOCTYPE": ("an HTML page", "download the file itself"),
    b"<html": ("an HTML page", "download the file itself"),
}
_WORDS: Final = {
    "jsonl": "JSON lines", "json": "a JSON array", "csv": "CSV", "tsv": "TSV",
    "parquet": "Parquet", "arrow": "Arrow", "arrow_stream": "Arrow",
}  # fmt: skip
_NAMED: Final = {
    ".jsonl": ("jsonl",), ".ndjson": ("jsonl",), ".json": ("json", "jsonl"), ".csv": ("csv",),
    ".tsv": ("tsv",), ".parquet": ("parquet",), ".arrow": ("arrow", "arrow_stream"),
    ".feather": ("arrow",),
}  # fmt: skip
# Rows under a key: {"data": [{"messages": ...}]}. A list of messages is not meant.
_WRAPPED: Final = re.compile(
    rb'"([^"\\]{1,60})"\s*:\s*\[\s*\{\s*"(?:id|messages|conversations?|prompt|instruction|question'
    rb'|input|chosen)"\s*:'
)
_ROW_LISTS: Final = frozenset(("messages", "conversations", "conversation", "tools", "metadata"))
_COLUMN: Final = re.compile(r'"?[A-Za-z_][\w .-]{0,40}"?')


@dataclass(frozen=True, slots=True, kw_only=True)
class FileKind:
    """How a file is read.

    Attributes:
        container: ``jsonl``, ``json`` (an array), ``csv``, ``tsv``, ``parquet``, ``arrow`` or
            ``arrow_stream``.
        compression: ``gzip``, ``zstd`` or empty.
        note: that name and content disagree; empty if they agree.
    """

    container: str
    compression: str = ""
    note: str = ""


def suffixes(path: Path) -> tuple[str, str]:
    """The suffix of the content and that of the compression: ``(".jsonl", ".gz")``."""
    name = path.name.lower()
    outer = next((suffix for suffix in COMPRESSED if name.endswith(suffix)), "")
    return Path(name.removesuffix(outer)).suffix, outer


def is_data_name(path: Path) -> bool:
    """Whether a file of a folder is read as data, by its name."""
    inner, outer = suffixes(path)
    return inner in TEXT_SUFFIXES or (inner in COLUMN_SUFFIXES and not outer)


def file_kind(path: Path) -> FileKind:
    """Look at the first bytes of a file.

    Raises:
        InputError: ``QC-DATA-001`` unreadable, ``-003`` an unsupported format, ``-031`` damaged,
            ``-033`` a package is missing.
    """
    with opened(path) as file:
        head = file.read(HEAD) or b""
    inner, outer = suffixes(path)
    compression = next((name for magic, name in _COMPRESSION.items() if head.startswith(magic)), "")
    if compression:
        head = _unpacked(path, compression)
    container = _container(path, head, inner, compression)
    notes = []
    if COMPRESSED.get(outer, "") != compression:
        notes.append(f"is {compression or 'not compressed'}")
    if container not in _NAMED.get(inner, (container,)):
        notes.append(f"contains {_WORDS[container]}")
    note = f"{' and '.join(notes)}, although its name ends in {inner}{outer}" if notes else ""
    return FileKind(container=container, compression=compression, note=note)


def _unpacked(path: Path, compression: str) -> bytes:
    try:
        with decompressed(path, compression) as file:
            head = b""
            while len(head) < HEAD and (more := file.read(HEAD - len(head))):
                head += more
            return head
    except Damaged as error:
        return _salvaged(path, compression, error)


def _salvaged(path: Path, compression: str, error: Damaged) -> bytes:
    """The first bytes of a damaged file; the reader of its records reports where it breaks."""
    head = b""
    try:
        with decompressed(path, compression) as file:
            while len(head) < HEAD and (byte := file.read(1)):
                head += byte
    except Damaged:
        pass
    if head:
        return head
    raise damaged(path, 1, error, compression) from None


def unit_of(container: str) -> str:
    """What the numbers of records count; see `Record.unit`."""
    return {"json": "element", "jsonl": "line", "csv": "line", "tsv": "line"}.get(container, "row")


def damaged(path: Path, line: int, error: Damaged, what: str, unit: str = "line") -> InputError:
    """The error of a file that cannot be read on."""
    return InputError(
        "QC-DATA-031",
        "is damaged or cut",
        file=path,
        field=f"{unit} {line}",
        found=" ".join(str(error).split())[:200],
        expected=f"a whole {_WORDS.get(what, what)} file",
        fix="download or write it again",
    )


def _container(path: Path, head: bytes, inner: str, compression: str) -> str:
    for magic, container in _COLUMNAR.items():
        if head.startswith(magic):
            if compression:
                raise _refused(path, f"{compression} of {_WORDS[container]}", "unpack it")
            return container
    for magic, (what, fix) in _FOREIGN.items():
        if head.startswith(magic):
            raise _refused(path, what, fix)
    if head[:1] in _COMPRESSED_TWICE and any(head.startswith(magic) for magic in _COMPRESSION):
        raise _refused(path, "compressed twice", "unpack it once")
    if head[257:262] == b"ustar":
        raise _refused(path, "a tar archive", "unpack it and name the folder")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _MAX_HEADER:
        raise _refused(path, "safetensors weights", "name the file with the rows")
    if b"\0" in head[:4]:
        what = "UTF-16 or UTF-32" if head[:4].strip(b"\0") else "binary (NUL bytes)"
        raise _refused(path, what, "save it as UTF-8")
    text = head.removeprefix(_BOM).lstrip(_SPACE)
    if text[:1] == b"[":
        return "json"
    if text[:1] == b"{":
        _check_object(path, text)
        return "jsonl"
    if inner in COLUMN_SUFFIXES and head:
        raise _refused(path, f"not {_WORDS[_NAMED[inner][0]]}", "download or write it again")
    if inner in (".csv", ".tsv"):
        return inner[1:]
    _check_csv(path, text)
    return "jsonl"


_COMPRESSED_TWICE: Final = frozenset(magic[:1] for magic in _COMPRESSION)


def _check_object(path: Path, text: bytes) -> None:
    """Refuse one JSON object that is not a row, or that takes several lines."""
    first, _, more = text.partition(b"\n")
    match = _WRAPPED.search(text)
    key = match[1].decode("utf-8", "replace") if match else ""
    if match and key not in _ROW_LISTS and _depth(text[: match.start()]) == 1:
        program = f".[{json.dumps(key, ensure_ascii=False)}][]"
        source = _shown(path, f"jq -c {shlex.quote(program)}")
        raise InputError(
            "QC-DATA-003",
            "is one JSON object with the rows in a list, not JSON lines",
            file=path,
            field=f"line 1, {key}",
            expected="one JSON object a line, or a JSON array of them",
            fix=f"{source} > {_new_name(path)}",
        )
    if first.strip(_SPACE) == b"{" or (not more and text.strip(_SPACE) == b"{"):
        raise InputError(
            "QC-DATA-003",
            "is one JSON document, not JSON lines",
            file=path,
            field="line 1",
            expected="one JSON object a line",
            fix=f"{_shown(path, 'jq -c .')} > {_new_name(path)}",
        )


def _shown(path: Path, jq: str) -> str:
    """The command that runs a program of jq on a file, which may be compressed."""
    name = shlex.quote(str(path))
    unpack = {"gzip": "gzip -dc", "zstd": "zstd -dc"}.get(COMPRESSED.get(suffixes(path)[1], ""))
    return f"{unpack} {name} | {jq}" if unpack else f"{jq} {name}"


def _new_name(path: Path, suffix: str = ".jsonl") -> str:
    """A file that does not exist, beside the one that is read: the fix must overwrite none."""
    stem = path.name.removesuffix(suffixes(path)[1]).rpartition(".")[0] or path.name
    names = (
        f"{stem}{more}{suffix}" for more in ("", "-rows", *(f"-{n}" for n in range(2, 10_000)))
    )
    return shlex.quote(str(next(new for n in names if not (new := path.with_name(n)).exists())))


def _depth(text: bytes) -> int:
    text = re.sub(rb'"(?:[^"\\]|\\.)*"', b"", text)
    return text.count(b"{") + text.count(b"[") - text.count(b"}") - text.count(b"]")


def _check_csv(path: Path, text: bytes) -> None:
    """Refuse CSV whose name does not say so, once instead of row by row."""
    first = text.partition(b"\n")[0].strip().decode("utf-8", "replace")
    for separator, suffix in ((",", ".csv"), ("\t", ".tsv"), (";", ".csv")):
        names = first.split(separator)
        if len(names) > 1 and all(_COLUMN.fullmatch(name.strip()) for name in names):
            fix = f"rename it to {_new_name(path, suffix)}"
            if separator == ";":
                fix = f"save it with commas as {_new_name(path, suffix)}"
            raise InputError(
                "QC-DATA-003",
                f"looks like {suffix[1:].upper()}, not JSON lines",
                file=path,
                field="line 1",
                found=first[:60],
                expected="one JSON object a line",
                fix=fix,
            )


def _refused(path: Path, what: str, fix: str) -> InputError:
    return InputError(
        "QC-DATA-003",
        f"is {what}",
        file=path,
        field="line 1",
        expected="JSON lines, a JSON array, CSV, Parquet or Arrow; text in UTF-8",
        fix=fix,
    )
