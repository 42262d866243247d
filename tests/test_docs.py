"""What the README and CONTRIBUTING show is true: recipes parse, code runs, commands exist."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import torch
import yaml

import afa
from afa.baselines.merging.recipe import load_merge_recipe
from afa.cli import main
from afa.denoisers import discover_sites
from afa.evaluation import load_evaluate_recipe
from afa.training.recipe import DatasetRecipe, load_recipe
from benchmarks import page
from tests.tiny import inputs, tiny_unet

ROOT = Path(__file__).parents[1]


def blocks(name: str) -> list[str]:
    """The indented code blocks of a page."""
    text = (ROOT / name).read_text()
    found = re.findall(r"(?:^\n)((?:^(?: {4}.*)?\n)+)", text, flags=re.MULTILINE)
    return [textwrap.dedent(block).strip() for block in found if block.strip()]


def block(name: str, word: str) -> str:
    return next(block for block in blocks(name) if word in block)


def test_the_recipe_is_one(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(block("README.md", "experts: ["))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.training.expert_dtype == "bfloat16"
    assert recipe.experts[2] == "stable-diffusion-v1-5/stable-diffusion-v1-5"


def test_the_training_recipe_is_one(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(block("docs/training.md", "experts: ["))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.data.resolution, recipe.training.keep_checkpoints) == (512, 2)
    text = (ROOT / "docs" / "training.md").read_text()
    sources = re.findall(r"`dataset: (\{.*\})`", text)
    assert len(sources) >= 3
    for source in sources:
        DatasetRecipe.model_validate(yaml.safe_load(source))


def test_the_comparison_and_the_merge_are_recipes(tmp_path: Path) -> None:
    (tmp_path / "compare.yaml").write_text(block("README.md", "methods:"))
    recipe = load_evaluate_recipe(tmp_path / "compare.yaml")
    assert [method.name for method in recipe.methods][-1] == "MagicFusion"
    (tmp_path / "merge.yaml").write_text(block("README.md", "method: ties"))
    assert load_merge_recipe(tmp_path / "merge.yaml").density == 0.3


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_commands_exist(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(blocks(page))
    commands = set(re.findall(r"^afa ((?:zoo )?\w+)", text, flags=re.MULTILINE))
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main([*command.split(), "--help"])
        assert not stop.value.code, command
    targets = set(re.findall(r"^make (\w+)", text, flags=re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    assert all(f"\n{target}:" in makefile for target in targets)


def test_files_on_the_map_exist() -> None:
    named = re.findall(r"`((?:src|tests)/[\w/.]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) >= 6
    assert all((ROOT / name).exists() for name in named)


def test_python_in_the_readme_names_what_there_is() -> None:
    code = block("README.md", "import afa")
    compile(code, "README.md", "exec")
    for name in re.findall(r"afa\.(\w+)", code):
        assert name in dir(afa), name


def test_a_new_fusion_rule_is_one_class() -> None:
    experts = [tiny_unet(n) for n in range(3)]
    definition, _, call = block("CONTRIBUTING.md", "class Median").rpartition("\n")
    scope = {"torch": torch, "experts": experts, "sites": discover_sites(experts[0])}
    exec(definition, scope)
    ensemble = eval(call, scope)
    with torch.no_grad():
        assert ensemble(**inputs()).sample.shape == (2, 4, 8, 8)


def test_the_benchmark_page_is_made_of_its_figures() -> None:
    assert (page.DOCS / "benchmarks.md").read_text() == page.as_page(page.committed())


def test_the_benchmark_page_says_which_rival_is_as_good() -> None:
    kept = page.committed()
    assert "none of the others comes as near" in page.as_page(kept)
    (pair,) = (
        pair
        for pair in kept["study"]["results"]["paired"]
        if (pair["against"], pair["score"]) == ("base: fast", "both")
    )
    pair["difference"] = {"mean": 0.01, "low": -0.02, "high": 0.04}
    assert "of the others it is *base: fast*" in page.as_page(kept)
