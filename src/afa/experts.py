"""Where an expert is, and how its parts are loaded."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from afa.errors import AfaError
from afa.files import read_json
from afa.kinds import Kind, kind_of
from afa.weights import (
    PICKLES,
    check_safetensors,
    hash_expert,
    hash_file,
    hash_files,
    loading,
    weights_in,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from diffusers import SchedulerMixin
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ZOO_PREFIX = "zoo:"
# what of a hub repository is needed; never a pickle. In these patterns * matches a slash as well.
_WEIGHTS = ("config.json", "*.safetensors", "*.safetensors.index.json")
_PIPELINE_FILES = (
    "model_index.json",
    "scheduler/*.json",
    *(f"tokenizer*/*.{kind}" for kind in ("json", "txt", "model")),
    *(
        f"{part}/{name}"
        for part in ("unet", "transformer", "text_encoder*", "vae")
        for name in _WEIGHTS
    ),
)
_VAE_FILES = (
    "config.json",
    "diffusion_pytorch_model*.safetensors",
    *(f"vae/{name}" for name in _WEIGHTS),
)


#: of an autoencoder: what has to be alike where predictions of latents are mixed
LATENTS = ("latent_channels", "scaling_factor", "shift_factor")


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


@dataclass(frozen=True)
class Expert:
    """The parts of one model that an ensemble needs.

    Attributes:
        reference: where it comes from.
        kind: of its pipeline.
        class_name: of its pipeline.
        denoiser: its U-Net or transformer.
        text_encoders: by their names in the pipeline.
        tokenizers: likewise.
        scheduler: for sampling.
        vae: of a single file; a folder's is loaded by `load_vae`.
        latents: what its autoencoder's configuration says of the latents; empty where it has none.
        options: what its pipeline is told besides.
    """

    reference: ExpertReference
    kind: Kind
    class_name: str
    denoiser: Any
    text_encoders: dict[str, PreTrainedModel]
    tokenizers: dict[str, PreTrainedTokenizerBase]
    scheduler: SchedulerMixin
    vae: AutoencoderKL | None = None
    latents: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def locate(
    source: str | Path,
    revision: str | None = None,
    *,
    files: Sequence[str] = _PIPELINE_FILES,
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


def load_expert(
    source: str | Path,
    *,
    revision: str | None = None,
    config: Path | None = None,
    sha256: str | None = None,
    torch_dtype: torch.dtype = torch.float32,
) -> Expert:
    """Load one expert's parts; of a folder all but the autoencoder, see `load_vae`.

    Args:
        source: see `locate`.
        revision: of a hub id.
        config: for a single file: a folder with the configuration and tokenizer of its family.
        sha256: that its weights must have; None takes any.
        torch_dtype: of the weights in memory.

    Raises:
        AfaError: nothing is there, a pickle, another hash, a damaged or incomplete model, or a
            family that is not supported.
    """
    path = locate(source, revision)
    index = path / "model_index.json"
    if index.is_file():  # before its weights are looked for, which other families name otherwise
        kind_of(str(read_json(index).get("_class_name")), source)
    reference = refer(source, path, hash_expert(path), revision)
    require_hash("Expert", reference, sha256)
    if path.is_file():
        return _load_single_file(reference, path, config, torch_dtype)
    with _loading(source):
        return _load_folder(reference, path, torch_dtype)


def _load_folder(reference: ExpertReference, path: Path, torch_dtype: torch.dtype) -> Expert:
    """All but the autoencoder of a pipeline's folder."""
    index = read_json(path / "model_index.json")
    class_name = str(index.get("_class_name"))
    kind = kind_of(class_name, reference.source)
    classes = {
        name: entry[1]
        for name, entry in index.items()
        if isinstance(entry, list) and entry and entry[0] is not None
    }
    encoders = [name for name in classes if name.startswith("text_encoder")]
    tokenizers = [name for name in classes if name.startswith("tokenizer")]
    return Expert(
        reference,
        kind,
        class_name,
        denoiser=_load_weights(
            kind.denoiser_family.model_class, path / kind.denoiser, torch_dtype=torch_dtype
        ),
        text_encoders={
            name: _load_weights(
                _class(transformers, classes[name], transformers.PreTrainedModel),
                path / name,
                dtype=torch_dtype,
            )
            for name in encoders
        },
        tokenizers={
            name: _class(
                transformers, classes[name], transformers.PreTrainedTokenizerBase
            ).from_pretrained(path / name)
            for name in tokenizers
        },
        scheduler=_class(diffusers, classes["scheduler"], diffusers.SchedulerMixin).from_pretrained(
            path / "scheduler"
        ),
        latents=_latents(path / "vae" / "config.json"),
        options={
            name: entry
            for name, entry in index.items()
            if not name.startswith("_") and not isinstance(entry, list)
        },
    )


