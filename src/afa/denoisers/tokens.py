"""Convert tokens of a transformer to features: an image's to their grid, a text's to a column.

Fusion rules take features [B, C, H, W]. Tokens on their grid are such features, in the same memory
(channels last). So SABW's weights are spatial in transformers as well, and can be plotted.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, overload

import torch

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

#: the suffix of the names of sites in a text stream
TEXT = ".text"


@overload
def to_grid(tokens: Tensor, height: int, width: int) -> Tensor: ...
@overload
def to_grid(tokens: Tensor | None, height: int, width: int) -> Tensor | None: ...
def to_grid(tokens: Tensor | None, height: int, width: int) -> Tensor | None:
    """View tokens [B, H * W, C] as a feature [B, C, H, W]; None (a skipped site) stays None."""
    return None if tokens is None else tokens.unflatten(1, (height, width)).movedim(-1, 1)


def to_tokens(feature: Tensor) -> Tensor:
    """Convert a feature [B, C, H, W] to tokens [B, H * W, C]; a view if it is channels last."""
    return feature.movedim(1, -1).flatten(1, 2)


def to_column(tokens: Tensor | None) -> Tensor | None:
    """View text tokens [B, L, C] as a feature [B, C, L, 1]; None (a skipped site) stays None."""
    return None if tokens is None else to_grid(tokens, tokens.shape[1], 1)


def unpatchify(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """Convert patches [B, H * W, P * P * C] to a latent [B, C, H * P, W * P]."""
    patches = tokens.unflatten(1, (height, width)).unflatten(-1, (patch, patch, -1))
    return torch.einsum("nhwpqc->nchpwq", patches).flatten(4, 5).flatten(2, 3)


def grid_of(positions: Tensor) -> tuple[int, int]:
    """Height and width, in tokens, of an image with the position ids [T, 3]: (0, row, column).

    On the meta device, which has no values, a square image is assumed.

    Raises:
        AfaError: if the tokens do not fill one rectangle, for instance because a second image is
            appended to them.
    """
    count = len(positions)
    if positions.is_meta:
        side = math.isqrt(count)
        return side, side
    first, row, column = (positions.amax(0) - positions.amin(0)).tolist()
    height, width = round(row) + 1, round(column) + 1
    if first or height * width != count:
        raise AfaError(
            "AFA-MODEL-014",
            f"The image tokens must fill one rectangle; got {count} tokens for {height} rows and "
            f"{width} columns. Experts that take a second image as tokens cannot be fused.",
        )
    return height, width


def require_blocks(model: nn.Module, kinds: Mapping[str, str]) -> None:
    """Check that a transformer has only blocks that its coroutine supports.

    Args:
        kinds: the name of each list of blocks -> the class name that its blocks must have.

    Raises:
        AfaError: if a block has another class; it names the first.
    """
    for name, kind in kinds.items():
        for k, block in enumerate(getattr(model, name)):
            if type(block).__name__.removeprefix("FSDP") != kind:
                raise AfaError(
                    "AFA-MODEL-015",
                    f"{name}.{k} is a {type(block).__name__}, but an ensemble supports only "
                    f"{type(model).__name__} with blocks of the class {kind}. Use a checkpoint "
                    "with these blocks.",
                )


def fill_out_channels(config: dict[str, Any]) -> None:
    """Set a missing `out_channels` of a transformer's configuration to `in_channels`, in place."""
    if config.get("out_channels") is None:
        config["out_channels"] = config["in_channels"]
