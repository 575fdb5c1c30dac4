"""Resolves ``--adapter`` to a folder: a local path or a hub id, and what is wrong with a wrong one.

This file decides which values an adapter option accepts: an existing folder, else
``ORG/NAME[/FOLDER][@REVISION]``, where FOLDER is the path of the adapter in the repository, such as
``checkpoint-1000``. It also decides what a wrong place is called: a file, the folder above the
adapter, a run folder, a model, pickled weights. `qcore.checkpoint.hub_client` downloads;
`qcore.adapter.reader` reads the folder.

Codes: ``QC-ADAPTER-003`` not an adapter folder; ``QC-CKPT-006`` a link to a file that is absent,
``-007`` pickled weights; ``QC-HUB-*`` as for models.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Collection
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Final

from ..checkpoint.hub import TOKENIZER_FILES, HubId, parse_id
from ..checkpoint.hub_client import download, list_files
from ..checkpoint.suggest import suggest_folder
from ..errors import InputError
from ..io.manifest import MANIFEST, read_manifest
from ..io.safe_path import dangling_target
from .peft_names import CONFIG, WEIGHTS
from .weight_files import INDEX, has_weights, shards, weight_files

#: Patterns of the files of an adapter that are downloaded.
_FILES: Final = (CONFIG, "adapter_model*.safetensors", INDEX, MANIFEST, *TOKENIZER_FILES)
_PICKLES: Final = (".bin", ".pt", ".pth")
_STEP: Final = re.compile(r"(?:.*/)?checkpoint-(\d+)")
_DEPTH: Final = 3  # folders below the wrong one that are searched
_MOST: Final = 5000  # files that are looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class LocatedAdapter:
    """The local folder of an adapter.

    Attributes:
        path: the folder.
        source: the folder or hub id that the user passed.
        revision: the commit on the hub; ``None`` for a local folder.
    """

    path: Path
    source: str
    revision: str | None = None


def locate_adapter(adapter: str | Path) -> LocatedAdapter:
    """Return the folder of an adapter, downloading it from the hub if it is not local.

    Args:
        adapter: a folder, or ``ORG/NAME[/FOLDER][@REVISION]``. A local folder of that name takes
            precedence.

    Raises:
        InputError: ``QC-ADAPTER-003``, ``QC-CKPT-006``, ``-007``, ``QC-HUB-*`` (see the module).
        TrustError: ``QC-HUB-004``, if the hub requires a token or an accepted license.
        WriteError: the hub's cache cannot be written.
    """
    source = str(adapter)
    path = Path(source).expanduser()
    if path.is_dir():
        _check_local(path)
        return LocatedAdapter(path=path, source=source)
    if os.path.lexists(path):
        raise _not_a_folder(path)
    parsed = parse_id(source)
    if parsed is None or (parsed.folder and Path(source.partition("/")[0]).is_dir()):
        raise InputError(
            "QC-ADAPTER-003",
            "no such folder",
            file=source,
            expected="an adapter folder, or ORG/NAME[/FOLDER][@REVISION]",
            fix=suggest_folder(source, path) or "name a folder that exists",
        )
    root = download(parsed.name, parsed.revision, source, _FILES, folder=parsed.folder)
    folder = root / parsed.folder
    if not ((folder / CONFIG).is_file() and has_weights(folder)):
        raise _hub_fault(parsed, list_files(parsed.name, root.name, source), source)
    weight_files(folder)
    return LocatedAdapter(path=folder, source=source, revision=root.name)


def locate_folder(folder: str | Path) -> Path:
    """Return the folder of a result for `verify`; of one on the hub, every listed file is there.

    Args:
        folder: a folder, or ``ORG/NAME[/FOLDER][@REVISION]``.

    Raises:
        InputError: ``QC-MANIFEST-001`` neither, ``-002`` it has no manifest and a folder below
            has one, or it is on the hub; as `read_manifest`; ``QC-HUB-*``.
    """
    source = str(folder)
    path = Path(source).expanduser()
    parsed = None if os.path.lexists(path) else parse_id(source)
    if parsed is None:
        if not path.is_dir():
            raise InputError(
                "QC-MANIFEST-001",
                "is not a folder",
                file=source,
                fix=(None if os.path.lexists(path) else suggest_folder(source, path))
                or "name a folder that qcore wrote",
            )
        others = folders_with(names_below(path), MANIFEST)
        if others and not os.path.lexists(path / MANIFEST):
            raise _no_manifest(source, did_you_mean([str(path / name) for name in others]))
        return path
    root = download(parsed.name, parsed.revision, source, [MANIFEST], folder=parsed.folder)
    if not (root / parsed.folder / MANIFEST).is_file():
        names, below = list_files(parsed.name, root.name, source), parsed.folder
        revision = f"@{parsed.revision}" if parsed.revision else ""
        inside = [n for n in folders_with(names, MANIFEST) if n.startswith(below and f"{below}/")]
        places = [f"{parsed.name}/{name}{revision}" for name in inside]
        fix = did_you_mean(places) if places else "name a repository or a folder that qcore wrote"
        raise _no_manifest(source, fix)
    listed = map(escape, read_manifest(root / parsed.folder).files)
    download(parsed.name, root.name, source, [MANIFEST, *listed], folder=parsed.folder)
    return root / parsed.folder


def _no_manifest(source: str, fix: str) -> InputError:
    return InputError("QC-MANIFEST-002", f"has no {MANIFEST}", file=source, fix=fix)


def _hub_fault(parsed: HubId, names: Collection[str], source: str) -> InputError:
    """Return the error for a repository, or a folder of it, that lacks a file of an adapter."""
    revision = f"@{parsed.revision}" if parsed.revision else ""
    below = f"{parsed.folder}/" if parsed.folder else ""
    inside = {name.removeprefix(below) for name in names if name.startswith(below)}
    if not inside:
        others = [f"{parsed.name}/{name}{revision}" for name in folders_with(names, CONFIG)]
        if CONFIG in names:
            others.insert(0, f"{parsed.name}{revision}")
        return InputError(
            "QC-ADAPTER-003",
            f"{parsed.name} has no folder {parsed.folder}" if below else "has no files",
            file=source,
            fix=did_you_mean(others) if others else "name the repository of an adapter",
        )
    got = f"hf download {parsed.name} --local-dir FOLDER, then "
    return _fault(inside, source, lambda name: f"{parsed.name}/{below}{name}{revision}", got)


def _not_a_folder(path: Path) -> InputError:
    """Return the error for a file, or for a link that leads nowhere."""
    if (target := dangling_target(path)) is not None:
        return InputError(
            "QC-CKPT-006",
            f"is a link to {target}, which does not exist",
            file=path,
            fix="name the folder itself",
        )
    return InputError(
        "QC-ADAPTER-003",
        "is a file, not an adapter folder",
        file=path,
        expected="a PEFT adapter folder",
        fix=(
            f"name the folder: {path.parent}"
            if (path.parent / CONFIG).is_file()
            else "name the folder that training wrote"
        ),
    )


def _check_local(folder: Path) -> None:
    """Check that a folder has the config of an adapter and all of its weights.

    Raises:
        InputError: ``QC-ADAPTER-003``, ``QC-CKPT-006``, ``-007``.
    """
    for name in (CONFIG, WEIGHTS, INDEX, *shards({path.name for path in folder.iterdir()})):
        if (target := dangling_target(folder / name)) is not None:
            raise InputError(
                "QC-CKPT-006",
                f"is a link to {target}, which does not exist",
                file=folder / name,
                fix="copy the folder again with the files that its links lead to (cp -rL)",
            )
    if not ((folder / CONFIG).is_file() and has_weights(folder)):
        raise _fault(names_below(folder), folder, lambda name: str(folder / name))
    weight_files(folder)


def names_below(folder: Path) -> set[str]:
    """Return relative names of files, a few folders deep, without hidden folders."""
    names: set[str] = set()
    for root, folders, files in os.walk(folder):
        below = Path(root).relative_to(folder)
        hidden = len(below.parts) >= _DEPTH
        folders[:] = [] if hidden else [name for name in folders if not name.startswith(".")]
        names |= {(below / name).as_posix() for name in files}
        if len(names) >= _MOST:
            break
    return names


def folders_with(names: Collection[str], file: str) -> list[str]:
    """Return the folders below that have a file; later checkpoints first."""
    found = (name.removesuffix(f"/{file}") for name in names if name.endswith(f"/{file}"))

    def order(name: str) -> tuple[bool, int, str]:
        match = _STEP.fullmatch(name)
        return (match is not None, -int(match[1]) if match else 0, name)

    return sorted(found, key=order)


def did_you_mean(places: Collection[str]) -> str:
    """Return the question for up to three places."""
    first = [*places][:3]
    if len(first) == 1:
        return f"did you mean {first[0]}?"
    return f"did you mean {', '.join(first[:-1])} or {first[-1]}?"


def _fault(
    names: Collection[str], where: object, place: Callable[[str], str], download_first: str = ""
) -> InputError:
    """Return the error for a folder that lacks a file of an adapter.

    Args:
        names: relative names of the files in and below the folder.
        where: the folder, for errors.
        place: how a user names something below the folder.
        download_first: command that brings a repository of the hub to ``FOLDER``, with what comes
            between it and the next; empty for a local folder.
    """
    local = (lambda name: f"FOLDER/{name}") if download_first else place
    pickled = sorted(name for name in names if _is_pickle(name))
    if WEIGHTS not in names and pickled:
        return InputError(
            "QC-CKPT-007",
            "holds a pickle, which qcore never opens",
            file=place(pickled[0]),
            expected=WEIGHTS,
            fix=download_first + _convert(local(pickled[0]), local(WEIGHTS)),
        )
    what, fix = _words(names, where, place)
    return InputError("QC-ADAPTER-003", what, file=where, expected="a PEFT adapter folder", fix=fix)


def _words(names: Collection[str], where: object, place: Callable[[str], str]) -> tuple[str, str]:
    """Return what is wrong with a folder, and the fix."""
    below = [place(name) for name in folders_with(names, CONFIG)]
    if CONFIG not in names and below:
        run = "metrics.jsonl" in names and any(_STEP.fullmatch(name) for name in below)
        published = str(where).removesuffix(".run")
        if run and published != str(where) and Path(published, CONFIG).is_file():
            below.insert(0, published)
        what = "is the run folder of a training, not an adapter" if run else f"has no {CONFIG}"
        return what, did_you_mean(below)
    if CONFIG not in names and WEIGHTS in names:
        return f"has no {CONFIG}", f"copy the {CONFIG} that was saved beside {WEIGHTS}"
    if "adapters.safetensors" in names:
        return "is an adapter of MLX", "convert it to PEFT, or train it with PEFT or qcore"
    if "config.json" in names and CONFIG not in names:
        return "is a model, not an adapter", "pass it as --model, and name the adapter's folder"
    if not names:
        return "is empty", "name the folder that training wrote"
    missing = CONFIG if CONFIG not in names else WEIGHTS
    return f"has no {missing}", "name the folder that training wrote"


def _is_pickle(name: str) -> bool:
    return "/" not in name and name.startswith("adapter_model") and name.endswith(_PICKLES)


def _convert(path: str, target: str) -> str:
    """Return the command that converts a pickled adapter, without running code from it."""
    code = (
        "import sys, torch, safetensors.torch as s; "
        "t = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
        "s.save_file({k: v.contiguous() for k, v in t.items()}, sys.argv[2], {'format': 'pt'})"
    )
    return f'convert it: python -c "{code}" {shlex.quote(path)} {shlex.quote(target)}'
