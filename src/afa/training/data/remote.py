"""Data folders, archives and lists on the hub: `hf://`."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from afa.errors import AfaError
from afa.policy import policy
from afa.training.data.list_formats import LISTS

#: of huggingface_hub's file system: datasets/user/name@revision/path
_HUB = re.compile(
    r"hf://(?P<kind>datasets/|models/|spaces/)?(?!(?:datasets|models|spaces)/)"
    r"(?P<id>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<path>.+?))?/?"
)
_KINDS = {"datasets/": "dataset", "spaces/": "space", "models/": "model", None: "model"}


def is_address(source: Path | str) -> bool:
    """Whether a data folder is an address instead of a path."""
    return isinstance(source, str) and "://" in source


def located(source: Path | str) -> Path:
    """Return a data folder, archive or list on this machine; downloads it first if necessary.

    Args:
        source: a path; or `hf://datasets/user/name`, optionally with `@revision` and a path inside
            of it.

    Raises:
        AfaError: if the address is not understood, or cannot be downloaded.
    """
    if not is_address(source):
        return Path(source)
    address = str(source)
    if found := _HUB.fullmatch(address):
        return _from_hub(address, **found.groupdict())
    raise AfaError(
        "AFA-TRAIN-070",
        f"data.folder '{address}' is not understood. It must be a path, or hf://datasets/user/name "
        "with an optional path inside. Download the data, for example with curl -LO, and set "
        "data.folder to the folder or the .zip; or use data.dataset.",
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


def _failed(address: str, error: Exception) -> AfaError:
    message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if policy().offline:
        message = f"offline, and not in the cache ({type(error).__name__})"
    return AfaError(
        "AFA-TRAIN-078",
        f"data.folder '{address}' cannot be downloaded: {message}. Check the address and the "
        "network; for a private repository, run: hf auth login",
    )
