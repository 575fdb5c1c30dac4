"""The files of a hub dataset: which ones a configuration and a split consist of.

This file decides what is downloaded. Configurations and splits are resolved by the `datasets`
library's own rules over the repository's file names; code in a repository is never run. The files
lie in the cache of huggingface_hub, and `qcore.data.sources.containers` reads them like any others.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Any, Final

from ...checkpoint.hub_datasets import download_dataset, list_dataset
from ...errors import Failure, InputError, contained, nearest
from .file_kinds import is_data_name
from .streams import not_installed

ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
REVISION: Final = re.compile(r"[A-Za-z0-9_](?!.*\.\.)[\w./+-]*", re.ASCII)
_CARD: Final = "README.md"
_SHARD: Final = re.compile(r"(.*)-(\d{5})-of-(\d{5})(.*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFiles:
    """Files of a hub dataset on this machine.

    Attributes:
        files: in the order in which they are read.
        revision: the commit.
        note: files of the split that are not read; empty if there are none.
    """

    files: tuple[Path, ...]
    revision: str
    note: str = ""


def hub_files(
    name: str, revision: str = "", *, config: str = "", split: str = "", source: str = ""
) -> HubFiles:
    """Download the files of a split.

    Args:
        name: ``ORG/NAME``.
        revision: branch, tag or commit; empty for the default branch.
        config: name of the configuration; empty for the default one.
        split: name of the split; empty for ``train``.
        source: how the user named it, for errors.

    Raises:
        InputError: ``QC-HUB-*``; ``QC-DATA-033`` `datasets` is not installed, ``-037`` no such
            configuration or split, or no files that can be read.
        TrustError: ``QC-HUB-004``.
        WriteError: the hub's cache cannot be written.
    """
    source = source or name
    try:
        import datasets
    except ImportError:
        raise not_installed(source, "datasets", "a hub dataset") from None
    del datasets
    folder, names = list_dataset(name, revision or None, source)
    card = _read_card(folder / _CARD, source) if _CARD in names else {}
    wanted = _wanted(card, names, config, split or "train", source)
    _check_shards(wanted, source)
    read = [each for each in wanted if is_data_name(Path(each))]
    if not read:
        raise _no_files(names, wanted, source)
    folder = download_dataset(name, folder.name, source, read)
    missing = [each for each in read if not (folder / each).is_file()]
    if missing:
        raise _refused(source, "files are missing", missing[0], "all files of the split")
    other = [each for each in wanted if each not in read]
    note = f"{len(other)} files of the split are not read: {', '.join(other[:5])}" if other else ""
    return HubFiles(files=tuple(folder / each for each in read), revision=folder.name, note=note)


def _read_card(path: Path, source: str) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    card = contained(lambda: metadata_load(path))
    if isinstance(card, Failure):
        raise _refused(source, f"the metadata in {_CARD} cannot be read", card, "YAML")
    return card or {}


def _wanted(
    card: Mapping[str, Any], names: Sequence[str], config: str, split: str, source: str
) -> list[str]:
    """File names of one split of one configuration."""
    configs = contained(lambda: _configs(card))
    if isinstance(configs, Failure):
        raise _refused(source, f"the configurations in {_CARD} cannot be read", configs, "YAML")
    default, entries = configs
    chosen = config or default or ("" if not entries else None)
    if chosen is None or (chosen and chosen not in entries):
        near = nearest(config, entries) if config else None
        raise InputError(
            "QC-DATA-037",
            "has no configuration of that name" if config else "has several configurations",
            file=source,
            field="config",
            found=config or None,
            expected=", ".join(sorted(entries)[:20]) or "no configuration",
            fix=f"did you mean {near}?" if near else "name one as `config:` in a mix file",
        )
    entry = entries.get(chosen, {})
    wanted = contained(lambda: _resolve(entry, names, split))
    if not isinstance(wanted, Failure):
        return wanted
    if isinstance(wanted.error, FileNotFoundError):
        raise _no_files(names, (), source)
    if isinstance(wanted.error, InputError):
        raise wanted.error.replace(file=source)
    raise _refused(source, f"the files in {_CARD} cannot be resolved", wanted, "file patterns")


def _configs(card: Mapping[str, Any]) -> tuple[str | None, dict[str, Mapping[str, Any]]]:
    """The default configuration's name, and all configurations."""
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCardData

    configs = MetadataConfigs.from_dataset_card_data(DatasetCardData(**card))
    return configs.get_default_config_name(), dict(configs)


