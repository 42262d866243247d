"""The tensors of a single file in the original layout, each made of tensors of diffusers' models.

The inverse of `afa.loading.single_file.conversion`, which uses diffusers' own conversions;
`afa.exporting.plan` checks it against them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor

    from afa.denoisers import Family
    from afa.loading.weights import Shapes

#: what happens to a tensor of diffusers: nothing, its two halves of rows swapped, its dimensions
#: swapped, or a matrix as the kernel of a 1x1 convolution
Change = Literal["none", "swapped", "transposed", "convolution"]


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a single file.

    Attributes:
        name: in the file, without the part's prefix.
        sources: tensors of diffusers, whose rows are joined.
        change: of the joined tensor.
    """

    name: str
    sources: tuple[str, ...]
    change: Change = "none"

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Return its shape, from the shapes of the sources."""
        first = shapes[self.sources[0]]
        joined = (sum(shapes[name][0] for name in self.sources), *first[1:]) if first else ()
        if self.change == "transposed":
            return joined[::-1]
        return (*joined, 1, 1) if self.change == "convolution" else joined

    def value(self, read: Callable[[str], Tensor]) -> Tensor:
        """Return its values; `read` returns those of a source."""
        tensors = [read(name) for name in self.sources]
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        if self.change == "swapped":
            return torch.cat(joined.chunk(2)[::-1])
        if self.change == "transposed":
            return joined.T
        return joined[..., None, None] if self.change == "convolution" else joined


# -- denoisers --------------------------------------------------------------------------------


def denoiser_tensors(
    names: Iterable[str], family: Family, renamed: Mapping[str, str]
) -> list[FileTensor]:
    """Return the tensors of a denoiser, from the names of its layers in `Family.original_layers`.

    Tensors of other layers keep their names.

    Args:
        names: its tensors in diffusers.
        family: its family, which has an original layout.
        renamed: regular expression -> replacement, for tensors that differ in more than the name
            of their layer.
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        layer, _, kind = name.rpartition(".")
        kinds.setdefault(layer, []).append(kind)
    original = family.original_layers
    found: list[FileTensor] = []
    done: set[str] = set()
    for theirs, rows in () if original is None else original(list(kinds)):
        layers = [row.layer for row in rows]
        if not done.isdisjoint(layers):  # another name of the same layer, in other programs
            continue
        done.update(layers)
        change: Change = "swapped" if rows[0].is_swapped else "none"
        for kind in kinds[layers[0]]:
            sources = tuple(f"{layer}.{kind}" for layer in layers)
            found.append(FileTensor(_replaced(f"{theirs}.{kind}", renamed), sources, change))
    for layer in sorted(kinds.keys() - done):
        for kind in kinds[layer]:
            name = f"{layer}.{kind}" if layer else kind
            found.append(FileTensor(_replaced(name, renamed), (name,)))
    return found


def _replaced(name: str, renamed: Mapping[str, str]) -> str:
    for pattern, new in renamed.items():
        name = re.sub(pattern, new, name)
    return name


# -- text encoders ----------------------------------------------------------------------------

_OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def clip_tensors(names: Iterable[str]) -> list[FileTensor]:
    """Return the tensors of CLIP under the names of transformers 4, which other programs expect."""
    return [
        FileTensor(
            n if n.startswith(("text_model.", "text_projection.")) else f"text_model.{n}", (n,)
        )
        for n in names
        if not n.endswith("position_ids")
    ]


def open_clip_tensors(names: Iterable[str]) -> list[FileTensor]:
    """Return the tensors of OpenCLIP, which joins queries, keys and values."""
    found = []
    for name in names:
        bare = name.removeprefix("text_model.")
        if bare == "text_projection.weight":
            found.append(FileTensor("text_projection", (name,), "transposed"))
        elif bare in _OPEN_CLIP:
            found.append(FileTensor(_OPEN_CLIP[bare], (name,)))
        elif match := _LAYER.fullmatch(bare):
            number, layer, kind = match.groups()
            block = f"transformer.resblocks.{number}"
            if layer == "self_attn.q_proj":
                joined = tuple(name.replace(".q_proj.", f".{each}_proj.") for each in "qkv")
                found.append(FileTensor(f"{block}.attn.in_proj_{kind}", joined))
            elif layer in _OPEN_CLIP_LAYER:
                found.append(FileTensor(f"{block}.{_OPEN_CLIP_LAYER[layer]}.{kind}", (name,)))
    return found


def same_tensors(names: Iterable[str]) -> list[FileTensor]:
    """Return tensors that have the same names in both layouts, as those of T5."""
    return [FileTensor(name, (name,)) for name in names]


# -- autoencoders -----------------------------------------------------------------------------

_VAE = (
    (r"((?:en|de)coder)\.mid_block\.resnets\.([01])\.", "{0}.mid.block_{1+}."),
    (r"((?:en|de)coder)\.mid_block\.attentions\.0\.", "{0}.mid.attn_1."),
    (r"((?:en|de)coder)\.conv_norm_out\.", "{0}.norm_out."),
    (r"(encoder)\.down_blocks\.(\d+)\.resnets\.(\d+)\.", "{0}.down.{1}.block.{2}."),
    (r"(encoder)\.down_blocks\.(\d+)\.downsamplers\.0\.", "{0}.down.{1}.downsample."),
    (r"(decoder)\.up_blocks\.(\d+)\.resnets\.(\d+)\.", "{0}.up.{1-}.block.{2}."),
    (r"(decoder)\.up_blocks\.(\d+)\.upsamplers\.0\.", "{0}.up.{1-}.upsample."),
)
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def vae_tensors(names: Iterable[str]) -> list[FileTensor]:
    """Return the tensors of an `AutoencoderKL`, whose decoder has its levels in reverse order."""
    names = list(names)
    blocks = {int(m[1]) for m in map(re.compile(r"decoder\.up_blocks\.(\d+)\.").match, names) if m}
    return [_vae_tensor(name, len(blocks)) for name in names]


def _vae_tensor(name: str, num_levels: int) -> FileTensor:
    for pattern, new in _VAE:
        match = re.match(pattern, name)
        if match is None:
            continue
        start, *numbers = match.groups()
        filled = new.replace("{0}", start)
        for place, number in enumerate(map(int, numbers), start=1):
            for mark, value in (("", number), ("+", number + 1), ("-", num_levels - 1 - number)):
                filled = filled.replace(f"{{{place}{mark}}}", str(value))
        layer, _, kind = name[match.end() :].rpartition(".")
        if ".attentions." in match.group():
            is_matrix = kind == "weight" and layer != "group_norm"
            change: Change = "convolution" if is_matrix else "none"
            return FileTensor(f"{filled}{_VAE_ATTENTION.get(layer, layer)}.{kind}", (name,), change)
        layer = "nin_shortcut" if layer == "conv_shortcut" else layer
        return FileTensor(filled + (f"{layer}.{kind}" if layer else kind), (name,))
    return FileTensor(name, (name,))


def tensors_of(names: Iterable[str], prefix: str) -> Iterator[FileTensor]:
    """Yield the tensors of a text encoder in the layout that its prefix in the file stands for."""
    if prefix.endswith(".model."):
        yield from open_clip_tensors(names)
    elif "t5" in prefix:
        yield from same_tensors(names)
    elif "qwen" in prefix:
        yield from (FileTensor(f"model.{name}", (name,)) for name in names)
    else:
        yield from clip_tensors(names)
