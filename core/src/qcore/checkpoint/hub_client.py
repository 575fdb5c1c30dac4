"""Calls huggingface_hub: downloads, range requests for headers, and an error for each failure.

This file decides how huggingface_hub is called and which error each failure raises. The client
downloads, with its own cache, token, endpoint and offline variables. Headers of safetensors files
are read by range requests, for most files a single one. A response is never read beyond the
requested bytes, even if the server ignores the range. `qcore.checkpoint.hub` decides which ids are
valid, and `qcore.checkpoint.safetensors_header` which headers are.

``HfApi.parse_safetensors_file_metadata`` is not used, because it reads the whole file from a
server that ignores ranges, does not retry an incomplete response, multiplies shapes of any rank,
and does not return the header's length, without which a truncated file looks valid. A test fails
when this changes.

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
from glob import escape
from pathlib import Path
from typing import Any, Final

from ..errors import InputError, QcoreError, TrustError
from ..io.atomic import write_error
from ..io.version import __version__
from .safetensors_header import PREFIX, Header, header_length, parse_headers
from .suggest import suggest_folder

_FIRST: Final = 100_000  # bytes; contains nearly every header with its length (the client's value)
_WORKERS: Final = 16
_TRIES: Final = 3  # attempts per range
_BAR_DELAY: Final = 1.0  # seconds until the progress bar appears
_CLIENT: Final = {"library_name": "qcore", "library_version": __version__}


def download(
    name: str, revision: str | None, source: str, patterns: Sequence[str], *, folder: str = ""
) -> Path:
    """Download the matching files of a folder of a repository and return the snapshot folder.

    Args:
        name: ``ORG/NAME``.
        revision: branch, tag or commit; ``None`` for the default branch.
        source: the id that the user passed, for errors.
        patterns: file names, which may contain ``*``; if one has a ``/``, a ``*`` of the others
            also matches folders.
        folder: folder of the files in the repository; empty for the top.

    Raises:
        InputError: ``QC-HUB-*``.
        TrustError: ``QC-HUB-004``.
        WriteError: the hub's cache cannot be written.
    """
    from huggingface_hub import snapshot_download

    below = f"{escape(folder)}/" if folder else ""
    with _client_errors(source):
        snapshot = snapshot_download(
            name,
            revision=revision,
            allow_patterns=[below + pattern for pattern in patterns],
            # A * in a pattern also matches folders.
            ignore_patterns=None if any("/" in p for p in patterns) else [f"{below}*/*"],
            tqdm_class=_progress_bar(),
            **_CLIENT,
        )
    return Path(snapshot)


def list_files(name: str, commit: str, source: str) -> set[str]:
    """Return the names of all files of a commit, with ``/`` between folder and file.

    Offline the names are unknown and the set is empty.

    Args:
        name: ``ORG/NAME``.
        commit: the commit.
        source: the id that the user passed, for errors.

    Raises:
        InputError: ``QC-HUB-*``.
        TrustError: ``QC-HUB-004``.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    with _client_errors(source):
        try:
            info = HfApi(**_CLIENT).model_info(
                name, revision=commit, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            )
        except OfflineModeIsEnabled:
            return set()
        return {file.rfilename for file in info.siblings or ()}


class RemoteWeights:
    """Files of one commit that are not downloaded; implements `checkpoint.Weights`."""

    def __init__(self, name: str, commit: str, source: str) -> None:
        self._name = name
        self._commit = commit
        self._source = source

    def names(self) -> set[str]:
        """Return the names of all top-level files, from one listing."""
        return set(self._sizes)

    def where(self, name: str) -> str:
        """Return the location of a file, for errors."""
        return f"{self._source}: {name}"

    def headers(self, shards: Sequence[str]) -> list[list[Header]]:
        """Read the headers of each shard by parallel range requests.

        Raises:
            InputError: ``QC-CKPT-005`` a damaged header, ``-006`` no such file; ``QC-HUB-*``.
            TrustError: ``QC-HUB-004``.
        """
        for shard in shards:
            if shard not in self._sizes:
                raise InputError(
                    "QC-CKPT-006",
                    "is referenced but does not exist",
                    file=self.where(shard[:200]),
                    fix="name a revision that has it",
                )
        with _client_errors(self._source):
            return self._fetch(shards)

    def _fetch(self, shards: Sequence[str]) -> list[list[Header]]:
        from huggingface_hub.utils import tqdm

        bar_class = _progress_bar() or tqdm
        bar = bar_class(total=len(shards), desc="Reading headers", delay=_BAR_DELAY)
        pool = ThreadPoolExecutor(min(_WORKERS, len(shards)))
        try:
            jobs = [pool.submit(self._header, shard) for shard in shards]
            for job in as_completed(jobs):
                job.result()
                bar.update(1)
            return [job.result() for job in jobs]
        finally:
            # After a failure or Ctrl-C, cancel pending requests and do not wait for running ones.
            pool.shutdown(wait=False, cancel_futures=True)
            bar.close()

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """Sizes in bytes of the top-level files, by name."""
        from huggingface_hub import HfApi, constants

        with _client_errors(self._source):
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
        """Read bytes ``start`` to ``stop`` of a file; continue an incomplete response."""
        from huggingface_hub import constants, errors, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        url = hf_hub_url(self._name, shard, revision=self._commit)
        data = bytearray()
        interruption: Exception | None = None
        for _ in range(_TRIES):
            position = start + len(data)
            if position >= stop:
                break
            range_headers = {
                "Range": f"bytes={position}-{stop - 1}",
                "Accept-Encoding": "identity",
            }
            with http_stream_backoff(
                "GET",
                url,
                headers=build_hf_headers(**_CLIENT) | range_headers,
                max_retries=_TRIES,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            ) as response:
                hf_raise_for_status(response)
                self._check_response(response, shard, position)
                try:
                    _append_bytes(
                        response,
                        data,
                        skip=position if response.status_code == 200 else 0,
                        size=stop - start,
                    )
                except errors.HTTPError as error:  # the client retries requests, not streams
                    interruption = error
        if start + len(data) < stop:
            raise self._bad_response(
                shard, "an incomplete response", f"{stop} bytes"
            ) from interruption
        return bytes(data)

    def _check_response(self, response: Any, shard: str, start: int) -> None:
        """Refuse a response with the wrong offset, or from a file of another size than listed."""
        size = self._sizes[shard]
        if response.status_code == 206:
            content, expected = response.headers.get("content-range", ""), f"bytes {start}-"
            total = content.rpartition("/")[2]
            valid = content.startswith(expected) and total in (str(size), "*")
            expected = f"{expected}.../{size}"
        else:  # a server without range support sends the file from its start
            content, expected = response.headers.get("content-length", str(size)), str(size)
            valid = response.status_code == 200 and content == expected
        if not valid:
            raise self._bad_response(
                shard, f"status {response.status_code}, {content[:100]}", expected
            )

    def _bad_response(self, shard: str, found: str, expected: str) -> InputError:
        return InputError(
            "QC-HUB-008",
            "the header cannot be downloaded",
            file=self.where(shard),
            found=found,
            expected=expected,
            fix="run the command again, or download the model and name its folder",
        )


