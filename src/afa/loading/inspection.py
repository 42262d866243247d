"""Describe a model file or folder without loading its weights (`afa inspect`)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from afa.aggregators import SABWConfig
from afa.aggregators.build import build_sabw
from afa.denoisers import FAMILIES, Family, Site, discover_sites
from afa.denoisers.family import COMPONENTS
from afa.errors import NO_MODEL, AfaError
from afa.files import read_json
from afa.loading.distilled import distilled_of
from afa.loading.expert_source import ExpertSource
from afa.loading.published import describe_published, is_published
from afa.loading.saved import FORMAT, read_config
from afa.loading.single_file.accounting import account
from afa.loading.single_file.identify import missing_parts
from afa.loading.single_file.layout import denoiser_in, names_by_part
from afa.loading.single_file.load import Companions, describe_expert
from afa.loading.single_file.packed.layout import layout_of, model_shapes
from afa.loading.sources import locate
from afa.loading.trust.folders import check_part
from afa.loading.trust.gguf import is_gguf
from afa.loading.weights import (
    SAFETENSORS,
    check_safetensors,
    count_elements,
    hash_expert,
    tensor_shapes,
    weight_files,
)
from afa.machine.damaged import is_own_bug
from afa.machine.hashes import hash_file

if TYPE_CHECKING:
    from collections.abc import Iterable

    from afa.loading.single_file.packed.layout import Layout
    from afa.loading.weights import Shapes

#: files without a denoiser: the start of a tensor name -> what the file is
_OTHERS = (
    ("conv_in.res_block.", "aggregators of an ensemble"),
    ("text_model.", "text encoder (CLIP)"),
    ("shared.weight", "text encoder (T5)"),
    ("encoder.block.", "text encoder (T5)"),
    ("decoder.conv_in.", "autoencoder"),
)


def describe(path: str | Path) -> dict[str, Any]:
    """Describe an ensemble folder, a pipeline or denoiser folder, or a safetensors file.

    Returns: JSON-serialisable facts: always `kind`; `sites`, `experts`, `sha256`, `parameters` and
        others if they apply. Sites are listed with channels and scale.

    Raises:
        AfaError: if the path does not exist, is a pickle, damaged, or of an unknown kind.
    """
    found = locate(path)
    if found.is_file():
        return _describe_file(found, Path(path).expanduser())
    if is_published(found):
        return describe_published(found)
    if (found / "model_index.json").is_file():
        return _describe_pipeline(found)
    if (found / "config.json").is_file():
        config = read_json(found / "config.json")
        if config.get("format") == FORMAT:  # read_config checks it; its other files are no part
            return _describe_ensemble(found)
        check_part(found)
        family = _family_named(config.get("_class_name"))
        if family is not None:
            kind = "U-Net folder" if family.component == "unet" else "transformer folder"
            return {"kind": kind, **_describe_denoiser(family, config)}
    remedy = ""
    if (found / "checkpoints").is_dir():
        remedy = f" If its training has not finished: afa runs {path}."
    raise AfaError(
        "AFA-LOAD-029",
        f"'{path}' is of an unknown kind; it must be an ensemble folder, a diffusers pipeline or "
        f"denoiser folder, or a safetensors file.{remedy}",
    )


def _describe_ensemble(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    weights = folder / "aggregators.safetensors"
    parameters, dtypes = _describe_elements([weights])
    judge = config["judge"]  # of its drafts
    return {
        "kind": "ensemble",
        "family": config["family"],
        **({"fuse": config["fuse"]} if config["fuse"] != "blocks" else {}),
        "experts": [_describe_expert(expert) for expert in config["experts"]],
        "vae": config["vae"] and config["vae"]["source"],
        "parts": [part["source"] for part in config["parts"]],
        **({"judge": judge["source"], "judge_sha256": judge["sha256"]} if judge else {}),
        "aggregator": ", ".join(f"{k} {v}" for k, v in config["aggregator"].items()),
        "aggregator_parameters": parameters,
        "dtypes": dtypes,
        "sites": config["sites"],
    }


def _describe_expert(saved: dict[str, Any]) -> dict[str, Any]:
    """Describe a saved expert without nested values, with or without a LoRA."""
    lora = saved["lora"]
    facts = {key: value for key, value in saved.items() if key != "lora"}
    if lora is not None:
        facts |= {"lora": f"{lora['scale']:g} x {lora['source']}", "lora_sha256": lora["sha256"]}
    return facts


def _describe_pipeline(folder: Path) -> dict[str, Any]:
    index = read_json(folder / "model_index.json")
    parameters, dtypes = _describe_elements(weight_files(folder))
    facts = {
        "kind": "pipeline folder",
        "class": index.get("_class_name"),
        "sha256": hash_expert(folder),
        "parameters": parameters,
        "dtypes": dtypes,
    }
    for name in COMPONENTS:
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
            if is_own_bug(error) and (model is None or runs_by_itself(family, model)):
                raise
            name = family.model_class.__name__
            return {"refused": f"The configuration does not describe a {name}: {error}"}
        parameters = sum(p.numel() for rule in rules for p in rule.parameters())
    return {
        **facts,
        "family": family.name,
        "aggregator_parameters_for_3_experts": parameters,
        "sites": [_describe_site(site) for site in sites],
    }


def runs_by_itself(family: Family, model: Any) -> bool:
    """Whether the library's own forward pass accepts this model's smallest input.

    If it does, an error in afa's coroutine for that pass is a bug, not a wrong configuration.
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


