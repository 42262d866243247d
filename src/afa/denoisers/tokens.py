"""Tokens of a transformer as features: an image's on their grid, a text's in one column.

Every fusion rule takes features [B, C, H, W]. Put back on their grid, tokens are such features, in
the same memory (channels last), so SABW's spatial weights keep their meaning and their maps can be
drawn.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, overload

import torch

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

#: how the names of sites end that fuse what a text has become
TEXT = ".text"


@overload
def to_grid(tokens: Tensor, height: int, width: int) -> Tensor: ...
@overload
def to_grid(tokens: Tensor | None, height: int, width: int) -> Tensor | None: ...
def to_grid(tokens: Tensor | None, height: int, width: int) -> Tensor | None:
    """Tokens [B, H * W, C] as a feature [B, C, H, W], without a copy; None of what was skipped."""
    return None if tokens is None else tokens.unflatten(1, (height, width)).movedim(-1, 1)


def to_tokens(feature: Tensor) -> Tensor:
    """A feature [B, C, H, W] as tokens [B, H * W, C]; no copy where it is channels last."""
    return feature.movedim(1, -1).flatten(1, 2)


def to_column(tokens: Tensor | None) -> Tensor | None:
    """Tokens of a text [B, L, C] as a feature [B, C, L, 1], without a copy; None of what is not."""
    return None if tokens is None else to_grid(tokens, tokens.shape[1], 1)


def unpatchify(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """Patches [B, H * W, P * P * C] as a latent [B, C, H * P, W * P]."""
    patches = tokens.unflatten(1, (height, width)).unflatten(-1, (patch, patch, -1))
    return torch.einsum("nhwpqc->nchpwq", patches).flatten(4, 5).flatten(2, 3)


def grid_of(positions: Tensor) -> tuple[int, int]:
    """Height and width of an image whose tokens have these positions [T, 3]: ., row, column.

    On the meta device, where there are none, the image is taken to be a square.

    Raises:
        AfaError: the tokens fill no rectangle, as where another image is appended to them.
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
            f"The tokens must be those of one image, row by row; {count} came, over {height} rows "
            f"and {width} columns. Experts that take another image beside it cannot be fused.",
        )
    return height, width


def require_blocks(model: nn.Module, kinds: Mapping[str, str]) -> None:
    """Refuse a transformer with blocks that its coroutine does not know.

    Args:
        model: the expert.
        kinds: the name of each list of blocks -> the class name that its blocks must have.

    Raises:
        AfaError: names the first one that is another.
    """
    for name, kind in kinds.items():
        for k, block in enumerate(getattr(model, name)):
            if type(block).__name__.removeprefix("FSDP") != kind:
                raise AfaError(
                    "AFA-MODEL-015",
                    f"The blocks of a {type(model).__name__} must be {kind} to be taken apart; "
                    f"{name}.{k} is a {type(block).__name__}.",
                )


def fill_out_channels(config: dict[str, Any]) -> None:
    """As many channels out as in, where a transformer's configuration does not say; in place."""
    if config.get("out_channels") is None:
        config["out_channels"] = config["in_channels"]