def _latents(config: Path) -> dict[str, Any]:
    """What an autoencoder's configuration says of the latents, with the library's defaults."""
    if not config.is_file():
        return {}
    found, defaults = read_json(config), inspect.signature(AutoencoderKL).parameters
    return {key: found.get(key, defaults[key].default) for key in LATENTS}


def _class(library: Any, name: str, base: type) -> Any:
    """A class that a folder names, if it is of the expected kind.

    Raises:
        AfaError: the library has none of this name and kind.
    """
    found = getattr(library, name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise AfaError(
            f"A part of a pipeline must be a {base.__name__} that {library.__name__} has; its "
            f"model_index.json names '{name}'. Is the installed version older than the model?"
        )
    return found


def load_vae(
    source: str | Path,
    *,
    revision: str | None = None,
    config: Path | None = None,
    torch_dtype: torch.dtype = torch.float32,
) -> tuple[AutoencoderKL, ExpertReference]:
    """Load an autoencoder from a pipeline folder, a folder of its own, a file or a hub id.

    Args:
        source: see `locate`.
        revision: of a hub id.
        config: for a single file: a pipeline folder whose `vae/config.json` describes it.
        torch_dtype: of the weights in memory.

    Raises:
        AfaError: as `load_expert`.
    """
    path = locate(source, revision, files=_VAE_FILES)
    if path.is_file():
        check_safetensors(path)
        reference = refer(source, path, hash_file(path), revision)
        options = {} if config is None else {"config": str(config), "subfolder": "vae"}
        with _loading(source, "Name a local diffusers folder of its family: config=FOLDER."):
            return AutoencoderKL.from_single_file(
                str(path), torch_dtype=torch_dtype, local_files_only=config is not None, **options
            ), reference
    folder = path / "vae" if (path / "vae").is_dir() else path
    files = weights_in(folder)[1]
    for file in files:
        check_safetensors(file)
    reference = refer(source, path, hash_files(path, files), revision)
    with _loading(source):
        return _load_weights(AutoencoderKL, folder, torch_dtype=torch_dtype), reference


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


def _load_weights(model_class: Any, folder: Path, **options: Any) -> Any:
    """A component from its folder; refused where the library would fill gaps with random weights.

    Raises:
        AfaError: parameters that the file lacks.
    """
    variant, _ = weights_in(folder)
    model, info = model_class.from_pretrained(
        folder, variant=variant, use_safetensors=True, output_loading_info=True, **options
    )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise AfaError(
            f"Weights must be complete; those in '{folder}' lack {len(missing)} parameters "
            f"(first: {missing[0]}). Download or save them again."
        )
    return model


def _loading(
    source: str | Path, remedy: str = "Download or save it again."
) -> AbstractContextManager[None]:
    must = f"'{source}' must be a complete diffusion model"
    return loading(must, remedy, SingleFileComponentError)


def _load_single_file(
    reference: ExpertReference, path: Path, config: Path | None, torch_dtype: torch.dtype
) -> Expert:
    if config is not None:
        needed = ("model_index.json", "unet", "text_encoder", "tokenizer", "scheduler", "vae")
        missing = [name for name in needed if not (config / name).exists()]
        if missing:
            raise AfaError(
                f"The configuration folder '{config}' must be a diffusers pipeline (weights are "
                f"not needed); it lacks {', '.join(missing)}."
            )
    remedy = (
        "Is it a whole checkpoint of the family that config=FOLDER describes?"
        if config is not None
        else "It needs the configuration and tokenizer of its family: name a local diffusers "
        "folder of that family, config=FOLDER."
    )
    with _loading(path, remedy):
        parts = StableDiffusionPipeline.from_single_file(
            str(path),
            config=None if config is None else str(config),
            torch_dtype=torch_dtype,
            safety_checker=None,
            local_files_only=config is not None,
        ).components
        for name in ("unet", "text_encoder", "vae"):
            empty = [key for key, p in parts[name].named_parameters() if p.is_meta]
            if empty:
                raise AfaError(
                    f"Weights must be complete; '{path}' lacks {len(empty)} of the {name} "
                    f"(first: {empty[0]}). {remedy}"
                )
    return Expert(
        reference,
        kind_of("StableDiffusionPipeline", path),
        "StableDiffusionPipeline",
        denoiser=parts["unet"],
        text_encoders={"text_encoder": parts["text_encoder"]},
        tokenizers={"tokenizer": parts["tokenizer"]},
        scheduler=parts["scheduler"],
        vae=parts["vae"],
        latents={key: parts["vae"].config[key] for key in LATENTS},
    )
