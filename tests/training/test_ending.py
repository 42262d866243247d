"""A training ends early, or continues with other settings on purpose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import afa
from afa.training import Checkpoints, Recipe, SceneImages, Stopped, TrainStep, train
from afa.training.changing import CHANGEABLE, changes_between
from afa.training.early_stopping import EarlyStopping
from afa.training.recipe import EarlyStoppingRecipe, TrainingRecipe
from afa.training.run import require_same_recipe
from afa.training.trainer import train_aggregators
from afa.training.tuned_base import tune_base
from afa.training.watch import Watch
from tests.refusal import refusal
from tests.training.runs import SMALL, as_written

AGGREGATORS = "aggregators.safetensors"


def written(experts: list[Path], folder: Path, **training: Any) -> dict[str, Any]:
    """Two experts, fused at one site; validated every second step, by a rate that is too high."""
    data = {"scenes": {"num_samples": 40}, "cache": True, "cache_folder": str(folder / "cache")}
    asked = as_written(experts[:2], data, **{"learning_rate": 0.05, "num_steps": 30, **training})
    asked["aggregator"]["sites"] = "conv_out"
    asked["validation"] = {"num_samples": 4, "every": 2}
    return asked


def run(
    asked: dict[str, Any], output: Path, *, stop_after: int | None = None, change: bool = False
) -> tuple[list[int], list[str]]:
    """The steps and the notes of a run, which may be stopped after a step."""
    steps: list[int] = []
    notes: list[str] = []

    def should_stop() -> bool:
        return stop_after is not None and len(steps) + 1 == stop_after

    events = train(
        Recipe.model_validate(asked), output, should_stop=should_stop, continue_with=change
    )
    try:
        for event in events:
            notes += event.notes
            if isinstance(event, TrainStep):
                steps.append(event.step)
    except Stopped:
        assert stop_after is not None
    return steps, notes


def losses(output: Path) -> dict[int, float]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}


# -- early stopping ---------------------------------------------------------------------------


def seen(patience: int, min_improvement: float, *found: float) -> EarlyStopping:
    settings = EarlyStoppingRecipe(patience=patience, min_improvement=min_improvement)
    early = EarlyStopping(settings)
    for number, loss in enumerate(found, start=1):
        assert not early.is_over
        early.see(number, loss)
    return early


def test_patience_counts_validations_without_improvement() -> None:
    assert seen(2, 0, 3.0, 2.0, 2.5, 2.0).is_over  # equal is no improvement
    assert not seen(2, 0, 3.0, 2.0, 2.5, 1.9).is_over
    early = seen(3, 0.5, 3.0, 2.9, 2.7, 2.6)  # lower, but never by more than 0.5
    assert early.is_over
    assert (early.state.best_step, early.state.best_loss) == (4, 2.6)
    assert not seen(3, 0.5, 3.0, 2.9, 2.7, 2.4).is_over  # slowly, but by more than 0.5 in all
    assert seen(1, 0, float("nan")).is_over
    assert seen(2, 0, 1.0, float("nan"), float("inf")).state.best_step == 1


def test_a_validation_is_seen_once() -> None:
    early = seen(2, 0, 3.0, 3.0)
    assert not early.see(2, 3.0)
    assert early.state.count == 1


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.9}, {"learning_rate_schedule": "cosine"}])
def test_it_ends_early_with_the_best_weights(
    experts: list[Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    stopping = {"early_stopping": {"patience": 2, "min_improvement": 1e-3}, "checkpoint_every": 7}
    asked = written(experts, tmp_path, **stopping, **changes)
    steps, notes = run(asked, whole := tmp_path / "whole")
    last = steps[-1]
    assert last < 30
    found = losses(whole)
    best = min(found, key=lambda step: found[step])
    assert any(f"Stopped early after step {last} of 30" in note for note in notes)
    assert any(f"are those of step {best}," in note for note in notes)
    assert f"Stopped early after step {last} of 30" in (whole / "README.md").read_text()
    # the weights are those of a run that ends at the best step
    if "learning_rate_schedule" not in changes:  # which depends on the number of steps
        shorter = written(experts, tmp_path, num_steps=best, **changes)
        run(shorter, tmp_path / "shorter")
        same = load_file(tmp_path / "shorter" / AGGREGATORS)
        for name, tensor in load_file(whole / AGGREGATORS).items():
            assert tensor.equal(same[name]), name
    # the same command again has nothing to do
    before = (whole / AGGREGATORS).read_bytes()
    again, notes = run(asked, whole)
    assert again == []
    assert any("Stopped early" in note for note in notes)
    assert (whole / AGGREGATORS).read_bytes() == before
    # and any interruption ends at the same step, with the same bytes
    for moment in sorted({1, 3, best, last - 2, last - 1}):
        parts = tmp_path / f"parts {moment}"
        run(asked, parts, stop_after=moment)
        rest, _ = run(asked, parts)
        assert rest[-1] == last
        assert (parts / AGGREGATORS).read_bytes() == before, moment
        assert losses(parts) == found


def test_it_is_decided_again_where_a_run_was_killed_before_its_validation(
    experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = written(experts, tmp_path, early_stopping={"patience": 2, "min_improvement": 1e-3})
    last = run(asked, whole := tmp_path / "whole")[0][-1]
    validate, parts = Watch._validate, tmp_path / "parts"

    def killed(watch: Watch, step: int) -> float:
        if step == last:  # whose checkpoint is written already
            raise KeyboardInterrupt
        return validate(watch, step)

    monkeypatch.setattr(Watch, "_validate", killed)
    with pytest.raises(KeyboardInterrupt):
        run(asked, parts)
    monkeypatch.undo()
    assert Checkpoints(parts / "checkpoints").steps()[-1] == last
    steps, notes = run(asked, parts)
    assert steps == []
    assert any(f"Stopped early after step {last}" in note for note in notes)
    assert (parts / AGGREGATORS).read_bytes() == (whole / AGGREGATORS).read_bytes()
    assert losses(parts) == losses(whole)


def test_a_run_that_did_not_end_early_has_the_best_weights_too(
    experts: list[Path], tmp_path: Path
) -> None:
    asked = written(experts, tmp_path, num_steps=6, early_stopping={"patience": 50})
    _, notes = run(asked, tmp_path / "run")
    found = losses(tmp_path / "run")
    assert list(found) == [2, 4, 6]
    best = min(found, key=lambda step: found[step])
    assert [n for n in notes if "weights" in n] == [
        f"The weights are those of step {best}, with the lowest validation loss, {found[best]:.6g}."
    ]


def test_early_stopping_needs_validation(experts: list[Path], tmp_path: Path) -> None:
    asked = written(experts, tmp_path, early_stopping={"patience": 1})
    del asked["validation"]
    with pytest.raises(ValueError, match="must have validation with training"):
        Recipe.model_validate(asked)
    settings = TrainingRecipe(num_steps=1, early_stopping=EarlyStoppingRecipe(patience=1))
    with refusal("AFA-TRAIN-092", "validation"):
        train_aggregators(afa.load_pipeline(experts[:1], SMALL), SceneImages(4), settings)
    with refusal("AFA-TRAIN-092", "validation"):
        next(tune_base(str(experts[0]), SceneImages(4), settings, tmp_path / "tuned"))


# -- continue with other settings -------------------------------------------------------------


def test_a_refusal_names_both_values_and_the_flag(experts: list[Path], tmp_path: Path) -> None:
    asked = written(experts, tmp_path, num_steps=2)
    run(asked, output := tmp_path / "run")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    faster = written(experts, tmp_path, num_steps=4, learning_rate=0.1)
    with refusal("AFA-TRAIN-046", r"training\.learning_rate: 0\.05 -> 0\.1\.", "--continue-with"):
        run(faster, output)
    faster["aggregator"]["hidden_size"] = 16
    with refusal(
        "AFA-TRAIN-046", r"hidden_size: 8 -> 16", r"aggregator\.hidden_size cannot change"
    ):
        run(faster, output)
    with refusal("AFA-TRAIN-090", "hidden_size: 8 -> 16", "learning_rate"):
        run(faster, output, change=True)
    with refusal("AFA-TRAIN-091", "new"):
        run(asked, tmp_path / "new", change=True)
    assert not (tmp_path / "new").exists()
    assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}


def test_every_setting_that_may_change_exists(experts: list[Path], tmp_path: Path) -> None:
    recipe = Recipe.model_validate(written(experts, tmp_path))
    for key in CHANGEABLE:
        section, name = key.split(".")
        assert name in type(getattr(recipe, section)).model_fields
    for name in ("ema_decay", "seed", "expert_dtype"):  # which the checkpoint or the order has
        assert f"training.{name}" not in CHANGEABLE


def test_num_steps_is_named_only_where_it_counts(experts: list[Path], tmp_path: Path) -> None:
    constant = written(experts, tmp_path)
    cosine = written(experts, tmp_path, learning_rate_schedule="cosine")
    longer = written(experts, tmp_path, learning_rate_schedule="cosine", num_steps=31)

    def keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
        return [change.key for change in changes_between(before, now)]

    assert keys(constant, cosine) == ["training.learning_rate_schedule"]
    assert keys(cosine, longer) == ["training.num_steps"]
    assert keys(constant, longer) == ["training.learning_rate_schedule", "training.num_steps"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"ema_decay": 0.9}, {"gradient_accumulation_steps": 2}, {"cache": False}]
)
def test_a_run_continues_with_another_rate_twice(
    experts: list[Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    def asked(**training: Any) -> dict[str, Any]:
        own = {key: value for key, value in changes.items() if key != "cache"}
        recipe = written(experts, tmp_path, **own, **training)
        if "cache" in changes:
            recipe["data"]["cache"] = changes["cache"]
        return recipe

    first = asked(num_steps=4)
    second = asked(num_steps=8, learning_rate=0.01, weight_decay=0.1)
    third = asked(num_steps=12, learning_rate_schedule="cosine")
    outputs = [tmp_path / name for name in ("whole", "parts")]
    run(first, outputs[0])
    steps, notes = run(second, outputs[0], change=True)
    assert steps == [5, 6, 7, 8]
    assert any(note.startswith("After step 4, the run continued with") for note in notes)
    assert run(third, outputs[0], change=True)[0] == [9, 10, 11, 12]
    # the same, interrupted right after the start and later; the flag is needed once
    run(first, outputs[1])
    for recipe, steps in ((second, [5, 6, 7, 8]), (third, [9, 10, 11, 12])):
        events = train(Recipe.model_validate(recipe), outputs[1], continue_with=True)
        for event in events:
            if isinstance(event, TrainStep):  # killed before its checkpoint can be used
                break
        events.close()  # type: ignore[attr-defined]
        Checkpoints(outputs[1] / "checkpoints").places()[-1].unlink()
        run(recipe, outputs[1], stop_after=2)
        assert run(recipe, outputs[1])[0] == steps[2:]
    whole, parts = ((output / AGGREGATORS).read_bytes() for output in outputs)
    assert whole == parts
    histories = [json.loads((output / "recipes.json").read_text()) for output in outputs]
    assert histories[0] == histories[1]
    assert [each["after_step"] for each in histories[0]["recipes"]] == [0, 4, 8]
    card = (outputs[0] / "README.md").read_text()
    assert "After step 4, the run continued with training.learning_rate: 0.05 -> 0.01" in card
    assert "After step 8, the run continued with" in card
    assert 'training.learning_rate_schedule: "constant" -> "cosine"' in card


def test_the_optimizer_goes_on(experts: list[Path], tmp_path: Path) -> None:
    """An equal rate that is called a change ends with the bytes of a run without it."""
    run(written(experts, tmp_path, num_steps=4), tmp_path / "parts")
    run(written(experts, tmp_path, num_steps=8), tmp_path / "whole")
    changed = written(experts, tmp_path, num_steps=8, early_stopping={"patience": 99})
    run(changed, tmp_path / "parts", change=True)
    whole, parts = (
        Checkpoints(tmp_path / name / "checkpoints").read() for name in ("whole", "parts")
    )
    assert whole is not None
    assert parts is not None
    for name, tensor in whole.tensors.items():
        assert tensor.equal(parts.tensors[name]), name


def test_a_run_that_ended_early_continues_on_purpose(experts: list[Path], tmp_path: Path) -> None:
    stopping = {"patience": 2, "min_improvement": 1e-3}
    asked = written(experts, tmp_path, early_stopping=stopping)
    last = run(asked, output := tmp_path / "run")[0][-1]
    slower = written(experts, tmp_path, early_stopping=stopping, learning_rate=1e-3)
    with refusal("AFA-TRAIN-046", "learning_rate", "--continue-with"):
        run(slower, output)
    steps, _ = run(slower, output, change=True)
    assert len(steps) >= 4  # patience starts anew
    assert steps[0] == last + 1
    found = losses(output)
    best = min(found, key=lambda step: found[step])
    assert f"are those of step {best}," in (output / "README.md").read_text()
    assert run(slower, output)[0] == []


def test_recipes_that_are_damaged(experts: list[Path], tmp_path: Path) -> None:
    asked = written(experts, tmp_path, num_steps=2)
    run(asked, output := tmp_path / "run")
    (output / "recipes.json").write_text('{"recipes": [{"after_step": 0}]}')
    with refusal("AFA-TRAIN-093", "recipes.json"):
        require_same_recipe(Recipe.model_validate(asked), output)
