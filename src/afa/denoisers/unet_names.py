"""Map a U-Net's parameters to sites, and layer names in diffusers to those in the original code.

A site stands for the layers that compute its feature. Stable Diffusion 1.x and 2.x have 25 sites:
the blocks IN00..IN11, M00, OUT00..OUT11 of block-weighted merges in web UIs, in that order.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

from afa.denoisers.original_names import Rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from afa.denoisers.original_names import OriginalName

# layers of the embeddings and of the first feature
_FIRST = (
    "conv_in",
    "time_embedding",
    "time_proj",
    "class_embedding",
    "add_embedding",
    "add_time_proj",
    "encoder_hid_proj",
    "time_embed",
    "label_emb",
)
_LAST = ("conv_norm_out", "conv_out", "out")
_MIDDLE = ("mid_block", "middle_block")
_LAYER = re.compile(r"(down|up)_blocks\.(\d+)\.(?:resnets|attentions)\.(\d+)\.")
_DOWNSAMPLER = re.compile(r"down_blocks\.(\d+)\.downsamplers\.")
_UPSAMPLER = re.compile(r"up_blocks\.(\d+)\.upsamplers\.")
_ORIGINAL = re.compile(r"(input|output)_blocks\.(\d+)\.")
_NUMBERED = (_LAYER, _DOWNSAMPLER, _UPSAMPLER, _ORIGINAL)
_ORIGINAL_DOWNSAMPLER = re.compile(r"input_blocks\.(\d+)\.0\.op\.")
_ORIGINAL_UPSAMPLER = re.compile(r"output_blocks\.(\d+)\.\d+\.conv\.")


def parameter_sites(names: Iterable[str]) -> dict[str, str]:
    """Map each parameter of a U-Net to the site whose feature it computes; see `unet_blocks`.

    An up block's upsampler belongs to the block's last layer. The last up layer is not a site: it
    belongs to `conv_out`, like the output layers.

    Args:
        names: the names of all parameters, without a prefix, in diffusers
            (`down_blocks.0.resnets.0.conv1.weight`) or in the original code
            (`input_blocks.1.0.in_layers.2.weight`).

    Returns: name -> site, without parameters that belong to no site.
    """
    names = list(names)
    by_layer = {**_library_sites(names), **_original_sites(names)}
    sites = {}
    for name in names:
        root = name.split(".", 1)[0]
        if root in _FIRST:
            sites[name] = "conv_in"
        elif root in _LAST:
            sites[name] = "conv_out"
        elif root in _MIDDLE:
            sites[name] = "mid"
        elif match := next(filter(None, (pattern.match(name) for pattern in _NUMBERED)), None):
            sites[name] = by_layer[match.group()]
    return sites


def ordered_sites(sites: Iterable[str]) -> list[str]:
    """Site names without duplicates, in the order in which a U-Net computes them."""
    ends = {"conv_in": 0, "down": 1, "mid": 2, "up": 3, "conv_out": 4}

    def order(site: str) -> tuple[int, ...]:
        kind, *numbers = site.split(".")
        # a block's downsampler follows its layers
        return (ends[kind], *(int(n) if n.isdigit() else len(site) + 10**6 for n in numbers))

    return sorted(set(sites), key=order)


def _library_sites(names: list[str]) -> dict[str, str]:
    """Map prefixes of names in diffusers, such as `down_blocks.0.resnets.0.`, to sites."""
    sites: dict[str, str] = {}
    up_layers: dict[int, int] = {}
    for match in filter(None, map(_LAYER.match, names)):
        side, block, layer = match[1], int(match[2]), int(match[3])
        sites[match.group()] = f"{side}.{block}.{layer}"
        if side == "up":
            up_layers[block] = max(layer, up_layers.get(block, 0))
    for match in filter(None, map(_DOWNSAMPLER.match, names)):
        sites[match.group()] = f"down.{match[1]}.downsample"
    for match in filter(None, map(_UPSAMPLER.match, names)):
        sites[match.group()] = f"up.{match[1]}.{up_layers.get(int(match[1]), 0)}"
    last_block = max(up_layers, default=0)
    last = f"up.{last_block}.{up_layers.get(last_block, 0)}"
    return {layer: "conv_out" if site == last else site for layer, site in sites.items()}


def _original_sites(names: list[str]) -> dict[str, str]:
    """Map prefixes such as `input_blocks.7.` to sites; blocks end where the size changes."""
    numbers: dict[str, set[int]] = {"input": set(), "output": set()}
    for match in filter(None, map(_ORIGINAL.match, names)):
        numbers[match[1]].add(int(match[2]))
    shrinks = {int(m[1]) for m in map(_ORIGINAL_DOWNSAMPLER.match, names) if m}
    grows = {int(m[1]) for m in map(_ORIGINAL_UPSAMPLER.match, names) if m}
    sites = {"input_blocks.0.": "conv_in"}
    block = layer = 0
    for number in sorted(numbers["input"] - {0}):
        if number in shrinks:
            sites[f"input_blocks.{number}."] = f"down.{block}.downsample"
            block, layer = block + 1, 0
        else:
            sites[f"input_blocks.{number}."] = f"down.{block}.{layer}"
            layer += 1
    block = layer = 0
    for number in sorted(numbers["output"]):
        is_last = number == max(numbers["output"])
        sites[f"output_blocks.{number}."] = "conv_out" if is_last else f"up.{block}.{layer}"
        block, layer = (block + 1, 0) if number in grows else (block, layer + 1)
    return sites


# -- layers in the original code --------------------------------------------------------------

_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_layers(layers: list[str]) -> Iterator[OriginalName]:
    """Yield the layers with their names in the original code.

    The original code numbers its blocks consecutively: one per resnet, and one per downsampler.

    Args:
        layers: the names of a U-Net's layers in diffusers.
    """
    members: defaultdict[str, set[str]] = defaultdict(set)
    for layer in layers:
        side, *rest = layer.split(".")
        if side in ("down_blocks", "up_blocks") and len(rest) > 2:
            members[f"{side}.{rest[0]}"].add(f"{rest[1]}.{rest[2]}")
    originals, number = dict(_UNET), 1
    for block in _numbered(members, "down_blocks"):
        for n in range(_count(members[block], "resnets")):
            originals[f"{block}.resnets.{n}"] = f"input_blocks.{number}.0"
            originals[f"{block}.attentions.{n}"] = f"input_blocks.{number}.1"
            number += 1
        if "downsamplers.0" in members[block]:
            originals[f"{block}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for block in _numbered(members, "up_blocks"):
        for n in range(_count(members[block], "resnets")):
            originals[f"{block}.resnets.{n}"] = f"output_blocks.{number}.0"
            originals[f"{block}.attentions.{n}"] = f"output_blocks.{number}.1"
            number += 1
        after = 2 if _count(members[block], "attentions") else 1
        originals[f"{block}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{after}.conv"
    for layer in layers:
        for start, original in originals.items():
            if layer == start:
                yield original, (Rows(layer),)
            elif layer.startswith(f"{start}."):
                inner = layer.removeprefix(f"{start}.")
                inner = _RESNET.get(inner, inner) if ".resnets." in start else inner
                yield f"{original}.{inner}", (Rows(layer),)


def _numbered(members: dict[str, set[str]], side: str) -> list[str]:
    count = sum(block.startswith(f"{side}.") for block in members)
    return [f"{side}.{n}" for n in range(count)]


def _count(members: set[str], kind: str) -> int:
    return sum(member.startswith(f"{kind}.") for member in members)
