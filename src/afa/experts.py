"""Where an expert is, what it is (its hash), and how its parts are loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from afa.errors import AfaError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PICKLES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl"})
_ZOO_PREFIX = "zoo:"
# what of a hub repository is needed; never a pickle
_WANTED = ("model_index.json", "*/*.safetensors", "*/*.json", "tokenizer/*.txt")


@dataclass(frozen=True)
class ExpertReference:
    """An expert as an ensemble folder keeps it: where it is and the hash of its weights."""

    source: str
    sha256: str
    revision: str | None = None


@dataclass(frozen=True)
class Expert:
    """The parts of one Stable Diffusion model that an ensemble needs."""

    reference: ExpertReference
    unet: UNet2DConditionModel
    text_encoder: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    scheduler: SchedulerMixin
    vae: AutoencoderKL | None


def locate(source: str | Path, revision: str | None = None) -> Path:
    """The local folder or file of an expert; a hub id is downloaded into the hub's cache.

    Args:
        source: a diffusers folder, a single `.safetensors` file, a hub id such as `org/name`, or
            `zoo:animals` for one of the shipped experts.
        revision: of a hub id.

    Raises:
        AfaError: nothing is there, or a pickled checkpoint is.
    """
    text = str(source)
    if text.startswith(_ZOO_PREFIX):
        from afa.zoo import expert_folder

        return expert_folder(text.removeprefix(_ZOO_PREFIX))
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
        return Path(snapshot_download(text, revision=revision, allow_patterns=list(_WANTED)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise AfaError(
            f"Expert '{text}' is no local path, and as a hub id it could not be fetched "
            f"({type(error).__name__}). Check the name, the network and HF_TOKEN."
        ) from error


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that make an expert: the file itself, or U-Net and text encoder.

    Raises:
        AfaError: not a diffusers folder, no safetensors in it, or one that is damaged.
    """
    if path.is_file():
        files = [path]
    else:
        if not (path / "model_index.json").is_file():
            raise AfaError(
                f"An expert's folder must be a diffusers pipeline with a model_index.json; "
                f"'{path}' has none. Save it with pipeline.save_pretrained(folder)."
            )
        files = []
        for part in ("unet", "text_encoder"):
            found = sorted((path / part).glob("*.safetensors"))
            # several precisions of the same weights may lie side by side; the plain ones are read
            plain = [f for f in found if f.name.count(".") == 1] or found
            if not plain:
                raise AfaError(
                    f"An expert's weights must be safetensors; '{path / part}' has none. Save it "
                    "again with safe_serialization=True."
                )
            files += plain
    for file in files:
        check_safetensors(file)
    return files


def check_safetensors(file: Path) -> None:
    """Read a safetensors file's header and compare it with the file's length.

    Raises:
        AfaError: the file is no safetensors file, or it is cut short.
    """
    try:
        with safe_open(file, framework="pt") as header:
            header.keys()
    except (SafetensorError, OSError) as error:
        raise AfaError(
            f"'{file}' must be a complete safetensors file, but reading its header says: {error}. "
            "Download or copy it again."
        ) from error


def hash_file(file: Path) -> str:
    """SHA-256 of a file, as published beside checkpoints."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_expert(path: Path) -> str:
    """SHA-256 of an expert: of a single file as it is, of a folder over its weight files.

    A folder's hash is that of the lines `<sha256>  <relative path>` of its U-Net and text encoder
    weights, sorted by path, which is what `sha256sum` prints.
    """
    files = weight_files(path)
    if path.is_file():
        return hash_file(path)
    lines = sorted(f"{hash_file(file)}  {file.relative_to(path).as_posix()}\n" for file in files)
    return hashlib.sha256("".join(sorted(lines, key=lambda line: line[66:])).encode()).hexdigest()


def load_expert(
    source: str | Path,
    *,
    revision: str | None = None,
    config: Path | None = None,
    torch_dtype: torch.dtype = torch.float32,
    with_vae: bool = False,
) -> Expert:
    """Load one expert's parts.

    Args:
        source: see `locate`.
        revision: of a hub id.
        config: for a single file: a folder with the configuration and tokenizer of its family.
        torch_dtype: of the weights in memory.
        with_vae: whether to load the autoencoder as well.

    Raises:
        AfaError: nothing is there, a pickle, a damaged file, or a family that is not supported.
    """
    path = locate(source, revision)
    reference = ExpertReference(_canonical(source, path), hash_expert(path), revision)
    if path.is_file():
        return _load_single_file(reference, path, config, torch_dtype)
    index = json.loads((path / "model_index.json").read_text())
    if not str(index.get("_class_name", "")).startswith("StableDiffusion") or (
        "text_encoder_2" in index
    ):
        raise AfaError(
            "An expert must be a Stable Diffusion 1.x or 2.x pipeline; "
            f"'{source}' is a {index.get('_class_name')}. Other families are not supported yet."
        )
    encoder_class = getattr(transformers, index["text_encoder"][1])
    tokenizer_class = getattr(transformers, index["tokenizer"][1])
    scheduler_class = getattr(diffusers, index["scheduler"][1])
    return Expert(
        reference,
        unet=UNet2DConditionModel.from_pretrained(
            path, subfolder="unet", torch_dtype=torch_dtype, use_safetensors=True
        ),
        text_encoder=encoder_class.from_pretrained(
            path / "text_encoder", dtype=torch_dtype, use_safetensors=True
        ),
        tokenizer=tokenizer_class.from_pretrained(path / "tokenizer"),
        scheduler=scheduler_class.from_pretrained(path, subfolder="scheduler"),
        vae=load_vae(path, torch_dtype) if with_vae else None,
    )


def load_vae(source: str | Path, torch_dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """Load an autoencoder from a pipeline folder, a folder of its own, a file or a hub id."""
    path = locate(source)
    if path.is_file():
        check_safetensors(path)
        return AutoencoderKL.from_single_file(str(path), torch_dtype=torch_dtype)
    subfolder = "vae" if (path / "vae").is_dir() else None
    for file in (path / (subfolder or "")).glob("*.safetensors"):
        check_safetensors(file)
    return AutoencoderKL.from_pretrained(
        path, subfolder=subfolder, torch_dtype=torch_dtype, use_safetensors=True
    )


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
    try:
        pipeline = StableDiffusionPipeline.from_single_file(
            str(path),
            config=None if config is None else str(config),
            torch_dtype=torch_dtype,
            safety_checker=None,
            local_files_only=config is not None,
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        if config is None:
            raise AfaError(
                f"The single file '{path}' needs the configuration and tokenizer of its family, "
                f"which could not be fetched ({type(error).__name__}). Name a local diffusers "
                "folder of the same family: config=FOLDER."
            ) from error
        raise
    parts = pipeline.components
    return Expert(
        reference,
        unet=parts["unet"],
        text_encoder=parts["text_encoder"],
        tokenizer=parts["tokenizer"],
        scheduler=parts["scheduler"],
        vae=parts["vae"],
    )


def _canonical(source: str | Path, path: Path) -> str:
    """How a source is written down: local paths absolute, names as they are."""
    return str(path.resolve()) if Path(str(source)).expanduser().exists() else str(source)
