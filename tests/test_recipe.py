"""Recipes: what is accepted, and how mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from afa.aggregators import SABWSettings
from afa.errors import AfaError
from afa.loading.expert_source import ExpertSource
from afa.training.recipe import load_recipe
from tests.refusal import refusal

GOOD = """
experts: [./a, org/name, zoo:food]
data: {folder: pictures}
training: {num_steps: 10}
"""


def write(folder: Path, content: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(content)
    return path


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    aggregator = recipe.aggregator
    assert (aggregator.hidden_size, aggregator.num_layers) == (128, 2)
    assert (aggregator.num_heads, aggregator.norm_num_groups) == (8, 32)
    assert aggregator == SABWSettings()
    assert recipe.model_dump()["aggregator"] == vars(SABWSettings())
    training = recipe.training
    assert (training.batch_size, training.learning_rate, training.weight_decay) == (8, 1e-4, 0.01)
    assert (training.num_warmup_steps, training.caption_dropout) == (100, 0.1)


def test_paths_are_relative_to_the_recipe_and_names_are_left_alone(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    sources = [str(tmp_path / "a"), "org/name", "zoo:food"]
    assert recipe.experts == [ExpertSource(source) for source in sources]
    assert recipe.model_dump(mode="json")["experts"] == sources
    assert recipe.data.folder == tmp_path / "pictures"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("num_steps", "num_step"), "unknown key 'training.num_step', did you mean 'num_steps'?"),
        (("experts", "expert"), "unknown key 'expert', did you mean 'experts'?"),
        (("folder", "foldr"), "unknown key 'data.foldr', did you mean 'folder'?"),
        (("num_steps: 10", "zzz: 1"), "unknown key 'training.zzz', known keys: num_steps"),
        # of kohya's scripts, diffusers' and SimpleTuner
        (("folder:", "path:"), "unknown key 'data.path', it is 'folder' here"),
        (("folder:", "train_data_dir:"), "'data.train_data_dir', it is 'folder' here"),
        (("folder:", "instance_data_dir:"), "'data.instance_data_dir', it is 'folder' here"),
        (("num_steps:", "max_train_steps:"), "'training.max_train_steps', it is 'num_steps'"),
        (("num_steps:", "max_train_epochs:"), "count steps instead of epochs, with 'num_steps'"),
        (("10}", "10, lr_scheduler: a}"), "lr_scheduler', it is 'learning_rate_schedule' here"),
        (("pictures}", "p, shuffle_caption: 1}"), "'data.shuffle_caption', known keys: folder"),
        (
            ("{folder: pictures}", "pictures"),
            "'data': must have keys (folder, dataset, scenes, ...), for example "
            "data: {folder: 'pictures'}, got 'pictures'",
        ),
        (("num_steps: 10", "num_steps: -1"), "'training.num_steps': input should be greater"),
        (("num_steps: 10", "num_steps: ten"), "'training.num_steps': input should be a valid int"),
        (("training: {num_steps: 10}", ""), "the key 'training' is missing"),
        (("[./a, org/name, zoo:food]", "[]"), "'experts': list should have at least 1 item"),
        (
            ("{folder: pictures}", "{}"),
            "'data' must have exactly one of folder, dataset and scenes",
        ),
        (
            ("{folder: pictures}", "{folder: a, scenes: {}}"),
            "'data' must have exactly one of folder, dataset and scenes",
        ),
        (("{folder: pictures}", "{scenes: {kind: cars}}"), "'data.scenes.kind': input should be"),
        (("{num_steps: 10}", "{num_steps: 10"), "not valid YAML"),
        (("experts:", "data: 1\nexperts:"), "duplicate key 'data'"),
    ],
)
def test_mistakes_are_named_with_their_place(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    with pytest.raises(AfaError) as caught:
        load_recipe(write(tmp_path, GOOD.replace(*change)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "- a\n- b", "just words", "!!python/object:os.system {}"])
def test_what_is_no_recipe_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(AfaError, match="recipe"):
        load_recipe(write(tmp_path, content))


def test_no_file_and_a_file_of_the_wrong_kind(tmp_path: Path) -> None:
    with refusal("AFA-RECIPE-005"):
        load_recipe(tmp_path / "none.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with refusal("AFA-RECIPE-003"):
        load_recipe(binary)


def test_a_billion_laughs_do_not_fill_the_memory(tmp_path: Path) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    with refusal("AFA-RECIPE-006", "100000"):
        load_recipe(write(tmp_path, "\n".join(levels)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("{hidden_siz: 64}", r"unknown key 'aggregator.hidden_siz', did you mean 'hidden_size'\?"),
        ("{num_experts: 3}", r"unknown key 'aggregator.num_experts'"),
        ("{hidden_size: 0}", r"'aggregator.hidden_size': input should be greater .* got 0"),
        ("{hidden_ratio: 0}", r"'aggregator.hidden_ratio': input should be greater than 0, got 0"),
        ("{sites: some}", r"'aggregator.sites': input should be 'all' or 'conv_out', got 'some'"),
        ("{hidden_size: 30}", r"hidden_size must be a multiple of num_heads; got 30 and 8"),
    ],
)
def test_settings_of_the_aggregator(settings: str, said: str, tmp_path: Path) -> None:
    with refusal("AFA-RECIPE-002", said):
        load_recipe(write(tmp_path, f"{GOOD}\naggregator: {settings}\n"))
