"""One SABW for every site of an ensemble, or fewer where the config has them shared or left out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import psutil

from afa.aggregators.sabw import SABW, SABWConfig
from afa.aggregators.simple import Separate
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from afa.denoisers import Site

#: hidden size or layers from which on it is worth a look whether they can be had at all
_LARGE = 512


def build_sabw(
    config: SABWConfig, sites: Sequence[Site], num_experts: int, text_channels: int | None
) -> list[nn.Module]:
    """A fusion rule for every site.

    Args:
        config: the same for all sites.
        sites: of the experts.
        num_experts: N.
        text_channels: width of the embedding of a token; None where experts take no text.

    Raises:
        AfaError: they would not fit into the machine's memory.
    """
    filled = replace(config, num_experts=num_experts, text_channels=text_channels)
    if max(config.hidden_size, config.num_layers) > _LARGE:
        _require_memory(filled, sites)
    built: dict[object, nn.Module] = {}
    rules: list[nn.Module] = []
    for site, of_site in zip(sites, site_configs(filled, sites), strict=True):
        if of_site is None:
            rules.append(Separate())
            continue
        key = (of_site, site.stream) if config.sharing == "width" else site.name
        if key not in built:
            built[key] = SABW(of_site)
        rules.append(built[key])
    return rules


def _require_memory(config: SABWConfig, sites: Sequence[Site]) -> None:
    """Refuse aggregators that are larger than the machine, before any memory is taken.

    A transformer block has at least eight times the square of its width in parameters.

    Raises:
        AfaError: says how much they would take.
    """
    widths = [found.channels for found in site_configs(config, sites) if found is not None]
    takes = sum(4 * 8 * config.num_layers * width**2 for width in widths)
    there = psutil.virtual_memory().total
    if takes > there:
        raise AfaError(
            "AFA-FUSION-001",
            f"Aggregators must fit into memory; of hidden_size {config.hidden_size} and num_layers "
            f"{config.num_layers} they take more than {takes / 1e9:.0f} GB, {there / 1e9:.0f} GB "
            "are there. Are these settings an ensemble's?",
        )


def site_configs(config: SABWConfig, sites: Sequence[Site]) -> list[SABWConfig | None]:
    """The config of every site of the experts; None where nothing is fused.

    Where the features are the text's own stream, or there is no text, no prompt is attended to.

    Args:
        config: with the number of experts and the width of the embedding of a token.
        sites: of the experts.
    """
    fused = fused_sites(config, sites)
    return [_site_config(config, site, sites) if site in fused else None for site in sites]


def _site_config(config: SABWConfig, site: Site, sites: Sequence[Site]) -> SABWConfig:
    is_image = site.stream == "image"
    sees_prompt = config.prompt and config.text_channels is not None and is_image
    return replace(
        config,
        prompt=sees_prompt,
        in_channels=site.channels,
        temb_channels=site.temb_channels,
        text_channels=config.text_channels if sees_prompt else None,
        # the prediction has few channels, but the layers before it are as wide as the first
        width=sites[0].channels if site == sites[-1] else site.channels,
        # a text has no grid to make coarser
        pool=max(1, config.min_scale // site.scale) if is_image else 1,
    )


def fused_sites(config: SABWConfig, sites: Sequence[Site]) -> list[Site]:
    """The sites where experts are fused; at the others each goes on with its own feature.

    The first and the last always are, and of those between every `stride`-th, counted so that the
    last of `stride` has it; a text's site goes with the picture's.
    """
    if config.sites == "conv_out":
        return [sites[-1]]
    blocks = [site.name for site in sites[1:-1] if site.stream == "image"]
    chosen = {sites[0].name, sites[-1].name, *blocks[config.stride - 1 :: config.stride]}
    return [site for site in sites if site.block in chosen]
