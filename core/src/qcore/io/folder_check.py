"""`verify`: compares a result folder with its MANIFEST.json, by the files that act.

This file decides which changes of a folder are problems and which are notes. A published folder is
copied, gets a model card, lies in the hub's cache as links and comes back with files of the tools
that moved it. So a problem is what changes a result: a file that acts and is missing, has another
content or leads out of the folder, or a new file that loaders would read. In an adapter the weights
and the config act; in a model the weights, config, tokenizer, chat template and processor; in other
folders every file that the manifest lists. Model cards and licenses never act. Of a JSON file with
recorded fields, the fields decide and not the bytes.

`qcore.io.manifest` decides the format of the manifest and its own faults.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from ..errors import InputError
from . import strict_json
from .atomic import CHUNK
from .manifest import MANIFEST, MAX_BYTES, FileEntry, Manifest, read_manifest
from .safe_path import dangling_target, stored_file

#: The two files of an adapter that act.
ADAPTER_FILES: Final = ("adapter_config.json", "adapter_model.safetensors")
#: Patterns of the files that loaders of a model folder read.
_MODEL_FILES: Final = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
    "tokenizer*.json", "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.*", "*processor_config.json", "adapter_config.json",
)  # fmt: skip
#: Files that describe a folder and never act.
_DESCRIPTIONS: Final = ("*.md", "license*", "notice*", ".git*", "*.png", "*.jpg", "*.svg")
_LFS: Final = b"version https://git-lfs.github.com/spec/"
_MOST_NAMES: Final = 1000  # unlisted files that are noted


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one file of a folder, or with a field of it.

    Attributes:
        file: name of the file.
        what: what is wrong.
        field: field of a JSON file; ``None`` for the file itself.
        found: value of the field.
        expected: value of the field in the manifest.
    """

    file: str
    what: str
    field: str | None = None
    found: str | None = None
    expected: str | None = None

    def line(self) -> str:
        """Return the fault in one line."""
        if self.field is None:
            return f"{self.file}: {self.what}"
        return f"{self.file}: {self.field} is {self.found}, expected {self.expected}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of `verify`.

    Attributes:
        ok: whether there are no problems.
        kind: the manifest's kind; empty if the manifest cannot be read.
        files: number of files in the manifest.
        size: their total size in bytes.
        problems: one line for each problem.
        notes: one line for each change that has no effect on what the folder does.
        meta: the manifest's meta mapping.
        faults: the problems of files, in the same order; empty if the manifest cannot be read.
    """

    ok: bool
    kind: str
    files: int
    size: int
    problems: list[str]
    notes: list[str] = field(default_factory=list)
    meta: Mapping[str, Any] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the payload of ``qcore verify --json``."""
        return {
            "ok": self.ok, "files": self.files, "problems": self.problems, "notes": self.notes,
        }  # fmt: skip


def verify(
    path: Path | str,
    *,
    progress: Callable[[int, int], None] | None = None,
    acting: Collection[str] = (),
) -> Report:
    """Compare a folder with its manifest.

    Args:
        path: the artifact folder; links within it and into the blobs of its hub cache are
            followed.
        progress: called with the bytes read so far and the total bytes.
        acting: names of the only files that act; empty for those of the manifest's kind.

    Returns:
        The report; every fault but the one below is a problem in it.

    Raises:
        InputError: ``QC-MANIFEST-001`` the path is not a folder.
    """
    folder = Path(path)
    try:
        manifest = read_manifest(folder)
    except InputError as error:
        if error.code == "QC-MANIFEST-001":
            raise
        return Report(ok=False, kind="", files=0, size=0, problems=[error.message])
    check = _Check(folder, manifest, acting, progress)
    for name, entry in sorted(manifest.files.items()):
        check.listed(name, entry)
    check.unlisted()
    return Report(
        ok=not check.faults,
        kind=manifest.kind,
        files=len(manifest.files),
        size=sum(entry.size for entry in manifest.files.values()),
        problems=[fault.line() for fault in check.faults],
        notes=check.notes,
        meta=manifest.meta,
        faults=tuple(check.faults),
    )


