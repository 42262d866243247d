"""Read the parts of a single file into the library's models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

from afa.errors import AfaError
from afa.files import parts_of, read_json
from afa.loading.components import require_complete
from afa.loading.single_file.accounting import account_part
from afa.loading.single_file.conversion import (
    PROJECTION,
    converted,
    expected_shapes,
    model_class_of,
)
from afa.loading.single_file.layout import denoiser_in, described_kind, harmless, names_by_part
from afa.loading.single_file.packed.build import read_packed
from afa.loading.single_file.packed.layout import model_shapes
from afa.loading.single_file.packed.read import read_tensors
from afa.loading.weights import check_safetensors
from afa.machine.library import library_class

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor

    from afa.loading.weights import Shapes

_VAE_PREFIXES = ("first_stage_model.", "vae.", "")
_VAE_INSIDE = ("decoder.conv_in.weight", "encoder.conv_in.weight")


def read_parts(
    path: Path, parts: Iterable[str], config: Path, dtype: torch.dtype
) -> dict[str, Any]:
    """Read some parts of a single file; only their tensors are loaded.

    Args:
        parts: by their names in the pipeline; the file must have them.

    Returns: the models by name, for inference.

    Raises:
        AfaError: if the file lacks parameters.
    """
    shapes, kind = model_shapes(path), described_kind(config)
    classes = parts_of(read_json(config / "model_index.json"))
    found, denoiser = names_by_part(shapes, kind), denoiser_in(shapes)
    read: dict[str, Any] = {}
    for part in parts:
        is_diffusers = part == kind.denoiser and denoiser is not None and denoiser.is_diffusers
        if part == kind.denoiser:
            packed = read_packed(path, found[part], config, dtype, is_diffusers=is_diffusers)
            if packed is not None:
                read[part] = packed
                continue
        tensors = read_tensors(path, found[part])
        state = converted(part, tensors, config, is_diffusers=is_diffusers)
        if part.startswith("text_encoder"):
            read[part] = encoder_from(state, classes[part], config / part, path, dtype)
        else:
            model_class = model_class_of(part, config)
            read[part] = _model_from(state, model_class, part, config, path, dtype)
    return read


def _model_from(
    state: dict[str, Tensor],
    model_class: Any,
    part: str,
    config: Path,
    path: Path,
    dtype: torch.dtype,
) -> Any:
    """Build a denoiser or an autoencoder from its state dict."""
    expected = expected_shapes(part, config)
    require_complete([name for name in expected if name not in state], path)
    # with exactly the model's own names, the library does no conversion
    own = {name: state[name] for name in expected}
    if model_class.__name__ in SINGLE_FILE_LOADABLE_CLASSES:
        model = model_class.from_single_file(
            own, config=str(config), subfolder=part, torch_dtype=dtype, local_files_only=True
        )
    else:
        model = model_class.from_config(read_json(config / part / "config.json")).to(dtype)
        model.load_state_dict(own)
    require_complete([name for name, p in model.named_parameters() if p.is_meta], path)
    return model.eval()


def encoder_from(
    state: dict[str, Tensor], class_name: str, config: Path, path: Path, dtype: torch.dtype
) -> Any:
    """Build a text encoder from its state dict.

    Args:
        state: in the layout of transformers.
        class_name: from `model_index.json`.
        config: the folder of the text encoder's `config.json`.

    Raises:
        AfaError: if parameters are missing.
    """
    encoder_class = library_class(transformers, class_name, transformers.PreTrainedModel)
    settings = encoder_class.config_class.from_pretrained(config)
    is_projecting = class_name.endswith("WithProjection")
    if is_projecting and settings.projection_dim == settings.hidden_size:
        # the usual CLIP-L file and complete files of Stable Diffusion 3 omit it
        state.setdefault(PROJECTION, torch.eye(settings.hidden_size))
    encoder, info = encoder_class.from_pretrained(
        None, config=settings, state_dict=state, dtype=dtype, output_loading_info=True
    )
    require_complete(info["missing_keys"], path)
    return encoder.eval()  # the library leaves T5's dropout enabled


# -- autoencoders -----------------------------------------------------------------------------


def vae_names(shapes: Shapes) -> dict[str, str]:
    """Find the tensors of an autoencoder in a separate file or in a complete checkpoint.

    Returns: name without a prefix -> name in the file; empty if there is none.
    """
    for start in _VAE_PREFIXES:
        if any(f"{start}{name}" in shapes for name in _VAE_INSIDE):
            return {n.removeprefix(start): n for n in shapes if n.startswith(start)}
    return {}


def read_vae(path: Path, config: Path | None, dtype: torch.dtype) -> Any:
    """Read an autoencoder from a file, in the original layout or in diffusers'.

    Args:
        path: a separate file, or a checkpoint that contains an autoencoder.
        config: a pipeline folder whose `vae/config.json` describes it; None uses the configuration
            in the library's cache.

    Raises:
        AfaError: if there is no autoencoder, or it does not fit the configuration.
    """
    check_safetensors(path)
    shapes = model_shapes(path)
    names = vae_names(shapes)
    if not names:
        raise AfaError(
            "AFA-LOAD-075",
            f"'{path}' contains no autoencoder (no '{_VAE_INSIDE[0]}'). Set vae to an "
            "autoencoder's file, a complete checkpoint or a diffusers folder.",
        )
    if config is None:
        given = {f"first_stage_model.{rest}": t for rest, t in read_tensors(path, names).items()}
        vae = AutoencoderKL.from_single_file(given, torch_dtype=dtype, local_files_only=True)
        require_complete([name for name, p in vae.named_parameters() if p.is_meta], path)
        return vae
    used = {rest: name for rest, name in names.items() if harmless(f"vae.{rest}") is None}
    account_part("vae", used, shapes, config, path)
    state = converted("vae", read_tensors(path, used), config)
    return _model_from(state, model_class_of("vae", config), "vae", config, path, dtype)