def _resolve(entry: Mapping[str, Any], names: Sequence[str], split: str) -> list[str]:
    """Resolve patterns over a file system in memory that has the names and no content."""
    from datasets.data_files import get_data_patterns, resolve_pattern, sanitize_patterns
    from fsspec.implementations.memory import MemoryFileSystem

    system, root = MemoryFileSystem(), f"/qcore-{uuid.uuid4().hex}"
    base = f"memory:/{root}"
    if folder := _relative(str(entry.get("data_dir") or "")):
        base = f"{base}/{folder}"
    try:
        for name in names:
            system.pipe_file(f"{root}/{name}", b"")
        patterns = entry.get("data_files")
        by_split = get_data_patterns(base) if patterns is None else sanitize_patterns(patterns)
        wanted: dict[str, None] = {}
        for pattern in _of_split({str(key): some for key, some in by_split.items()}, split):
            try:
                matches = resolve_pattern(_relative(pattern), base)
            except FileNotFoundError:
                if has_magic(pattern):  # as in datasets: only a name must exist
                    continue
                raise
            wanted |= dict.fromkeys(path.partition(f"{root}/")[2] for path in matches)
        return list(wanted)
    finally:
        if system.exists(root):
            system.rm(root, recursive=True)


def _of_split(splits: Mapping[str, list[str]], split: str) -> list[str]:
    if split in splits:
        return splits[split]
    near = nearest(split, splits)
    raise InputError(
        "QC-DATA-037",
        "has no split of that name",
        field="split",
        found=split,
        expected=", ".join(sorted(splits)[:20]),
        fix=f"did you mean {near}?" if near else f"set split: {min(splits)} in a mix file",
    )


def _relative(pattern: str) -> str:
    """A pattern of a repository, which must not lead out of it.

    Raises:
        ValueError: it is a URL or an absolute path, or contains ``..``.
    """
    if ":" in pattern or pattern.startswith(("/", "~")) or ".." in pattern.split("/"):
        raise ValueError(f"{pattern[:100]} is not in the repository")
    return pattern


def _check_shards(names: Sequence[str], source: str) -> None:
    """Refuse a split of which files are missing, as in a cache that was filled in part."""
    shards: dict[tuple[str, str, int], set[int]] = {}
    for name in names:
        if match := _SHARD.fullmatch(name):
            shards.setdefault((match[1], match[4], int(match[3])), set()).add(int(match[2]))
    for (stem, suffix, count), present in shards.items():
        if missing := sorted(set(range(count)) - present):
            name = f"{stem}-{missing[0]:05d}-of-{count:05d}{suffix}"
            raise _refused(source, f"{len(missing)} files are missing", name, f"{count} files")


def _no_files(names: Sequence[str], wanted: Sequence[str], source: str) -> InputError:
    scripts = [name for name in names if name.endswith(".py")]
    found = f"{scripts[0]}, which is never run" if scripts else ", ".join((wanted or names)[:5])
    return _refused(
        source, "has no data files", found or "an empty repository", "JSON, CSV, Parquet or Arrow"
    )


def _refused(source: str, what: str, found: object, expected: str) -> InputError:
    return InputError(
        "QC-DATA-037",
        what,
        file=source,
        found=found,
        expected=expected,
        fix="download the files and name their folder",
    )
