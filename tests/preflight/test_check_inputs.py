"""`afa check` opens what a recipe names, and reports the same errors as the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from afa.evaluation.scoring import pictures_in
from afa.training.data import FolderImages, open_data
from afa.training.recipe import DataRecipe
from tests.cli.test_cli import AGGREGATOR, run

TRAINING = {"num_steps": 1, "batch_size": 2, "device": "cpu"}
CAPTION = "a fox on the left and a pizza on the right, blue background"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve pictures with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for n in range(12):
        Image.new("RGB", (16, 16), (n * 20, 0, 0)).save(folder / f"{n:02d}.png")
        lines.append(json.dumps({"file_name": f"{n:02d}.png", "text": CAPTION}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def written(folder: Path, **content: Any) -> Path:
    place = folder / "recipe.yaml"
    place.write_text(yaml.safe_dump(content))
    return place


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command ends."""
    assert run(*arguments) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]  # below the libraries' bars
    assert line.startswith("afa: error [AFA-")
    return line.partition("]: ")[2]


def assert_check_says(
    capsys: pytest.CaptureFixture[str], recipe: Path, line: str, *more: object
) -> None:
    code = run("check", recipe, "--no-weights", *more)
    came = capsys.readouterr()
    assert code == 2, came.out
    assert line, "the command has refused nothing"
    assert line in came.out or line in came.err, came.out + came.err


def spoil(folder: Path, count: int) -> None:
    for file in sorted(folder.glob("*.png"))[:count]:
        file.write_bytes(b"no picture")


TRAININGS: dict[str, Any] = {
    "no folder": {"data": {"folder": "./nowhere"}},
    "no captions": {"data": {"folder": "./pictures"}, "change": "metadata"},
    "too many broken": {"data": {"folder": "./pictures", "max_broken": 0.1}, "change": "broken"},
    "a resolution in which nothing works": {"data": {"folder": "./pictures", "resolution": 15}},
    "a step that the experts do not support": {
        "data": {"folder": "./pictures", "resolution": 32, "buckets": {"step": 3}},
    },
    "buckets that are all longer than the longest": {
        "data": {"folder": "./pictures", "resolution": 32, "buckets": {"max_size": 16}},
    },
    "half of a character": {"data": {"folder": "./pictures"}, "change": "surrogate"},
    "an autoencoder that is not there": {"data": {"folder": "./pictures"}, "vae": "./nowhere"},
    "an autoencoder of another scale": {
        "data": {"folder": "./pictures"},
        "vae": "./scaled",
        "change": "scale",
    },
    "no such tracker": {
        "data": {"folder": "./pictures"},
        "training": {**TRAINING, "trackers": ["nonsense"]},
    },
    "a scheduler that does not fit": {
        "data": {"folder": "./pictures"},
        "previews": {"prompts": [CAPTION], "scheduler": "ddim_karras"},
    },
    "a cache that is a file": {
        "data": {"folder": "./pictures", "cache": True, "cache_folder": "./recipe.yaml"},
    },
    "previews that cannot be read": {
        "data": {"folder": "./pictures"},
        "previews": {"prompts": ["a [fox|bee]"], "prompt_syntax": "weighted"},
    },
    "nothing left to train on": {
        "data": {"folder": "./pictures"},
        "validation": {"num_samples": 12, "every": 1},
    },
}