def _describe_file(path: Path, named: Path) -> dict[str, Any]:
    is_block_file = is_gguf(path)
    if not is_block_file and path.suffix.lower() not in SAFETENSORS:
        check_safetensors(path)  # raises a more specific error for known formats
        raise AfaError(
            "AFA-LOAD-030",
            f"'{path}' is a safetensors file with another suffix; it must be .safetensors or .sft. "
            "Rename it.",
        )
    parameters, dtypes = _describe_elements([path])
    shapes = tensor_shapes(path)
    is_lora = any("lora_" in key or ".lora." in key for key in shapes)
    layout = "LoRA" if is_lora else _layout(shapes)
    return {
        "kind": "GGUF file" if is_block_file else "safetensors file",
        "layout": layout,
        **({} if is_lora else _describe_model(path, named)),
        "sha256": hash_file(path),
        "parameters": parameters,
        "dtypes": dtypes,
        "tensors": len(shapes),
    }


def _layout(shapes: Shapes) -> str:
    """Name the kind of model and the layout of its tensor names."""
    found = denoiser_in(shapes)
    if found is None:
        names = (what for key, what in _OTHERS if any(k.startswith(key) for k in shapes))
        return next(names, "unknown")
    names_of = "diffusers layout" if found.is_diffusers else "original layout"
    parts = names_by_part(shapes, found.kind).keys() - {"", found.kind.denoiser}
    return f"{found.kind.name}, {names_of}" + ("" if parts else ", denoiser alone")


def _describe_model(path: Path, named: Path) -> dict[str, Any]:
    """Describe a single file: its configuration, prediction type, missing and unused parts."""
    try:
        companions = Companions(torch.float32).of(ExpertSource(str(named)))
        found = describe_expert(path, companions)
        shapes, layout = model_shapes(path), layout_of(path)
        unused = Counter(account(shapes, found.config, path))
        unused.update(layout.unused.values())
    except AfaError as error:
        return {"configuration": f"unknown: {error}"}
    facts: dict[str, Any] = {"configuration": found.config.name}
    if layout.quantised:
        facts["quantised"] = describe_quantised(layout)
    if found.prediction is not None:
        facts["predicts"] = found.prediction.text
    distilled = distilled_of(str(named), found.config, is_file=True, path=path)
    if distilled is not None:
        facts["distilled"] = f"{distilled.method} (by {distilled.where})"
    return {
        **facts,
        "leaves_out": missing_parts(shapes, found.config),
        "not_used": [f"{count} tensors: {why}" for why, count in unused.items()],
    }


def describe_quantised(layout: Layout) -> str:
    """Count the quantised tensors by type, and those with a scale in another tensor."""
    counts = Counter(layout.quantised.values()).most_common()
    text = ", ".join(f"{count} tensors {kind}" for kind, count in counts)
    return text + (f", {len(layout.scales)} with a scale" if layout.scales else "")


def _describe_elements(files: Iterable[Path]) -> tuple[int, str]:
    """Count the elements of all tensors in weight files, in total and by data type."""
    counts = count_elements(files)
    return counts.total(), ", ".join(f"{dtype} {n:,}" for dtype, n in counts.most_common())
