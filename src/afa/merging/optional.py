"""Tensors that some files of a model have and others do not, and tensors that are no weights."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from afa.loading.single_file.canonical_names import MARKERS, SCHEDULE

if TYPE_CHECKING:
    from afa.merging.streams import StoredTensor

_OPTIONAL = re.compile(
    r"model_ema\..*|(.*\.)?position_ids|(.*\.)?attn_mask"
    r"|(.*\.)?(logit_scale|logit_bias|text_projection|text_projection\.weight)"
    r"|(.*\.)?encoder\.embed_tokens\.weight"  # T5 has it as shared.weight as well
    # Stable Diffusion 2.x reads the layer before the last
    r"|cond_stage_model\.model\.transformer\.resblocks\.23\..*"
    r"|(.*\.)?(num_batches_tracked|global_step|spiece_model|tekken_model)"
    r"|first_stage_model\.(loss|model_ema)\..*"
)
_POSITIONS = re.compile(r"(.*\.)?position_ids")
_MAX_POSITIONS = 100_000


def is_optional(name: str) -> bool:
    """Whether a model may have this tensor or not, and draws in either case.

    Args:
        name: canonical.
    """
    return bool(_OPTIONAL.fullmatch(name) or SCHEDULE.fullmatch(name) or name in MARKERS)


def is_schedule(name: str) -> bool:
    """Whether it is a buffer of the noise schedule; some hold infinity by their definition."""
    return SCHEDULE.fullmatch(name) is not None or name in MARKERS


def damaged_positions(name: str, stored: StoredTensor, dtype: torch.dtype) -> bool:
    """Whether a text encoder's positions are not 0, 1, 2, ... as each of them must be.

    Half precision rounds them and merges average them; a program that reads them then takes other
    positions for some tokens (`position_ids` of CLIP, transformers).

    Args:
        name: canonical.
        stored: the tensor.
        dtype: that it would be written in.
    """
    if not _POSITIONS.fullmatch(name) or max(stored.shape, default=0) > _MAX_POSITIONS:
        return False
    values = stored.read().to(dtype).reshape(-1).double()
    return not torch.equal(values, torch.arange(values.numel(), dtype=torch.float64))


def right_positions(shape: tuple[int, ...]) -> torch.Tensor:
    """Positions as transformers makes them: int64, counted from 0."""
    return torch.arange(torch.Size(shape).numel()).reshape(shape)
