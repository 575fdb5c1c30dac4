"""Files of dataset repositories on the hub: their names, and the download of some of them.

This file decides how the snapshot of a dataset is found, online and offline. Errors are those of
`qcore.checkpoint.hub_client`; `qcore.data.sources.hub_files` decides which files are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from glob import escape
from pathlib import Path

from .hub_client import _CLIENT as CLIENT
from .hub_client import _client_errors as told
from .hub_client import _progress_bar as bar


def list_dataset(name: str, revision: str | None, source: str) -> tuple[Path, tuple[str, ...]]:
    """The snapshot folder of a dataset repository, with its card, and its file names.

    Offline, they are the names in the cached snapshot, which may lack files of the repository.

    Args:
        name: ``ORG/NAME``.
        revision: branch, tag or commit; ``None`` for the default branch.
        source: the id that the user passed, for errors.

    Raises:
        InputError: ``QC-HUB-*``.
        TrustError: ``QC-HUB-004``.
        WriteError: the hub's cache cannot be written.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    # This names the commit in the cache, so that the revision is known offline.
    folder = download_dataset(name, revision, source, ["README.md"])
    with told(source, "dataset"):
        try:
            info = HfApi(**CLIENT).dataset_info(
                name, revision=folder.name, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            )
        except OfflineModeIsEnabled:
            files = (path for path in folder.rglob("*") if path.is_file())
            return folder, tuple(sorted(path.relative_to(folder).as_posix() for path in files))
    return folder, tuple(sorted(file.rfilename for file in info.siblings or ()))


def download_dataset(name: str, revision: str | None, source: str, names: Sequence[str]) -> Path:
    """Download files of a dataset repository and return the snapshot folder.

    Args:
        name: ``ORG/NAME``.
        revision: branch, tag or commit; ``None`` for the default branch.
        source: the id that the user passed, for errors.
        names: paths in the repository.

    Raises:
        InputError: ``QC-HUB-*``.
        TrustError: ``QC-HUB-004``.
        WriteError: the hub's cache cannot be written.
    """
    from huggingface_hub import snapshot_download

    with told(source, "dataset"):
        folder = snapshot_download(
            name,
            repo_type="dataset",
            revision=revision,
            allow_patterns=[escape(each) for each in names],
            tqdm_class=bar(),
            **CLIENT,
        )
    return Path(folder)
