"""Build the aggregators of an ensemble: one SABW per site, unless shared or switched off."""

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

#: above this hidden size or number of layers, the memory need is checked first
_LARGE = 512


def build_sabw(
    config: SABWConfig, sites: Sequence[Site], num_experts: int, text_channels: int | None
) -> list[nn.Module]:
    """Build an untrained SABW for every fused site, and `Separate` for the others.

    Args:
        config: the settings, the same for all sites.
        sites: the experts' sites, in order.
        num_experts: N.
        text_channels: the width of a token's embedding; None if the experts take no text.

    Raises:
        AfaError: if the aggregators are larger than the machine's memory.
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
    """Refuse aggregators that are larger than the machine's memory, before allocating them.

    A transformer block of width W has at least 8 W^2 parameters of 4 bytes.

    Raises:
        AfaError: if they are larger.
    """
    widths = [found.channels for found in site_configs(config, sites) if found is not None]
    needed = sum(4 * 8 * config.num_layers * width**2 for width in widths)
    total = psutil.virtual_memory().total
    if needed > total:
        raise AfaError(
            "AFA-FUSION-001",
            f"Aggregators with hidden_size {config.hidden_size} and num_layers {config.num_layers} "
            f"need more than {needed / 1e9:.0f} GB of memory, but the machine has "
            f"{total / 1e9:.0f} GB. Lower these settings.",
        )


def site_configs(config: SABWConfig, sites: Sequence[Site]) -> list[SABWConfig | None]:
    """The config of every site, with the site's properties filled in; None if it is not fused.

    At text sites, and if the experts take no text, aggregators do not attend to the prompt.

    Args:
        config: the settings, with `num_experts` and `text_channels` filled in.
        sites: the experts' sites, in order.
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
        # the prediction has few channels, but the layers before it are as wide as at the first site
        width=sites[0].channels if site == sites[-1] else site.channels,
        # a text has no grid to pool
        pool=max(1, config.min_scale // site.scale) if is_image else 1,
    )


def fused_sites(config: SABWConfig, sites: Sequence[Site]) -> list[Site]:
    """The sites at which experts are fused; at the others each continues with its own feature.

    They are the first, the last and every `stride`-th site between. A text site is fused if the
    image site of its block is. With `sites="conv_out"` only the last site is fused.
    """
    if config.sites == "conv_out":
        return [sites[-1]]
    blocks = [site.name for site in sites[1:-1] if site.stream == "image"]
    chosen = {sites[0].name, sites[-1].name, *blocks[config.stride - 1 :: config.stride]}
    return [site for site in sites if site.block in chosen]