@pytest.mark.parametrize("case", TRAININGS)
def test_what_train_refuses(
    case: str,
    pictures: Path,
    experts: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = dict(TRAININGS[case])
    change = changes.pop("change", None)
    if change == "metadata":
        (pictures / "metadata.jsonl").unlink()
    elif change == "broken":
        spoil(pictures, 4)
        changes["data"]["cache"] = True  # which reads all of them before any work
    elif change == "scale":
        shutil.copytree(experts[0] / "vae", tmp_path / "scaled")
        config = tmp_path / "scaled" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.5}))
    elif change == "surrogate":
        place = pictures / "metadata.jsonl"
        place.write_text(place.read_text().replace("a fox", "a fox \\ud83d", 1))
    recipe = written(
        tmp_path,
        **{
            "experts": [str(expert) for expert in experts[:2]],
            "aggregator": AGGREGATOR,
            "training": TRAINING,
            **changes,
        },
    )
    line = refused(capsys, "train", recipe, "--output", tmp_path / "run", "--no-check")
    assert not (tmp_path / "run").exists()
    assert "vae" not in changes or line.startswith(("Autoencoder '", "The autoencoder '"))
    assert_check_says(capsys, recipe, line)


def test_an_output_that_holds_something_else(
    pictures: Path, experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(
        tmp_path,
        experts=[str(expert) for expert in experts[:2]],
        aggregator=AGGREGATOR,
        training=TRAINING,
        data={"folder": "./pictures"},
    )
    line = refused(capsys, "train", recipe, "--output", pictures, "--no-check")
    assert_check_says(capsys, recipe, line, "--output", pictures)
    assert run("check", recipe, "--no-weights", "--output", tmp_path / "new") == 0


def test_a_run_whose_data_has_changed(
    pictures: Path, experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content: dict[str, Any] = {
        "experts": [str(expert) for expert in experts[:2]],
        "aggregator": AGGREGATOR,
        "training": TRAINING,
        "data": {"folder": "./pictures"},
    }
    recipe, output = written(tmp_path, **content), tmp_path / "run"
    assert run("train", recipe, "--output", output, "--no-check") == 0
    assert run("check", recipe, "--output", output, "--no-weights") == 0
    place = pictures / "metadata.jsonl"
    place.write_text(place.read_text().replace("a fox", "an owl", 1))
    written(tmp_path, **{**content, "training": {**TRAINING, "num_steps": 2}})
    capsys.readouterr()
    line = refused(capsys, "train", recipe, "--output", output, "--no-check")
    assert "1 sample with changed captions" in line
    assert_check_says(capsys, recipe, line, "--output", output)


EVALUATIONS: dict[str, Any] = {
    "no prompts": {"prompts": {"text": "nowhere.txt"}},
    "empty prompts": {"prompts": {"text": "empty.txt"}},
    "no references": {"references": "./nowhere"},
    "nothing to compare with": {"metrics": [{"name": "fid", "weights": "zoo:clip"}]},
    "weights that are not there": {"metrics": [{"name": "clip_t", "weights": "./nowhere"}]},
    "a subset that is too large": {
        "metrics": [{"name": "kid", "weights": "zoo:clip", "subset_size": 50}],
        "references": "./pictures",
    },
    "a plan that is none": {
        "methods": [{"name": "A", "ensemble": "zoo:ensemble", "plan": "p.json"}]
    },
    "an ensemble that is not there": {"methods": [{"name": "A", "ensemble": "./nowhere"}]},
    "a scheduler without zero terminal SNR": {
        "sampling": {"num_steps": 1, "guidance": 1, "device": "cpu", "scheduler": "heun"}
    },
    "weights that cannot be read": {
        "sampling": {"device": "cpu", "prompt_syntax": "weighted", "negative_prompt": "(a fox"}
    },
}


@pytest.mark.parametrize("case", EVALUATIONS)
def test_what_evaluate_refuses(
    case: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del pictures
    (tmp_path / "prompts.txt").write_text(CAPTION + "\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "p.json").write_text("{}")
    needs_real = [{"name": "fid", "weights": "zoo:clip"}]
    metrics = needs_real if "references" in EVALUATIONS[case] else ["scenes"]
    content = {
        "prompts": {"text": "prompts.txt"},
        "methods": [{"name": "A", "model": "zoo:base"}],
        "sampling": {"num_steps": 1, "guidance": 1, "device": "cpu"},
        "metrics": metrics,
        **EVALUATIONS[case],
    }
    recipe = written(tmp_path, **content)
    line = refused(capsys, "evaluate", recipe, "--output", tmp_path / "run", "--no-check")
    assert_check_says(capsys, recipe, line)


def test_a_reference_that_is_damaged(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text(CAPTION + "\n")
    spoil(pictures, 1)
    recipe = written(
        tmp_path,
        prompts={"text": "prompts.txt"},
        methods=[{"name": "A", "model": "zoo:base"}],
        metrics=[{"name": "fid", "weights": "zoo:clip"}],
        sampling={"num_steps": 1, "guidance": 1, "device": "cpu"},
        references="./pictures",
    )
    line = refused(capsys, "evaluate", recipe, "--output", tmp_path / "run", "--no-check")
    assert_check_says(capsys, recipe, line)


@pytest.mark.parametrize("other", [False, True], ids=["this output", "another's output"])
def test_drawn_pictures_are_no_references(
    other: bool, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text(CAPTION + "\n")
    recipe = written(
        tmp_path,
        prompts={"text": "prompts.txt"},
        methods=[{"name": "A", "model": "zoo:base"}],
        metrics=[{"name": "fid", "weights": "zoo:clip"}],
        sampling={"num_steps": 1, "guidance": 1, "device": "cpu"},
        references="./pictures",
    )
    output = tmp_path / "elsewhere" if other else pictures / "out"
    if other:
        (pictures / "old").mkdir()
        (pictures / "old" / "evaluation.json").write_text("{}")
    line = refused(capsys, "evaluate", recipe, "--output", output, "--no-check")
    assert f"'{pictures / ('old' if other else 'out')}'" in line
    assert not (pictures / "out").exists()
    assert_check_says(capsys, recipe, line, "--output", output)


def test_a_warning_does_not_keep_a_search_from_looking_at_its_output(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("very " * 90 + CAPTION + "\n")
    recipe = written(
        tmp_path,
        experts=["zoo:animals", "zoo:food"],
        prompts={"text": "prompts.txt"},
        metric={"name": "clip_t", "weights": "zoo:clip"},
        num_trials=1,
        sampling={"num_steps": 1, "guidance": 1, "device": "cpu"},
    )
    line = refused(capsys, "search", recipe, "--output", pictures)
    assert_check_says(capsys, recipe, line, "--output", pictures)


def test_linked_folders_are_read_alike(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "more").symlink_to(pictures)
    (tmp_path / "linked" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "linked" / "gone.txt").write_text("a fox")
    assert len(pictures_in(tmp_path / "linked")) == 13
    data = open_data(DataRecipe(folder=tmp_path / "linked" / "more"))
    assert data is not None
    assert data.fingerprint
    beside = FolderImages(tmp_path / "linked")
    assert any(path.name == "gone.png" for path, _ in beside.rows)
    assert beside.fingerprint  # a link to nowhere is a broken sample, not an end


@pytest.mark.parametrize(
    "change",
    [{"prompts": {"text": "nowhere.txt"}}, {"metric": {"name": "fid", "weights": "zoo:clip"}}],
    ids=["no prompts", "a metric of sets"],
)
def test_what_search_refuses(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text(CAPTION + "\n")
    content = {
        "experts": ["zoo:animals", "zoo:food"],
        "prompts": {"text": "prompts.txt"},
        "metric": "scenes",
        "num_trials": 1,
        "sampling": {"num_steps": 1, "guidance": 1, "device": "cpu"},
        **change,
    }
    recipe = written(tmp_path, **content)
    line = refused(capsys, "search", recipe, "--output", tmp_path / "run")
    assert_check_says(capsys, recipe, line)


def test_what_merge_refuses(
    experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(tmp_path, method="weighted", experts=[str(experts[0]), "zoo:animals"])
    line = refused(capsys, "merge", recipe, "--output", tmp_path / "merged")
    code = run("check", recipe, "--no-weights")
    assert code == 2
    assert capsys.readouterr().err.partition("]: ")[2].strip() == line


def test_what_generate_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    output = ("--output", tmp_path / "drawn", "--no-check")
    line = refused(capsys, "generate", tmp_path / "empty", "a fox", *output)
    assert run("check", tmp_path / "empty") == 2
    assert capsys.readouterr().err.partition("]: ")[2].strip() == line


def test_the_summary_of_the_data(
    pictures: Path, experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    for n, text in enumerate(("", " ", "very " * 90)):
        lines[n]["text"] = text
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    Image.new("RGB", (8, 8)).save(pictures / "03.png")
    shutil.copy(pictures / "04.png", pictures / "unlisted.png")
    recipe = written(
        tmp_path,
        experts=[str(expert) for expert in experts[:2]],
        aggregator=AGGREGATOR,
        training=TRAINING,
        data={"folder": "./pictures", "resolution": 16},
    )
    assert run("check", recipe, "--no-weights") == 0
    out = capsys.readouterr().out
    assert (
        "Data: 12 pictures, 2 without caption, 1 caption longer than 24 tokens, 1 smaller than the "
        "resolution, 1 file not listed." in out
    )
    assert run("check", recipe, "--no-weights", "--json") == 0
    assert json.loads(capsys.readouterr().out)["data"].startswith("12 pictures, 2 without")


@pytest.mark.parametrize("change", ["prompts", "model"])
def test_an_evaluation_of_something_else(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text(CAPTION + "\n")
    recipe = written(
        tmp_path,
        prompts={"text": "prompts.txt"},
        methods=[{"name": "A", "model": "zoo:base"}],
        metrics=[{"name": "clip_t", "weights": "zoo:clip"}],
        sampling={"num_steps": 1, "guidance": 1, "device": "cpu"},
    )
    output = tmp_path / "run"
    kept = {
        "evaluation.json": {"format": "afa-evaluation", "version": 1},
        "prompts.json": {"prompts": [[CAPTION if change == "model" else "a fox", "all"]]},
        "methods/a/replica-0/method.json": {"model": ["another"]},
    }
    for name, content in kept.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(json.dumps(content))
    line = refused(capsys, "evaluate", recipe, "--output", output, "--no-check")
    assert f"differ in {change}" in line
    before = sorted(output.rglob("*"))
    assert_check_says(capsys, recipe, line, "--output", output)
    assert sorted(output.rglob("*")) == before


@pytest.mark.parametrize("damaged", [False, True], ids=["missing", "damaged"])
def test_parts_that_no_file_asks_for(
    damaged: bool, pictures: Path, experts: list[Path], tmp_path: Path, capsys: Any
) -> None:
    del pictures
    part = tmp_path / "part.safetensors"
    if damaged:
        part.write_bytes(b"no weights")
    recipe = written(
        tmp_path,
        experts=[str(expert) for expert in experts[:2]],
        parts=["./part.safetensors"],
        aggregator=AGGREGATOR,
        training=TRAINING,
        data={"folder": "./pictures"},
    )
    line = refused(capsys, "train", recipe, "--output", tmp_path / "run", "--no-check")
    assert "part.safetensors'" in line
    assert damaged or line.startswith("Part '")
    assert_check_says(capsys, recipe, line)


def test_the_output_of_a_merge(
    experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(tmp_path, method="weighted", experts=[str(each) for each in experts[:2]])
    for output, said in (
        (experts[0], f"'{experts[0]}' exists"),
        (tmp_path / "recipe.yaml" / "merged", "cannot be written"),
        (tmp_path / "merged.safetensors", "Pass a folder"),
    ):
        line = refused(capsys, "merge", recipe, "--output", output)
        assert said in line
        assert_check_says(capsys, recipe, line, "--output", output)
    assert run("check", recipe, "--no-weights", "--output", tmp_path / "merged") == 0


def test_an_ensemble_has_no_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "check", "zoo:ensemble", "--output", tmp_path)
    assert line.startswith("--output only applies to recipes")
