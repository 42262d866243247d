"""ComfyUI's `MMDiT` of Stable Diffusion 3 as a coroutine, with the sites of `afa.denoisers.sd3`.

If features are sent back unchanged, the result equals ComfyUI's forward pass bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from afa.denoisers import PLAIN, Blocks, Execution, Family, Feature, Widths
from afa.denoisers.tokens import TEXT, to_column, to_grid, to_tokens
from afa.errors import AfaError

from .interface import WITHOUT_DATA, ComfyInterface, own_options
from .joint import first_joint, run_block, split_joint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn


def mmdit_blocks(
    model: OpenAISignatureMMDITWrapper,
    sample: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    y: Tensor | None = None,
    control: Mapping[str, list[Any]] | None = None,
    transformer_options: Mapping[str, Any] | None = None,
    *,
    execution: Execution = PLAIN,
) -> Blocks:
    """Run one transformer of Stable Diffusion 3 site by site; sites as in `afa.denoisers.sd3`.

    Args:
        sample: noisy latent [B, C, H, W].
        timestep: [B].
        encoder_hidden_states: text embedding [B, L, D], which ComfyUI calls `context`.
        y: pooled text embedding [B, D'].
        control: residuals of ControlNets, as ComfyUI passes them.
        transformer_options: patches and everything else that ComfyUI passes.

    Yields: features [B, C', H / P, W / P] of the image and [B, C', L, 1] of the text, where P is
        the patch size.

    Returns: the prediction [B, C, H, W].
    """
    options, size = own_options(transformer_options), sample.shape[-2:]
    patch = model.patch_size
    height, width = ((side + 1) // patch for side in size)

    positions = model.cropped_pos_embed(size, device=sample.device)
    image = model.x_embedder(sample)
    image = image + comfy.ops.cast_to_input(positions, sample)
    temb = model.t_embedder(timestep, dtype=image.dtype)
    if y is not None and model.y_embedder is not None:
        temb = temb + model.y_embedder(y)
    text = model.context_embedder(encoder_hidden_states)

    def layer(k: int, block: nn.Module, image: Tensor, text: Tensor) -> tuple[Any, Tensor]:
        def run(given: dict[str, Any]) -> dict[str, Any]:
            text, image = block(
                given["txt"],
                given["img"],
                c=given["vec"],
                use_checkpoint=model.use_checkpoint,
                transformer_options=given["transformer_options"],
            )
            return {"txt": text, "img": image}

        given = {"img": image, "txt": text, "vec": temb, "transformer_options": options}
        found = run_block(run, given, options, ("double_block", k))
        return found["txt"], found["img"]

    image = to_tokens((yield Feature("embed", to_grid(image, height, width), temb)))
    residuals = () if control is None else control.get("output", ())
    last = len(model.joint_blocks) - 1
    for k, block in enumerate(model.joint_blocks):
        site = f"block.{k}"
        text, image = execution.segment(site, layer, k, block, image, text) or (None, None)
        image = to_tokens((yield Feature(site, to_grid(image, height, width), temb)))
        if k < last:
            text = to_tokens((yield Feature(f"{site}{TEXT}", to_column(text), temb)))
        if k < len(residuals) and residuals[k] is not None:
            image = image + residuals[k]

    def output(image: Tensor) -> Tensor:
        return model.unpatchify(model.final_layer(image, temb), hw=size)

    out = yield Feature("out", execution.segment("out", output, image), temb)
    return out[:, :, : size[0], : size[1]]


def _check(model: OpenAISignatureMMDITWrapper) -> None:
    """Check that `mmdit_blocks` supports a transformer.

    Raises:
        AfaError: if it has registers or a processor of texts, which no Stable Diffusion 3 has.
    """
    if model.register_length or model.context_processor is not None:
        raise AfaError(
            "AFA-COMFY-033",
            "A transformer with registers or a processor of texts cannot be an expert. Use models "
            "of Stable Diffusion 3 or 3.5.",
        )


def mmdit_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an ensemble's call from those of ComfyUI's forward pass."""
    return {
        "sample": given["x"],
        "timestep": given["timesteps"],
        "encoder_hidden_states": given["context"],
        "y": given.get("y"),
        "control": given.get("control"),
        "transformer_options": given.get("transformer_options"),
    }


def mmdit_first(
    model: OpenAISignatureMMDITWrapper, given: Mapping[str, Any], count: int
) -> dict[str, Any]:
    """The conditions of the first expert; see `first_joint`."""
    return first_joint(_widths(model), given, count)


def _call(
    sample: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    y: Tensor | None = None,
    control: Mapping[str, list[Any]] | None = None,
    transformer_options: Any = None,
) -> None:
    """The arguments of an ensemble's call; `transformer_options` may be a list of one by expert."""


def _example(model: OpenAISignatureMMDITWrapper) -> dict[str, Any]:
    (width,), side = _widths(model).text, 2 * model.patch_size
    example = {
        "sample": torch.empty(1, model.in_channels, side, side, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "encoder_hidden_states": torch.empty(1, 1, width, device="meta"),
    }
    tensors = {name: tensor.to(model.dtype) for name, tensor in example.items()}
    return {**tensors, "transformer_options": WITHOUT_DATA}


def _widths(model: OpenAISignatureMMDITWrapper) -> Widths:
    embedder = model.context_embedder
    width = getattr(embedder, "in_features", model.hidden_size)
    pooled = () if model.y_embedder is None else (model.y_embedder.mlp[0].in_features,)
    return Widths((width,), pooled)


MMDIT = Family(
    name="comfy_mmdit",
    model_class=OpenAISignatureMMDITWrapper,
    output_class=Transformer2DModelOutput,
    blocks=mmdit_blocks,
    layers=lambda model: list(model.joint_blocks),
    check=_check,
    example=_example,
    widths=_widths,
    split=split_joint,
    latent="sample",
    interface=ComfyInterface(_call),
)
