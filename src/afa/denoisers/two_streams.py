"""What Flux and the models made from it share: blocks of two streams, and packed latents.

An image and a text stream pass through double-stream blocks with weights of their own, then through
single-stream blocks with common weights. A latent is packed: 2 x 2 pixels of it are one token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from afa.denoisers.coroutine import Blocks, Feature
from afa.denoisers.execution import PLAIN, Execution
from afa.denoisers.family import Grid
from afa.denoisers.prompt import once_per_prompt
from afa.denoisers.tokens import TEXT, grid_of, to_column, to_grid, to_tokens
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    #: a function of a block, its number, image tokens [B, T, C] and text tokens [B, L, C] that
    #: returns the text tokens and the image tokens after the block
    Layer = Callable[[Any, int, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Residuals:
    """Residuals of a ControlNet [B, T, C], which are added to the image stream after blocks.

    Attributes:
        double: for the double-stream blocks; None if there are none.
        single: for the single-stream blocks; None if there are none.
        repeats: whether the double-stream blocks use theirs in turn, instead of consecutive blocks
            sharing one.
    """

    double: Sequence[Tensor] | None = None
    single: Sequence[Tensor] | None = None
    repeats: bool = False


def two_stream_blocks(
    transformer: Any,
    hidden: Tensor,
    text: Tensor,
    temb: Tensor,
    size: tuple[int, int],
    *,
    double: Layer,
    single: Layer,
    output: Callable[[Tensor], Tensor],
    residuals: Residuals = Residuals(),
    execution: Execution = PLAIN,
) -> Blocks:
    """Run the blocks of a transformer site by site; see `afa.denoisers.flux.flux_blocks`.

    Args:
        transformer: has `transformer_blocks` and `single_transformer_blocks`.
        hidden: embedded image tokens [B, H * W, C].
        text: embedded text tokens [B, L, C].
        temb: the timestep embedding [B, T], for fusion rules.
        size: H and W.
        double: runs a double-stream block.
        single: runs a single-stream block.
        output: computes the packed prediction [B, H * W, C'] from image tokens.
        residuals: of a ControlNet.
        execution: skips and checkpoints segments; `double` and `single` run layers through it.

    Yields: features [B, C, H, W] of the image and [B, C, L, 1] of the text.

    Returns: the packed prediction [B, H * W, C'].
    """
    height, width = size

    def segment(site: str, layer: Layer, *inputs: Any) -> Any:
        return execution.segment(site, layer, *inputs) or (None, None)

    hidden = to_tokens((yield Feature("embed", to_grid(hidden, height, width), temb)))

    blocks, added = transformer.transformer_blocks, residuals.double
    for k, block in enumerate(blocks):
        site = f"double.{k}"
        text, hidden = segment(site, double, block, k, hidden, text)
        hidden = to_tokens((yield Feature(site, to_grid(hidden, height, width), temb)))
        text = to_tokens((yield Feature(f"{site}{TEXT}", to_column(text), temb)))
        if added is not None and residuals.repeats:
            hidden = hidden + added[k % len(added)]
        elif added is not None:
            hidden = hidden + added[k // interval(blocks, added)]

    blocks, added = transformer.single_transformer_blocks, residuals.single
    for k, block in enumerate(blocks):
        site = f"single.{k}"
        text, hidden = segment(site, single, block, k, hidden, text)
        hidden = to_tokens((yield Feature(site, to_grid(hidden, height, width), temb)))
        if k < len(blocks) - 1:
            text = to_tokens((yield Feature(f"{site}{TEXT}", to_column(text), temb)))
        if added is not None:
            hidden = hidden + added[k // interval(blocks, added)]

    out = execution.segment("out", output, hidden)
    return to_tokens((yield Feature("out", to_grid(out, height, width), temb)))


def interval(blocks: Any, residuals: Sequence[Tensor]) -> int:
    """Return the number of consecutive blocks that share one ControlNet residual, rounded up."""
    return -(-len(blocks) // len(residuals))


def own_attention_kwargs(given: dict[str, Any] | None) -> dict[str, Any]:
    """Copy attention arguments, so that they can be changed.

    Raises:
        AfaError: if they contain a LoRA `scale`.
    """
    if given and "scale" in given:
        raise AfaError(
            "AFA-MODEL-004",
            "The attention arguments of a coroutine must not contain a LoRA scale. Call the "
            "ensemble, which applies the scale to every expert.",
        )
    return dict(given or {})


def with_ip_adapter(transformer: Any, given: dict[str, Any] | None) -> dict[str, Any]:
    """Copy attention arguments, with the projected images of an IP-Adapter if there are some.

    Raises:
        AfaError: see `own_attention_kwargs`.
    """
    attention_kwargs = own_attention_kwargs(given)
    if "ip_adapter_image_embeds" in attention_kwargs:
        images = attention_kwargs.pop("ip_adapter_image_embeds")
        attention_kwargs["ip_hidden_states"] = transformer.encoder_hid_proj(images)
    return attention_kwargs


def positions_of(
    transformer: Any, img_ids: Tensor, txt_ids: Tensor
) -> tuple[tuple[int, int], tuple[Tensor, Tensor]]:
    """Return the grid of the image tokens, and the rotary embedding of all tokens, the text first.

    Args:
        img_ids: position ids of the image tokens [H * W, 3], or with a batch axis.
        txt_ids: position ids of the text tokens [L, 3], or with a batch axis.

    Raises:
        AfaError: if the image tokens do not fill one rectangle.
    """
    image, text = (ids[0] if ids.ndim == 3 else ids for ids in (img_ids, txt_ids))
    # cached, because reading the positions makes the CPU wait for the GPU
    size = once_per_prompt(img_ids, grid_of, lambda: grid_of(image))
    return size, transformer.pos_embed(torch.cat((text, image), dim=0))


# -- packed latents ---------------------------------------------------------------------------


def pack(noisy: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return `hidden_states` and `img_ids` of a denoiser's call for latents [B, C, H, W]."""
    from diffusers import FluxPipeline

    batch, channels, height, width = noisy.shape
    return {
        "hidden_states": FluxPipeline._pack_latents(
            noisy.to(dtype), batch, channels, height, width
        ),
        "img_ids": FluxPipeline._prepare_latent_image_ids(
            batch, height // 2, width // 2, device=noisy.device, dtype=dtype
        ),
    }


def _unpacked(packed: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Convert tokens [B, H * W, 4 * C] to a latent [B, C, 2 * H, 2 * W], by their `img_ids`."""
    ids = arguments["img_ids"]
    image = ids[0] if ids.ndim == 3 else ids
    # cached, because reading the positions makes the CPU wait for the GPU
    rows, columns = once_per_prompt(ids, grid_of, lambda: grid_of(image))
    batch, _, features = packed.shape
    grid = packed.view(batch, rows, columns, features // 4, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, features // 4, 2 * rows, 2 * columns)


def _packed(latent: Tensor) -> Tensor:
    """Convert a latent [B, C, 2 * H, 2 * W] to tokens [B, H * W, 4 * C]."""
    batch, channels, height, width = latent.shape
    grid = latent.view(batch, channels, height // 2, 2, width // 2, 2)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


#: 2 x 2 pixels are one token, whose position is in `img_ids`
GRID = Grid(_unpacked, _packed)


def unpack(pipeline: Any, packed: Tensor, height: int, width: int) -> Tensor:
    """Convert packed latents [B, L, D] to [B, C, H, W]; height and width are in pixels."""
    from diffusers import FluxPipeline

    return FluxPipeline._unpack_latents(packed, height, width, pipeline.vae_scale_factor)
