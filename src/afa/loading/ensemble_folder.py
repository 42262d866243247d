"""Save and load ensemble folders: aggregators, configuration and references to the experts.

The weights of experts are never written. An ensemble folder holds `config.json`,
`aggregators.safetensors` (keys `SITE.PARAMETER`) and a model card `README.md`.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save

from afa.aggregators import SABW, Mean, Separate
from afa.aggregators.build import site_configs
from afa.denoisers.kinds import denoiser_of
from afa.errors import AfaError
from afa.files import staged, write_atomic
from afa.loading.pipeline import load_pipeline
from afa.loading.predictions import are_same, fused_by, objectives_in
from afa.loading.published import is_published, load_published
from afa.loading.saved import (
    ABSENT,
    FORMAT,
    read_config,
    referred,
    saved_aggregators,
    source_of,
    sources_in,
)
from afa.loading.sources import locate, relative_source, require_hash
from afa.loading.vocabulary import read_words, write_words
from afa.loading.weights import check_safetensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    from afa.aggregators import SABWConfig
    from afa.denoisers import Site
    from afa.ensemble.denoiser import EnsembleDenoiser
    from afa.ensemble.references import ExpertReference
    from afa.loading.expert_source import AnySource

AGGREGATORS = "aggregators.safetensors"
_UNKNOWN = "Prompts with words that no training caption has"
_SIZES = ("hidden_size", "num_layers", "num_heads", "norm_num_groups")


def aggregator_tensors(ensemble: EnsembleDenoiser) -> dict[str, Tensor]:
    """Return the aggregators' weights by `SITE.PARAMETER`; shared ones once, at the first site."""
    return {
        f"{site.name}.{key}": tensor.detach().cpu().contiguous()
        for site, rule in _distinct_rules(ensemble)
        for key, tensor in rule.state_dict().items()
    }


def names_of_parameters(ensemble: EnsembleDenoiser) -> dict[nn.Parameter, str]:
    """Return the names of the aggregators' parameters in `aggregator_tensors`."""
    return {
        parameter: f"{site.name}.{key}"
        for site, rule in _distinct_rules(ensemble)
        for key, parameter in rule.named_parameters()
    }


def _distinct_rules(ensemble: EnsembleDenoiser) -> list[tuple[Site, nn.Module]]:
    """Return every fusion rule once, with its first site."""
    pairs = zip(ensemble.sites, ensemble.aggregators, strict=True)
    first = {id(rule): (site, rule) for site, rule in reversed(list(pairs))}
    return list(reversed(first.values()))


def load_aggregator_tensors(ensemble: EnsembleDenoiser, tensors: dict[str, Tensor]) -> None:
    """Load weights that `aggregator_tensors` returned into an ensemble of the same shape.

    Raises:
        AfaError: if names are missing or unknown, or shapes differ.
    """
    own = aggregator_tensors(ensemble)
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    misfit = [k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape]
    if missing or unknown or misfit:
        problems = (missing, "missing"), (unknown, "unknown"), (misfit, "of another shape")
        detail = [f"{len(names)} {what} (first: {min(names)})" for names, what in problems if names]
        raise AfaError(
            "AFA-LOAD-018",
            f"The aggregator weights do not fit the ensemble's sites: {', '.join(detail)}. Use "
            "them with the experts and the aggregator settings that they were trained with.",
        )
    for site, rule in _distinct_rules(ensemble):
        rule.load_state_dict({key: tensors[f"{site.name}.{key}"] for key in rule.state_dict()})


def save_ensemble(
    pipeline: DiffusionPipeline,
    folder: str | Path,
    *,
    exist_ok: bool = False,
    training: Sequence[str] = (),
) -> Path:
    """Write an ensemble folder: aggregators, configuration and references to the experts.

    Args:
        pipeline: from `load_pipeline` or `load_ensemble`.
        folder: to create.
        exist_ok: whether the folder may exist and hold other files.
        training: sentences about the training, for the model card.

    Returns: `folder`.

    Raises:
        AfaError: if the folder exists, the experts were created in memory and have no source, or
            a fusion rule cannot be saved.
    """
    folder = Path(folder)
    ensemble: EnsembleDenoiser = denoiser_of(pipeline)
    config = config_of(ensemble, folder)
    if folder.exists() and not exist_ok:
        raise AfaError(
            "AFA-LOAD-021", f"The output folder '{folder}' exists; it must be new. Name another."
        )
    tensors, words = aggregator_tensors(ensemble), ensemble.provenance.words
    with staged(folder) if not folder.exists() else nullcontext(folder) as place:
        write_files(place, config, tensors, words, training)
    return folder


