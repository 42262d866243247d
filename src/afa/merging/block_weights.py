"""Merge block weighted: other weights at every site of the U-Net."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from afa.denoisers.unet_names import ordered_sites
from afa.errors import AfaError
from afa.merging.method import MergeMethod, check_number, check_weights, uniform
from afa.merging.parts import OTHER_PARTS, block_keys
from afa.merging.presets import NUM_BLOCKS, check_preset, read_preset
from afa.merging.weighted import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT = "default"


@dataclass(frozen=True)
class BlockWeights(MergeMethod):
    """The weighted mean, with weights of its own at every site (MBW, "merge block weighted").

    Attributes:
        weights: site (`conv_in`, `down.0.1`, `mid`, ...), `text_encoder`, `text_encoder_2`, `vae`
            or `default` -> one weight per expert, summing to 1. Without `default` all that is not
            named is merged uniformly. Or, for two experts and a U-Net with 25 sites, the second
            one's weights as the web UIs write them: 26 numbers, or a preset's name; see
            `afa.merging.presets`.
        keys: tensor -> key of its weights; filled in by `fit`.
    """

    weights: Mapping[str, Sequence[float]] | Sequence[float] | str
    keys: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.weights, Mapping):
            if not self.weights:
                raise AfaError(
                    "AFA-MERGE-001", "block_weights must name at least one site, or 'default'."
                )
            for weights in self.weights.values():
                check_weights(weights, sum_to_one=True)
        elif isinstance(self.weights, str):
            read_preset(self.weights)
        else:
            check_preset(tuple(self.weights))

    def fit(self, names: Iterable[str], num_experts: int) -> BlockWeights:
        """These weights, laid out over the sites that the tensors work for."""
        keys = block_keys(names)
        sites = ordered_sites(set(keys.values()) - set(OTHER_PARTS))
        if isinstance(self.weights, Mapping):
            weights: Mapping[str, Sequence[float]] = self.weights
            _check_keys(weights, sites)
            for vector in weights.values():
                check_number(vector, num_experts)
        else:
            weights = self._spread(sites, num_experts)
        return replace(self, weights=weights, keys=keys)

    def merge(self, name: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """The weighted mean of one tensor, with the weights of its site."""
        if self.keys is None or not isinstance(self.weights, Mapping):
            raise AfaError(
                "AFA-MERGE-002",
                "Block weights must know the checkpoint's tensors first. Call fit().",
            )
        weights = self.weights.get(self.keys.get(name, DEFAULT), self.weights.get(DEFAULT))
        return weighted_sum(tensors, uniform(weights, len(tensors)))

    def _spread(self, sites: list[str], num_experts: int) -> dict[str, list[float]]:
        """The 26 numbers of a preset as weights of two experts at every site."""
        given = self.weights
        assert not isinstance(given, Mapping)
        numbers = read_preset(given) if isinstance(given, str) else check_preset(tuple(given))
        if num_experts != 2:
            raise AfaError(
                "AFA-MERGE-003",
                f"A preset of block weights is for two experts, came {num_experts}. Give one "
                "weight per expert: block_weights: {default: [...], mid: [...]}.",
            )
        if sites and len(sites) != NUM_BLOCKS:  # a text encoder alone has none
            raise AfaError(
                "AFA-MERGE-004",
                f"A preset of block weights is for a U-Net with {NUM_BLOCKS} sites (Stable "
                f"Diffusion 1.x and 2.x); this one has {len(sites)}: {', '.join(sites)}. Name "
                "them: block_weights: {default: [...], mid: [...]}.",
            )
        pairs = [[1 - number, number] for number in numbers]
        return {DEFAULT: pairs[0], **dict(zip(sites, pairs[1:], strict=False))}


def _check_keys(weights: Mapping[str, Sequence[float]], sites: list[str]) -> None:
    known = [DEFAULT, *OTHER_PARTS, *sites]
    for key in weights:
        if sites and key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(known)}."
            raise AfaError(
                "AFA-MERGE-005",
                f"block_weights names '{key}', which these experts do not have; {hint}",
            )
