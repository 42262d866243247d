"""Single files of the original codes: which model is it, and what does the file leave out?

The package ships the configuration and the tokenizers of every family's published models, in
`afa/configs`, so that no hub is asked for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from afa.denoisers.kinds import Kind

import functools
import hashlib
import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

from afa.denoisers.kinds import kind_of
from afa.errors import AfaError
from afa.files import cache_folder, parts_of, read_json, staged, write_atomic
from afa.loading.prediction import marks_in
from afa.loading.single_file.accounting import account
from afa.loading.single_file.layout import PARTS, denoiser_in, kind_name, names_by_part
from afa.loading.weights import Shapes

__all__ = [
    "COMMON_NAMES",
    "PARTS",
    "Ambiguous",
    "Shapes",
    "config_folder",
    "config_of",
    "configs",
    "kind_name",
    "missing_parts",
    "refuse_lora",
]

#: what people call the text encoders that files leave out
COMMON_NAMES = {
    ("Stable Diffusion 3", "text_encoder"): "CLIP-L",
    ("Stable Diffusion 3", "text_encoder_2"): "CLIP-G",
    ("Stable Diffusion 3", "text_encoder_3"): "T5-XXL",
    ("Flux", "text_encoder"): "CLIP-L",
    ("Flux", "text_encoder_2"): "T5-XXL",
}
_LORA = (".lora_up.", ".lora_down.", ".lora_A.", ".lora_B.", ".lora.up.", ".lora.down.")


class Ambiguous(AfaError):
    """Several models look alike, and guessing would draw noise."""


def configs() -> list[str]:
    """The names of the configurations that ship."""
    return sorted(file.stem for file in _assets().glob("*.json"))


def config_folder(name: str) -> Path:
    """A pipeline folder without weights: configurations, scheduler and tokenizers of a model.

    Written into the user's cache on first use, see `afa.files.cache_folder`.

    Raises:
        AfaError: none of this name ships.
    """
    if name not in configs():
        raise AfaError(f"A shipped configuration is one of {', '.join(configs())}, came '{name}'.")
    folder = cache_folder() / f"configs-{_digest()[:16]}" / name
    if not folder.exists():
        try:
            with staged(folder) as partial:
                partial.mkdir()
                _write_config(read_json(_assets() / f"{name}.json"), partial)
        except OSError:
            if not folder.exists():  # unless another process was quicker
                raise
    return folder


def _write_config(content: dict[str, Any], folder: Path) -> None:
    write_atomic(folder / "model_index.json", json.dumps(content.pop("model_index"), indent=2))
    for part, settings in content.items():
        (folder / part).mkdir()
        name = "config.json"
        if part.startswith("tokenizer"):
            name = "tokenizer_config.json"
            is_clip = settings["tokenizer_class"] == "CLIPTokenizer"
            for file in (_assets() / ("clip" if is_clip else "t5")).iterdir():
                shutil.copyfile(file, folder / part / file.name)
        elif part == "scheduler":
            name = "scheduler_config.json"
        write_atomic(folder / part / name, json.dumps(settings, indent=2) + "\n")


def _assets() -> Path:
    return Path(str(resources.files("afa") / "configs"))


@functools.cache
def _digest() -> str:
    """SHA-256 over what ships, so that another release has another cache."""
    digest = hashlib.sha256()
    for file in sorted(_assets().rglob("*")):
        if file.is_file():
            digest.update(file.relative_to(_assets()).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


# -- which model a file holds -----------------------------------------------------------------


def config_of(
    shapes: Shapes, source: object, prediction_type: str | None = None, *, own_vae: bool = True
) -> str:
    """The name of the shipped configuration that a single file needs, told by its tensors.

    Args:
        shapes: of all tensors of the file.
        source: for the errors.
        prediction_type: what it predicts, where its marker tensors do not say it.
        own_vae: whether its autoencoder is to be used, and must fit.

    A Flux without guidance is taken for schnell, which a dev that lost it may have to be told from:
    name its configuration.

    Raises:
        AfaError: the file is of no family that is known, or of an unusual member of one; or it has
            tensors that the configuration has no use for, or lacks some, see
            `afa.loading.single_file.accounting`.
        Ambiguous: it is one of several models that no tensor tells apart.
    """
    found = denoiser_in(shapes)
    if found is None:
        raise AfaError(
            f"A single file must hold a model in the layout of {', '.join(PARTS)}; '{source}' "
            f"starts with '{min(shapes, default='nothing')}'. If it is one of a known family, "
            "describe it: config=FOLDER, a diffusers folder of its family."
        )
    bare = {
        name.removeprefix(found.prefix): shape
        for name, shape in shapes.items()
        if name.startswith(found.prefix)
    }
    tell = {"Flux": _flux, "Stable Diffusion 3": _sd3}.get(found.kind)
    if tell is not None:
        name = tell(bare, found.is_diffusers, source)
    else:
        name = _unet(bare, found.is_diffusers, source, shapes, prediction_type)
    account(shapes, config_folder(name), source, own_vae=own_vae)
    return name


def refuse_lora(shapes: Shapes, source: object) -> None:
    """Refuse a file that changes a model and is none.

    Raises:
        AfaError: says how to name it.
    """
    if any(mark in name for name in shapes for mark in _LORA):
        raise AfaError(
            f"An expert must be a whole model; '{source}' is a LoRA. Name the model that it is for "
            "as well: {base: MODEL, lora: FILE}."
        )


def _size(shapes: Shapes, key: str, dimension: int) -> int:
    """One dimension of a tensor; 0 where there is none."""
    shape = shapes.get(key, ())
    return shape[dimension] if len(shape) > dimension else 0


def _flux(bare: Shapes, is_diffusers: bool, source: object) -> str:
    guidance = (
        "time_text_embed.guidance_embedder.linear_1" if is_diffusers else "guidance_in.in_layer"
    )
    name = "flux-dev" if f"{guidance}.weight" in bare else "flux-schnell"
    width = _size(bare, "x_embedder.weight" if is_diffusers else "img_in.weight", 1)
    is_other = any("distilled_" in key for key in bare)
    if width != 64 or is_other:
        what = "guidance layers of its own" if is_other else f"{width} channels in"
        raise AfaError(
            f"'{source}' must be described: it has {what}, where {name} has 64 channels and none. "
            "Name a diffusers folder of its kind, config=FOLDER."
        )
    return name


def _sd3(bare: Shapes, is_diffusers: bool, source: object) -> str:
    start = "transformer_blocks." if is_diffusers else "joint_blocks."
    depth = len({name.split(".")[1] for name in bare if name.startswith(start)})
    known = {
        (24, 192**2): "stable-diffusion-3-medium",
        (24, 384**2): "stable-diffusion-3.5-medium",
        (38, 192**2): "stable-diffusion-3.5-large",
    }
    positions = _size(bare, "pos_embed.pos_embed" if is_diffusers else "pos_embed", 1)
    if (depth, positions) not in known:
        raise AfaError(
            f"'{source}' must be described: a Stable Diffusion 3 of {depth} blocks and {positions} "
            "positions is none of the published ones. Name a diffusers folder, config=FOLDER."
        )
    return known[depth, positions]


def _unet(
    bare: Shapes, is_diffusers: bool, source: object, shapes: Shapes, prediction_type: str | None
) -> str:
    if is_diffusers:
        first, added = "conv_in.weight", "add_embedding.linear_1.weight"
        attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    else:
        first, added = "input_blocks.0.0.weight", "label_emb.0.0.weight"
        attention = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    channels, pooled = _size(bare, first, 1), _size(bare, added, 1)
    width = _size(bare, attention, 1)
    known = {
        (0, 768, 4): "stable-diffusion-1.5",
        (0, 768, 9): "stable-diffusion-1.5-inpainting",
        (0, 1024, 9): "stable-diffusion-2-inpainting",
        (2816, 0, 4): "stable-diffusion-xl",
        (2816, 0, 9): "stable-diffusion-xl-inpainting",
        (2560, 0, 4): "stable-diffusion-xl-refiner",
    }
    marks = marks_in(shapes)
    edm = next((mark for mark in marks if mark.is_edm), None)
    if edm is not None:
        raise AfaError(
            f"'{source}' must be described: it predicts on continuous noise levels ({edm.where}), "
            "which no shipped configuration does, and cannot be mixed with other models. Leave it "
            "out, or name a diffusers folder of it with an EDM scheduler, config=FOLDER."
        )
    predicts = prediction_type or next((mark.type for mark in marks if mark.type), None)
    if (pooled, width, channels) == (0, 1024, 4):
        if predicts is None:
            raise Ambiguous(
                f"'{source}' must be described: it may be of stable-diffusion-2, which predicts "
                "velocity, or of stable-diffusion-2-base, which predicts noise, and no tensor "
                "tells. Name the right one: config=stable-diffusion-2."
            )
        return "stable-diffusion-2" if predicts == "v_prediction" else "stable-diffusion-2-base"
    name = known.get((pooled, width, channels))
    if name is None:
        raise AfaError(
            f"'{source}' must be described: a U-Net with {channels} channels, text of width "
            f"{width} and {pooled} pooled is none of the published ones. Name a diffusers folder "
            "of its kind, config=FOLDER."
        )
    # velocity to zero terminal SNR; `afa.loading.prediction` changes the scheduler for others
    is_zero_snr = any(mark.zero_snr for mark in marks)
    if name == "stable-diffusion-xl" and predicts == "v_prediction" and is_zero_snr:
        return "stable-diffusion-xl-v"
    return name


# -- what a file leaves out -------------------------------------------------------------------


def missing_parts(shapes: Shapes, config: Path) -> list[str]:
    """The parts with weights that a pipeline has and a file lacks.

    Args:
        shapes: of all tensors of the file.
        config: the pipeline folder that describes it.
    """
    index = read_json(config / "model_index.json")
    kind = kind_of(str(index.get("_class_name")), config).name
    named, found = parts_of(index), names_by_part(shapes, kind)
    return [part for part in PARTS[kind] if part in named and part not in found]


def described_kind(folder: Path) -> Kind:
    """Of the pipeline that a folder describes."""
    index = read_json(folder / "model_index.json")
    return kind_of(str(index.get("_class_name")), folder)
