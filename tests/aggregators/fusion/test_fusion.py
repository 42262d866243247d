"""The registry of fusions: every module of the folder is in recipes, by its own name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from afa.aggregators import fusion
from afa.aggregators.fusion import FUSIONS, AnyFusion, FusionRecipe, ShellRecipe
from afa.denoisers import discover_sites
from afa.ensemble.denoiser import EnsembleDenoiser
from tests.tiny import inputs, tiny_unet


class Recipe(BaseModel):
    fusion: AnyFusion


def test_every_module_of_the_folder_has_one() -> None:
    files = {path.stem for path in Path(fusion.__file__).parent.glob("*.py")}
    modules = {kind.__module__.rpartition(".")[2] for kind in FUSIONS}
    assert modules == files - {"__init__", "recipe"}


@pytest.mark.parametrize("kind", FUSIONS)
def test_rows_are_read_back_from_a_recipe_and_draw(kind: type[FusionRecipe]) -> None:
    experts = [tiny_unet(seed) for seed in range(2)]
    sites = discover_sites(experts[0])
    rows = kind.rows(["a", "b"])
    assert rows
    arguments: dict[str, Any] = inputs()
    arguments["sample"] = arguments["sample"][:1].repeat(2, 1, 1, 1)  # as guidance has it
    arguments["timestep"] = 500
    for settings in (settings for listed in rows.values() for settings in listed):
        written = settings.model_dump(mode="json", exclude_none=True)
        assert Recipe.model_validate({"fusion": written}).fusion == settings
        settings.check(num_experts=2, guidance=7.5)
        ensemble = EnsembleDenoiser(experts, settings.rules(sites), settings.schedule(2, 1000))
        assert ensemble(**arguments).sample.isfinite().all()


def test_a_rule_is_told_by_its_name() -> None:
    read = Recipe.model_validate({"fusion": {"rule": "shell", "expert": 1}})
    assert read.fusion == ShellRecipe(expert=1)
    with pytest.raises(ValidationError, match="'feature_mean'"):
        Recipe.model_validate({"fusion": {"rule": "median"}})
