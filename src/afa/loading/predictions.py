"""Combine experts of any architectures that share one latent space, by their predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from afa.aggregators import SABWConfig
from afa.denoisers.kinds import build_pipeline, options_of
from afa.denoisers.objective import objective_of
from afa.denoisers.packing import Packing
from afa.denoisers.predictor import Host, Predictor
from afa.ensemble.conversion import Objectives
from afa.ensemble.denoiser import EnsembleDenoiser
from afa.ensemble.prompts import PromptEncoder, PromptTokenizer
from afa.ensemble.references import Provenance
from afa.errors import AfaError
from afa.loading.single_file.autoencoder import load_vae

#: the largest root mean square error of decoded pixels in -1..1 between two autoencoders
_MOST = 0.1
#: angles that differ by less are equal, since they are rounded in files
_ROUNDED = 2e-3

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    from afa.ensemble.references import ExpertReference
    from afa.loading.expert_source import Fuse
    from afa.loading.loaded import Expert
    from afa.loading.manifest import ExpertManifest


def parts_of_predictions(
    experts: Sequence[Expert],
    aggregators: SABWConfig | Sequence[nn.Module] | None,
    vae: nn.Module,
) -> dict[str, Any]:
    """The parts of the first expert's pipeline that make it an ensemble of predictions.

    Args:
        experts: as `afa.loading.compare` requires them.
        aggregators: see `load_pipeline`.
        vae: the autoencoder.
    """
    first, *others = experts
    own = [_pipeline(expert, vae) for expert in others]
    packing = Packing([_encoder(e, p) for e, p in zip(others, own, strict=True)])
    host = Host(first.denoiser, first.kind.family, packing)
    objectives = [objective_of(expert.scheduler) for expert in experts]
    predictors = [
        Predictor(expert.denoiser, expert.kind, objective, host, pipeline)
        for expert, objective, pipeline in zip(experts, objectives, [None, *own], strict=True)
    ]
    widths = first.kind.widths(first.text_encoders, 0)
    if isinstance(aggregators, SABWConfig):
        aggregators = aggregators.for_predictions()
    denoiser = EnsembleDenoiser(
        predictors, aggregators, widths=widths, objectives=Objectives.of(objectives)
    )
    denoiser.provenance = Provenance(tuple(expert.reference for expert in experts))
    text = first.kind.text[0]
    modules = [encoder for expert in others for encoder in expert.text_encoders.values()]
    described = [options_of(pipeline) for pipeline in own]
    encoder = PromptEncoder(first.text_encoders[text], packing, modules, described)
    tokenizer = text.replace("text_encoder", "tokenizer")
    return {
        **first.text_encoders,
        first.kind.denoiser: denoiser,
        text: encoder,
        tokenizer: PromptTokenizer(
            first.tokenizers[tokenizer], [t for e in others for t in e.tokenizers.values()]
        ),
    }


def fused_by(ensemble: EnsembleDenoiser) -> Fuse:
    """What an ensemble fuses."""
    return "predictions" if isinstance(ensemble.experts[0], Predictor) else "blocks"


def objectives_in(ensemble: EnsembleDenoiser) -> list[dict[str, Any]] | None:
    """What each expert predicts on which noise schedule, as in files; None if all are equal."""
    if ensemble.objectives is None:
        return None
    return [each.described for each in ensemble.objectives.experts]


def are_same(saved: list[dict[str, Any]] | None, found: list[dict[str, Any]] | None) -> bool:
    """Whether two results of `objectives_in` are equal up to rounding."""
    if saved is None or found is None or len(saved) != len(found):
        return saved is found
    return all(
        {**one, "angles": None} == {**other, "angles": None}
        and len(one["angles"]) == len(other["angles"])
        and all(abs(a - b) < _ROUNDED for a, b in zip(one["angles"], other["angles"], strict=True))
        for one, other in zip(saved, found, strict=True)
    )


def require_predictions(place: str, memory_budget: str | int | None) -> None:
    """Check where the experts of an ensemble of predictions are to be.

    Raises:
        AfaError: if they are to be streamed, or placed by a budget.
    """
    if place == "stream" or memory_budget is not None:
        raise AfaError(
            "AFA-LOAD-108",
            "Experts whose predictions are fused cannot be streamed or placed by memory_budget. "
            "Set place to memory or offload.",
        )


def require_one_latent_space(
    experts: Sequence[ExpertManifest], vae: Any, reference: ExpertReference
) -> None:
    """Check that experts with other autoencoders mean the same by a latent.

    A picture is encoded by the ensemble's autoencoder and decoded by each other one.

    Args:
        experts: all experts; those in single files are compared by their configuration alone.
        vae: the ensemble's autoencoder.
        reference: its source and hash.

    Raises:
        AfaError: if the pictures differ.
    """
    for expert in experts:
        if not (expert.path / "vae").is_dir():
            continue
        other, found = load_vae(expert.source.base, torch_dtype=vae.dtype)
        if found.sha256 == reference.sha256:
            continue
        error = _difference(vae, other.to(vae.device))
        if not error <= _MOST:
            raise AfaError(
                "AFA-LOAD-109",
                f"The autoencoder of '{expert.source.source}' decodes the ensemble's latents to "
                f"other pictures: the pixels differ by {error:.2f} of 2 on average (at most "
                f"{_MOST}). All experts must share one latent space. Use experts that were trained "
                "with one autoencoder.",
            )


@torch.no_grad()
def _difference(vae: Any, other: Any) -> float:
    """The root mean square difference of a picture that two autoencoders decode from one latent."""
    side = torch.linspace(-1, 1, 64)
    rows, columns = torch.meshgrid(side, side, indexing="ij")
    disc = torch.where(rows.square() + columns.square() < 0.4, 0.8, -0.3)
    picture = torch.stack([rows, disc, columns])[None].to(device=vae.device, dtype=vae.dtype)
    latent = vae.encode(picture).latent_dist.mode()
    ours, theirs = (each.decode(latent).sample.float() for each in (vae, other))
    return float((ours - theirs).square().mean().sqrt())


def _pipeline(expert: Expert, vae: nn.Module) -> DiffusionPipeline:
    """The pipeline of an expert alone, for its settings and its encoding of prompts."""
    parts = {
        **expert.tokenizers,
        **expert.text_encoders,
        "scheduler": expert.scheduler,
        "vae": vae,
        expert.kind.denoiser: expert.denoiser,
    }
    name = expert.kind.class_for(expert.class_name, expert.denoiser, expert.text_encoders)
    return build_pipeline(name, parts, expert.options)


def _encoder(expert: Expert, pipeline: Any) -> Callable[[list[str]], dict[str, Tensor]]:
    conditioning = expert.kind.conditioning
    assert conditioning is not None, "checked before"
    return lambda captions: conditioning.encode(pipeline, captions)
