"""Merge block weighted (MBW): separate weights for each site of the U-Net."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from afa.denoisers.unet_names import ordered_sites
from afa.errors import AfaError
from afa.merging.method import MergeMethod, check_number, check_weights, uniform
from afa.merging.parts import OTHER_PARTS, block_keys
from afa.merging.presets import NUM_BLOCKS, read_preset
from afa.merging.weighted import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT = "default"


@dataclass(frozen=True)
class BlockWeights(MergeMethod):
    """Weighted mean with separate weights for each site ("merge block weighted", MBW).

    Attributes:
        weights: site (`conv_in`, `down.0.1`, `mid`, ...), `text_encoder`, `text_encoder_2`, `vae`
            or `default` -> one weight per expert, summing to 1. Tensors without an entry use
            `default`, or uniform weights if there is none. For two experts and a U-Net with 25
            sites: 26 weights of the second expert in the web UIs' order, or the name of a preset;
            see `afa.merging.presets`.
        keys: tensor -> key of its weights; set by `fit`.
    """

    weights: Mapping[str, Sequence[float]] | Sequence[float] | str
    keys: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.weights, Mapping):
            if not self.weights:
                raise AfaError(
                    "AFA-MERGE-001",
                    "block_weights is empty. It must have at least one site, or 'default'.",
                )
            for weights in self.weights.values():
                check_weights(weights, sum_to_one=True)
        else:
            read_preset(self.weights)

    def fit(self, names: Iterable[str], num_experts: int) -> BlockWeights:
        """Assign the weights to the sites of these tensors."""
        keys = block_keys(names)
        sites = ordered_sites(set(keys.values()) - set(OTHER_PARTS))
        if isinstance(self.weights, Mapping):
            weights: Mapping[str, Sequence[float]] = self.weights
            _check_keys(weights, sites)
            for vector in weights.values():
                check_number(vector, num_experts)
        else:
            weights = _preset_by_site(read_preset(self.weights), sites, num_experts)
        return replace(self, weights=weights, keys=keys)

    def merge(self, name: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Compute the weighted mean of one tensor with the weights of its site."""
        if self.keys is None or not isinstance(self.weights, Mapping):
            raise AfaError(
                "AFA-MERGE-002",
                "Block weights are not assigned to the checkpoint's tensors. Call fit() first.",
            )
        weights = self.weights.get(self.keys.get(name, DEFAULT), self.weights.get(DEFAULT))
        return weighted_sum(tensors, uniform(weights, len(tensors)))


def _preset_by_site(
    numbers: Sequence[float], sites: list[str], num_experts: int
) -> dict[str, list[float]]:
    """Convert the 26 weights of a preset to the weights of two experts at every site."""
    if num_experts != 2:
        raise AfaError(
            "AFA-MERGE-003",
            f"A preset of block weights needs two experts; got {num_experts}. Set one weight per "
            "expert: block_weights: {default: [...], mid: [...]}.",
        )
    if sites and len(sites) != NUM_BLOCKS:  # a text encoder alone has no sites
        raise AfaError(
            "AFA-MERGE-004",
            f"A preset of block weights needs a U-Net with {NUM_BLOCKS} sites (Stable Diffusion "
            f"1.x and 2.x); this one has {len(sites)}: {', '.join(sites)}. Set the weights by "
            "site: block_weights: {default: [...], mid: [...]}.",
        )
    pairs = [[1 - number, number] for number in numbers]
    return {DEFAULT: pairs[0], **dict(zip(sites, pairs[1:], strict=False))}


def _check_keys(weights: Mapping[str, Sequence[float]], sites: list[str]) -> None:
    known = [DEFAULT, *OTHER_PARTS, *sites]
    for key in weights:
        if sites and key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"Did you mean '{close[0]}'?" if close else f"They have {', '.join(known)}."
            raise AfaError(
                "AFA-MERGE-005",
                f"block_weights names '{key}', which these experts do not have. {hint}",
            )
