"""Data folders and archives at addresses: `hf://` and `https://`."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from afa.errors import AfaError
from afa.policy import policy
from afa.training.data.list_formats import LISTS

#: of huggingface_hub's file system: datasets/user/name@revision/path
_HUB = re.compile(
    r"hf://(?P<kind>datasets/|models/|spaces/)?(?!(?:datasets|models|spaces)/)"
    r"(?P<id>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<path>.+?))?/?"
)
_KINDS = {"datasets/": "dataset", "spaces/": "space", "models/": "model", None: "model"}
_WEB = re.compile(r"https?://.+")
_FILES = (".zip", *LISTS)


def is_address(source: Path | str) -> bool:
    """Whether a data folder is an address instead of a path."""
    return isinstance(source, str) and "://" in source


def located(source: Path | str) -> Path:
    """Return a data folder, archive or list on this machine; downloads it first if necessary.

    Args:
        source: a path; `hf://datasets/user/name`, optionally with `@revision` and a path inside of
            it; or an `https://` address of a `.zip`.

    Raises:
        AfaError: if the address is not understood, or cannot be downloaded.
    """
    if not is_address(source):
        return Path(source)
    address = str(source)
    if found := _HUB.fullmatch(address):
        return _from_hub(address, **found.groupdict())
    if _WEB.fullmatch(address) and PurePosixPath(urlsplit(address).path).suffix.lower() == ".zip":
        return _from_web(address)
    raise AfaError(
        "AFA-TRAIN-070",
        f"data.folder '{address}' is not understood. It must be a path, hf://datasets/user/name "
        "with an optional path inside, or the https:// address of a .zip. Download other data, and "
        "set data.folder to it; or use data.dataset.",
    )


def _from_hub(
    address: str, kind: str | None, id: str, revision: str | None, path: str | None
) -> Path:
    """Download a folder or a file of a hub repository to the hub's cache."""
    from huggingface_hub import hf_hub_download, snapshot_download

    asked: dict[str, Any] = {
        "repo_type": _KINDS[kind],
        "revision": unquote(revision) if revision else None,
        "local_files_only": policy().offline,
    }
    try:
        if path is not None and PurePosixPath(path).suffix.lower() == ".zip":
            return Path(hf_hub_download(id, path, **asked))
        # a list needs the pictures beside it
        is_list = path is not None and PurePosixPath(path).suffix.lower() in LISTS
        folder = str(PurePosixPath(path).parent) if path is not None and is_list else path
        patterns = None if folder in (None, ".") else [f"{folder}/**"]
        root = Path(snapshot_download(id, allow_patterns=patterns, **asked))
    except Exception as error:  # of the hub, its network libraries or the disk
        raise _failed(address, error) from error
    place = root if path is None else root / path
    if not place.exists():
        raise AfaError(
            "AFA-TRAIN-079",
            f"'{address}' does not exist: the repository has no '{path}'. Correct data.folder.",
        )
    return place


def _from_web(address: str) -> Path:
    """Download an archive to the cache of `datasets`, which keeps it while it is unchanged."""
    from datasets import DownloadConfig, DownloadManager, disable_progress_bars

    disable_progress_bars()
    config = DownloadConfig(local_files_only=policy().offline)
    try:
        local = DownloadManager(download_config=config).download(address)
    except Exception as error:  # of datasets, fsspec or the network
        raise _failed(address, error) from error
    return _with_suffix(Path(str(local)))


def _with_suffix(file: Path) -> Path:
    """Link a downloaded file, whose name is a hash, to a name with its suffix."""
    linked = file.with_name(f"{file.name}.zip")
    if not linked.exists():
        linked.unlink(missing_ok=True)
        linked.symlink_to(file.name)
    return linked


def _failed(address: str, error: Exception) -> AfaError:
    message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if policy().offline:
        message = f"offline, and not in the cache ({type(error).__name__})"
    return AfaError(
        "AFA-TRAIN-078",
        f"data.folder '{address}' cannot be downloaded: {message}. Check the address and the "
        "network; for a private repository, run: hf auth login",
    )
