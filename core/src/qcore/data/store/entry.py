"""One store with everything that is known beside its samples: how it is written and opened.

This file decides which files a kept store has and when it can be used: all are there with the size
that they were written with, those that are read as a whole have the same content, the identity is
that of the run, and the data and media files are those that were read. Tokens are checked sample by
sample when they are read. `qcore.data.store.cache` decides where a kept store lies.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...errors import WriteError
from ...io.artifact import Writer, read_manifest
from ...io.atomic import CHUNK, rewrite
from ...reporting import Reporter
from ..findings import Findings
from ..rejects import REJECTED, Rejects
from ..source_counts import SourceCount
from ..sources.file_kinds import file_kind
from .records import FORMAT
from .rendered import Rendered, asked_of
from .samples import TokenStore
from .stamps import GONE, Changed, Stamp, rechecked, taken, with_digests
from .write import FILES, INDEX, MEDIA, TOKENS, AnonymousStore, StoreWriter

if TYPE_CHECKING:
    from ...api.media import MediaReader
    from ...checkpoint.identity import Identity
    from ..policies import Policies
    from ..sources.source import Source

KIND: Final = "tokens"
_RENDERED, _STAMPS = "rendered.json", "stamps.json"


class Damaged(Exception):
    """A store cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The rows of a run.

    Attributes:
        sources: the training sources.
        eval_sources: the sources that are only evaluated.
        policies: of the run.
        reader: reads media.
        render: writes the samples.
        identity: of their tokens; ``None``: unknown, so that no store is used or kept.
    """

    sources: Sequence[Source]
    eval_sources: Sequence[Source]
    policies: Policies
    reader: MediaReader | None
    render: Callable[[StoreWriter], Rendered]
    identity: Identity | None = None

    @property
    def paths(self) -> list[Path]:
        """All data files."""
        return [path for source in (*self.sources, *self.eval_sources) for path in source.files]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A store and what is known beside it.

    Attributes:
        store: the samples.
        rendered: counts, findings and refused rows.
        files: the data files as they were read.
        media: the media files that rows name, as they were read.
        size: bytes of the store on disk.
        lasting: whether another process can read its media again.
    """

    store: TokenStore
    rendered: Rendered
    files: tuple[Stamp, ...]
    media: tuple[Stamp, ...] = ()
    size: int = 0
    lasting: bool = True


def render_apart(request: Request, reporter: Reporter) -> Loaded:
    """Render the rows to files without names.

    Raises:
        InputError: ``QC-DATA-081`` a file changed while it was read; as `Request.render`.
        WriteError: ``QC-WRITE-003`` to ``-006``.
    """
    before, store = taken(request.paths), AnonymousStore()
    with store.writer() as out:
        rendered = request.render(out)
    files = _digested(before, rendered, reporter)
    return Loaded(
        store=store.open(request.reader), rendered=rendered, files=files, media=_media(out)
    )


def write_entry(out: Writer, entry: Path, request: Request, reporter: Reporter) -> Loaded:
    """Render the rows to a store that is about to be published.

    Args:
        out: writes its files.
        entry: the folder that will be published.
        request: the rows.
        reporter: receives progress.

    Raises:
        InputError: ``QC-DATA-081`` a file changed while it was read; as `Request.render`.
        WriteError: ``QC-WRITE-003`` to ``-006``.
    """
    assert request.identity is not None, "only rows of known identity are kept"
    before = taken(request.paths)
    with ExitStack() as stack:
        writer = StoreWriter({name: stack.enter_context(out.stream(name)) for name in FILES})
        rendered = request.render(writer)
        writer.close()
    data = _digested(before, rendered, reporter)
    media = _media(writer)
    state = {
        "format": FORMAT,
        "identity": dict(request.identity.values),
        "variables": writer.variables,
        "findings": rendered.findings.state(),
        **rendered.as_json(),
    }
    out.write_bytes(_RENDERED, json.dumps(state).encode())
    out.write_bytes(_STAMPS, _stamps_json(data, media))
    with out.stream(REJECTED) as file:
        for one in rendered.rejects.entries():
            file.write(json.dumps(one, ensure_ascii=False).encode() + b"\n")
    return Loaded(
        store=_store(out.folder, entry, writer.variables, request.reader, writer),
        rendered=rendered,
        files=data,
        media=media,
        size=sum(one.size for one in out.files.values()),
        lasting=not writer.held,
    )


