"""The part of a round that provokes errors: an error must leave nothing behind."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import afa
from afa.drawing.pictures import draw, on_every_call, prepare
from afa.drawing.plots import save_figure
from afa.drawing.recorded import read_picture
from afa.errors import AfaError
from afa.evaluation import evaluate
from afa.evaluation.recipe import EvaluateRecipe
from afa.machine.ownership import owned
from afa.merging import MergeRecipe, merge_checkpoints
from afa.training import load_recipe, train
from benchmarks.soak.drawn import ENSEMBLE, asked_for
from benchmarks.soak.trained import recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.soak.fixtures import Round


class _Interrupted(Exception):
    """Raised in the middle of a picture."""


def mistakes(this: Round) -> None:
    """Provoke every error; each must be raised."""
    for mistake in _MISTAKES:
        try:
            mistake(this)
        except (AfaError, _Interrupted):
            continue
        raise AssertionError(f"'{mistake.__name__}' must be refused")


def _recipe_with_a_typo(this: Round) -> None:
    place = this.folder / "typo.yaml"
    place.write_text("experts: [zoo:animals]\ndata: {scenes: {}}\ntraining: {num_step: 3}\n")
    load_recipe(place)


def _expert_that_is_cut(this: Round) -> None:
    afa.load_pipeline(["zoo:animals", this.fixtures.cut])


def _folder_that_is_cut(this: Round) -> None:
    folder = this.folder / "cut"
    shutil.copytree(this.fixtures.experts["xl"][0], folder)
    shutil.copyfile(this.fixtures.cut, folder / "unet" / "diffusion_pytorch_model.safetensors")
    afa.load_pipeline([folder, this.fixtures.experts["xl"][1]], place="stream")


def _another_hash(this: Round) -> None:
    expert = afa.ExpertSource("zoo:animals", sha256="0" * 64)
    afa.load_pipeline([expert, "zoo:food"], place="stream")


def _experts_that_do_not_fit(this: Round) -> None:
    afa.load_pipeline(["zoo:animals", this.fixtures.experts["xl"][0]], place="stream")


def _lora_that_is_cut(this: Round) -> None:
    afa.load_pipeline(["zoo:base", {"base": "zoo:base", "lora": str(this.fixtures.cut)}])


def _no_picture_of_ours(this: Round) -> None:
    read_picture(this.fixtures.pictures / "0.png")


def _broken_picture(this: Round) -> None:
    read_picture(this.fixtures.pictures / "3.png")


def _figure_of_no_kind(this: Round) -> None:
    from matplotlib.figure import Figure

    save_figure(Figure(), this.folder / "figure.bmp")


def _no_such_tracker(this: Round) -> None:
    data: dict[str, Any] = {"scenes": {"num_samples": 8}, "cache": False}
    _all(train(recipe(data, trackers=["tensorboard", "none"]), this.folder / "no tracker"))


def _too_many_broken_pictures(this: Round) -> None:
    data = {"folder": str(this.fixtures.pictures), "cache": False, "num_workers": 1}
    _all(train(recipe({**data, "max_broken": 0.0}, num_steps=20), this.folder / "broken"))


def _too_many_broken_to_encode(this: Round) -> None:
    data: dict[str, Any] = {"folder": str(this.fixtures.pictures), "cache": True}
    data |= {"max_broken": 0.0, "cache_folder": str(this.folder / "encoded with holes")}
    _all(train(recipe(data), this.folder / "holes"))


def _loss_that_explodes(this: Round) -> None:
    data: dict[str, Any] = {"scenes": {"num_samples": 8}, "cache": False}
    _all(train(recipe(data, learning_rate=1e30, num_steps=8), this.folder / "exploded"))


def _folder_of_somebody_else(this: Round) -> None:
    with owned(this.folder), owned(this.folder):
        pass


def _merge_of_what_does_not_fit(this: Round) -> None:
    experts = ["zoo:animals", str(this.fixtures.experts["xl"][0])]
    asked = MergeRecipe.model_validate({"method": "weighted", "experts": experts})
    _all(merge_checkpoints(asked, this.folder / "no merge"))


def _comparison_without_an_ensemble(this: Round) -> None:
    asked = {
        "prompts": {"zoo": {"kinds": {"mixed": 1}}},
        "methods": [{"name": "AFA", "ensemble": str(this.folder / "nowhere")}],
        "metrics": ["scenes"],
    }
    _all(evaluate(EvaluateRecipe.model_validate(asked), this.folder / "no comparison"))


def _interrupted_picture(this: Round) -> None:
    pipeline = prepare(ENSEMBLE, place="stream", acceleration="fast")

    def interrupt(step: int) -> None:
        if step == 2:
            raise _Interrupted

    with afa.record_weights(pipeline.unet), on_every_call(pipeline, interrupt):
        draw(pipeline, asked_for(pipeline, this.number))


def _all(events: Iterator[object]) -> None:
    for _ in events:
        pass


_MISTAKES: tuple[Callable[[Round], None], ...] = (
    _recipe_with_a_typo,
    _expert_that_is_cut,
    _folder_that_is_cut,
    _another_hash,
    _experts_that_do_not_fit,
    _lora_that_is_cut,
    _no_picture_of_ours,
    _broken_picture,
    _figure_of_no_kind,
    _no_such_tracker,
    _too_many_broken_pictures,
    _too_many_broken_to_encode,
    _loss_that_explodes,
    _folder_of_somebody_else,
    _merge_of_what_does_not_fit,
    _comparison_without_an_ensemble,
    _interrupted_picture,
)
