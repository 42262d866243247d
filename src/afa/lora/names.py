"""Parse the names of a LoRA's tensors (part, layer and role), and list those of a model's layers.

Trainers and converters use different names for the same tensor. Supported are:

- diffusers: `unet.down_blocks.0.[...].to_q.lora_A.weight`, and the older
  `[...].attn1.processor.to_q_lora.down.weight`, with or without `unet.`;
- PEFT: `base_model.model.[...].to_q.lora_A.weight`, or with the name of the adapter,
  `lora_A.default.weight`;
- kohya's scripts and LyCORIS: `lora_unet_down_blocks_0_[...]_to_q.lora_down.weight`, with the
  layer's name flattened, and `lora_te_`, `lora_te1_`, `lora_te2_`, `lora_te3_`, `lycoris_`;
- ComfyUI: `diffusion_model.[...]`, `text_encoders.clip_l.transformer.[...]`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from afa.denoisers.original_names import Rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from afa.denoisers import Family
    from afa.denoisers.original_names import OriginalName

#: LoHa, LoKr and DoRA in the names of LyCORIS, see `afa.lora.lycoris`
LycorisRole = Literal[
    "hada_w1_a",
    "hada_w1_b",
    "hada_w2_a",
    "hada_w2_b",
    "hada_t1",
    "hada_t2",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_w2_b",
    "lokr_t2",
    "dora_scale",
]
#: `down` and `up` are the factors of a low-rank product, `mid` the core between them (CP
#: decomposition); `up_bias` is PEFT's `lora_bias`, `magnitude` that of DoRA; `diff` and `diff_b`
#: are added to weight and bias; `weight` and `bias` replace them
Role = (
    Literal["down", "up", "mid", "up_bias", "alpha", "magnitude", "diff", "diff_b"]
    | Literal["weight", "bias"]
    | LycorisRole
)
_SIDES: dict[str, Role] = {"down": "down", "up": "up", "mid": "mid", "A": "down", "B": "up"}
_DIFFERENCES: dict[str, Role] = {
    "diff": "diff",
    "w_norm": "diff",
    "diff_b": "diff_b",
    "b_norm": "diff_b",
}
_WHOLE: dict[str, Role] = {"weight": "weight", "scale": "weight", "bias": "bias"}
_ADAPTER = r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?"
_PEFT = re.compile(rf"\.lora_(?P<side>[AB]){_ADAPTER}\.(?P<kind>weight|bias)$")
_KOHYA = re.compile(r"\.lora_(?P<side>down|up|mid)\.weight$")
_OLD = re.compile(r"(?:(?<=lora\d)|[._]lora|\.lora_linear_layer)\.(?P<side>down|up)\.weight$")
_MAGNITUDE = re.compile(rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?$")
_ALPHA = re.compile(r"(?:[._]lora|\.lora_linear_layer)?\.alpha$")
_DIFFERENCE = re.compile(r"\.(?P<kind>diff|diff_b|w_norm|b_norm)$")
_LYCORIS = re.compile(
    r"\.(?P<kind>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|dora_scale)$"
)
_PLAIN = re.compile(r"(?:\.base_layer|\.modules_to_save)?\.(?P<kind>weight|scale|bias)$")
#: the end of names of tensors without effect: the numbers 0, 1, 2, ..., which the text encoder
#: computes itself
HARMLESS = ".position_ids"


@dataclass(frozen=True)
class Name:
    """The components of a tensor's name.

    Attributes:
        layer: prefix and layer, as named in the file.
        role: of the tensor in that layer.
        adapter: PEFT's name of the adapter, if the file has one.
    """

    layer: str
    role: Role
    adapter: str | None = None


def parse(name: str) -> Name | None:
    """Parse a tensor's name; None if it is unknown."""
    if found := _PEFT.search(name):
        layer, side = name[: found.start()], _SIDES[found["side"]]
        if found["kind"] == "weight":
            return Name(layer, side, found["adapter"])
        # in PEFT, only the second factor can have a bias
        return Name(layer, "up_bias", found["adapter"]) if side == "up" else None
    if found := _KOHYA.search(name) or _OLD.search(name):
        return Name(name[: found.start()], _SIDES[found["side"]])
    if found := _MAGNITUDE.search(name):
        return Name(name[: found.start()], "magnitude", found["adapter"])
    if found := _ALPHA.search(name):
        return Name(name[: found.start()], "alpha")
    if found := _DIFFERENCE.search(name):
        return Name(name[: found.start()], _DIFFERENCES[found["kind"]])
    if found := _LYCORIS.search(name):
        return Name(name[: found.start()], cast("LycorisRole", found["kind"]))
    if (found := _PLAIN.search(name)) and ".lora_" not in name:
        return Name(name[: found.start()], _WHOLE[found["kind"]])
    return None