def _append_bytes(response: Any, data: bytearray, *, skip: int, size: int) -> None:
    """Append a response's bytes, without its first ``skip``, until ``data`` has ``size`` bytes."""
    for chunk in response.iter_raw():
        data += chunk[skip:][: size - len(data)]
        skip = max(0, skip - len(chunk))
        if len(data) >= size:
            return


@contextmanager
def _client_errors(source: str, kind: str = "model") -> Iterator[None]:
    """Convert the client's exceptions to qcore errors and silence its warnings."""
    from huggingface_hub import constants, errors

    try:
        with _without_warnings():
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
def _without_warnings() -> Iterator[None]:
    """Silence the client's warnings, unless the user set its verbosity: our errors cover them."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    if "HF_HUB_VERBOSITY" not in os.environ and "HF_DEBUG" not in os.environ:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _progress_bar() -> Any:
    """Return a silent progress bar class, or ``None`` for the client's own on a terminal."""
    if sys.stderr is not None and sys.stderr.isatty():
        return None
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):  # type: ignore[misc]  # mypy does not follow imports of the client
        """A progress bar that draws nothing."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"disable": True}))

    return Silent


def _refused(error: Exception, source: str, endpoint: str, kind: str) -> QcoreError:
    """Return the error for an HTTP failure: an error response, or no response at all."""
    from huggingface_hub import errors

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    page = ("datasets/" if kind == "dataset" else "") + source.partition("@")[0]
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return TrustError(
            "QC-HUB-004",
            f"{endpoint} denies access to this {kind}",
            file=source,
            fix=f"accept the license at {endpoint}/{page} and set HF_TOKEN",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            "QC-HUB-003",
            f"is not a folder, and {endpoint} has no public {kind} of that name",
            file=source,
            fix=suggest_folder(source, Path(source))
            or f"check the name; for a private {kind} set HF_TOKEN or run: hf auth login",
        )
    if status == 401:
        return TrustError(
            "QC-HUB-004",
            f"{endpoint} rejects this token",
            file=source,
            fix="set a valid HF_TOKEN, or run: hf auth login",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        what = f"{endpoint} has the {kind} but not this revision"
        fix = "name a branch, tag or commit, or leave @REVISION out"
        if "/" in source.partition("@")[2]:
            fix += "; a folder comes before it: ORG/NAME/FOLDER@REVISION"
        return InputError("QC-HUB-005", what, file=source, fix=fix)
    if isinstance(error, errors.HFValidationError):
        return InputError("QC-HUB-001", "is not a valid hub id", file=source, expected="ORG/NAME")
    if status is None:
        return _unreachable(error, source, endpoint)
    return InputError(
        "QC-HUB-008",
        f"{endpoint} responds with status {status}",
        file=source,
        fix="try again later",
    )


def _not_cached(error: Exception, source: str, endpoint: str, kind: str) -> QcoreError:
    """Return the error for files that are not cached while the hub is offline or unreachable."""
    from huggingface_hub import errors

    cause = error.__cause__ or error
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return InputError(
            "QC-HUB-006",
            "is not a folder, is not fully cached, and HF_HUB_OFFLINE is set",
            file=source,
            fix="unset HF_HUB_OFFLINE, or name a folder",
        )
    if getattr(cause, "response", None) is not None:
        return _refused(cause if isinstance(cause, Exception) else error, source, endpoint, kind)
    return _unreachable(cause, source, endpoint)


def _unreachable(error: BaseException, source: str, endpoint: str) -> QcoreError:
    return InputError(
        "QC-HUB-007",
        f"is not a folder, is not fully cached, and {endpoint} cannot be reached",
        file=source,
        found=_one_line(error),
        fix="check the network and HF_ENDPOINT, or name a folder",
    )


def _failed(error: Exception, source: str) -> QcoreError:
    return InputError(
        "QC-HUB-008",
        "the download failed",
        file=source,
        found=_one_line(error),
        fix="run the command again",
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]
