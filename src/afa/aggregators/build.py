"""One SABW for every site of an ensemble, or fewer where the config has them shared or left out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from afa.aggregators.sabw import SABW, SABWConfig
from afa.aggregators.simple import Separate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from afa.denoisers import Site


def build_sabw(
    config: SABWConfig, sites: Sequence[Site], num_experts: int, text_channels: int | None
) -> list[nn.Module]:
    """A fusion rule for every site.

    Args:
        config: the same for all sites.
        sites: of the experts.
        num_experts: N.
        text_channels: width of the embedding of a token; None where experts take no text.
    """
    built: dict[object, nn.Module] = {}
    rules: list[nn.Module] = []
    fused = fused_sites(config, sites)
    for site in sites:
        if site not in fused:
            rules.append(Separate())
            continue
        shape = (site.channels, site.temb_channels, site.stream)
        key = shape if config.sharing == "width" else site.name
        if key not in built:
            built[key] = SABW(site_config(config, site, num_experts, text_channels))
        rules.append(built[key])
    return rules


def site_config(
    config: SABWConfig, site: Site, num_experts: int, text_channels: int | None
) -> SABWConfig:
    """The config of one site.

    Where the features are the text's own stream, or there is no text, no prompt is attended to.
    """
    sees_prompt = config.prompt and text_channels is not None and site.stream == "image"
    return replace(
        config,
        prompt=sees_prompt,
        num_experts=num_experts,
        in_channels=site.channels,
        temb_channels=site.temb_channels,
        text_channels=text_channels if sees_prompt else None,
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