def open_entry(entry: Path, request: Request, reporter: Reporter, *, verify: bool) -> Loaded:
    """Open a kept store.

    Args:
        entry: its folder.
        request: the rows.
        reporter: receives progress.
        verify: hash all data and media files, also those that are recognized.

    Raises:
        Damaged: it cannot be used.
        Changed: a data or media file is not the one that was read.
        InputError: ``QC-MANIFEST-*``, ``QC-READ-001``.
        OSError: a file cannot be read.
        ValueError: a file is not what was written.
        LookupError: a file is not what was written.
        TypeError: a file is not what was written.
    """
    assert request.identity is not None, "only rows of known identity are kept"
    _check_files(entry)
    state = json.loads((entry / _RENDERED).read_bytes())
    if state["format"] != FORMAT or request.identity.differing(state["identity"]):
        raise Damaged("it belongs to other rows")
    store = _store(entry, entry, state["variables"], request.reader)
    stamps = json.loads((entry / _STAMPS).read_bytes())
    before = [[Stamp.of_json(one) for one in stamps[key]] for key in ("data", "media")]
    data, media = (rechecked(some, reporter, content=verify) for some in before)
    pairs = zip((*before[0], *before[1]), (*data, *media), strict=True)
    if any(not (old.settled and old.matches(new)) for old, new in pairs):
        with suppress(WriteError):  # then they are hashed again at the next start
            rewrite(entry / _STAMPS, [_stamps_json(data, media)])
    with suppress(OSError):
        os.utime(entry)  # marks it as recently used
    return Loaded(
        store=store, rendered=_rendered(state, entry, request), files=tuple(data),
        media=tuple(media),
    )  # fmt: skip


def _media(writer: StoreWriter) -> tuple[Stamp, ...]:
    """Stamps of the media files that rows name, with the digests of their bytes.

    Raises:
        InputError: ``QC-DATA-081`` a file is gone.
    """
    stamps = []
    for path, sha256 in writer.paths.items():
        try:
            stamps.append(Stamp.of(path, sha256))
        except OSError:
            gone = Changed(path, GONE)
            raise gone.error("run the command again", when="while its rows were read") from None
    return tuple(stamps)


def _check_files(entry: Path) -> None:
    """Check sizes, and the content of the files that are read as a whole."""
    manifest = read_manifest(entry)
    if manifest.kind != KIND or not {*FILES, _RENDERED, REJECTED} <= manifest.files.keys():
        raise Damaged("it is of another kind")
    for name, file in manifest.files.items():
        size = (entry / name).stat().st_size
        if name == _STAMPS:  # it is written again
            continue
        if size != file.size:
            raise Damaged(f"{name} has {size} bytes, not {file.size}")
        if name not in (TOKENS, MEDIA) and _hash(entry / name) != file.sha256:
            raise Damaged(f"{name} has other content")


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _store(
    folder: Path,
    entry: Path,
    variables: Sequence[str],
    reader: MediaReader | None,
    writer: StoreWriter | None = None,
) -> TokenStore:
    """Open the files of a store, which stay open if the folder is renamed or deleted."""
    with ExitStack() as stack:
        descriptors = {}
        for name in FILES:
            descriptors[name] = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, descriptors[name])
        stack.pop_all()
    return TokenStore(
        descriptors[TOKENS], descriptors[INDEX], descriptors[MEDIA], variables,
        reader=reader, held=None if writer is None else writer.held, folder=entry,
    )  # fmt: skip


def _rendered(state: Mapping[str, Any], entry: Path, request: Request) -> Rendered:
    """What is known beside the samples, of the sources as the user names them now."""

    def counts(sources: Sequence[Source], values: Sequence[Any]) -> tuple[SourceCount, ...]:
        pairs = zip(sources, values, strict=True)
        return tuple(SourceCount.of(source, value) for source, value in pairs)

    return Rendered(
        train=state["train"],
        counts=counts(request.sources, state["counts"]),
        eval_counts=counts(request.eval_sources, state["eval_counts"]),
        findings=Findings.of(state["findings"]),
        rejects=Rejects.of(request.policies, state["rejects"], entry / REJECTED),
        dropped=state["dropped"],
        truncated=state["truncated"],
        asked=asked_of(state["asked"]),
        template_sha256=state["template_sha256"],
        switch=state["switch"],
    )


def _stamps_json(data: Sequence[Stamp], media: Sequence[Stamp]) -> bytes:
    stamps = {"data": data, "media": media}
    return json.dumps(
        {key: [one.as_json() for one in some] for key, some in stamps.items()}
    ).encode()


def _digested(before: Sequence[Stamp], rendered: Rendered, reporter: Reporter) -> tuple[Stamp, ...]:
    """The stamps with digests; that of a plain file was made while it was read.

    Raises:
        InputError: ``QC-DATA-081``.
    """
    known = {}
    for count in (*rendered.counts, *rendered.eval_counts):
        if len(count.source.files) == 1:
            (path,) = count.source.files
            kind = file_kind(path)
            if kind.container == "jsonl" and not kind.compression:
                known[path] = count.sha256
    try:
        return tuple(with_digests(before, known, reporter))
    except Changed as changed:
        raise changed.error("run the command again", when="while its rows were read") from None
