"""The conversation with the hub: files, a listing, the first bytes of a file, failures.

This file decides how huggingface_hub is asked and what each failure is called. Downloading is
the client's, with its own cache, token, endpoint and offline variables. Headers of safetensors
files come by range requests, one a file for most of them; no answer is read further than what
was asked for, also where a server ignores the range. It leaves to `qcore.checkpoint.hub` what a
user may name, and to `qcore.checkpoint.safetensors_header` whether a header is sound.

Headers are not read by ``HfApi.parse_safetensors_file_metadata``: it reads a whole file from a
server that ignores ranges, does not ask again when an answer breaks off, multiplies out shapes of
any rank, and keeps back the header's length, without which a file that was cut looks sound (a
test shows it, so that we notice when it changes).

Codes: ``QC-HUB-003`` to ``-009``, see `qcore.checkpoint.hub`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Final

from ..errors import InputError, QcoreError, TrustError, nearest
from ..io.atomic import write_error
from ..io.version import __version__
from .safetensors_header import PREFIX, Header, header_length, parse_headers

_FIRST: Final = 100_000  # holds nearly every header, length included (the client's figure)
_WORKERS: Final = 16
_TRIES: Final = 3  # answers that may break off before a file is given up
_BAR_DELAY: Final = 1.0  # seconds without a bar
_CLIENT: Final = {"library_name": "qcore", "library_version": __version__}


def download(name: str, revision: str | None, source: str, patterns: Sequence[str]) -> Path:
    """The snapshot folder of a model, with the files of its top folder that match.

    Args:
        name: ``ORG/NAME``.
        revision: branch, tag or commit; ``None`` for the default branch.
        source: what the user named, for errors.
        patterns: file names, ``*`` allowed.

    Raises:
        InputError: ``QC-HUB-*``.
        TrustError: ``QC-HUB-004``.
        WriteError: the hub's cache cannot be written.
    """
    from huggingface_hub import snapshot_download

    with _told(source):
        found = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],  # a pattern's * takes folders too
            tqdm_class=_bar(),
            **_CLIENT,
        )
    return Path(found)


class RemoteWeights:
    """The files of one commit that stay on the hub; `qcore.checkpoint.checkpoint.Weights`."""

    def __init__(self, name: str, commit: str, source: str) -> None:
        self._name = name
        self._commit = commit
        self._source = source

    def names(self) -> set[str]:
        """Every file of the top folder, by one listing."""
        return set(self._sizes)

    def where(self, name: str) -> str:
        """A file, as an error names it."""
        return f"{self._source}: {name}"

    def headers(self, shards: Sequence[str]) -> list[list[Header]]:
        """The tensors of each of these files, by parallel range requests.

        Raises:
            InputError: ``QC-CKPT-005`` a damaged header, ``-006`` no such file; ``QC-HUB-*``.
            TrustError: ``QC-HUB-004``.
        """
        for shard in shards:
            if shard not in self._sizes:
                raise InputError(
                    "QC-CKPT-006",
                    "is named but is not there",
                    file=self.where(shard[:200]),
                    fix="name a revision that has it, or report it to the repository",
                )
        with _told(self._source):
            return self._fetch(shards)

    def _fetch(self, shards: Sequence[str]) -> list[list[Header]]:
        from huggingface_hub.utils import tqdm

        bar = (_bar() or tqdm)(total=len(shards), desc="Reading headers", delay=_BAR_DELAY)
        pool = ThreadPoolExecutor(min(_WORKERS, len(shards)))
        try:
            jobs = [pool.submit(self._header, shard) for shard in shards]
            for job in as_completed(jobs):
                job.result()
                bar.update(1)
            return [job.result() for job in jobs]
        finally:
            # After a failure or Ctrl-C nothing more is asked, and nobody waits for an answer.
            pool.shutdown(wait=False, cancel_futures=True)
            bar.close()

    @cached_property
    def _sizes(self) -> dict[str, int]:
        from huggingface_hub import HfApi, constants

        with _told(self._source):
            info = HfApi(**_CLIENT).model_info(
                self._name,
                revision=self._commit,
                files_metadata=True,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            )
            files = ((file.rfilename, file.size) for file in info.siblings or ())
            return {name: size or 0 for name, size in files if "/" not in name}

    def _header(self, shard: str) -> list[Header]:
        size, where = self._sizes[shard], self.where(shard)
        first = self._read(shard, 0, min(_FIRST, size))
        stop = PREFIX + header_length(first[:PREFIX], size, where)
        if stop > len(first):
            first += self._read(shard, len(first), stop)
        return parse_headers(first[PREFIX:stop], size, shard, where)

    def _read(self, shard: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of a file; an answer that breaks off is asked on."""
        from huggingface_hub import constants, errors, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        url = hf_hub_url(self._name, shard, revision=self._commit)
        data = bytearray()
        broken: Exception | None = None
        for _ in range(_TRIES):
            at = start + len(data)
            if at >= stop:
                break
            asked = {"Range": f"bytes={at}-{stop - 1}", "Accept-Encoding": "identity"}
            with http_stream_backoff(
                "GET",
                url,
                headers=build_hf_headers(**_CLIENT) | asked,
                max_retries=_TRIES,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            ) as response:
                hf_raise_for_status(response)
                self._check_answer(response, shard, at)
                try:
                    _take(
                        response,
                        data,
                        at=at if response.status_code == 200 else 0,
                        want=stop - start,
                    )
                except errors.HTTPError as error:  # the client would repeat it, and cannot here
                    broken = error
        if start + len(data) < stop:
            raise self._wrong(shard, "an answer that breaks off", f"{stop} bytes") from broken
        return bytes(data)

    def _check_answer(self, response: Any, shard: str, at: int) -> None:
        """Refuse bytes of another place or of another file than the listing promised."""
        size = self._sizes[shard]
        if response.status_code == 206:
            found, expected = response.headers.get("content-range", ""), f"bytes {at}-"
            told = found.rpartition("/")[2]
            sound = found.startswith(expected) and told in (str(size), "*")
            expected = f"{expected}.../{size}"
        else:  # a server that knows no ranges begins at the start
            found, expected = response.headers.get("content-length", str(size)), str(size)
            sound = response.status_code == 200 and found == expected
        if not sound:
            raise self._wrong(shard, f"status {response.status_code}, {found[:100]}", expected)

    def _wrong(self, shard: str, found: str, expected: str) -> InputError:
        return InputError(
            "QC-HUB-008",
            "the header cannot be fetched",
            file=self.where(shard),
            found=found,
            expected=expected,
            fix="run it again, or download the model and name its folder",
        )


