"""What is saved of an ensemble: aggregators, configuration and who the experts are.

No weights of experts are ever written. An ensemble folder holds `config.json`,
`aggregators.safetensors` (keys `SITE.PARAMETER`) and a model card `README.md`.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save

from afa.aggregators import SABW, Mean, SABWConfig
from afa.errors import AfaError
from afa.experts import check_safetensors, hash_expert, locate
from afa.pipeline import load_pipeline

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from torch import Tensor, nn

    from afa.ensemble import EnsembleDenoiser

FORMAT = "afa-ensemble"
_CHOICES = ("hidden_size", "num_layers", "num_heads", "norm_num_groups")


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that it is there whole or not at all."""
    data = content.encode() if isinstance(content, str) else content
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def aggregator_tensors(ensemble: EnsembleDenoiser) -> dict[str, Tensor]:
    """The aggregators' weights under `SITE.PARAMETER`."""
    return {
        f"{site.name}.{key}": tensor.detach().cpu().contiguous()
        for site, rule in zip(ensemble.sites, ensemble.aggregators, strict=True)
        for key, tensor in rule.state_dict().items()
    }


def load_aggregator_tensors(ensemble: EnsembleDenoiser, tensors: dict[str, Tensor]) -> None:
    """Put weights written by `aggregator_tensors` into an ensemble of the same shape.

    Raises:
        AfaError: names that are missing or unknown, or shapes that differ.
    """
    own = aggregator_tensors(ensemble)
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    misfit = [k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape]
    if missing or unknown or misfit:
        detail = [
            f"{len(names)} {what} (first: {min(names)})"
            for names, what in ((missing, "missing"), (unknown, "unknown"), (misfit, "misshapen"))
            if names
        ]
        raise AfaError(
            f"Aggregator weights must fit the ensemble's sites, but there are {', '.join(detail)}. "
            "Use the weights with the experts and the aggregator settings they were trained for."
        )
    for site, rule in zip(ensemble.sites, ensemble.aggregators, strict=True):
        prefix = f"{site.name}."
        rule.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )


