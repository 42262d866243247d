"""Where experts are: folders, files, hub ids and shipped models, and how they are found again."""

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
from afa.loading.trust.headers import check_header
from afa.loading.trust.pickles import PICKLES, as_safetensors, folder_as_safetensors
from afa.loading.weights import SAFETENSORS
from afa.policy import policy

if TYPE_CHECKING:
    from collections.abc import Sequence


#: errors of the disk, which are no news of the hub
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
_ZOO_PREFIX = "zoo:"
#: what the hub's library raises where something cannot be had
HUB_ERRORS = (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError)
# what of a hub repository is needed; never a pickle. In these patterns * matches a slash as well.
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
    """The local folder or file of a source; a hub id is downloaded into the hub's cache.

    Args:
        source: a diffusers folder, a single `.safetensors` file, a hub id such as `org/name`, or
            `zoo:animals` for one of the shipped models.
        revision: of a hub id.
        files: patterns of what is downloaded.
        what: the source is, for errors, such as `Autoencoder`.

    Raises:
        AfaError: nothing is there, or a pickled checkpoint is and none is allowed.
    """
    text = str(source)
    if text.startswith(_ZOO_PREFIX):
        from afa.zoo import shipped

        return shipped(text.removeprefix(_ZOO_PREFIX))
    path = Path(text).expanduser()
    if path.suffix.lower() in PICKLES:
        return as_safetensors(path)
    if path.suffix.lower() == ".gguf" and path.is_file():
        check_header(path)  # says what such a file is
    if path.is_dir():
        return folder_as_safetensors(path)
    if path.exists():
        return path
    is_hub_id = text.count("/") == 1 and not text.startswith((".", "/", "~"))
    if not is_hub_id or path.suffix.lower() in SAFETENSORS:
        raise AfaError(
            "AFA-LOAD-079", f"{what} '{text}' does not exist. Name a folder, a file or a hub id."
        )
    try:
        return fetch(text, files, revision)
    except HUB_ERRORS as error:
        raise AfaError(
            "AFA-LOAD-080",
            f"{what} '{text}' is no local path, and as a hub id it could not be fetched "
            f"({why_not_fetched(error)}). Check the name, the network and HF_TOKEN.",
        ) from error


def fetch(name: str, files: Sequence[str], revision: str | None = None) -> Path:
    """The folder of a hub repository in the hub's cache, with what of it is needed.

    Offline the cache is looked into and nothing is asked.

    Raises:
        one of `HUB_ERRORS`: it cannot be had.
        AfaError: this machine cannot keep it.
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
            f"{error}. The cache must have room and be writable. Make room, or set HF_HOME to "
            "another folder.",
        ) from error


def why_not_fetched(error: Exception) -> str:
    """What stands in the way, for an error's text."""
    if policy().offline or hub_constants.HF_HUB_OFFLINE:
        return "offline, and the hub's cache has no copy"
    return type(error).__name__


def refer(source: ExpertSource, path: Path, sha256: str) -> ExpertReference:
    """A reference by which the same weights are found again, wherever the program is run.

    Local paths become absolute, links in them stay; a hub id keeps the commit it was fetched at.
    """
    local, revision = Path(source.source).expanduser(), source.revision
    is_local = local.exists()
    if not is_local and path.parent.name == "snapshots":
        revision = path.name
    place = os.path.abspath(local) if is_local else source.source
    config = source.config and absolute_config(source.config)
    return ExpertReference(place, sha256, revision, config=config)


def locate_vae(source: str | Path, revision: str | None = None) -> Path:
    """The local folder or file of an autoencoder; see `locate`."""
    return locate(source, revision, files=VAE_FILES, what="Autoencoder")


def require_hash(what: str, reference: ExpertReference, sha256: str | None) -> None:
    """Refuse weights that are not the ones an ensemble was trained with.

    Raises:
        AfaError: another hash; names both.
    """
    if sha256 not in (None, reference.sha256):
        raise AfaError(
            "AFA-LOAD-082",
            f"{what} '{reference.source}' must have SHA-256 {sha256}, with which the ensemble was "
            f"trained, has {reference.sha256}. Restore that file, or train again.",
        )


def relative_source(source: str, folder: Path) -> str:
    """A source under the ensemble's parent folder, relative, so that both can move together.

    Relative paths begin with a dot; nothing else does.
    """
    base, path = folder.resolve(), Path(source)
    place = path.parent.resolve() / path.name  # a link at the end stays one
    if path.is_absolute() and place.is_relative_to(base.parent):
        return os.path.join(".", os.path.relpath(place, base))
    return source


def absolute_source(source: str, folder: Path) -> str:
    """A source that an ensemble folder names, as it is found from anywhere."""
    if not source.startswith("."):
        return source
    return os.path.normpath(folder.resolve() / source)
