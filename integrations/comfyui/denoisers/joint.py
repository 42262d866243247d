"""What ComfyUI's transformers with joint attention share: their texts and replaced blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.denoisers.splitting import split_joined
from afa.errors import AfaError

from .interface import by_expert

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from afa.denoisers import Widths


def split_joint(
    model: Any, arguments: Mapping[str, Any], widths: Widths, count: int
) -> list[dict[str, Any]]:
    """The arguments of each expert: its own text, pooled text and options."""
    del model
    options = by_expert(arguments.get("transformer_options"), count)
    per_expert = [{**arguments, "transformer_options": own} for own in options]
    for key, what, of in (
        ("encoder_hidden_states", "text embedding", widths.text),
        ("y", "pooled text embedding", widths.pooled),
    ):
        if (joined := arguments.get(key)) is not None and of:
            parts = split_joined(what, joined, of, count)
            for own, part in zip(per_expert, parts, strict=True):
                own[key] = part
    return per_expert


def first_joint(widths: Widths, given: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The texts and pooled texts of the first expert, from those of all."""
    found, texts = dict(given), ("c_crossattn", "crossattn_controlnet")
    for key, of in (*((text, widths.text) for text in texts), ("y", widths.pooled)):
        if (joined := given.get(key)) is not None and of:
            found[key] = split_joined("text embedding", joined, of, count)[0]
    return found


def run_block(
    run: Callable[[dict[str, Any]], dict[str, Any]],
    arguments: dict[str, Any],
    options: Mapping[str, Any],
    place: tuple[str, int],
) -> dict[str, Any]:
    """Run a block, or the patch that another node has put in its place.

    Args:
        run: runs the block with ComfyUI's arguments by name, and returns its outputs by name.
        arguments: these arguments.
        options: `transformer_options`.
        place: the kind and number of the block, as patches name it.
    """
    replaced = options.get("patches_replace", {}).get("dit", {})
    if place not in replaced:
        return run(arguments)
    found: dict[str, Any] = replaced[place](arguments, {"original_block": run})
    return found


def require_tokens(tokens: Tensor, count: int) -> None:
    """Check that no node has added tokens to those of the picture.

    Raises:
        AfaError: if the number of tokens is another one.
    """
    if tokens.shape[1] != count:
        raise AfaError(
            "AFA-COMFY-030",
            f"Another node adds {tokens.shape[1] - count} tokens to the {count} of the picture, "
            "which cannot be fused per pixel. Remove that node.",
        )
