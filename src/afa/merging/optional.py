"""Optional tensors, and tensors that are buffers and not weights."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from afa.loading.single_file.canonical_names import MARKERS, SCHEDULE

if TYPE_CHECKING:
    from afa.loading.tensor_files import StoredTensor

_OPTIONAL = re.compile(
    r"model_ema\..*|(.*\.)?position_ids|(.*\.)?attn_mask"
    r"|(.*\.)?(logit_scale|logit_bias|text_projection|text_projection\.weight)"
    r"|(.*\.)?encoder\.embed_tokens\.weight"  # T5's copy of shared.weight
    # Stable Diffusion 2.x uses the output of the second last layer
    r"|cond_stage_model\.model\.transformer\.resblocks\.23\..*"
    r"|(.*\.)?(num_batches_tracked|global_step|spiece_model|tekken_model)"
    r"|first_stage_model\.(loss|model_ema)\..*"
)
_POSITIONS = re.compile(r"(.*\.)?position_ids")
_MAX_POSITIONS = 100_000


def is_optional(name: str) -> bool:
    """Whether a model also works without this tensor.

    Args:
        name: canonical name.
    """
    return _OPTIONAL.fullmatch(name) is not None or is_schedule(name)


def is_schedule(name: str) -> bool:
    """Whether it is a buffer of the noise schedule; some contain infinity by definition."""
    return SCHEDULE.fullmatch(name) is not None or name in MARKERS


def damaged_positions(name: str, stored: StoredTensor, dtype: torch.dtype) -> bool:
    """Whether this is a text encoder's `position_ids` with values other than 0, 1, 2, ...

    Half precision rounds them and merges average them, and some programs then use wrong positions
    (`position_ids` of CLIP, transformers).

    Args:
        name: canonical name.
        stored: the tensor.
        dtype: dtype of the output.
    """
    if not _POSITIONS.fullmatch(name) or max(stored.shape, default=0) > _MAX_POSITIONS:
        return False
    values = stored.read().to(dtype).double()
    return not torch.equal(values, right_positions(stored.shape).double())


def right_positions(shape: tuple[int, ...]) -> torch.Tensor:
    """Positions 0, 1, 2, ... in int64, as transformers creates them."""
    return torch.arange(torch.Size(shape).numel()).reshape(shape)