class _Check:
    """The comparison of one folder; collects `faults` and `notes`."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        acting: Collection[str],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.faults: list[Fault] = []
        self.notes: list[str] = []
        is_adapter = manifest.kind == "adapter" and set(ADAPTER_FILES) <= manifest.files.keys()
        self._acting = tuple(acting) or (ADAPTER_FILES if is_adapter else ())
        self._is_model = manifest.kind == "model" and "config.json" in manifest.files
        self._total = sum(e.size for name, e in manifest.files.items() if self._acts(name))
        self._progress = progress
        self._done = 0

    def _acts(self, name: str) -> bool:
        """Whether a listed file decides what the folder does."""
        if self._acting:
            return name in self._acting
        if self._is_model:
            return _is_read(name)
        base = name.rpartition("/")[2].lower()
        return not any(fnmatchcase(base, pattern) for pattern in _DESCRIPTIONS)

    def listed(self, name: str, entry: FileEntry) -> None:
        """Compare a file that the manifest lists."""
        acts = self._acts(name)
        found = self._compare(name, entry, self._tick if acts else lambda count: None)
        if acts:
            self.faults += found
        else:
            self.notes += [fault.line() for fault in found]

    def _tick(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _compare(self, name: str, entry: FileEntry, tick: Callable[[int], None]) -> list[Fault]:
        path = self.folder / name
        if not os.path.lexists(path):
            return [Fault(name, "missing")]
        real = stored_file(self.folder, name)
        if real is None:
            return [Fault(name, "a link that leaves the folder")]
        if (target := dangling_target(path)) is not None:
            return [Fault(name, f"a link to {target}, which does not exist")]
        try:
            status = os.stat(real)
        except OSError as error:
            return [Fault(name, f"cannot be read: {error.strerror}")]
        if not stat.S_ISREG(status.st_mode):
            return [Fault(name, "not a plain file")]
        if status.st_size == entry.size:
            found = _content(real, name, entry, tick)
        elif _starts_with(real, _LFS):
            return [Fault(name, "a Git LFS pointer; run git lfs pull")]
        else:
            found = [Fault(name, f"{status.st_size} bytes, expected {entry.size}")]
        return self._fields(real, name, entry) if found and entry.fields is not None else found

    def _fields(self, path: Path, name: str, entry: FileEntry) -> list[Fault]:
        """Return the fields that differ in a JSON file; those that may be edited are notes."""
        try:
            with path.open("rb") as stream:
                values = strict_json.loads(stream.read(MAX_BYTES).decode("utf-8"))
        except (OSError, ValueError, RecursionError):
            return [Fault(name, "cannot be read as JSON")]
        if not isinstance(values, dict):
            return [Fault(name, "is not a JSON object")]
        recorded: Mapping[str, Any] = entry.fields or {}
        keys = dict.fromkeys((*recorded, *values))
        edited = [
            Fault(name, "differs", key, _shown(values.get(key)), _shown(recorded.get(key)))
            for key in keys
            if not _same(recorded.get(key), values.get(key))
        ]
        allowed = [fault for fault in edited if fault.field in entry.editable]
        self.notes += [
            f"{name}: {fault.field} was edited to {fault.found}, from {fault.expected}"
            for fault in allowed
        ]
        return [fault for fault in edited if fault not in allowed]

    def unlisted(self) -> None:
        """Note files that the manifest does not list; those that loaders read are problems."""
        names = []
        for name in _walk(self.folder, "", self.manifest.files):
            if self._is_model and _is_read(name):
                what = "not in the manifest, and loaders would read it"
                self.faults.append(Fault(name, what))
            else:
                names.append(name)
            if len(names) >= _MOST_NAMES:
                break
        self.notes += [f"{name}: not in the manifest" for name in names]


def _is_read(name: str) -> bool:
    """Whether loaders of a model folder read a file of that name."""
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in _MODEL_FILES)


def _walk(folder: Path, prefix: str, listed: Mapping[str, FileEntry]) -> Iterator[str]:
    """Yield the names of unlisted files and of unlisted folders, without their content."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        name = prefix + entry.name
        if name in listed or name == MANIFEST:
            continue
        is_folder = entry.is_dir(follow_symlinks=False)
        if is_folder and any(each.startswith(f"{name}/") for each in listed):
            yield from _walk(folder / entry.name, f"{name}/", listed)
        else:
            yield f"{name}/" if is_folder else name


def _content(path: Path, name: str, entry: FileEntry, tick: Callable[[int], None]) -> list[Fault]:
    """Return the problems with the content of a file that has the right size."""
    digest = hashlib.sha256()
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb", buffering=0) as stream:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return [Fault(name, "not a plain file")]
            buffer = memoryview(bytearray(min(CHUNK, max(entry.size, 1))))
            while count := stream.readinto(buffer):
                digest.update(buffer[:count])
                tick(count)
    except OSError as error:
        return [Fault(name, f"cannot be read: {error.strerror}")]
    return [] if digest.hexdigest() == entry.sha256 else [Fault(name, "content differs (sha256)")]


def _starts_with(path: Path, head: bytes) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(len(head)) == head
    except OSError:
        return False


def _same(recorded: object, value: object) -> bool:
    """Whether two values of a field mean the same; lists of names have no order."""
    if isinstance(recorded, list) and isinstance(value, list):
        names = all(isinstance(one, str) for one in (*recorded, *value))
        return set(recorded) == set(value) if names else recorded == value
    off: tuple[object, ...] = (None, False, [], {}, "none")
    return recorded == value or (recorded in off and value in off)


def _shown(value: object) -> str:
    text = "absent" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
