"""Single files of the original codes: which model is it, and what does the file leave out?

The package ships the configuration and the tokenizers of every family's published models, in
`afa/configs`, so that no hub is asked for them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.errors import AfaError
from afa.files import cache_folder, parts_of, read_json, staged, write_atomic
from afa.kinds import kind_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    #: of every tensor of a file, by name
    Shapes = Mapping[str, tuple[int, ...]]

_VAE = ("first_stage_model.", "vae.")
#: kind of pipeline -> its part -> how the names of that part's tensors start
PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "Stable Diffusion": {
        "unet": ("model.diffusion_model.",),
        "text_encoder": ("cond_stage_model.",),
        "vae": _VAE,
    },
    "Stable Diffusion XL": {
        "unet": ("model.diffusion_model.",),
        "text_encoder": ("conditioner.embedders.0.transformer.",),
        "text_encoder_2": ("conditioner.embedders.1.model.", "conditioner.embedders.0.model."),
        "vae": _VAE,
    },
    "Stable Diffusion 3": {
        "transformer": ("model.diffusion_model.", "joint_blocks."),
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.clip_g.",),
        "text_encoder_3": ("text_encoders.t5xxl.",),
        "vae": _VAE,
    },
    "Flux": {
        "transformer": ("model.diffusion_model.", "double_blocks."),
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.t5xxl.",),
        "vae": _VAE,
    },
}
#: what people call the text encoders that files leave out
COMMON_NAMES = {
    ("Stable Diffusion 3", "text_encoder"): "CLIP-L",
    ("Stable Diffusion 3", "text_encoder_2"): "CLIP-G",
    ("Stable Diffusion 3", "text_encoder_3"): "T5-XXL",
    ("Flux", "text_encoder"): "CLIP-L",
    ("Flux", "text_encoder_2"): "T5-XXL",
}
_LORA = (".lora_up.", ".lora_down.", ".lora_A.", ".lora_B.", ".lora.up.", ".lora.down.")
_UNET = "model.diffusion_model."


class Ambiguous(AfaError):
    """Several models look alike, and guessing would draw noise."""


def kind_name(shapes: Shapes) -> str | None:
    """The kind of pipeline whose denoiser a file holds, whatever its size; None without one."""
    bare = {name.removeprefix(_UNET) for name in shapes}
    if any(name.startswith("double_blocks.") for name in bare):
        return "Flux"
    if any(name.startswith("joint_blocks.") for name in bare):
        return "Stable Diffusion 3"
    if f"{_UNET}input_blocks.0.0.weight" not in shapes:
        return None
    is_xl = f"{_UNET}label_emb.0.0.weight" in shapes
    return "Stable Diffusion XL" if is_xl else "Stable Diffusion"


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


def config_of(shapes: Shapes, source: object) -> str:
    """The name of the shipped configuration that a single file needs, told by its tensors.

    Args:
        shapes: of all tensors of the file.
        source: for the errors.

    A Flux without guidance is taken for schnell, which a dev that lost it may have to be told from:
    name its configuration.

    Raises:
        AfaError: the file is of no family that is known, or of an unusual member of one.
        Ambiguous: it is one of several models that no tensor tells apart.
    """
    bare = {name.removeprefix(_UNET): shape for name, shape in shapes.items()}
    kind = kind_name(shapes)
    if kind == "Flux":
        return _flux(bare, source)
    if kind == "Stable Diffusion 3":
        return _sd3(bare, source)
    if kind is not None:
        return _unet(shapes, source)
    raise AfaError(
        f"A single file must hold a model in the layout of {', '.join(PARTS)}; '{source}' starts "
        f"with '{min(shapes, default='nothing')}'. If it is one of a known family, describe it: "
        "config=FOLDER, a diffusers folder of its family."
    )


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


def _flux(bare: Shapes, source: object) -> str:
    name = "flux-dev" if "guidance_in.in_layer.weight" in bare else "flux-schnell"
    width, is_other = _size(bare, "img_in.weight", 1), any("distilled_" in key for key in bare)
    if width != 64 or is_other:
        what = "guidance layers of its own" if is_other else f"{width} channels in"
        raise AfaError(
            f"'{source}' must be described: it has {what}, where {name} has 64 channels and none. "
            "Name a diffusers folder of its kind, config=FOLDER."
        )
    return name


def _sd3(bare: Shapes, source: object) -> str:
    depth = len({name.split(".")[1] for name in bare if name.startswith("joint_blocks.")})
    known = {
        (24, 192**2): "stable-diffusion-3-medium",
        (24, 384**2): "stable-diffusion-3.5-medium",
        (38, 192**2): "stable-diffusion-3.5-large",
    }
    positions = _size(bare, "pos_embed", 1)
    if (depth, positions) not in known:
        raise AfaError(
            f"'{source}' must be described: a Stable Diffusion 3 of {depth} blocks and {positions} "
            "positions is none of the published ones. Name a diffusers folder, config=FOLDER."
        )
    return known[depth, positions]


def _unet(shapes: Shapes, source: object) -> str:
    channels = _size(shapes, f"{_UNET}input_blocks.0.0.weight", 1)
    pooled = _size(shapes, f"{_UNET}label_emb.0.0.weight", 1)
    attention = f"{_UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    width = _size(shapes, attention, 1)
    known = {
        (0, 768, 4): "stable-diffusion-1.5",
        (0, 768, 9): "stable-diffusion-1.5-inpainting",
        (0, 1024, 9): "stable-diffusion-2-inpainting",
        (2816, 0, 4): "stable-diffusion-xl",
        (2816, 0, 9): "stable-diffusion-xl-inpainting",
        (2560, 0, 4): "stable-diffusion-xl-refiner",
    }
    if (pooled, width, channels) == (0, 1024, 4):
        raise Ambiguous(
            f"'{source}' must be described: it may be of stable-diffusion-2, which predicts "
            "velocity, or of stable-diffusion-2-base, which predicts noise, and no tensor tells. "
            "Name the right one: config=stable-diffusion-2."
        )
    name = known.get((pooled, width, channels))
    if name is None or "edm_mean" in shapes:
        raise AfaError(
            f"'{source}' must be described: a U-Net with {channels} channels, text of width "
            f"{width} and {pooled} pooled is none of the published ones. Name a diffusers folder "
            "of its kind, config=FOLDER."
        )
    # the marks of models that were trained on velocity, and to zero terminal SNR
    marks = {mark for mark in ("v_pred", "ztsnr") if mark in shapes}
    if name == "stable-diffusion-xl" and marks == {"v_pred", "ztsnr"}:
        return "stable-diffusion-xl-v"
    if marks:
        raise Ambiguous(
            f"'{source}' must be described: it is marked with {' and '.join(sorted(marks))}, which "
            "no shipped configuration has by itself. Name a diffusers folder whose scheduler says "
            "what it predicts, config=FOLDER; stable-diffusion-xl-v has zero terminal SNR besides."
        )
    return name


# -- what a file leaves out -------------------------------------------------------------------


def missing_parts(shapes: Shapes, config: Path) -> list[str]:
    """The parts with weights that a pipeline has and a file lacks.

    Args:
        shapes: of all tensors of the file.
        config: the pipeline folder that describes it.
    """
    index = read_json(config / "model_index.json")
    table = PARTS[kind_of(str(index.get("_class_name")), config).name]
    named = parts_of(index)
    return [
        part
        for part, starts in table.items()
        if part in named and not any(name.startswith(starts) for name in shapes)
    ]