def config_of(ensemble: EnsembleDenoiser, folder: Path) -> dict[str, Any]:
    """Return the content of `config.json` in the folder of an ensemble.

    Raises:
        AfaError: if the experts have no source of their own, or a fusion rule cannot be saved.
    """
    known = ensemble.provenance
    if not known.experts:
        raise AfaError(
            "AFA-LOAD-019",
            "These experts were created in memory; a saved ensemble refers to its experts by "
            "folder, file or hub id. Save them as pipeline folders, and load these with "
            "afa.load_pipeline.",
        )
    if known.folder is not None:
        raise AfaError(
            "AFA-LOAD-020",
            f"These experts are stored inside the ensemble folder '{known.folder}'; a saved "
            "ensemble refers to experts with folders of their own. Copy that folder instead.",
        )
    return {
        "format": FORMAT,
        "version": 1,
        "family": ensemble.family.name,
        **({"fuse": fuse} if (fuse := fused_by(ensemble)) != "blocks" else {}),
        **({"objectives": found} if (found := objectives_in(ensemble)) else {}),
        "experts": [_written(reference, folder) for reference in known.experts],
        "vae": known.vae and _written(known.vae, folder),
        "config": known.config and relative_source(known.config, folder),
        **({"parts": [_written(part, folder) for part in known.parts]} if known.parts else {}),
        **({"judge": _written(known.judge, folder), "drafts": known.drafts} if known.judge else {}),
        "aggregator": describe_rules(ensemble),
        "sites": [site.name for site in ensemble.sites],
    }


def write_files(
    place: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    words: Sequence[str] | None,
    training: Sequence[str],
) -> None:
    """Write the files of an ensemble folder, `config.json` last.

    Args:
        place: the folder, which may exist.
        config: of `config_of`.
        tensors: of `aggregator_tensors`.
        words: of the training captions.
        training: see `save_ensemble`.
    """
    place.mkdir(exist_ok=True)
    write_atomic(place / AGGREGATORS, save(tensors, metadata={"format": "pt"}))
    write_atomic(place / "README.md", _model_card(config, training))
    if words:
        write_words(words, place)
    write_atomic(place / "config.json", json.dumps(config, indent=2) + "\n")


def describe_rules(ensemble: EnsembleDenoiser) -> dict[str, Any]:
    """Describe the fusion rules as in `config.json`.

    Raises:
        AfaError: if they are neither SABW of one configuration nor the mean.
    """
    rules = dict(zip(ensemble.sites, ensemble.aggregators, strict=True))
    if all(isinstance(rule, Mean) for rule in rules.values()):
        return {"type": "mean"}
    last = rules[ensemble.sites[-1]]
    if isinstance(last, SABW):
        expected = dict(zip(ensemble.sites, site_configs(last.config, ensemble.sites), strict=True))
        if all(_is_of(rule, expected[site]) for site, rule in rules.items()):
            return {
                "type": "sabw",
                **{
                    key: value
                    for key, absent in ABSENT.items()
                    if (value := getattr(last.config, key)) != absent or key in _SIZES
                },
            }
    kinds = ", ".join(sorted({type(rule).__name__ for rule in rules.values()}))
    raise AfaError(
        "AFA-LOAD-022",
        "An ensemble can only be saved with SABW of one configuration, or Mean, at every site; got "
        f"{kinds}.",
    )


def _is_of(rule: nn.Module, config: SABWConfig | None) -> bool:
    """Whether a rule is what `build_sabw` creates for this configuration."""
    if config is None:
        return isinstance(rule, Separate)
    return isinstance(rule, SABW) and rule.config == config


def ensemble_folder(folder: str | Path) -> Path:
    """Return the local folder of an ensemble, or of `zoo:ensemble`; hub ids are not supported."""
    return locate(folder) if str(folder).startswith("zoo:") else Path(folder)