def _take(response: Any, data: bytearray, *, at: int, want: int) -> None:
    """Add an answer's bytes from ``at`` on to ``data`` until it has ``want``; then stop reading."""
    for chunk in response.iter_raw():
        data += chunk[at:][: want - len(data)]
        at = max(0, at - len(chunk))
        if len(data) >= want:
            return


@contextmanager
def _told(source: str, kind: str = "model") -> Iterator[None]:
    """What fails inside becomes the error that a user is told, and the client warns of nothing."""
    from huggingface_hub import constants, errors

    try:
        with _quiet():
            yield
    except (errors.HTTPError, errors.HFValidationError) as error:
        raise _refused(error, source, constants.ENDPOINT, kind) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _not_cached(error, source, constants.ENDPOINT, kind) from error
    except OSError as error:
        if error.errno is not None:
            raise write_error(error, Path(error.filename or constants.HF_HUB_CACHE)) from error
        raise _failed(error, source) from error
    except (RuntimeError, getattr(errors, "XetDownloadError", RuntimeError)) as error:
        raise _failed(error, source) from error


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


def _refused(error: Exception, source: str, endpoint: str, kind: str) -> QcoreError:
    """What an answer of the hub, or the lack of one, means for the user."""
    from huggingface_hub import errors

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    page = ("datasets/" if kind == "dataset" else "") + source.partition("@")[0]
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return TrustError(
            "QC-HUB-004",
            f"{endpoint} gives this token no access",
            file=source,
            fix=f"accept the licence at {endpoint}/{page} and set HF_TOKEN",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            "QC-HUB-003",
            f"is no folder, and {endpoint} has no public {kind} of that name",
            file=source,
            fix=near(source, Path(source))
            or f"check the name; for a private {kind} set HF_TOKEN or run: hf auth login",
        )
    if status == 401:
        return TrustError(
            "QC-HUB-004",
            f"{endpoint} does not take this token",
            file=source,
            fix="set a valid HF_TOKEN, or run: hf auth login",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        what = f"{endpoint} has the {kind} but not this revision"
        fix = "name a branch, tag or commit, or leave @REVISION out"
        return InputError("QC-HUB-005", what, file=source, fix=fix)
    if isinstance(error, errors.HFValidationError):
        return InputError("QC-HUB-001", "is no hub id", file=source, expected="ORG/NAME")
    if status is None:
        return _unreachable(error, source, endpoint)
    return InputError(
        "QC-HUB-008", f"{endpoint} answers with status {status}", file=source, fix="try again later"
    )


def _not_cached(error: Exception, source: str, endpoint: str, kind: str) -> QcoreError:
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
        return _refused(cause if isinstance(cause, Exception) else error, source, endpoint, kind)
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


def near(source: str, path: Path) -> str | None:
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
    name = nearest(missing.name, names)
    if name is None:
        return None
    guess = missing.with_name(name)
    rest = path.relative_to(missing)
    return f"did you mean {guess / rest if (guess / rest).is_dir() else guess}?"
