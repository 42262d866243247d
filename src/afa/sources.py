"""Where experts are: folders, files, hub ids and shipped models, and how they are found again."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from afa.errors import AfaError
from afa.weights import PICKLES

if TYPE_CHECKING:
    from collections.abc import Sequence

_ZOO_PREFIX = "zoo:"
# what of a hub repository is needed; never a pickle. In these patterns * matches a slash as well.
_WEIGHTS = ("config.json", "*.safetensors", "*.safetensors.index.json")
PIPELINE_FILES = (
    "model_index.json",
    "scheduler/*.json",
    *(f"tokenizer*/*.{kind}" for kind in ("json", "txt", "model")),
    *(
        f"{part}/{name}"
        for part in ("unet", "transformer", "text_encoder*", "vae")
        for name in _WEIGHTS
    ),
)
VAE_FILES = (
    "config.json",
    "diffusion_pytorch_model*.safetensors",
    *(f"vae/{name}" for name in _WEIGHTS),
)


@dataclass(frozen=True)
class LoraReference:
    """The LoRA of an expert, as an ensemble folder keeps it: where, its file's hash, its scale."""

    source: str
    sha256: str
    scale: float


@dataclass(frozen=True)
class ExpertReference:
    """An expert, or an autoencoder, as an ensemble folder keeps it: where, and its weights' hash.

    `revision` is the commit that a hub id stood for. With a `lora`, all else is its base's.
    """

    source: str
    sha256: str
    revision: str | None = None
    lora: LoraReference | None = None

    @property
    def identity(self) -> str:
        """All that decides its weights: their hash, and its LoRA's with the scale."""
        if self.lora is None:
            return self.sha256
        return f"{self.sha256} + {self.lora.scale!r} x {self.lora.sha256}"

    @property
    def name(self) -> str:
        """What people call it: the last part of its source, or its LoRA's."""
        source = self.source if self.lora is None else self.lora.source
        return source.rstrip("/").rpartition("/")[2].removeprefix("zoo:")


def locate(
    source: str | Path,
    revision: str | None = None,
    *,
    files: Sequence[str] = PIPELINE_FILES,
) -> Path:
    """The local folder or file of an expert; a hub id is downloaded into the hub's cache.

    Args:
        source: a diffusers folder, a single `.safetensors` file, a hub id such as `org/name`, or
            `zoo:animals` for one of the shipped models.
        revision: of a hub id.
        files: patterns of what is downloaded.

    Raises:
        AfaError: nothing is there, or a pickled checkpoint is.
    """
    text = str(source)
    if text.startswith(_ZOO_PREFIX):
        from afa.zoo import shipped

        return shipped(text.removeprefix(_ZOO_PREFIX))
    path = Path(text).expanduser()
    if path.suffix.lower() in PICKLES:
        raise AfaError(
            f"Experts must be safetensors; '{text}' is a pickle, which can run code when it is "
            "opened. Convert it with a tool you trust, or get the .safetensors file."
        )
    if path.exists():
        return path
    is_hub_id = text.count("/") == 1 and not text.startswith((".", "/", "~"))
    if not is_hub_id or path.suffix == ".safetensors":
        raise AfaError(f"Expert '{text}' does not exist. Name a folder, a file or a hub id.")
    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=list(files)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise AfaError(
            f"Expert '{text}' is no local path, and as a hub id it could not be fetched "
            f"({type(error).__name__}). Check the name, the network and HF_TOKEN."
        ) from error


def refer(
    source: str | Path, path: Path, sha256: str, revision: str | None = None
) -> ExpertReference:
    """A reference by which the same weights are found again, wherever the program is run.

    Local paths become absolute, links in them stay; a hub id keeps the commit it was fetched at.
    """
    is_local = Path(str(source)).expanduser().exists()
    if not is_local and path.parent.name == "snapshots":
        revision = path.name
    return ExpertReference(os.path.abspath(path) if is_local else str(source), sha256, revision)


def require_hash(what: str, reference: ExpertReference, sha256: str | None) -> None:
    """Refuse weights that are not the ones an ensemble was trained with.

    Raises:
        AfaError: another hash; names both.
    """
    if sha256 not in (None, reference.sha256):
        raise AfaError(
            f"{what} '{reference.source}' must have SHA-256 {sha256}, with which the ensemble was "
            f"trained, has {reference.sha256}. Restore that file, or train again."
        )
