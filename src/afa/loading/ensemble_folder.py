"""What is saved of an ensemble: aggregators, configuration and who the experts are.

No weights of experts are ever written. An ensemble folder holds `config.json`,
`aggregators.safetensors` (keys `SITE.PARAMETER`) and a model card `README.md`.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save

from afa.aggregators import SABW, Mean, Separate
from afa.aggregators.build import site_configs
from afa.denoisers.kinds import denoiser_of
from afa.errors import AfaError
from afa.files import staged, write_atomic
from afa.loading.model_card import model_card
from afa.loading.pipeline import load_pipeline
from afa.loading.published import is_published, load_published
from afa.loading.saved import ABSENT, FORMAT, read_config, saved_aggregators, source_of, sources_in
from afa.loading.sources import locate, relative_source, require_hash
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


_SIZES = ("hidden_size", "num_layers", "num_heads", "norm_num_groups")


def aggregator_tensors(ensemble: EnsembleDenoiser) -> dict[str, Tensor]:
    """The aggregators' weights under `SITE.PARAMETER`; shared ones once, at their first site."""
    return {
        f"{site.name}.{key}": tensor.detach().cpu().contiguous()
        for site, rule in _distinct_rules(ensemble)
        for key, tensor in rule.state_dict().items()
    }


def _distinct_rules(ensemble: EnsembleDenoiser) -> list[tuple[Site, nn.Module]]:
    """Every fusion rule with the first site that has it."""
    pairs = zip(ensemble.sites, ensemble.aggregators, strict=True)
    first = {id(rule): (site, rule) for site, rule in reversed(list(pairs))}
    return list(reversed(first.values()))


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
            "AFA-LOAD-018",
            f"Aggregator weights must fit the ensemble's sites, but there are {', '.join(detail)}. "
            "Use the weights with the experts and the aggregator settings they were trained for.",
        )
    for site, rule in _distinct_rules(ensemble):
        rule.load_state_dict({key: tensors[f"{site.name}.{key}"] for key in rule.state_dict()})


def save_ensemble(
    pipeline: DiffusionPipeline, folder: str | Path, *, exist_ok: bool = False
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
    ensemble: EnsembleDenoiser = denoiser_of(pipeline)
    known = ensemble.provenance
    if not known.experts:
        raise AfaError(
            "AFA-LOAD-019",
            "A saved ensemble names its experts by their source, but these were made in memory. "
            "Save them as pipeline folders and load them with afa.load_pipeline.",
        )
    if known.folder is not None:
        raise AfaError(
            "AFA-LOAD-020",
            f"A saved ensemble names experts that have folders of their own; these are in "
            f"'{known.folder}', which loads as it is. Copy that folder.",
        )
    if folder.exists() and not exist_ok:
        raise AfaError(
            "AFA-LOAD-021", f"The output folder must be new; '{folder}' exists. Name another one."
        )
    config = {
        "format": FORMAT,
        "version": 1,
        "family": ensemble.family.name,
        "experts": [_written(reference, folder) for reference in known.experts],
        "vae": known.vae and _written(known.vae, folder),
        "config": known.config and relative_source(known.config, folder),
        **({"parts": [_written(part, folder) for part in known.parts]} if known.parts else {}),
        "aggregator": describe_rules(ensemble),
        "sites": [site.name for site in ensemble.sites],
    }
    with staged(folder) if not folder.exists() else nullcontext(folder) as place:
        place.mkdir(exist_ok=True)
        write_atomic(
            place / AGGREGATORS,
            save(aggregator_tensors(ensemble), metadata={"format": "pt"}),
        )
        write_atomic(place / "README.md", model_card(config))
        write_atomic(place / "config.json", json.dumps(config, indent=2) + "\n")
    return folder


def describe_rules(ensemble: EnsembleDenoiser) -> dict[str, Any]:
    """The fusion rules as they stand in `config.json`.

    Raises:
        AfaError: rules that are neither SABW of one shape nor the mean.
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
        f"Only ensembles with SABW of one shape or Mean at every site can be saved, came {kinds}.",
    )


def _is_of(rule: nn.Module, config: SABWConfig | None) -> bool:
    """Whether a rule is the one that `build_sabw` makes where this is expected."""
    if config is None:
        return isinstance(rule, Separate)
    return isinstance(rule, SABW) and rule.config == config


def ensemble_folder(folder: str | Path) -> Path:
    """Where an ensemble is: a local folder, or `zoo:ensemble`; no hub is asked for one."""
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
            the shipped one.
        torch_dtype: of experts and autoencoder.
        device: where everything goes.
        experts: where the experts are now, if they were moved; their hashes must still match.
        vae: likewise the autoencoder, if it is none of the experts'.
        config: likewise the configuration of single files.
        parts: likewise what lends single files the parts that they leave out.
        memory: `place`, `memory_budget`, `pixels`, `on_plan` and `quantize` of `load_pipeline`.

    Raises:
        AfaError: a damaged folder, an expert that is gone, or one whose hash is another.
    """
    folder = ensemble_folder(folder)
    if is_published(folder):
        if not all(moved is None for moved in (experts, vae, config, parts)):
            raise AfaError("AFA-LOAD-023", f"'{folder}' holds its experts itself; name no others.")
        if memory:
            raise AfaError(
                "AFA-LOAD-024",
                f"'{folder}' is of the published code and loads as a whole; it takes no "
                f"{', '.join(memory)}. Move it with pipeline.unet.stream_experts() once loaded.",
            )
        return load_published(folder, torch_dtype=torch_dtype, device=device)
    saved = read_config(folder)
    sources, saved_config, saved_parts = sources_in(saved, folder)
    if parts is not None and len(parts) != len(saved_parts):
        raise AfaError(
            "AFA-LOAD-025", f"This ensemble has {len(saved_parts)} parts, {len(parts)} were named."
        )
    if experts is not None and len(experts) != len(sources):
        raise AfaError(
            "AFA-LOAD-026", f"This ensemble has {len(sources)} experts, {len(experts)} were named."
        )
    before = [*sources, *saved_parts]
    named = [*(experts or sources), *(parts or saved_parts)]
    after = [old.moved_to(new) for old, new in zip(before, named, strict=True)]
    weights = folder / AGGREGATORS
    check_safetensors(weights)
    saved_vae = saved["vae"] and source_of(saved["vae"], folder)
    if saved_vae is not None and vae is None and saved_vae.source != sources[0].source:
        # an expert's own autoencoder moves with that expert
        moved = {old.source: new.source for old, new in zip(before, after, strict=True)}
        vae = moved.get(saved_vae.source, saved_vae.source)
    pipeline = load_pipeline(
        after[: len(sources)],
        saved_aggregators(saved),
        vae=vae if vae is None or saved_vae is None else saved_vae.moved_to(vae),
        config=saved_config if config is None else config,
        parts=after[len(sources) :],
        allow_duplicates=True,  # whoever trained it has allowed them
        torch_dtype=torch_dtype,
        device=device,
        **memory,
    )
    if saved_vae is not None:
        require_hash("Autoencoder", denoiser_of(pipeline).provenance.vae, saved_vae.sha256)
    load_aggregator_tensors(denoiser_of(pipeline), load_file(weights))
    return pipeline


def _written(reference: ExpertReference, folder: Path) -> dict[str, Any]:
    written = {k: v for k, v in asdict(reference).items() if v is not None or k == "revision"}
    written["source"] = relative_source(reference.source, folder)
    if reference.config is not None:
        written["config"] = relative_source(reference.config, folder)
    if reference.lora is not None:
        written["lora"]["source"] = relative_source(reference.lora.source, folder)
    return written
