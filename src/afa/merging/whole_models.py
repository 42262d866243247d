"""Detect files that are not complete models: LoRAs, ControlNets, autoencoders, ..."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Shapes = Mapping[str, tuple[int, ...]]

_WHOLE = "List complete checkpoints as experts."
_BAKE = (
    "Merge it into its base first: load the base with diffusers, then "
    "pipeline.load_lora_weights(FILE), pipeline.fuse_lora(), pipeline.unload_lora_weights(), "
    "pipeline.save_pretrained(FOLDER), and list FOLDER as expert."
)
_LORA = re.compile(
    r".*\.(lora_(up|down|A|B|mid|magnitude_vector)|lora\.(up|down)|processor\.\w+_lora)\b.*"
    r"|.*[._](hada_[wt][12]\w*|lokr_[wt][12]\w*|oft_\w+|boft_\w+|dora_scale|glora_\w+)"
    r"|(lora_(unet|te\d?|transformer|prior)|lycoris)_.*|.*\.(diff|diff_b|set_weight)"
)
_CONTROL = re.compile(
    r"(control_model|controlnet|control_net)\..*|(.*\.)?(input_hint_block|zero_convs)\..*"
    r"|(controlnet_(cond_embedding|down_blocks|mid_block|blocks|x_embedder|single_blocks))\..*"
    r"|lllite_.*|(pos_embed_input|control_\w+_embedder)\..*"
)
_ADAPTER = re.compile(r"(ip_adapter|image_proj(_model)?|ip_adapter_\w+)\..*|adapter\.body\..*")
_MOTION = re.compile(r"(.*\.)?motion_modules\..*")
_VAE = re.compile(r"(first_stage_model\.|vae\.)?(encoder|decoder)\.(conv_in|mid|mid_block)\..*")
_TEXT = re.compile(
    r"(.*\.)?(text_model\.|token_embedding\.weight|shared\.weight|transformer\.resblocks\."
    r"|encoder\.block\.).*"
)
_VISION = re.compile(r"(.*\.)?(vision_model|visual|visual_projection)\..*")
_OF_DENOISERS = (
    *("model.diffusion_model.", "unet.", "transformer."),
    *("input_blocks.", "joint_blocks.", "double_blocks.", "down_blocks.", "transformer_blocks."),
)
_WEIGHTS = re.compile(r"(.*\.)?(weight|bias|scale|gamma)")


def refuse_parts(shapes: Shapes, source: object) -> None:
    """Check that a single file is not an adapter or a component of a model.

    Args:
        shapes: name in the file -> shape, for all tensors.
        source: name of the file in errors.

    Raises:
        AfaError: if it is.
    """
    has_denoiser = any(name.startswith(_OF_DENOISERS) for name in shapes)
    for kind, remedy, matches, is_certain in _KINDS:
        if has_denoiser and not is_certain:
            continue
        name = next((name for name in shapes if matches(name, shapes)), None)
        if name is not None:
            raise AfaError(
                "AFA-MERGE-041",
                f"'{source}' is {kind} (it has '{name}'), not a complete model. {remedy}",
            )


def refuse_other_data(shapes: Shapes, source: object) -> None:
    """Check that a file has weights of layers, and not other data such as encoded pictures.

    Accepts models of an unknown kind, because tensors are matched by name.

    Raises:
        AfaError: if not.
    """
    if not any(_WEIGHTS.fullmatch(name) for name in shapes):
        raise AfaError(
            "AFA-MERGE-042",
            f"'{source}' is not a model: none of its {len(shapes)} tensors (such as "
            f"'{min(shapes, default='none')}') is the weight of a layer. {_WHOLE}",
        )


def _is_embedding(name: str, shapes: Shapes) -> bool:
    """Whether the file only has one or more vectors per text encoder."""
    return len(shapes) <= 4 and all(
        "." not in key and len(s) in (1, 2) for key, s in shapes.items()
    )


def _is(pattern: re.Pattern[str]) -> Callable[[str, Shapes], bool]:
    return lambda name, _: pattern.fullmatch(name) is not None


# kind, remedy, test of a tensor, whether one such tensor suffices in a file with a denoiser
_KINDS: tuple[tuple[str, str, Callable[[str, Shapes], bool], bool], ...] = (
    (
        "a ControlNet",
        f"{_WHOLE} A ControlNet also works with the merged model.",
        _is(_CONTROL),
        True,
    ),
    ("a LoRA", _BAKE, _is(_LORA), True),
    (
        "an adapter for image prompts (IP-Adapter, T2I-Adapter)",
        f"{_WHOLE} An adapter also works with the merged model.",
        _is(_ADAPTER),
        True,
    ),
    ("a motion module (AnimateDiff)", _WHOLE, _is(_MOTION), True),
    (
        "a textual inversion embedding",
        f"{_WHOLE} An embedding also works with the merged model.",
        _is_embedding,
        False,
    ),
    (
        "an autoencoder (VAE) without a denoiser",
        f"{_WHOLE} Set vae: merge to merge their autoencoders.",
        _is(_VAE),
        False,
    ),
    ("an image encoder (CLIP vision)", _WHOLE, _is(_VISION), False),
    ("a text encoder without a denoiser", _WHOLE, _is(_TEXT), False),
)
