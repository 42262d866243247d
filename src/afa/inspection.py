"""What a file or folder is, read without loading weights."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from afa.aggregators import SABWConfig
from afa.aggregators.build import build_sabw
from afa.checkpoint import FORMAT, read_config
from afa.damaged import is_own_bug
from afa.denoisers import FAMILIES, Family, Site, discover_sites
from afa.errors import NO_MODEL, AfaError
from afa.files import read_json
from afa.layouts import config_folder, config_of, missing_parts
from afa.published import describe_published, is_published
from afa.sources import locate
from afa.trust.folders import check_part
from afa.weights import (
    PICKLES,
    check_safetensors,
    hash_expert,
    hash_file,
    tensor_shapes,
    weight_files,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

# telling keys of single files -> what they are; the first that fits
_LAYOUTS = (
    ("conditioner.embedders.1.", "Stable Diffusion XL, original layout"),
    ("model.diffusion_model.double_blocks.", "Flux, original layout"),
    ("model.diffusion_model.joint_blocks.", "Stable Diffusion 3, original layout"),
    ("model.diffusion_model.input_blocks.", "Stable Diffusion, original layout"),
    ("down_blocks.0.resnets.", "U-Net, diffusers layout"),
    ("conv_in.res_block.", "aggregators of an ensemble"),
)


def describe(path: str | Path) -> dict[str, Any]:
    """Facts about an ensemble, a pipeline's or a denoiser's folder, or a safetensors file.

    Returns: JSON-able facts; `kind` is always there, `sites`, `experts`, `sha256`, `parameters`
        and others where they make sense. Sites are named with channels and scale.

    Raises:
        AfaError: nothing is there, a pickle, a damaged file, or a folder of no known kind.
    """
    found = locate(path)
    if found.is_file():
        return _describe_file(found)
    if is_published(found):
        return describe_published(found)
    if (found / "model_index.json").is_file():
        return _describe_pipeline(found)
    if (found / "config.json").is_file():
        check_part(found)
        config = read_json(found / "config.json")
        if config.get("format") == FORMAT:
            return _describe_ensemble(found)
        family = _family_named(config.get("_class_name"))
        if family is not None:
            kind = "U-Net folder" if family.name == "unet" else "transformer folder"
            return {"kind": kind, **_describe_denoiser(family, config)}
    raise AfaError(
        f"'{path}' must be an ensemble folder, a diffusers pipeline or denoiser folder, or a "
        "safetensors file; it is none of them."
    )


def _describe_ensemble(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    weights = folder / "aggregators.safetensors"
    check_safetensors(weights)
    parameters, dtypes, _ = _read_header([weights])
    return {
        "kind": "ensemble",
        "family": config["family"],
        "experts": [_describe_expert(expert) for expert in config["experts"]],
        "vae": config["vae"] and config["vae"]["source"],
        "parts": [part["source"] for part in config["parts"]],
        "aggregator": ", ".join(f"{k} {v}" for k, v in config["aggregator"].items()),
        "aggregator_parameters": parameters,
        "dtypes": dtypes,
        "sites": config["sites"],
    }


def _describe_expert(saved: dict[str, Any]) -> dict[str, Any]:
    """Flat, whether or not it is a LoRA on its source."""
    lora = saved["lora"]
    facts = {key: value for key, value in saved.items() if key != "lora"}
    if lora is not None:
        facts |= {"lora": f"{lora['scale']:g} x {lora['source']}", "lora_sha256": lora["sha256"]}
    return facts


def _describe_pipeline(folder: Path) -> dict[str, Any]:
    index = read_json(folder / "model_index.json")
    parameters, dtypes, _ = _read_header(weight_files(folder))
    facts = {
        "kind": "pipeline folder",
        "class": index.get("_class_name"),
        "sha256": hash_expert(folder),
        "parameters": parameters,
        "dtypes": dtypes,
    }
    for name in ("unet", "transformer"):
        place = folder / name / "config.json"
        config = read_json(place) if place.is_file() else {}
        family = _family_named(config.get("_class_name"))
        if family is not None:
            facts |= _describe_denoiser(family, config)
    return facts


def _describe_denoiser(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    model: Any = None
    with torch.device("meta"), torch.no_grad():
        try:
            model = family.model_class.from_config(config)
            facts = {"denoiser_parameters": sum(p.numel() for p in model.parameters())}
            sites = discover_sites(model)
            width = sum(family.widths(model).text) or None
            rules = build_sabw(SABWConfig(), sites, 3, width)
        except AfaError as error:
            return {**facts, "refused": str(error)}
        except NO_MODEL as error:
            if is_own_bug(error) and (model is None or _runs_by_itself(family, model)):
                raise
            name = family.model_class.__name__
            return {"refused": f"The configuration describes no {name}: {error}"}
        parameters = sum(p.numel() for rule in rules for p in rule.parameters())
    return {
        **facts,
        "family": family.name,
        "aggregator_parameters_for_3_experts": parameters,
        "sites": [_describe_site(site) for site in sites],
    }


def _runs_by_itself(family: Family, model: Any) -> bool:
    """Whether the library's own forward pass takes this model's smallest input.

    Where it does, an error of the coroutine, which stands for that pass, is none of the
    configuration's.
    """
    try:
        model(**family.example(model))
    except NO_MODEL:
        return False
    return True


def _describe_site(site: Site) -> str:
    place = "text" if site.stream == "text" else f"1/{site.scale}"
    return f"{site.name}  {site.channels} channels, {place}"


def _family_named(class_name: object) -> Family | None:
    return next((f for f in FAMILIES if f.model_class.__name__ == class_name), None)


def _describe_file(path: Path) -> dict[str, Any]:
    if path.suffix.lower() in PICKLES or path.suffix != ".safetensors":
        raise AfaError(f"A single file must be .safetensors, came '{path}'. Convert it first.")
    check_safetensors(path)
    parameters, dtypes, keys = _read_header([path])
    layout = next((name for key, name in _LAYOUTS if any(k.startswith(key) for k in keys)), None)
    if any("lora_" in key or ".lora." in key for key in keys):
        layout = "LoRA"
    return {
        "kind": "safetensors file",
        "layout": layout or "unknown",
        **({} if layout == "LoRA" else _describe_model(path)),
        "sha256": hash_file(path),
        "parameters": parameters,
        "dtypes": dtypes,
        "tensors": len(keys),
    }


def _describe_model(path: Path) -> dict[str, Any]:
    """Which published model's configuration a file needs, and what it leaves out."""
    shapes = tensor_shapes(path)
    try:
        name = config_of(shapes, path)
    except AfaError as error:
        return {"configuration": f"not told: {error}"}
    return {"configuration": name, "leaves_out": missing_parts(shapes, config_folder(name))}


def _read_header(files: Iterable[Path]) -> tuple[int, str, list[str]]:
    """Number of elements, data types and names of all tensors in some safetensors files."""
    count, names = 0, []
    dtypes: Counter[str] = Counter()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                piece = tensors.get_slice(name)
                size = prod(piece.get_shape())
                count += size
                dtypes[piece.get_dtype()] += size
                names.append(name)
    return count, ", ".join(f"{dtype} {n:,}" for dtype, n in dtypes.most_common()), names
