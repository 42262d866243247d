"""The parts of a pipeline, each from its own folder or file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from diffusers.loaders.single_file_utils import SingleFileComponentError

from afa.errors import AfaError
from afa.loading.weights import weights_in
from afa.machine.damaged import loading
from afa.machine.library import library_class

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from transformers import PreTrainedModel


def loading_model(
    source: str | Path, remedy: str = "Download or save it again."
) -> AbstractContextManager[None]:
    """One line for what a library says of a damaged model; see `afa.machine.damaged.loading`."""
    must = f"'{source}' must be a complete diffusion model"
    return loading(must, remedy, SingleFileComponentError)


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
            "AFA-LOAD-017",
            f"Weights must be complete; those in '{source}' lack {len(missing)} parameters "
            f"(first: {min(missing)}). Download or save them again.",
        )


def load_text_encoder(folder: Path, class_name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A text encoder of a pipeline's folder.

    Raises:
        AfaError: see `library_class` and `load_weights`.
    """
    encoder_class = library_class(transformers, class_name, transformers.PreTrainedModel)
    return load_weights(encoder_class, folder, dtype=dtype)
