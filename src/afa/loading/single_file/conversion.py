"""Convert the tensors of one part of a single file to the state dict of the library's model.

Uses diffusers' own conversions (`diffusers.loaders.single_file_utils`).
"""

from __future__ import annotations

import json
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

from afa.denoisers.architecture import with_defaults
from afa.errors import NO_MODEL, AfaError
from afa.files import parts_of, read_json
from afa.loading.single_file.layout import described_kind
from afa.machine.damaged import is_own_bug
from afa.machine.library import library_class

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

PROJECTION = "text_projection.weight"
#: with this prefix, diffusers drops the last layer of Stable Diffusion 2's text encoder
_OPEN_CLIP_2 = "cond_stage_model.model."
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def converted(
    part: str, tensors: Mapping[str, Tensor], config: Path, *, is_diffusers: bool = False
) -> dict[str, Tensor]:
    """Return the state dict of one part of a pipeline.

    Args:
        part: `unet`, `transformer`, `vae`, `text_encoder`, ...
        tensors: of that part, by their names in the file without the part's prefix.
        is_diffusers: whether a denoiser already has diffusers' names.

    Raises:
        LookupError, ValueError and others of `afa.errors.NO_MODEL`: if tensors that the conversion
            needs are missing.
    """
    if part.startswith("text_encoder"):
        return _encoder_state(tensors, _class_name(part, config), config / part)
    settings = read_json(config / part / "config.json")
    model_class = model_class_of(part, config)
    if is_diffusers:
        return dict(tensors)
    if part == "vae":
        return _vae_state(tensors, settings)
    settings = with_defaults(model_class, settings)
    files = described_kind(config).single_files
    if files is not None and files.convert is not None:
        return files.convert(tensors, settings, config)
    convert: Any = SINGLE_FILE_LOADABLE_CLASSES[model_class.__name__]["checkpoint_mapping_fn"]
    result: dict[str, Tensor] = convert(dict(tensors), config=settings)
    return result


def model_class_of(part: str, config: Path) -> Any:
    """Return the class of one part of a pipeline, from its family or a library.

    Raises:
        AfaError: if no library has it.
    """
    name = _class_name(part, config)
    if part.startswith("text_encoder"):
        return library_class(transformers, name, transformers.PreTrainedModel)
    own = described_kind(config).family.model_class
    if name == own.__name__:
        return own
    return library_class(diffusers, name, diffusers.ModelMixin)


def _class_name(part: str, config: Path) -> str:
    return parts_of(read_json(config / "model_index.json"))[part]


def _vae_state(tensors: Mapping[str, Tensor], settings: dict[str, Any]) -> dict[str, Tensor]:
    """Convert from the original layout, or from diffusers' with older names of attention."""
    if any(".down_blocks." in name or ".up_blocks." in name for name in tensors):
        return {_new_attention(name): tensor for name, tensor in tensors.items()}
    convert: Any = SINGLE_FILE_LOADABLE_CLASSES["AutoencoderKL"]["checkpoint_mapping_fn"]
    settings = with_defaults(diffusers.AutoencoderKL, settings)
    prefixed = {f"first_stage_model.{name}": tensor for name, tensor in tensors.items()}
    result: dict[str, Tensor] = convert(prefixed, config=settings)
    return result


def _new_attention(name: str) -> str:
    *start, layer, kind = name.split(".")
    new = _OLD_VAE_ATTENTION.get(layer) if "attentions" in start else None
    return name if new is None else ".".join([*start, new, kind])


def _encoder_state(
    tensors: Mapping[str, Tensor], class_name: str, folder: Path
) -> dict[str, Tensor]:
    """Convert from OpenCLIP, T5, Qwen, or CLIP with or without `text_model.`."""
    if any("resblocks." in name for name in tensors):
        is_second = any(name.startswith("model.") for name in tensors)
        prefix = _OPEN_CLIP_2 if is_second else "model."
        given = {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        settings = SimpleNamespace(config=SimpleNamespace(**read_json(folder / "config.json")))
        return dict(convert_open_clip_checkpoint(settings, given, prefix=prefix))
    given = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    if class_name.startswith("T5"):
        return given
    if class_name.startswith("Qwen"):  # published with the output layer, which pipelines do not use
        return {name.removeprefix("model."): tensor for name, tensor in given.items()}
    return {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": t
        for name, t in given.items()
    }


def expected_shapes(part: str, config: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a part's parameters from its configuration, without allocation.

    Raises:
        AfaError: if the configuration does not describe a model.
    """
    settings = json.dumps(read_json(config / part / "config.json"), sort_keys=True)
    try:
        return dict(_expected(model_class_of(part, config), settings))
    except NO_MODEL as error:
        if isinstance(error, AfaError) or is_own_bug(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise AfaError(
            "AFA-LOAD-067",
            f"'{config / part / 'config.json'}' does not describe a valid model: {reason}. "
            "Download it again.",
        ) from error


@lru_cache(maxsize=32)
def _expected(model_class: Any, settings: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    model = without_data(model_class, json.loads(settings))
    return tuple((name, tuple(tensor.shape)) for name, tensor in model.state_dict().items())


def without_data(model_class: Any, settings: dict[str, Any]) -> Any:
    """Build a model of either library from its configuration, on the meta device."""
    with torch.device("meta"):
        if issubclass(model_class, diffusers.ModelMixin):
            return model_class.from_config(settings)
        return model_class(model_class.config_class.from_dict(settings))
