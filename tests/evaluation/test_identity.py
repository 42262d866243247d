"""Whatever a kept picture, score or trial depends on, a change of it is seen."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import afa
from afa.evaluation import evaluate, identity, load_evaluate_recipe, search
from afa.evaluation.identity import Identities, of_metric
from afa.evaluation.prompts import PromptsRecipe, load_prompts
from afa.evaluation.recipe import EvaluateRecipe
from afa.evaluation.search import search_block_weights
from afa.metrics import MetricRecipe
from tests.evaluation.test_run import unmeasured
from tests.evaluation.test_search import recipe as search_recipe
from tests.metrics.tiny import write_clip
from tests.refusal import refusal
from tests.single_file import original_layout
from tests.training.runs import SMALL

Write = Callable[..., Path]
Change = Callable[[Path], object]

QUICK: dict[str, Any] = {
    "prompts": {"zoo": {"kinds": {"mixed": 2}}},
    "methods": [{"name": "one", "model": "zoo:animals"}],
    "sampling": {"num_steps": 1, "guidance": 3, "num_threads": 1},
    "metrics": [{"name": "fid", "weights": "zoo:clip"}],
    "curve": None,
}


def run(recipe: Path, output: Path) -> dict[str, Any]:
    list(evaluate(load_evaluate_recipe(recipe), output))
    return json.loads((output / "report.json").read_text())


# -- references -------------------------------------------------------------------------------


def references(place: Path, seed: int = 0, count: int = 4) -> Path:
    place.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for n in range(count):
        pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{n}.bmp")
    return place


def test_a_changed_reference_is_measured_again(tmp_path: Path, write: Write) -> None:
    """Of the same name, size and time of change: a folder of bitmaps of one size."""
    place = references(tmp_path / "real")
    recipe = write(**QUICK, references=str(place))
    first = run(recipe, tmp_path / "output")
    kept = {path.name: path.stat() for path in place.iterdir()}
    references(place, seed=1)
    for path in place.iterdir():
        before = kept[path.name]
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size
    again = run(recipe, tmp_path / "output")
    assert unmeasured(again) != unmeasured(first)
    fresh = run(recipe, tmp_path / "fresh")
    assert unmeasured(again) == unmeasured(fresh)
    # another folder, and fewer pictures there
    shorter = write(**QUICK, references=str(references(tmp_path / "other", 2, count=3)))
    assert unmeasured(run(shorter, tmp_path / "output")) == unmeasured(run(shorter, tmp_path / "o"))


def test_references_in_another_order_are_other_references(tmp_path: Path, write: Write) -> None:
    """Of prompts with pictures of their own, each is compared with its own one."""
    place = references(tmp_path / "real", count=2)
    rows = [{"file_name": f"{n}.bmp", "text": f"a {n}"} for n in range(2)]
    (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    metrics = [{"name": "clip_i", "weights": "zoo:clip"}]
    recipe = write(**{**QUICK, "prompts": {"folder": str(place)}, "metrics": metrics})
    first = run(recipe, tmp_path / "output")
    (place / "0.bmp").rename(place / "x.bmp")
    (place / "1.bmp").rename(place / "0.bmp")
    (place / "x.bmp").rename(place / "1.bmp")
    again = run(recipe, tmp_path / "output")
    scores = [r["rows"][0]["groups"]["all"]["scores"]["clip_i"]["mean"] for r in (first, again)]
    assert scores[0] != scores[1]
    assert unmeasured(again) == unmeasured(run(recipe, tmp_path / "fresh"))


def test_the_zoos_own_references_are_made_again_where_they_differ(tmp_path: Path) -> None:
    asked = PromptsRecipe.model_validate({"zoo": {"kinds": {"mixed": 2}}})
    first = [
        (prompt.reference or tmp_path).read_bytes() for prompt in load_prompts(asked, tmp_path)
    ]
    Image.new("RGB", (64, 64), "red").save(tmp_path / "000001.png")
    again = load_prompts(asked, tmp_path)
    assert [(prompt.reference or tmp_path).read_bytes() for prompt in again] == first


# -- pictures ---------------------------------------------------------------------------------


def set_key(file: str, key: str, value: Any) -> Change:
    def change(folder: Path) -> None:
        settings = json.loads((folder / file).read_text())
        settings[key] = value
        (folder / file).write_text(json.dumps(settings))

    return change


def set_option(folder: Path) -> None:
    """Of a pipeline that is told more than its parts."""
    set_key("model_index.json", "force_zeros_for_empty_prompt", False)(folder)


def add_word(folder: Path) -> None:
    (folder / "tokenizer" / "added.txt").write_text("another vocabulary")


def scale(file: str) -> Change:
    def change(folder: Path) -> None:
        (place,) = (folder / file).glob("*.safetensors")
        tensors = {key: tensor * 2 for key, tensor in load_file(place).items()}
        save_file(tensors, place, metadata={"format": "pt"})

    return change


#: what may change in a model's folder; all of it changes pictures
CHANGES: dict[str, Change] = {
    "scheduler": set_key("scheduler/scheduler_config.json", "prediction_type", "v_prediction"),
    "vae": set_key("vae/config.json", "scaling_factor", 0.5),
    "vae's weights": scale("vae"),
    "denoiser": set_key("unet/config.json", "act_fn", "gelu"),
    "denoiser's weights": scale("unet"),
    "text encoder": set_key("text_encoder/config.json", "hidden_act", "gelu"),
    "text encoder's weights": scale("text_encoder"),
    "options": set_option,
    "tokenizer": add_word,
}


def of(**changes: Any) -> EvaluateRecipe:
    from tests.evaluation.conftest import SMALL as COMPARISON

    return EvaluateRecipe.model_validate({**COMPARISON, "curve": None, **changes})


def identities(recipe: EvaluateRecipe) -> list[str]:
    made = Identities(recipe)
    return [json.dumps(made.method(method, 0)) for method in recipe.methods]


@pytest.mark.parametrize("what", CHANGES)
def test_all_of_a_models_folder(experts: list[Path], tmp_path: Path, what: str) -> None:
    own = shutil.copytree(experts[0], tmp_path / "own")
    other = str(experts[1])
    recipe = of(
        experts=[str(own), other],
        base=None,
        methods=[
            {"name": "model", "model": str(own)},
            {"name": "fusion", "fusion": {"rule": "feature_mean"}},
            {"name": "merge", "merge": {"method": "weighted"}},
            {"name": "untouched", "model": other},
        ],
    )
    before = identities(recipe)
    assert identities(recipe) == before
    CHANGES[what](own)
    after = identities(recipe)
    assert all(one != two for one, two in zip(before[:3], after[:3], strict=True))
    assert before[3] == after[3]


@pytest.mark.parametrize("what", [name for name in CHANGES if "weights" not in name])
def test_an_ensembles_experts_are_looked_at(experts: list[Path], tmp_path: Path, what: str) -> None:
    """Its folder has the hashes of their weights, and refuses others when it is loaded."""
    own = shutil.copytree(experts[0], tmp_path / "own")
    afa.save_ensemble(afa.load_pipeline([own, experts[1]], SMALL), tmp_path / "ensemble")
    recipe = of(methods=[{"name": "ours", "ensemble": str(tmp_path / "ensemble")}])
    before = identities(recipe)
    CHANGES[what](own)
    assert identities(recipe) != before


def test_an_autoencoder_that_is_named(experts: list[Path], tmp_path: Path) -> None:
    own = shutil.copytree(experts[0] / "vae", tmp_path / "vae")
    methods = [{"name": "mean", "fusion": {"rule": "feature_mean"}}]
    recipe = of(experts=list(map(str, experts[:2])), vae=str(own), methods=methods)
    before = identities(recipe)
    set_key("config.json", "scaling_factor", 0.5)(own)
    assert identities(recipe) != before


def test_the_folder_that_describes_a_single_file(experts: list[Path], tmp_path: Path) -> None:
    """A file of no shipped configuration is described by the first expert that is a folder."""
    pipeline = afa.load_pipeline([experts[1]]).components
    single = afa.loading.pipeline.load_single(experts[1])[0]
    assert pipeline
    save_file(original_layout(single), tmp_path / "one.safetensors")
    own = shutil.copytree(experts[0], tmp_path / "own")
    methods = [{"name": "file", "model": str(tmp_path / "one.safetensors")}]
    recipe = of(experts=[str(own), str(experts[1])], methods=methods)
    before = identities(recipe)
    CHANGES["scheduler"](own)
    assert identities(recipe) != before


def test_pictures_without_a_note_of_what_drew_them_are_not_taken(
    tmp_path: Path, write: Write
) -> None:
    recipe = write(**{**QUICK, "metrics": ["scenes"]})
    run(recipe, tmp_path / "output")
    note = tmp_path / "output" / "methods" / "one" / "replica-0" / "method.json"
    kept = note.read_text()
    note.unlink()
    with refusal("AFA-EVAL-029", "'one'", "method.json"):
        run(recipe, tmp_path / "output")
    note.write_text(kept)
    (tmp_path / "output" / "prompts.json").unlink()
    with refusal("AFA-EVAL-029", "prompts.json"):
        run(recipe, tmp_path / "output")


def test_several_machines_are_told_in_the_report(tmp_path: Path, write: Write) -> None:
    recipe = write(**{**QUICK, "metrics": ["scenes"]})
    report = run(recipe, tmp_path / "output")
    (here,) = report["measured"]["on"]
    assert "threads; afa " in here
    assert "Drawn on several machines" not in (tmp_path / "output" / "report.md").read_text()
    (cost,) = (tmp_path / "output" / "methods").glob("*/*/*/*/batch-*.json")
    cost.write_text(cost.read_text().replace(here, "another machine; torch 1.0"))
    methods = [*QUICK["methods"], {"name": "two", "model": "zoo:food"}]
    again = run(write(**{**QUICK, "metrics": ["scenes"], "methods": methods}), tmp_path / "output")
    assert again["measured"]["on"] == sorted([here, "another machine; torch 1.0"])
    text = (tmp_path / "output" / "report.md").read_text()
    assert "Drawn on several machines or with several software versions" in text
    assert "another machine; torch 1.0" in text


# -- scores -----------------------------------------------------------------------------------


def test_weights_of_a_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clip(tmp_path / "clip")
    monkeypatch.setenv("HOME", str(tmp_path))
    metric = MetricRecipe(name="clip_t", weights="~/clip")
    before = of_metric(metric)
    assert of_metric(metric) == before
    with (tmp_path / "clip" / "preprocessor_config.json").open("a") as file:
        file.write(" ")
    assert of_metric(metric) != before
    # a hub id stands for another commit tomorrow
    hub = MetricRecipe(name="clip_t", weights="org/clip")
    commits = [Path("/hub/snapshots/abc"), Path("/hub/snapshots/def")]
    monkeypatch.setattr(identity, "fetch", lambda *_: commits.pop())
    assert of_metric(hub) != of_metric(hub)
    assert not commits


def test_the_zoos_judges_are_told_by_their_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = shutil.copytree(afa.zoo.assets(), tmp_path / "assets")
    monkeypatch.setattr("afa.zoo.assets", lambda: own)
    metrics: list[Any] = ["scenes", MetricRecipe(name="clip_t", weights="zoo:clip")]
    before = [of_metric(metric) for metric in metrics]
    for part in ("classifier.safetensors", "clip/model.safetensors"):
        file = own / "judges" / part
        save_file({k: t * torch.tensor(2).to(t) for k, t in load_file(file).items()}, file)
    after = [of_metric(metric) for metric in metrics]
    assert all(one != two for one, two in zip(before, after, strict=True))


def test_a_release_that_scores_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    before = of_metric("scenes")
    monkeypatch.setattr(identity, "releases", lambda *_: {"afa": "99.0"})
    assert of_metric("scenes") != before


# -- searches ---------------------------------------------------------------------------------


def test_a_search_continues_with_the_same_judge_and_models(
    experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "merged_pipeline", lambda *_: None)
    monkeypatch.setattr(search, "mean_score", lambda *_: 0.5)
    write_clip(tmp_path / "clip")
    (tmp_path / "prompts.txt").write_text("a fox\n")
    own = shutil.copytree(experts[0], tmp_path / "own")
    vae = shutil.copytree(experts[0] / "vae", tmp_path / "vae")
    asked = search_recipe(
        experts=[str(own), str(experts[1])],
        vae=str(vae),
        prompts={"text": str(tmp_path / "prompts.txt")},
        metric={"name": "clip_t", "weights": str(tmp_path / "clip")},
        num_trials=1,
    )
    list(search_block_weights(asked, tmp_path / "search"))
    for folder, change, said in (
        (own, CHANGES["scheduler"], "experts"),
        (vae, set_key("config.json", "scaling_factor", 0.5), "vae"),
        (tmp_path / "clip", set_key("config.json", "logit_scale_init_value", 3), "metric weights"),
    ):
        kept = shutil.copytree(folder, tmp_path / f"kept {said}")
        change(folder)
        with refusal("AFA-EVAL-027", f"{said}"):
            list(search_block_weights(asked, tmp_path / "search"))
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
    assert not list(search_block_weights(asked, tmp_path / "search"))
