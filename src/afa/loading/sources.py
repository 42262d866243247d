"""Locate experts: folders, files, hub ids and bundled models; make references to them."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants as hub_constants
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from afa.denoisers.family import COMPONENTS
from afa.ensemble.references import ExpertReference
from afa.errors import AfaError
from afa.loading.expert_source import ExpertSource, absolute_config
from afa.loading.trust.pickles import PICKLES, as_safetensors, folder_as_safetensors
from afa.loading.weights import GGUF_SUFFIX, SAFETENSORS
from afa.policy import policy

if TYPE_CHECKING:
    from collections.abc import Sequence


#: errors of the local disk, not of the hub
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
_ZOO_PREFIX = "zoo:"
#: what the hub's library raises if something cannot be downloaded
HUB_ERRORS = (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError)
# the required files of a hub repository, without pickles. In these patterns * also matches a slash.
_WEIGHTS = ("config.json", "*.safetensors", "*.safetensors.index.json")
PIPELINE_FILES = (
    "model_index.json",
    "scheduler/*.json",
    *(f"tokenizer*/*.{kind}" for kind in ("json", "txt", "model")),
    *(f"{part}/{name}" for part in (*COMPONENTS, "text_encoder*", "vae") for name in _WEIGHTS),
)
VAE_FILES = (
    "config.json",
    "diffusion_pytorch_model*.safetensors",
    *(f"vae/{name}" for name in _WEIGHTS),
)


def locate(
    source: str | Path,
    revision: str | None = None,
    *,
    files: Sequence[str] = PIPELINE_FILES,
    what: str = "Expert",
) -> Path:
    """Return the local folder or file of a source; download a hub id into the hub's cache.

    Args:
        source: a diffusers folder, a single `.safetensors` file, a hub id such as `org/name`, or
            `zoo:animals` for one of the bundled models.
        revision: of a hub id.
        files: patterns of the files to download.
        what: kind of the source for errors, such as `Autoencoder`.

    Raises:
        AfaError: if the source does not exist, or is a pickle and pickles are not allowed.
    """
    text = str(source)
    if text.startswith(_ZOO_PREFIX):
        from afa.zoo import shipped

        return shipped(text.removeprefix(_ZOO_PREFIX))
    path = Path(text).expanduser()
    if path.suffix.lower() in PICKLES:
        return as_safetensors(path)
    if path.is_dir():
        return folder_as_safetensors(path)
    if path.exists():
        return path
    if not _is_hub_id(text) or path.suffix.lower() in (*SAFETENSORS, GGUF_SUFFIX):
        raise AfaError(
            "AFA-LOAD-079", f"{what} '{text}' does not exist. Pass a folder, a file or a hub id."
        )
    try:
        return fetch(text, files, revision)
    except HUB_ERRORS as error:
        raise AfaError(
            "AFA-LOAD-080",
            f"{what} '{text}' is not a local path, and could not be downloaded as a hub id "
            f"({why_not_fetched(error)}). Check the name, the network and HF_TOKEN.",
        ) from error


def _is_hub_id(text: str) -> bool:
    is_drive = text[1:2] == ":"  # of Windows
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not is_drive


def is_there(source: str) -> bool:
    """Whether a source is bundled, an existing local path, or may be a hub id."""
    is_local = Path(source).expanduser().exists()
    return is_local or source.startswith(_ZOO_PREFIX) or _is_hub_id(source)


def fetch(name: str, files: Sequence[str], revision: str | None = None) -> Path:
    """Download the required files of a hub repository; return its folder in the hub's cache.

    With `offline`, only the cache is used.

    Raises:
        one of `HUB_ERRORS`: if it cannot be downloaded.
        AfaError: if it cannot be written to the cache.
    """
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(files),
                local_files_only=policy().offline,
            )
        )
    except OSError as error:
        if error.errno not in _OF_DISKS:
            raise
        raise AfaError(
            "AFA-LOAD-081",
            f"'{name}' cannot be written to the hub's cache '{hub_constants.HF_HUB_CACHE}': "
            f"{error}. The cache must be writable and have enough space. Free disk space, or set "
            "HF_HOME to another folder.",
        ) from error


def why_not_fetched(error: Exception) -> str:
    """Return the reason why a download failed, for an error's text."""
    if policy().offline or hub_constants.HF_HUB_OFFLINE:
        return "offline, and not in the hub's cache"
    return type(error).__name__


def refer(source: ExpertSource, path: Path, sha256: str) -> ExpertReference:
    """Make a reference that finds the same weights again from any working directory.

    Local paths become absolute, with links unresolved; a hub id gets the downloaded commit.
    """
    local, revision = Path(source.source).expanduser(), source.revision
    is_local = local.exists()
    if not is_local and path.parent.name == "snapshots":
        revision = path.name
    name = os.path.abspath(local) if is_local else source.source
    config = source.config and absolute_config(source.config)
    return ExpertReference(name, sha256, revision, config=config)


def locate_vae(source: str | Path, revision: str | None = None) -> Path:
    """Return the local folder or file of an autoencoder; see `locate`."""
    return locate(source, revision, files=VAE_FILES, what="Autoencoder")


def require_hash(what: str, reference: ExpertReference, sha256: str | None) -> None:
    """Check that weights are those that an ensemble was trained with.

    Raises:
        AfaError: if the hash differs; names both.
    """
    if sha256 not in (None, reference.sha256):
        raise AfaError(
            "AFA-LOAD-082",
            f"{what} '{reference.source}' has SHA-256 {reference.sha256}; the ensemble was trained "
            f"with {sha256}. Restore that file, or train again.",
        )


def relative_source(source: str, folder: Path) -> str:
    """Make a source relative if it is in the ensemble's parent folder, so that both can be moved.

    Only relative paths begin with a dot.
    """
    base, path = folder.resolve(), Path(source)
    absolute = path.parent.resolve() / path.name  # the last component may be a link
    if path.is_absolute() and absolute.is_relative_to(base.parent):
        # slashes on every system, so that the ensemble can be moved to another one
        return f"./{Path(os.path.relpath(absolute, base)).as_posix()}"
    return source


def absolute_source(source: str, folder: Path) -> str:
    """Make a source in an ensemble folder absolute."""
    if not source.startswith("."):
        return source
    return os.path.normpath(folder.resolve() / source)
