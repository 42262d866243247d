"""ComfyUI's `Flux` as a coroutine, with the sites of `afa.denoisers.flux`.

If features are sent back unchanged, the result equals ComfyUI's forward pass bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from comfy.ldm.flux.layers import timestep_embedding
from comfy.ldm.flux.model import Flux
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from afa.denoisers import PLAIN, Blocks, Execution, Family, Feature, Widths
from afa.denoisers.tokens import TEXT, to_column, to_grid, to_tokens
from afa.errors import AfaError

from .interface import WITHOUT_DATA, ComfyInterface, own_options
from .joint import first_joint, require_tokens, run_block, split_joint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

#: the largest number of float16
_LARGEST = 65504


def flux_blocks(
    model: Flux,
    sample: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    y: Tensor | None = None,
    guidance: Tensor | None = None,
    control: Mapping[str, list[Any]] | None = None,
    attention_mask: Tensor | None = None,
    transformer_options: Mapping[str, Any] | None = None,
    *,
    execution: Execution = PLAIN,
) -> Blocks:
    """Run one Flux transformer site by site; sites as in `afa.denoisers.flux.flux_blocks`.

    Args:
        sample: noisy latent [B, C, H, W].
        timestep: [B], from 0 to 1.
        encoder_hidden_states: text embedding [B, L, D], which ComfyUI calls `context`.
        y: pooled text embedding [B, D']; None for zeros.
        guidance: the guidance scale [B], for guidance-distilled models.
        control: residuals of ControlNets, as ComfyUI passes them.
        attention_mask: mask of the attention, as ComfyUI passes it.
        transformer_options: patches and everything else that ComfyUI passes.

    Yields: features [B, C', H / 2, W / 2] of the image and [B, C', L, 1] of the text.

    Returns: the prediction [B, C, H, W].

    Raises:
        AfaError: if a patch adds tokens to those of the picture.
    """
    options = own_options(transformer_options)
    patches = options.get("patches", {})
    patch = model.patch_size
    height, width = ((side + patch // 2) // patch for side in sample.shape[-2:])
    tokens, image_ids = model.process_img(sample, transformer_options=options)
    text_ids = image_ids.new_zeros(len(sample), encoder_hidden_states.shape[1], 3)

    image = model.img_in(tokens)
    temb = model.time_in(timestep_embedding(timestep, 256).to(image.dtype))
    if model.params.guidance_embed and guidance is not None:
        temb = temb + model.guidance_in(timestep_embedding(guidance, 256).to(image.dtype))
    if model.vector_in is not None:
        size = model.params.vec_in_dim
        pooled = image.new_zeros(len(image), size) if y is None else y[:, :size]
        temb = temb + model.vector_in(pooled)
    text = model.txt_in(encoder_hidden_states)

    image = to_tokens((yield Feature("embed", to_grid(image, height, width), temb)))
    for each in patches.get("post_input", ()):
        given = {"img": image, "txt": text, "img_ids": image_ids, "txt_ids": text_ids}
        given = each(given)
        image, text = given["img"], given["txt"]
        image_ids, text_ids = given["img_ids"], given["txt_ids"]
        require_tokens(image, height * width)
    rotary = model.pe_embedder(torch.cat((text_ids, image_ids), dim=1))
    common = {"vec": temb, "pe": rotary, "attn_mask": attention_mask}

    def double(k: int, block: nn.Module, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        options["block_index"] = k

        def run(given: dict[str, Any]) -> dict[str, Any]:
            image, text = block(
                img=given["img"],
                txt=given["txt"],
                vec=given["vec"],
                pe=given["pe"],
                attn_mask=given.get("attn_mask"),
                transformer_options=given.get("transformer_options"),
            )
            return {"img": image, "txt": text}

        # ComfyUI's blocks add to their inputs in place, which the experts share
        given = {"img": image.clone(), "txt": text.clone(), **common}
        given["transformer_options"] = options
        found = run_block(run, given, options, ("double_block", k))
        return found["txt"], found["img"]

    def single(k: int, block: nn.Module, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        options["block_index"] = k

        def run(given: dict[str, Any]) -> dict[str, Any]:
            return {
                "img": block(
                    given["img"],
                    vec=given["vec"],
                    pe=given["pe"],
                    attn_mask=given.get("attn_mask"),
                    transformer_options=given.get("transformer_options"),
                )
            }

        joined = {"img": torch.cat((text, image), 1), **common, "transformer_options": options}
        found = run_block(run, joined, options, ("single_block", k))["img"]
        return found[:, : text.shape[1]], found[:, text.shape[1] :]

    options["total_blocks"], options["block_type"] = len(model.double_blocks), "double"
    for k, block in enumerate(model.double_blocks):
        site = f"double.{k}"
        text, image = execution.segment(site, double, k, block, image, text) or (None, None)
        image = to_tokens((yield Feature(site, to_grid(image, height, width), temb)))
        text = to_tokens((yield Feature(f"{site}{TEXT}", to_column(text), temb)))
        image = _controlled(image, control, "input", k)

    if image.dtype == torch.float16:
        image = torch.nan_to_num(image, nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)
    options["total_blocks"], options["block_type"] = len(model.single_blocks), "single"
    for k, block in enumerate(model.single_blocks):
        site = f"single.{k}"
        text, image = execution.segment(site, single, k, block, image, text) or (None, None)
        image = to_tokens((yield Feature(site, to_grid(image, height, width), temb)))
        if k < len(model.single_blocks) - 1:
            text = to_tokens((yield Feature(f"{site}{TEXT}", to_column(text), temb)))
        image = _controlled(image, control, "output", k)

    def output(image: Tensor) -> Tensor:
        return model.final_layer(image, temb)

    out = execution.segment("out", output, image)
    out = to_tokens((yield Feature("out", to_grid(out, height, width), temb)))
    packed = out.unflatten(1, (height, width)).unflatten(-1, (-1, patch, patch))
    unpacked = torch.einsum("bhwcpq->bchpwq", packed).flatten(4, 5).flatten(2, 3)
    return unpacked[:, :, : sample.shape[-2], : sample.shape[-1]]


def _controlled(
    image: Tensor, control: Mapping[str, list[Any]] | None, name: str, k: int
) -> Tensor:
    """Add the residual of a ControlNet to the first tokens, in a copy."""
    residuals = () if control is None else control.get(name, ())
    if k >= len(residuals) or (residual := residuals[k]) is None:
        return image
    image = image.clone()
    image[:, : residual.shape[1]] += residual
    return image


def _check(model: Flux) -> None:
    """Check that `flux_blocks` supports a transformer.

    Raises:
        AfaError: if it is a Flux 2.
    """
    if model.params.global_modulation or len(model.params.axes_dim) != 3:
        raise AfaError(
            "AFA-COMFY-031",
            "A transformer of Flux 2 cannot be an expert yet. Use models of Flux 1.",
        )


def flux_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an ensemble's call from those of `Flux.forward`.

    Raises:
        AfaError: if there are reference pictures, whose tokens cannot be fused.
    """
    if given.get("ref_latents") is not None:
        raise AfaError(
            "AFA-COMFY-032",
            "Reference latents add tokens to those of the picture, which cannot be fused per "
            "pixel. Remove the reference latents.",
        )
    others = given.get("kwargs", {})
    return {
        "sample": given["x"],
        "timestep": given["timestep"],
        "encoder_hidden_states": given["context"],
        "y": given.get("y"),
        "guidance": given.get("guidance"),
        "control": given.get("control"),
        "attention_mask": others.get("attention_mask"),
        "transformer_options": given.get("transformer_options"),
    }


def flux_first(model: Flux, given: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The conditions of the first expert; see `first_joint`."""
    return first_joint(_widths(model), given, count)


def _call(
    sample: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    y: Tensor | None = None,
    guidance: Tensor | None = None,
    control: Mapping[str, list[Any]] | None = None,
    attention_mask: Tensor | None = None,
    transformer_options: Any = None,
) -> None:
    """The arguments of an ensemble's call; `transformer_options` may be a list of one by expert."""


def _example(model: Flux) -> dict[str, Any]:
    params = model.params
    example = {
        "sample": torch.empty(1, params.in_channels, 4, 4, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "encoder_hidden_states": torch.empty(1, 1, params.context_in_dim, device="meta"),
    }
    if params.guidance_embed:
        example["guidance"] = torch.empty(1, device="meta")
    tensors = {name: tensor.to(model.dtype) for name, tensor in example.items()}
    return {**tensors, "transformer_options": WITHOUT_DATA}


def _widths(model: Flux) -> Widths:
    pooled = model.params.vec_in_dim
    return Widths((model.params.context_in_dim,), () if pooled is None else (pooled,))


FLUX = Family(
    name="comfy_flux",
    model_class=Flux,
    output_class=Transformer2DModelOutput,
    blocks=flux_blocks,
    layers=lambda model: [*model.double_blocks, *model.single_blocks],
    check=_check,
    example=_example,
    widths=_widths,
    split=split_joint,
    batches_guidance=False,
    timestep_divisor=1000,
    latent="sample",
    interface=ComfyInterface(_call, packed=2),
)