def save_ensemble(
    pipeline: StableDiffusionPipeline, folder: str | Path, *, exist_ok: bool = False
) -> Path:
    """Write an ensemble folder: aggregators, configuration and experts by reference.

    Args:
        pipeline: from `load_pipeline` or `load_ensemble`.
        folder: is made.
        exist_ok: whether the folder may exist and hold other files.

    Returns: `folder`.

    Raises:
        AfaError: the folder exists, the experts were made in memory and have no source, or a
            fusion rule that cannot be saved.
    """
    folder = Path(folder)
    ensemble: EnsembleDenoiser = pipeline.unet
    if ensemble.references is None:
        raise AfaError(
            "A saved ensemble names its experts by their source, but these were made in memory. "
            "Save them as pipeline folders and load them with afa.load_pipeline."
        )
    if folder.exists() and not exist_ok:
        raise AfaError(f"The output folder must be new; '{folder}' exists. Name another one.")
    config = {
        "format": FORMAT,
        "version": 1,
        "family": "unet",
        "experts": [
            {**asdict(r), "source": _relative(r.source, folder)} for r in ensemble.references
        ],
        "vae": ensemble.vae_source and _relative(ensemble.vae_source, folder),
        "aggregator": describe_rules(ensemble.aggregators),
        "sites": [site.name for site in ensemble.sites],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(
        folder / "aggregators.safetensors",
        save(aggregator_tensors(ensemble), metadata={"format": "pt"}),
    )
    write_atomic(folder / "README.md", model_card(config))
    write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return folder


def describe_rules(rules: nn.ModuleList) -> dict[str, Any]:
    """The fusion rules as they stand in `config.json`.

    Raises:
        AfaError: rules that are neither SABW of one shape nor the mean.
    """
    if all(isinstance(rule, Mean) for rule in rules):
        return {"type": "mean"}
    if all(isinstance(rule, SABW) for rule in rules):
        shapes = [{key: getattr(rule.config, key) for key in _CHOICES} for rule in rules]
        if all(shape == shapes[0] for shape in shapes):
            return {"type": "sabw", **shapes[0]}
    kinds = ", ".join(sorted({type(rule).__name__ for rule in rules}))
    raise AfaError(
        f"Only ensembles with SABW of one shape or Mean at every site can be saved, came {kinds}."
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Read and check `config.json` of an ensemble folder.

    Raises:
        AfaError: there is none, or it is of another format or version.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise AfaError(
            f"An ensemble folder must hold a config.json; '{folder}' has none. "
            "Make one with `afa train` or afa.save_ensemble."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise AfaError(f"'{path}' must be JSON, but reading it says: {error}.") from error
    came = (config.get("format"), config.get("version")) if isinstance(config, dict) else config
    if came != (FORMAT, 1):
        raise AfaError(
            f"'{path}' must be of format '{FORMAT}', version 1, came {came}. Is it an ensemble?"
        )
    return config


def load_ensemble(
    folder: str | Path,
    *,
    torch_dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    experts: list[str] | None = None,
) -> StableDiffusionPipeline:
    """Load an ensemble folder into a stock pipeline.

    Args:
        folder: written by `save_ensemble`.
        torch_dtype: of experts and autoencoder.
        device: where everything goes.
        experts: where the experts are now, if they were moved; their hashes must still match.

    Raises:
        AfaError: a damaged folder, an expert that is gone, or one whose hash is another.
    """
    folder = Path(folder)
    config = read_config(folder)
    references = config["experts"]
    moved = experts or [reference["source"] for reference in references]
    if len(moved) != len(references):
        raise AfaError(f"This ensemble has {len(references)} experts, {len(moved)} were named.")
    sources = [_absolute(source, folder) if experts is None else source for source in moved]
    for source, reference in zip(sources, references, strict=True):
        came = hash_expert(locate(source, reference["revision"]))
        if came != reference["sha256"]:
            raise AfaError(
                f"Expert '{source}' must have SHA-256 {reference['sha256']}, with which the "
                f"ensemble was trained, has {came}. Restore that file, or train again."
            )
    weights = folder / "aggregators.safetensors"
    check_safetensors(weights)
    settings = dict(config["aggregator"])
    kind = settings.pop("type")
    vae = config.get("vae")
    pipeline = load_pipeline(
        sources,
        SABWConfig(**settings) if kind == "sabw" else None,
        vae=None if vae is None else _absolute(vae, folder),
        revisions=[reference["revision"] for reference in references],
        torch_dtype=torch_dtype,
        device=device,
    )
    load_aggregator_tensors(pipeline.unet, load_file(weights))
    return pipeline


def _relative(source: str, folder: Path) -> str:
    """A source under the ensemble's parent folder, relative, so that both can move together."""
    path, parent = Path(source), folder.resolve().parent
    if path.is_absolute() and path.is_relative_to(parent):
        return os.path.relpath(path, folder.resolve())
    return source


def _absolute(source: str, folder: Path) -> str:
    return str((folder.resolve() / source).resolve()) if source.startswith("..") else source


def model_card(config: dict[str, Any]) -> str:
    """A model card in the hub's format, with what one needs to use the ensemble."""
    experts = "\n".join(f"- `{e['source']}` (SHA-256 `{e['sha256']}`)" for e in config["experts"])
    settings = ", ".join(f"{key} {value}" for key, value in config["aggregator"].items())
    return f"""---
library_name: afa
tags: [text-to-image, diffusion, ensemble]
---

# An ensemble of {len(config["experts"])} diffusion models

Adaptive Feature Aggregation (Wang et al., ICLR 2025, arXiv 2405.17082): the experts below run side
by side, frozen, and after each block a small network decides per pixel how much of each goes on.

## Experts

{experts}

Their weights are not part of this folder.

## Aggregators

{settings}; {len(config["sites"])} sites.

## Use

    import afa
    pipeline = afa.load_ensemble("this-folder")
    picture = pipeline("a prompt").images[0]

or `afa generate this-folder "a prompt" --output pictures`.
"""
