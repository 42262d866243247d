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
from afa.files import cache_folder, read_json, staged, write_atomic
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

    Raises:
        AfaError: the file is of no family that is known, of an unusual member of one, or one of
            several models that no tensor tells apart.
    """
    bare = {name.removeprefix(_UNET): shape for name, shape in shapes.items()}
    if "double_blocks.0.img_attn.norm.key_norm.scale" in bare:
        name = "flux-dev" if "guidance_in.in_layer.weight" in bare else "flux-schnell"
        return _of_width(name, bare.get("img_in.weight"), 64, source)
    if "joint_blocks.0.context_block.adaLN_modulation.1.bias" in bare:
        return _sd3(bare, source)
    if f"{_UNET}input_blocks.0.0.weight" in shapes:
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


def _of_width(name: str, shape: tuple[int, ...] | None, expected: int, source: object) -> str:
    """Refuse models that take another input than the shipped configuration says."""
    if shape is not None and shape[1] != expected:
        raise AfaError(
            f"'{source}' must be described: it takes {shape[1]} channels where {name} takes "
            f"{expected}. Name a diffusers folder of its kind, config=FOLDER."
        )
    return name


def _sd3(bare: Shapes, source: object) -> str:
    depth = len({name.split(".")[1] for name in bare if name.startswith("joint_blocks.")})
    known = {
        (24, 192**2): "stable-diffusion-3-medium",
        (24, 384**2): "stable-diffusion-3.5-medium",
        (38, 192**2): "stable-diffusion-3.5-large",
    }
    positions = bare.get("pos_embed", (0, 0))[1]
    if (depth, positions) not in known:
        raise AfaError(
            f"'{source}' must be described: a Stable Diffusion 3 of {depth} blocks and {positions} "
            "positions is none of the published ones. Name a diffusers folder, config=FOLDER."
        )
    return known[depth, positions]


def _unet(shapes: Shapes, source: object) -> str:
    channels = shapes[f"{_UNET}input_blocks.0.0.weight"][1]
    pooled = shapes.get(f"{_UNET}label_emb.0.0.weight")
    if pooled is not None:
        name = {2816: "stable-diffusion-xl", 2560: "stable-diffusion-xl-refiner"}.get(pooled[1])
        # the mark of models that were trained on velocity, in their file since no tensor tells
        variant = {4: "-v" if "v_pred" in shapes else "", 9: "-inpainting"}.get(channels)
        name = None if name is None or variant is None else name + variant
        if name in configs() and "edm_mean" not in shapes:
            return str(name)
    width = shapes.get(f"{_UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (0, 0))[1]
    if pooled is None and (width, channels) == (1024, 4):
        raise AfaError(
            f"'{source}' must be described: it may be of stable-diffusion-2, which predicts "
            "velocity, or of stable-diffusion-2-base, which predicts noise, and no tensor tells. "
            "Name the right one: config=stable-diffusion-2."
        )
    known = {
        (768, 4): "stable-diffusion-1.5",
        (768, 9): "stable-diffusion-1.5-inpainting",
        (1024, 9): "stable-diffusion-2-inpainting",
    }
    if pooled is None and (width, channels) in known:
        return known[width, channels]
    raise AfaError(
        f"'{source}' must be described: a U-Net with {channels} channels and text of width {width} "
        "is none of the published ones. Name a diffusers folder of its kind, config=FOLDER."
    )


# -- what a file leaves out -------------------------------------------------------------------


def missing_parts(shapes: Shapes, config: Path) -> list[str]:
    """The parts with weights that a pipeline has and a file lacks.

    Args:
        shapes: of all tensors of the file.
        config: the pipeline folder that describes it.
    """
    index = read_json(config / "model_index.json")
    table = PARTS[kind_of(str(index.get("_class_name")), config).name]
    return [
        part
        for part, starts in table.items()
        if (index.get(part) or [None])[0] is not None
        and not any(name.startswith(starts) for name in shapes)
    ]
