"""Draw drafts with all experts, and make a bias by region from what a judge recognises in them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from afa.aggregators import Separate
from afa.denoisers.kinds import conditioning_of, denoiser_of
from afa.drafting.recognition import recognition
from afa.ensemble.denoiser import EnsembleDenoiser
from afa.ensemble.regions import Regions
from afa.errors import AfaError
from afa.loading.pipeline import check_text_to_image, load_single, native_resolution

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from diffusers import DiffusionPipeline
    from torch import Tensor

    from afa.drafting.settings import DraftsRecipe
    from afa.loading.single_file.load import Companions


class Drafter:
    """Decides for the next pictures of an ensemble which expert draws which region.

    Each expert drafts the picture alone, in a few steps and from the same noise. The judge says for
    each region in which draft it recognises the prompt best; see `recognition`.

    Args:
        judge: pipeline of the model that judges.
        settings: the settings.
        identity: hash of the judge's weights.
    """

    def __init__(self, judge: DiffusionPipeline, settings: DraftsRecipe, identity: str) -> None:
        self.judge, self.settings, self.identity = judge, settings, identity

    def bias(
        self,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        **call: Any,
    ) -> Tensor:
        """Draw the drafts of a batch of B pictures, and judge them.

        Args:
            pipeline: with an ensemble of N experts.
            prompts: B prompts.
            generators: of the initial noise of each picture; they are not changed.
            call: further arguments of the pipeline's call.

        Returns: the bias [B, N, h, w] of the experts' logits. It is the mean judgement over the
            noise levels, divided by its standard error: where the judge sees no difference between
            the drafts, it is small for all experts.

        Raises:
            AfaError: if a feature of the ensemble excludes drafts.
        """
        ensemble = denoiser_of(pipeline)
        judged = []
        for n in range(len(ensemble.experts)):
            latents = self._draft(pipeline, n, prompts, generators, call)
            judged.append(recognition(self.judge, latents, prompts, self.settings.num_levels))
        found = torch.stack(judged, 1)  # [B, N, levels, h, w]
        found = blurred(found, self.settings.region * min(found.shape[-2:]))
        found = found - found.mean(1, keepdim=True)
        count = self.settings.num_levels
        error = (found.var(2).mean((1, 2, 3)) / count).sqrt()
        error = error.clamp(min=torch.finfo(torch.float32).tiny)
        return self.settings.sharpness * found.mean(2) / error[:, None, None, None]

    def _draft(
        self,
        pipeline: DiffusionPipeline,
        expert: int,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        call: dict[str, Any],
    ) -> Tensor:
        """Draw the latents [B, C, H, W] of one expert alone."""
        ensemble = denoiser_of(pipeline)
        own = [generator.clone_state() for generator in generators]
        changes = {"num_inference_steps": self.settings.num_steps, "output_type": "latent"}
        schedule, ensemble.schedule = ensemble.schedule, lambda _: [expert]
        ensemble.is_drafting = True
        try:
            latents = pipeline(list(prompts), generator=own, **{**call, **changes}).images
        finally:
            ensemble.schedule, ensemble.is_drafting = schedule, False
        unpack = conditioning_of(pipeline).unpack
        if unpack is None:
            return latents
        height, width = native_resolution(pipeline)
        return unpack(pipeline, latents, call.get("height") or height, call.get("width") or width)


def blurred(found: Tensor, deviation: float) -> Tensor:
    """Blur maps [..., h, w] by a Gaussian with this standard deviation in pixels."""
    for dim in (-2, -1):
        place = torch.arange(found.shape[dim]).to(found)
        distance = (place[:, None] - place) / max(deviation, 1e-3)
        kernel = (-distance.square() / 2).softmax(1)  # at the border, only pixels inside count
        found = (found.movedim(dim, -1) @ kernel.T).movedim(-1, dim)
    return found


def use_drafts(
    pipeline: DiffusionPipeline,
    settings: DraftsRecipe | None,
    companions: Companions | None = None,
) -> None:
    """Draw all pictures of an ensemble by drafts from now on; draw them with `routed`.

    The judge is loaded on the device of the ensemble and in its data type.

    Args:
        pipeline: with the ensemble.
        settings: the settings; None ends it.
        companions: parts that a single file lacks; see `afa.loading.expert.load_expert`.

    Raises:
        AfaError: if the pipeline has no ensemble, its experts exclude drafts, or the judge cannot
            be loaded or has another latent.
    """
    ensemble = denoiser_of(pipeline)
    if settings is None:
        ensemble.drafter = None
        return
    if not isinstance(ensemble, EnsembleDenoiser):
        raise AfaError(
            "AFA-DRAFT-001",
            "Drafts decide between the experts of an ensemble, but this is a single model. Load an "
            "ensemble, or remove drafts.",
        )
    ensemble.require_drafts()
    judge, reference = load_single(
        settings.judge, companions=companions, torch_dtype=ensemble.dtype
    )
    check_text_to_image(judge)
    own, other = (_latent(each) for each in (pipeline, judge))
    if own != other:
        raise AfaError(
            "AFA-DRAFT-002",
            f"The judge '{settings.judge}' sees latents with {other}, the experts with {own}. "
            "Judge with a model of the experts' family, best the one they were fine-tuned from.",
        )
    judge.set_progress_bar_config(disable=True)
    ensemble.drafter = Drafter(judge.to(ensemble.device), settings, reference.identity)


def _latent(pipeline: DiffusionPipeline) -> str:
    config = pipeline.vae.config
    return (
        f"{config.latent_channels} channels, the factor {config.scaling_factor} and the shift "
        f"{getattr(config, 'shift_factor', None) or 0}"
    )


@contextmanager
def routed(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    **call: Any,
) -> Iterator[None]:
    """Draw the pictures of a batch by drafts, if the pipeline's ensemble uses them.

    Args:
        pipeline: any pipeline; see `use_drafts`.
        prompts: prompts of the pictures that are drawn inside the block, in one batch.
        generators: see `Drafter.bias`.
        call: further arguments of that call, which drafts share: guidance, sizes, ...
    """
    ensemble = denoiser_of(pipeline)
    drafter: Drafter | None = getattr(ensemble, "drafter", None)
    if drafter is None:
        yield
        return
    ensemble.drafter = None
    try:
        bias = drafter.bias(pipeline, prompts, generators, **call)
        replaced: list[str] = []
        if drafter.settings.aggregators == "ignore":
            pairs = zip(ensemble.sites, ensemble.aggregators, strict=True)
            replaced = [site.name for site, rule in pairs if not isinstance(rule, Separate)]
        ensemble.regions = Regions(bias, replaced)
        yield
    finally:
        ensemble.regions, ensemble.drafter = None, drafter
