"""The teacher of a distillation: its experts, its identity and its pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from afa.errors import AfaError
from afa.evaluation.identity import Identities
from afa.evaluation.methods import MethodBuilder
from afa.loading.ensemble_folder import ensemble_folder
from afa.loading.expert_source import ExpertSource, first_folder
from afa.loading.manifest import read_manifest
from afa.loading.published import is_published
from afa.loading.saved import read_config, source_of, sources_in
from afa.loading.single_file.load import Companions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import DiffusionPipeline

    from afa.distilling.recipe import DistillRecipe
    from afa.loading.manifest import ExpertManifest


@dataclass(frozen=True)
class Teacher:
    """The models of which a teacher consists.

    Attributes:
        recipe: of the distillation.
        experts: its experts, or the single model.
        vae: source of its autoencoder; None for the first expert's own.
        config: description of single files.
        parts: sources of what single files lack.
    """

    recipe: DistillRecipe
    experts: Sequence[ExpertSource]
    vae: ExpertSource | None = None
    config: str | None = None
    parts: Sequence[ExpertSource] = ()

    @classmethod
    def of(cls, recipe: DistillRecipe) -> Teacher:
        """List the models of a recipe's teacher.

        Raises:
            AfaError: if it is an ensemble that cannot be read, or one of the published code.
        """
        named = recipe.teacher
        parts = [ExpertSource.of(part) for part in recipe.parts]
        if named.model is not None:
            return cls(recipe, named.model, config=recipe.config, parts=parts)
        if named.ensemble is None:
            vae = None if recipe.vae is None else ExpertSource(recipe.vae)
            return cls(recipe, recipe.experts, vae, recipe.config, parts)
        folder = ensemble_folder(named.ensemble[0])
        if is_published(folder):
            raise AfaError(
                "AFA-DISTILL-001",
                f"'{folder}' is an ensemble of the published code, whose experts are not complete "
                "models. Load it with afa.load_ensemble, and save it with afa.save_ensemble; then "
                "set teacher.ensemble to the new folder.",
            )
        saved = read_config(folder)
        experts, config, found = sources_in(saved, folder)
        vae = None if saved["vae"] is None else source_of(saved["vae"], folder)
        return cls(recipe, experts, vae, config, found)

    def companions(self, dtype: torch.dtype = torch.float32) -> Companions:
        """Return the sources of what single files lack."""
        return Companions(
            dtype,
            config=self.config,
            fallback=first_folder(self.experts),
            parts=self.parts,
            own_vae=self.vae is None,
        )

    def manifests(self) -> list[ExpertManifest]:
        """Return the manifests of its experts."""
        companions = self.companions()
        return [read_manifest(expert, companions) for expert in self.experts]

    def expert(self, name: str) -> ExpertSource:
        """Return the expert with a name: of its folder, its file, its zoo's model, or its LoRA.

        Raises:
            AfaError: if there is no such expert, or there are several.
        """
        names = [name_of(expert) for expert in self.experts]
        if names.count(name) == 1:
            return self.experts[names.index(name)]
        raise AfaError(
            "AFA-DISTILL-002",
            f"student.init names the expert '{name}', which must be one of the teacher's experts: "
            f"{', '.join(names)}. If two have this name, set student.init to a path.",
        )

    def identity(self) -> dict[str, Any]:
        """Return everything that determines its predictions except prompts and sampling."""
        return Identities(self.recipe).method(self.recipe.teacher, 0)

    def load(self, device: torch.device) -> DiffusionPipeline:
        """Load its pipeline.

        Raises:
            AfaError: see `MethodBuilder.build`.
        """
        return MethodBuilder(self.recipe, self.recipe.sampling, device).build(self.recipe.teacher)


def name_of(expert: ExpertSource) -> str:
    """Return the name by which a recipe can name an expert."""
    place = expert.lora or expert.source
    return Path(place.removeprefix("zoo:")).name.removesuffix(".safetensors")
