"""A distillation ends early, or continues with other settings; the student of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from afa.cli import main
from afa.distilling.exported import export_student
from afa.distilling.recipe import DistillRecipe
from afa.distilling.run import distill
from afa.training import Checkpoints, Stopped
from tests.distilling.students import as_written, files_of, steps_of
from tests.refusal import refusal

LORA = {"what": "lora", "rank": 2}


def asked(experts: list[Path], tmp_path: Path, **training: Any) -> DistillRecipe:
    """A student of two experts that is validated often, with a LoRA, which is small."""
    recipe = as_written(
        experts[:2],
        tmp_path / "prompts.txt",
        student=LORA,
        recording={"folder": str(tmp_path / "recorded")},
        validation={"num_samples": 4, "every": 2},
        training={"keep_checkpoints": 9, "learning_rate_schedule": "constant", **training},
    )
    return DistillRecipe.model_validate(recipe)


def change(recipe: DistillRecipe, output: Path, stop_after: int | None = None) -> None:
    count = 0

    def should_stop() -> bool:
        nonlocal count
        count += len(list(output.glob("checkpoints/*"))) > 0
        return stop_after is not None and count > stop_after

    try:
        list(distill(recipe, output, should_stop=should_stop, continue_with=True))
    except Stopped:
        assert stop_after is not None


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.9}])
def test_the_student_of_a_checkpoint(
    experts: list[Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    steps_of(asked(experts, tmp_path, num_steps=4, **changes), whole := tmp_path / "a" / "student")
    steps_of(asked(experts, tmp_path, num_steps=2, **changes), tmp_path / "b" / "student")
    ours = tmp_path / "c" / "student"
    assert export_student(whole, ours, step=2) == 2
    expected, found = (
        {name: load_file(file) for file in folder.glob("*.safetensors") if (name := file.name)}
        for folder in (tmp_path / "b" / "student", ours)
    )
    assert found.keys() == expected.keys()
    assert found
    for name, tensors in expected.items():
        for key, tensor in tensors.items():
            assert tensor.equal(found[name][key]), key
    record = json.loads((ours / "distill.json").read_text())
    assert [each["step"] for each in record["validation_loss"]] == [2]
    assert "weights of step 2 of 4 of the run 'student'" in (ours / "README.md").read_text()
    with refusal("AFA-TRAIN-094", "step 9", "1, 2, 3, 4"):
        export_student(whole, tmp_path / "none", step=9)
    with refusal("AFA-TRAIN-095", "student"):
        export_student(whole, ours)
    assert not (tmp_path / "none").exists()


def test_it_continues_with_another_rate(experts: list[Path], tmp_path: Path) -> None:
    """Plainly resumed before there is a new checkpoint, and later."""
    first = asked(experts, tmp_path, num_steps=4)
    second = asked(experts, tmp_path, num_steps=8, learning_rate=1e-4)
    whole, parts = tmp_path / "a" / "student", tmp_path / "b" / "student"
    steps_of(first, whole)
    with refusal("AFA-DISTILL-015", r"training\.learning_rate: 0\.001 -> 0\.0001", "--continue"):
        steps_of(second, whole)
    change(second, whole)
    steps_of(first, parts)
    change(second, parts, stop_after=2)
    for place in Checkpoints(parts / "checkpoints").places():
        if place.name > "step-00000004.safetensors":
            place.unlink()  # as if it was killed before it wrote them
    assert [step.step for step in steps_of(second, parts)] == [5, 6, 7, 8]
    assert files_of(whole) == files_of(parts)
    assert (
        "After step 4, the run continued with training.learning_rate"
        in (whole / "README.md").read_text()
    )
    other = DistillRecipe.model_validate(
        {**as_written(experts[:2], tmp_path / "prompts.txt"), "student": {"init": str(experts[1])}}
    )
    with refusal("AFA-TRAIN-090", "student"):
        change(other, whole)


def test_it_ends_early(
    experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopping = {"early_stopping": {"patience": 2}, "learning_rate": 0.05, "num_steps": 40}
    recipe = asked(experts, tmp_path, **stopping)
    steps = steps_of(recipe, output := tmp_path / "a" / "student")
    assert len(steps) < 40
    record = json.loads((output / "distill.json").read_text())
    found = {each["step"]: each["loss"] for each in record["validation_loss"]}
    best = min(found, key=lambda step: found[step])
    assert f"are those of step {best}," in record["history"][0]
    assert "Stopped early" in (output / "README.md").read_text()
    with pytest.raises(SystemExit) as stop:
        main(["export-checkpoint", str(output), "--best", "--output", str(tmp_path / "best")])
    assert not stop.value.code
    assert f"Best student up to step {len(steps)} in" in capsys.readouterr().out
    ours, same = (load_file(place / "lora.safetensors") for place in (tmp_path / "best", output))
    assert all(tensor.equal(same[name]) for name, tensor in ours.items())
