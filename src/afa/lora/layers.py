"""The layers of a model under all names that LoRAs have for them.

Besides the library's own names there are those of the original codes. They may join what are
several layers in the library (`qkv`), and have scale and shift of the last modulation the other
way round, as the library's converters of single files say (`diffusers.loaders.single_file_utils`).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from afa.lora.names import flat

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@dataclass(frozen=True)
class Rows:
    """The rows of a named layer that are one layer of the library, in order.

    Attributes:
        layer: the library's name.
        is_swapped: whether the two halves of the rows are the other way round.
    """

    layer: str
    is_swapped: bool = False


#: flattened name -> the layers that it joins
Names = dict[str, tuple[Rows, ...]]


def names_of(layers: Iterable[str], family: str | None) -> Names:
    """All names of a part's layers.

    Args:
        layers: the library's names.
        family: of the denoiser; None for a text encoder.
    """
    own = list(layers)
    found: Names = {}
    original = _text_encoder if family is None else _ORIGINAL.get(family)
    for name, rows in (*_library(own), *(original(own) if original else ())):
        found.setdefault(flat(name), rows)
    return found


def _library(layers: list[str]) -> Iterator[tuple[str, tuple[Rows, ...]]]:
    for layer in layers:
        yield layer, (Rows(layer),)
        if layer.endswith(".to_out.0"):  # as attention processors were saved
            yield layer.removesuffix(".0"), (Rows(layer),)


# -- text encoders ----------------------------------------------------------------------------

_OLD_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def _text_encoder(layers: list[str]) -> Iterator[tuple[str, tuple[Rows, ...]]]:
    """CLIP's layers begin with `text_model.` or not, by the version of transformers."""
    for layer in layers:
        bare = layer.removeprefix("text_model.")
        place, _, last = bare.rpartition(".")
        for name in (bare, f"{place}.{_OLD_ATTENTION.get(last, last)}"):
            yield name, (Rows(layer),)
            yield f"text_model.{name}", (Rows(layer),)


# -- U-Nets -----------------------------------------------------------------------------------

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


def _unet(layers: list[str]) -> Iterator[tuple[str, tuple[Rows, ...]]]:
    """Blocks are numbered through: one for each resnet, and on the way down for each scale."""
    members: defaultdict[str, set[str]] = defaultdict(set)
    for layer in layers:
        side, *rest = layer.split(".")
        if side in ("down_blocks", "up_blocks") and len(rest) > 2:
            members[f"{side}.{rest[0]}"].add(f"{rest[1]}.{rest[2]}")
    places, number = dict(_UNET), 1
    for block in _numbered(members, "down_blocks"):
        for n in range(_count(members[block], "resnets")):
            places[f"{block}.resnets.{n}"] = f"input_blocks.{number}.0"
            places[f"{block}.attentions.{n}"] = f"input_blocks.{number}.1"
            number += 1
        if "downsamplers.0" in members[block]:
            places[f"{block}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for block in _numbered(members, "up_blocks"):
        for n in range(_count(members[block], "resnets")):
            places[f"{block}.resnets.{n}"] = f"output_blocks.{number}.0"
            places[f"{block}.attentions.{n}"] = f"output_blocks.{number}.1"
            number += 1
        after = 2 if _count(members[block], "attentions") else 1
        places[f"{block}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{after}.conv"
    for layer in layers:
        for place, original in places.items():
            if layer == place:
                yield original, (Rows(layer),)
            elif layer.startswith(f"{place}."):
                inner = layer.removeprefix(f"{place}.")
                inner = _RESNET.get(inner, inner) if ".resnets." in place else inner
                yield f"{original}.{inner}", (Rows(layer),)


def _numbered(members: dict[str, set[str]], side: str) -> list[str]:
    count = sum(block.startswith(f"{side}.") for block in members)
    return [f"{side}.{n}" for n in range(count)]


def _count(members: set[str], kind: str) -> int:
    return sum(member.startswith(f"{kind}.") for member in members)


# -- transformers -----------------------------------------------------------------------------

_FLUX = {
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "txt_in": "context_embedder",
    "img_in": "x_embedder",
    "final_layer.linear": "proj_out",
}
_FLUX_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    # XLabs, after `.processor` is taken out
    "proj_lora1": "attn.to_out.0",
    "proj_lora2": "attn.to_add_out",
    "qkv_lora1": "attn.to_q attn.to_k attn.to_v",
    "qkv_lora2": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
}
_FLUX_SINGLE = {
    "modulation.lin": "norm.linear",
    "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    # XLabs
    "proj": "proj_out",
    "qkv": "attn.to_q attn.to_k attn.to_v",
}
_SD3 = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_SD3_JOINT = {
    "x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
    "context_block.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.proj": "attn2.to_out.0",
    "context_block.attn.proj": "attn.to_add_out",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
_LAST = "final_layer.adaLN_modulation.1"


def _flux(layers: list[str]) -> Iterator[tuple[str, tuple[Rows, ...]]]:
    known = set(layers)
    yield from _outside(_FLUX, known)
    yield from _blocks("double_blocks", "transformer_blocks", _FLUX_DOUBLE, known)
    yield from _blocks("single_blocks", "single_transformer_blocks", _FLUX_SINGLE, known)


def _sd3(layers: list[str]) -> Iterator[tuple[str, tuple[Rows, ...]]]:
    known = set(layers)
    yield from _outside(_SD3, known)
    last = f"transformer_blocks.{_depth('transformer_blocks', known) - 1}.norm1_context.linear"
    for name, rows in _blocks("joint_blocks", "transformer_blocks", _SD3_JOINT, known):
        # of the last block the context is not used further: its modulation is a final one
        yield name, ((Rows(last, is_swapped=True),) if rows == (Rows(last),) else rows)


def _outside(table: dict[str, str], known: set[str]) -> Iterator[tuple[str, tuple[Rows, ...]]]:
    for name, layer in table.items():
        if layer in known:
            yield name, (Rows(layer),)
    if "norm_out.linear" in known:
        yield _LAST, (Rows("norm_out.linear", is_swapped=True),)


def _blocks(
    theirs: str, ours: str, table: dict[str, str], known: set[str]
) -> Iterator[tuple[str, tuple[Rows, ...]]]:
    for n in range(_depth(ours, known)):
        for name, layers in table.items():
            joined = [f"{ours}.{n}.{layer}" for layer in layers.split()]
            if known.issuperset(joined):
                yield f"{theirs}.{n}.{name}", tuple(map(Rows, joined))


def _depth(blocks: str, known: set[str]) -> int:
    return len({name.split(".")[1] for name in known if name.startswith(f"{blocks}.")})


_ORIGINAL = {"unet": _unet, "flux": _flux, "sd3": _sd3}