# -- parts ------------------------------------------------------------------------------------

#: placeholder for `unet` or `transformer`
DENOISER = "denoiser"
RAW_PEFT = "base_model.model."
# prefixes of names and their possible parts, of which the first that has the layer is used
_PREFIXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("model.diffusion_model.", (DENOISER,)),
    ("diffusion_model.", (DENOISER,)),
    ("unet.", (DENOISER,)),
    ("transformer.", (DENOISER,)),
    ("lora_unet_", (DENOISER,)),
    ("lora_transformer_", (DENOISER,)),
    ("text_encoders.clip_l.transformer.", ("text_encoder",)),
    ("text_encoders.clip_g.transformer.", ("text_encoder_2",)),
    # T5 is the second text encoder of Flux, the third of Stable Diffusion 3, PixArt's only one
    (
        "text_encoders.t5xxl.transformer.",
        ("text_encoder_3", "text_encoder_2", "text_encoder"),
    ),
    ("text_encoder.", ("text_encoder",)),
    ("text_encoder_2.", ("text_encoder_2",)),
    ("text_encoder_3.", ("text_encoder_3",)),
    ("lora_te_", ("text_encoder",)),
    ("lora_te1_", ("text_encoder",)),
    ("lora_te2_", ("text_encoder_2",)),
    ("lora_te3_", ("text_encoder_3", "text_encoder_2")),
)


def split_prefix(layer: str) -> tuple[tuple[str, ...] | None, str]:
    """Return the possible parts of a layer by its prefix, and the rest of its name.

    Returns: None for the parts if the prefix is unknown.
    """
    bare = layer.removeprefix(RAW_PEFT)
    for prefix, parts in _PREFIXES:
        if bare.startswith(prefix):
            return parts, bare.removeprefix(prefix).removeprefix(RAW_PEFT)
    return None, bare.removeprefix("lycoris_")


def flat(layer: str) -> str:
    """Flatten a layer's name like kohya's scripts, to compare names of different layouts."""
    return layer.replace(".processor", "").replace(".", "_")


# -- layers -----------------------------------------------------------------------------------

_OLD_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
#: flattened name -> the layers that it combines
Names = dict[str, tuple[Rows, ...]]


def names_of(layers: Iterable[str], family: Family | None) -> Names:
    """Return all names that LoRAs use for a part's layers.

    These are the library's names and those of the original layouts, see
    `afa.denoisers.original_names`.

    Args:
        layers: the library's names.
        family: of the denoiser; None for a text encoder.
    """
    own = list(layers)
    found: Names = {}
    original = _text_encoder if family is None else family.original_layers
    for name, rows in (*_library(own), *(original(own) if original else ())):
        found.setdefault(flat(name), rows)
    return found


def _library(layers: list[str]) -> Iterator[OriginalName]:
    for layer in layers:
        yield layer, (Rows(layer),)
        if layer.endswith(".to_out.0"):  # in files of attention processors
            yield layer.removesuffix(".0"), (Rows(layer),)


def _text_encoder(layers: list[str]) -> Iterator[OriginalName]:
    """Yield CLIP's layers with and without `text_model.`, by the version of transformers."""
    for layer in layers:
        bare = layer.removeprefix("text_model.")
        place, _, last = bare.rpartition(".")
        for name in (bare, f"{place}.{_OLD_ATTENTION.get(last, last)}"):
            yield name, (Rows(layer),)
            yield f"text_model.{name}", (Rows(layer),)
