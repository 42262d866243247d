"""Build the diffusers pipeline of a method from its recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from afa.aggregators import SABW
from afa.aggregators.sparse import Leading
from afa.denoisers.kinds import denoiser_of
from afa.denoisers.timesteps import in_scheduler_timesteps
from afa.drafting import use_drafts
from afa.drawing.merged import merged_pipeline
from afa.ensemble.accelerate import accelerate
from afa.ensemble.sparse import run_leading
from afa.errors import AfaError
from afa.loading.ensemble_folder import load_ensemble
from afa.loading.expert import load_expert
from afa.loading.expert_source import ExpertSource, first_folder
from afa.loading.pipeline import load_pipeline, load_single, with_rules
from afa.loading.planned import companions_of_ensemble
from afa.loading.single_file.load import Companions
from afa.loading.task import check_text_to_image
from afa.training.engine import pick_device

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from afa.aggregators.fusion import FusionRecipe
    from afa.evaluation.recipe import (
        MethodRecipe,
        ModelsRecipe,
        SamplingRecipe,
        SparseRecipe,
    )


class MethodBuilder:
    """Builds the pipelines of a comparison, and loads shared experts once.

    Args:
        recipe: the experts, and what they need.
        sampling: the dtype and the device of the pipelines.
        device: device of the pipelines; None uses that of `sampling`.
    """

    def __init__(
        self,
        recipe: ModelsRecipe,
        sampling: SamplingRecipe,
        device: torch.device | None = None,
    ) -> None:
        self._recipe = recipe
        self._device = device or pick_device(sampling.device)
        self._dtype = getattr(torch, sampling.dtype)
        self._experts: DiffusionPipeline | None = None
        self._has_base = False  # whether the base is one of them

    def build(self, method: MethodRecipe, replica: int = 0) -> DiffusionPipeline:
        """The pipeline of one method.

        Raises:
            AfaError: if a checkpoint cannot be loaded, or the experts do not fit each other.
        """
        if not method.needs_experts:
            self._experts = None  # so that the cost of a picture is that of its own model
        if method.model is not None:
            pipeline = self._model(method.model[replica])
        elif method.ensemble is not None:
            pipeline = load_ensemble(
                method.ensemble[replica], torch_dtype=self._dtype, device=self._device
            )
        elif method.merge is not None:
            pipeline = self._merge(method)
        else:
            assert method.fusion is not None, "a method has exactly one of them"
            pipeline = self._fusion(method.fusion)
        check_text_to_image(pipeline)
        if method.sparse is not None:
            pipeline = _sparse(pipeline, method.sparse)
        pipeline = accelerate(pipeline, method.acceleration, plan=method.plan)
        pipeline.set_progress_bar_config(disable=True)
        if method.drafts is not None:
            companions = self._companions()
            if method.ensemble is not None:  # as afa generate
                companions = companions_of_ensemble(method.ensemble[replica], self._dtype)
            use_drafts(pipeline, method.drafts, companions)
        return pipeline

    def _all_experts(self, *, with_base: bool = False) -> DiffusionPipeline:
        """The pipeline of all experts, and of the base, which merges and fusions share."""
        if self._has_base != with_base:
            self._experts = None
        if self._experts is None:
            base = [ExpertSource(self._recipe.base)] if with_base and self._recipe.base else []
            self._has_base = with_base
            self._experts = load_pipeline(
                [*self._recipe.experts, *base],
                vae=self._recipe.vae,
                config=self._recipe.config,
                parts=self._recipe.parts,
                torch_dtype=self._dtype,
                device=self._device,
            )
        return self._experts

    def _companions(self) -> Companions:
        """Supplies the components that single files lack."""
        recipe = self._recipe
        fallback = first_folder(recipe.experts)
        return Companions(self._dtype, config=recipe.config, fallback=fallback, parts=recipe.parts)

    def _model(self, source: ExpertSource) -> DiffusionPipeline:
        """The pipeline of a checkpoint with its own autoencoder."""
        pipeline, _ = load_single(source, companions=self._companions(), torch_dtype=self._dtype)
        return pipeline.to(self._device)

    def _merge(self, method: MethodRecipe) -> DiffusionPipeline:
        recipe = self._recipe.merge_recipe(method)
        base = None
        if recipe.base is not None:
            base = load_expert(recipe.base, companions=self._companions(), torch_dtype=self._dtype)
        return merged_pipeline(self._all_experts(), recipe.build(), base)

    def _fusion(self, fusion: FusionRecipe) -> DiffusionPipeline:
        experts = self._all_experts(with_base=fusion.with_base)
        ensemble = denoiser_of(experts)
        count = len(ensemble.experts)
        schedule = fusion.schedule(count, experts.scheduler.config.num_train_timesteps)
        if schedule is not None:
            schedule = in_scheduler_timesteps(schedule, ensemble.family)
        return with_rules(experts, fusion.rules(ensemble.sites), schedule)


def _sparse(pipeline: DiffusionPipeline, sparse: SparseRecipe) -> DiffusionPipeline:
    """The pipeline of an ensemble that fuses only its leading experts."""
    ensemble = denoiser_of(pipeline)
    count = len(ensemble.experts)
    if sparse.experts >= count or not any(isinstance(r, SABW) for r in ensemble.aggregators):
        raise AfaError(
            "AFA-EVAL-034",
            f"sparse must leave out some of the experts of a trained ensemble; got {sparse.experts}"
            f" of {count} experts. Set fewer, or remove sparse.",
        )
    if sparse.by == "step":
        run_leading(ensemble, sparse.experts, sparse.every)
        return pipeline
    rules = [Leading(rule, sparse.experts) for rule in ensemble.aggregators]
    return with_rules(pipeline, rules)
