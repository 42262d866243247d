"""Load the components of a pipeline, each from its own folder or file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from diffusers.loaders.single_file_utils import SingleFileComponentError

from afa.errors import AfaError
from afa.loading.weights import keep_no_words, weights_in
from afa.machine.damaged import loading
from afa.machine.library import library_class

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def loading_model(
    source: str | Path, remedy: str = "Download or save it again."
) -> AbstractContextManager[None]:
    """Turn library errors about a damaged model into `AfaError`; see `afa.machine.damaged`."""
    requirement = f"'{source}' must be a complete diffusion model"
    return loading(requirement, remedy, SingleFileComponentError)


def load_weights(model_class: Any, folder: Path, **options: Any) -> Any:
    """Load a component from its folder, without random weights for missing parameters.

    Raises:
        AfaError: if the files lack parameters.
    """
    variant, _ = weights_in(folder)
    model, info = model_class.from_pretrained(
        folder, variant=variant, use_safetensors=True, output_loading_info=True, **options
    )
    require_complete(info["missing_keys"], folder)
    return model


def require_complete(missing: Any, source: object) -> None:
    """Check that no parameters are missing.

    Raises:
        AfaError: if some are; their number and the first name.
    """
    if missing:
        raise AfaError(
            "AFA-LOAD-017",
            f"The weights in '{source}' lack {len(missing)} parameters (first: {min(missing)}); "
            "they must be complete. Download or save them again.",
        )


def load_text_encoder(folder: Path, class_name: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load a text encoder from its folder in a pipeline.

    Raises:
        AfaError: see `library_class` and `load_weights`.
    """
    encoder_class = library_class(transformers, class_name, transformers.PreTrainedModel)
    return load_weights(encoder_class, folder, dtype=dtype)


def load_tokenizer(folder: Path, class_name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from its folder in a pipeline.

    Raises:
        AfaError: see `library_class`.
    """
    tokenizer_class = library_class(transformers, class_name, transformers.PreTrainedTokenizerBase)
    return keep_no_words(tokenizer_class.from_pretrained(folder))


def encoder_width(config: Mapping[str, Any]) -> int | None:
    """The size of a text encoder's embeddings, from its configuration (CLIP, T5 or Qwen)."""
    text = config.get("text_config") or config
    return text.get("hidden_size", text.get("d_model"))
