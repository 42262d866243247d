"""The parts of a pipeline, each from its own folder or file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import SingleFileComponentError

from afa.damaged import loading
from afa.errors import AfaError
from afa.sources import locate_vae, refer
from afa.weights import check_safetensors, hash_file, hash_files, weights_in

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from transformers import PreTrainedModel

    from afa.sources import ExpertReference


def loading_model(
    source: str | Path, remedy: str = "Download or save it again."
) -> AbstractContextManager[None]:
    """Turn whatever a library says of a damaged model into one line; see `afa.damaged.loading`."""
    must = f"'{source}' must be a complete diffusion model"
    return loading(must, remedy, SingleFileComponentError)


def library_class(library: Any, name: str, base: type) -> Any:
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


def load_weights(model_class: Any, folder: Path, **options: Any) -> Any:
    """A component from its folder; refused where the library would fill gaps with random weights.

    Raises:
        AfaError: parameters that the file lacks.
    """
    variant, _ = weights_in(folder)
    model, info = model_class.from_pretrained(
        folder, variant=variant, use_safetensors=True, output_loading_info=True, **options
    )
    require_complete(info["missing_keys"], folder)
    return model


def require_complete(missing: Any, source: object) -> None:
    """Refuse weights that leave parameters out.

    Raises:
        AfaError: says how many, and the first.
    """
    if missing:
        raise AfaError(
            f"Weights must be complete; those in '{source}' lack {len(missing)} parameters "
            f"(first: {min(missing)}). Download or save them again."
        )


def load_text_encoder(folder: Path, class_name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A text encoder of a pipeline's folder.

    Raises:
        AfaError: see `library_class` and `load_weights`.
    """
    encoder_class = library_class(transformers, class_name, transformers.PreTrainedModel)
    return load_weights(encoder_class, folder, dtype=dtype)


def load_vae(
    source: str | Path,
    *,
    revision: str | None = None,
    config: Path | None = None,
    torch_dtype: torch.dtype = torch.float32,
) -> tuple[AutoencoderKL, ExpertReference]:
    """Load an autoencoder from a pipeline folder, a folder of its own, a file or a hub id.

    Args:
        source: see `afa.sources.locate`.
        revision: of a hub id.
        config: for a single file: a pipeline folder whose `vae/config.json` describes it.
        torch_dtype: of the weights in memory.

    Raises:
        AfaError: as `afa.experts.load_expert`.
    """
    path = locate_vae(source, revision)
    if path.is_file():
        check_safetensors(path)
        reference = refer(source, path, hash_file(path), revision)
        from afa.file_parts import read_vae  # which loads parts by this module

        with loading_model(source, "Name a local diffusers folder of its family: config=FOLDER."):
            return read_vae(path, config, torch_dtype), reference
    folder = path / "vae" if (path / "vae").is_dir() else path
    files = weights_in(folder)[1]
    for file in files:
        check_safetensors(file)
    reference = refer(source, path, hash_files(path, files), revision)
    with loading_model(source):
        return load_weights(AutoencoderKL, folder, torch_dtype=torch_dtype), reference
