"""The ensemble of a checkpoint is the one that a training of so many steps writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import afa
from afa.cli import main
from afa.denoisers.kinds import denoiser_of
from afa.loading.inspection import describe
from afa.loading.vocabulary import read_words
from afa.training import Checkpoints, Recipe, TrainStep, train
from afa.training.exported import export_checkpoint
from tests.refusal import refusal
from tests.training.test_ending import AGGREGATORS, losses, run, written


def recipe(experts: list[Path], folder: Path, **training: Any) -> dict[str, Any]:
    """Two experts in the folder of the run, with all checkpoints of six steps."""
    own = [shutil.copytree(e, folder / e.name, dirs_exist_ok=True) for e in experts[:2]]
    asked = {"num_steps": 6, "keep_checkpoints": 9, **training}
    return written(own, folder, **asked)


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.9}])
def test_it_is_that_of_a_shorter_training(
    experts: list[Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    run(recipe(experts, tmp_path, **changes), whole := tmp_path / "runs" / "whole")
    run(recipe(experts, tmp_path, num_steps=4, **changes), shorter := tmp_path / "shorter")
    assert export_checkpoint(whole, tmp_path / "four", step=4) == 4
    deep = tmp_path / "a" / "b" / "newest"
    assert export_checkpoint(whole, deep) == 6
    for ours, theirs in ((tmp_path / "four", shorter), (deep, whole)):
        assert (ours / AGGREGATORS).read_bytes() == (theirs / AGGREGATORS).read_bytes()
        assert read_words(ours) == read_words(theirs)
        assert read_words(ours)
        expected, found = (afa.load_ensemble(place) for place in (theirs, ours))
        for name, tensor in denoiser_of(expected).state_dict().items():
            assert tensor.equal(denoiser_of(found).state_dict()[name]), name
    # beside its experts, as the other one is
    assert (tmp_path / "four" / "config.json").read_text() == (shorter / "config.json").read_text()
    card = (tmp_path / "four" / "README.md").read_text()
    assert "These are the weights of step 4 of 6 of the run 'whole'." in card
    assert sorted(f.name for f in deep.iterdir()) == [
        "README.md", AGGREGATORS, "config.json", "words.json",
    ]  # fmt: skip


def test_drafts_are_kept(experts: list[Path], tmp_path: Path) -> None:
    asked = recipe(experts, tmp_path, num_steps=2)
    asked["drafts"] = {"judge": str(experts[2]), "prompts": "all"}
    run(asked, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "one", step=1)
    finished, ours = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("run", "one")
    )
    assert ours == finished
    assert ours["drafts"]


def test_fused_predictions(experts: list[Path], tmp_path: Path) -> None:
    asked = recipe(experts, tmp_path, num_steps=2, ema_decay=0.5)
    # which share one latent space
    asked |= {"fuse": "predictions", "experts": ["zoo:animals", "zoo:food"]}
    del asked["aggregator"]["sites"]
    run(asked, output := tmp_path / "run")
    export_checkpoint(output, tmp_path / "two", step=2)
    for name in ("config.json", AGGREGATORS):
        assert (tmp_path / "two" / name).read_bytes() == (output / name).read_bytes()
    assert afa.load_ensemble(tmp_path / "two")


def test_while_the_training_is_running(experts: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = []
    for event in train(Recipe.model_validate(recipe(experts, tmp_path)), output):
        if isinstance(event, TrainStep):
            done.append(event.step)
            assert not (output / "config.json").exists()
            place = tmp_path / f"step {event.step}"
            assert export_checkpoint(output, place) == event.step
            stored = Checkpoints(output / "checkpoints").read(event.step)
            assert stored is not None
            for name, tensor in load_file(place / AGGREGATORS).items():
                assert tensor.equal(stored.tensors[f"aggregators.{name}"])
    assert done == [1, 2, 3, 4, 5, 6]


def test_the_best_weights(experts: list[Path], tmp_path: Path) -> None:
    stopping = {"early_stopping": {"patience": 2, "min_improvement": 1e-3}, "num_steps": 30}
    run(recipe(experts, tmp_path, **stopping), output := tmp_path / "run")
    last = export_checkpoint(output, tmp_path / "best", best=True)
    assert (tmp_path / "best" / AGGREGATORS).read_bytes() == (output / AGGREGATORS).read_bytes()
    export_checkpoint(output, tmp_path / "last")
    found = losses(output)
    assert min(found.values()) < found[last]
    assert (tmp_path / "last" / AGGREGATORS).read_bytes() != (output / AGGREGATORS).read_bytes()
    with refusal("AFA-TRAIN-098", "step 1", "early_stopping"):
        export_checkpoint(output, tmp_path / "none", step=1, best=True)
    assert not (tmp_path / "none").exists()


def test_the_card_has_the_changes_up_to_the_step(experts: list[Path], tmp_path: Path) -> None:
    run(recipe(experts, tmp_path, num_steps=2), output := tmp_path / "run")
    run(recipe(experts, tmp_path, num_steps=6, learning_rate=0.01), output, change=True)
    for step in (2, 3):
        export_checkpoint(output, tmp_path / str(step), step=step)
        card = (tmp_path / str(step) / "README.md").read_text()
        assert ("learning_rate: 0.05 -> 0.01" in card) == (step == 3)


def with_notes(place: Path, **changes: Any) -> None:
    """Change the notes of a checkpoint."""
    with safe_open(place, framework="pt") as file:
        notes = json.loads(file.metadata()["afa"])
    save_file(load_file(place), place, metadata={"afa": json.dumps(notes | changes)})


def test_what_cannot_be_exported(
    experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(recipe(experts, tmp_path, num_steps=3, keep_checkpoints=2), output := tmp_path / "run")
    new = tmp_path / "new"
    with refusal("AFA-TRAIN-094", "no checkpoint of step 1;", "2, 3"):
        export_checkpoint(output, new, step=1)
    with refusal("AFA-TRAIN-095", "run"):
        export_checkpoint(output, output)
    with refusal("AFA-TRAIN-100", "expert0"):
        export_checkpoint(tmp_path / "expert0", new)
    checkpoint = output / "checkpoints" / "step-00000003.safetensors"
    kept = checkpoint.read_bytes()
    with_notes(checkpoint, experts=["0" * 64])
    with refusal("AFA-TRAIN-099", "step 3"):
        export_checkpoint(output, new)
    checkpoint.write_bytes(kept[:-100])
    with refusal("AFA-MACHINE-002", "step-00000003"):
        export_checkpoint(output, new)
    checkpoint.write_bytes(kept)
    description = output / "ensemble.json"
    text = description.read_text()
    description.write_text("{}")
    with refusal("AFA-TRAIN-097", "ensemble.json"):
        export_checkpoint(output, new)
    description.unlink()
    with refusal("AFA-TRAIN-096", "ensemble.json", "Repeat the command"):
        export_checkpoint(output, new)
    run(recipe(experts, tmp_path, num_steps=3, keep_checkpoints=2), output)  # as it says
    assert description.read_text() == text
    (output / "config.json").unlink()
    with refusal("AFA-LOAD-029", f"afa runs {output}"):
        describe(output)
    for ensemble, said in (
        (f"{output}@step-2", f"afa export-checkpoint {output} --step 2 --output"),
        (output, f"afa export-checkpoint {output} --output"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["generate", str(ensemble), "a fox", "--output", str(new)])
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
    assert not new.exists()


def test_the_command(
    experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(recipe(experts, tmp_path, num_steps=2), output := tmp_path / "run")
    file = output / "checkpoints" / "step-00000001.safetensors"

    def call(*arguments: object) -> int:
        with pytest.raises(SystemExit) as stop:
            main(["export-checkpoint", *map(str, arguments)])
        return int(stop.value.code or 0)

    assert call(output, "--output", tmp_path / "newest") == 0
    assert "Ensemble of step 2 in" in capsys.readouterr().out
    assert call(output, "--step", 1, "--output", tmp_path / "one") == 0
    assert call(file, "--output", tmp_path / "file") == 0
    one, same = (load_file(tmp_path / name / AGGREGATORS) for name in ("one", "file"))
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert call(file, "--step", 2, "--output", tmp_path / "other") == 2
    assert "AFA-CLI-046" in capsys.readouterr().err
    drawn = ["generate", str(tmp_path / "one"), "a fox", "--steps", "1"]
    with pytest.raises(SystemExit) as stop:
        main([*drawn, "--output", str(tmp_path / "pictures")])
    assert not stop.value.code