def load_ensemble(
    folder: str | Path,
    *,
    torch_dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    experts: Sequence[AnySource] | None = None,
    vae: AnySource | None = None,
    config: str | Path | None = None,
    parts: Sequence[AnySource] | None = None,
    **memory: Any,
) -> DiffusionPipeline:
    """Load an ensemble folder into a stock pipeline.

    Args:
        folder: written by `save_ensemble` or by the method's published code, or `zoo:ensemble` for
            the bundled one.
        torch_dtype: of experts and autoencoder.
        device: for all components.
        experts: the experts' new locations, if they were moved; their hashes must still match.
        vae: likewise of an autoencoder that is not one of the experts'.
        config: likewise of the configuration of single files.
        parts: likewise of the models that supply parts missing in single files.
        memory: `place`, `memory_budget`, `pixels`, `reserved`, `on_plan` and `quantize` of
            `load_pipeline`.

    Raises:
        AfaError: if the folder is damaged, or an expert is missing or has another hash.
    """
    folder = ensemble_folder(folder)
    if is_published(folder):
        if not all(moved is None for moved in (experts, vae, config, parts)):
            raise AfaError(
                "AFA-LOAD-023",
                f"'{folder}' contains its experts. Remove experts, vae, config and parts.",
            )
        if memory:
            raise AfaError(
                "AFA-LOAD-024",
                f"'{folder}' was written by the published code, which does not support "
                f"{', '.join(memory)}. Load it without, then call pipeline.unet.stream_experts().",
            )
        return load_published(folder, torch_dtype=torch_dtype, device=device)
    saved = read_config(folder)
    sources, saved_config, saved_parts = sources_in(saved, folder)
    if parts is not None and len(parts) != len(saved_parts):
        raise AfaError(
            "AFA-LOAD-025",
            f"Got {len(parts)} parts; the ensemble '{folder}' has {len(saved_parts)}. Name each.",
        )
    if experts is not None and len(experts) != len(sources):
        raise AfaError(
            "AFA-LOAD-026",
            f"Got {len(experts)} experts; the ensemble '{folder}' has {len(sources)}. Name each.",
        )
    before = [*sources, *saved_parts]
    given = [*(experts or sources), *(parts or saved_parts)]
    after = [old.moved_to(new) for old, new in zip(before, given, strict=True)]
    weights = folder / AGGREGATORS
    check_safetensors(weights)
    saved_vae = saved["vae"] and source_of(saved["vae"], folder)
    if saved_vae is not None and vae is None and saved_vae.source != sources[0].source:
        # the autoencoder of an expert moves with that expert
        moved = {old.source: new.source for old, new in zip(before, after, strict=True)}
        vae = moved.get(saved_vae.source, saved_vae.source)
    pipeline = load_pipeline(
        after[: len(sources)],
        saved_aggregators(saved),
        vae=vae if vae is None or saved_vae is None else saved_vae.moved_to(vae),
        config=saved_config if config is None else config,
        parts=after[len(sources) :],
        allow_duplicates=True,  # were allowed in training
        fuse=saved["fuse"],
        torch_dtype=torch_dtype,
        device=device,
        **memory,
    )
    if saved_vae is not None:
        require_hash("Autoencoder", denoiser_of(pipeline).provenance.vae, saved_vae.sha256)
    ensemble: EnsembleDenoiser = denoiser_of(pipeline)
    if not are_same(saved["objectives"], objectives_in(ensemble)):
        raise AfaError(
            "AFA-LOAD-123",
            f"The experts of '{folder}' do not predict what they did when the aggregators were "
            "trained, or have other noise schedules. Restore the scheduler_config.json of the "
            "experts, or their prediction_type.",
        )
    load_aggregator_tensors(ensemble, load_file(weights))
    ensemble.provenance = replace(
        ensemble.provenance,
        words=read_words(folder),
        judge=saved["judge"] and referred(saved["judge"], folder),
        drafts=saved["drafts"],
    )
    return pipeline


def _written(reference: ExpertReference, folder: Path) -> dict[str, Any]:
    written = {k: v for k, v in asdict(reference).items() if v is not None or k == "revision"}
    written["source"] = relative_source(reference.source, folder)
    if reference.config is not None:
        written["config"] = relative_source(reference.config, folder)
    if reference.lora is not None:
        written["lora"]["source"] = relative_source(reference.lora.source, folder)
    return written


def _model_card(config: dict[str, Any], training: Sequence[str]) -> str:
    """Write a model card in the hub's format from `config.json` and sentences on the training."""
    trained = "".join(f"- {line}\n" for line in training)
    trained = f"\n## Training\n\n{trained}" if trained else ""
    experts = ""
    for expert in config["experts"]:
        experts += f"- `{expert['source']}` (SHA-256 `{expert['sha256']}`)"
        if (lora := expert.get("lora")) is not None:
            experts += f" with {lora['scale']:g} of `{lora['source']}` (SHA-256 `{lora['sha256']}`)"
        experts += "\n"
    settings = ", ".join(f"{key} {value}" for key, value in config["aggregator"].items())
    drafts = ""
    if (judge := config.get("judge")) is not None:
        kind = "All prompts" if config["drafts"].get("prompts") == "all" else _UNKNOWN
        named = f"`{judge['source']}` (SHA-256 `{judge['sha256']}`)"
        drafts = f"\n## Drafts\n\n{kind} are drawn by drafts, which {named} judges.\n"
    fused = "after each block a small network fuses their features"
    if config.get("fuse") == "predictions":
        fused = "a small network fuses their predictions"
    return f"""---
library_name: afa
tags: [text-to-image, diffusion, ensemble]
---

# An ensemble of {len(config["experts"])} diffusion models

Adaptive Feature Aggregation (Wang et al., ICLR 2025, arXiv 2405.17082): the frozen experts below
run side by side, and {fused} with weights per pixel.

## Experts

{experts}
This folder does not contain their weights.

## Aggregators

{settings}; {len(config["sites"])} sites.
{trained}{drafts}
## Use

    import afa
    pipeline = afa.load_ensemble("this-folder")
    picture = pipeline("a prompt").images[0]

or `afa generate this-folder "a prompt" --output pictures`.
"""
