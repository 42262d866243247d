"""What a run leaves to look at: figures, validation, warnings, pictures, where it was made."""

from __future__ import annotations

import json
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from afa.training import Recipe
from afa.training.split import Split
from tests.refusal import refusal
from tests.training.runs import as_written, steps_of

pytestmark = pytest.mark.slow

NAMES = ["expert0", "expert1", "expert2"]


def observed(experts: list[Path], **changes: Any) -> Recipe:
    written = as_written(experts, num_steps=6, log_every=2, trackers=["tensorboard"])
    written["validation"] = {"num_samples": 5, "every": 3}
    written["previews"] = {"prompts": ["a fox", "a pizza"], "every": 3, "num_steps": 2}
    for key, value in changes.items():
        written[key] = {**written.get(key, {}), **value}
    return Recipe.model_validate(written)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(experts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("watched") / "run"
    list(steps_of(observed(experts), output))
    return output


def test_figures_are_written_every_so_often(run: Path) -> None:
    steps = [line for line in lines(run) if "loss" in line]
    assert [line["step"] for line in steps] == [2, 4, 6]
    for line in steps:
        assert line["loss"] > 0
        assert line["grad_norm"] > 0
        assert line["learning_rate"] == pytest.approx(1e-2)
        assert line["seconds_per_step"] > 0


def test_weights_and_entropy_of_every_site(run: Path) -> None:
    routed = [line for line in lines(run) if "entropy/conv_in" in line]
    assert [line["step"] for line in routed] == [2, 4, 6]
    for line in routed:
        assert 0 < line["entropy/mid"] <= 1
        shares = [line[f"weight/mid/{name}"] for name in NAMES]
        assert sum(shares) == pytest.approx(1, abs=1e-4)


def test_validation(run: Path) -> None:
    found = [line for line in lines(run) if "validation_loss" in line]
    assert [line["step"] for line in found] == [3, 6]
    assert found[0]["validation_loss"] != found[1]["validation_loss"]
    assert "validation/weight/mid/expert0" in found[0]


def test_validation_is_the_same_however_it_is_batched_and_encoded(
    experts: list[Path], tmp_path: Path
) -> None:
    """Nothing is learnt at a learning rate of next to nothing, so all runs have one loss."""
    losses = []
    for n, (size, cache) in enumerate(((2, False), (4, False), (2, True))):
        data = {"cache_folder": str(tmp_path / "cache"), "cache": cache}
        training = {"batch_size": size, "learning_rate": 1e-12, "num_steps": 1}
        asked = observed(experts, data=data, training=training, validation={"every": 1})
        list(steps_of(asked, tmp_path / str(n)))
        found = [
            line["validation_loss"]
            for line in lines(tmp_path / str(n))
            if "validation_loss" in line
        ]
        losses += found
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


def test_validation_and_previews_change_no_step(
    experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the samples that are held out."""
    last = Split(list(range(95)), list(range(95, 100)), 100, 5, 100)
    monkeypatch.setattr("afa.training.split.split_by_picture", lambda *_: last)
    plain = as_written(experts, {"scenes": {"num_samples": 95}}, num_steps=6)
    unseen = [s.loss for s in steps_of(Recipe.model_validate(plain), tmp_path / "plain")]
    assert [s.loss for s in steps_of(observed(experts), tmp_path / "seen")] == unseen


def test_held_out_samples_must_leave_some(experts: list[Path], tmp_path: Path) -> None:
    asked = observed(experts, validation={"num_samples": 100})
    with refusal("AFA-TRAIN-047", "100", r"\(100", "99"):
        list(steps_of(asked, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_pictures(run: Path) -> None:
    pictures = sorted((run / "previews").iterdir())
    assert [path.name for path in pictures] == ["step-00000003.png", "step-00000006.png"]
    with Image.open(pictures[0]) as sheet:
        assert sheet.size == (32, 16)  # two of 16 pixels
    assert pictures[0].read_bytes() != pictures[1].read_bytes()


def test_previews_with_another_scheduler(experts: list[Path], run: Path, tmp_path: Path) -> None:
    """It draws other pictures and changes no step; one that does not fit is refused before."""
    output = tmp_path / "run"
    list(steps_of(observed(experts, previews={"scheduler": "Euler a"}), output))
    sheets = [folder / "previews" / "step-00000006.png" for folder in (run, output)]
    assert sheets[0].read_bytes() != sheets[1].read_bytes()
    losses = [[line["loss"] for line in lines(each) if "loss" in line] for each in (run, output)]
    assert losses[0] == losses[1]
    with refusal("AFA-DRAW-024", "ddim", "karras"):
        list(steps_of(observed(experts, previews={"scheduler": "ddim_karras"}), tmp_path / "no"))
    with pytest.raises(ValueError, match="Unknown scheduler"):
        observed(experts, previews={"scheduler": "foo"})


def test_weighted_previews(experts: list[Path], tmp_path: Path) -> None:
    """They are drawn in batches of equal length, and each is in its place."""

    def drawn(name: str, syntax: str, *prompts: str) -> list[bytes]:
        asked = {"prompts": list(prompts), "prompt_syntax": syntax, "every": 3}
        list(
            steps_of(observed(experts, previews=asked, training={"num_steps": 3}), tmp_path / name)
        )
        with Image.open(tmp_path / name / "previews" / "step-00000003.png") as sheet:
            corners = [(x, y, x + 16, y + 16) for y in range(0, sheet.height, 16) for x in (0, 16)]
            return [sheet.crop(corner).tobytes() for corner in corners]

    plain = drawn("plain", "plain", "a fox", "a pizza", "a bee")
    found = drawn("new", "weighted", "a fox", "a pizza BREAK in the (snow:1.3)", "a bee")
    assert [found[n] == plain[n] for n in range(3)] == [True, False, True]
    asked = {"prompts": ["a [fox|bee]"], "prompt_syntax": "weighted"}
    with refusal("AFA-DRAW-038"):
        list(steps_of(observed(experts, previews=asked), tmp_path / "refused"))
    assert not list((tmp_path / "refused").glob("metrics.jsonl"))


def test_tensorboard_has_figures_and_pictures(run: Path) -> None:
    events = EventAccumulator(str(run / "logs"))
    events.Reload()
    tags = events.Tags()
    assert {"loss", "validation_loss", "entropy/mid", "weight/mid/expert1"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6]
    assert any(tag.startswith("previews") for tag in tags["images"])


def test_where_it_was_made(run: Path) -> None:
    (start,) = json.loads((run / "environment.json").read_text())["starts"]
    assert start["step"] == 0
    assert start["commit"]
    assert {"afa", "torch", "diffusers", "accelerate"} <= set(start["versions"])
    assert json.loads((run / "recipe.json").read_text())["validation"]["num_samples"] == 5


def test_lines_after_the_checkpoint_are_written_again_once(
    experts: list[Path], tmp_path: Path, run: Path
) -> None:
    asked = observed(experts, training={"checkpoint_every": 3})
    list(islice(steps_of(asked, tmp_path / "run"), 5))  # killed after step 5, saved at step 3
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    list(steps_of(asked, tmp_path / "run"))
    kept, whole = lines(tmp_path / "run"), lines(run)

    def seen(found: list[dict[str, Any]], key: str) -> list[tuple[int, Any]]:
        return [(line["step"], line[key]) for line in found if key in line]

    assert seen(kept, "validation_loss") == seen(whole, "validation_loss")
    assert [step for step, _ in seen(kept, "loss")] == [2, 4, 6]
    assert seen(kept, "loss")[0] == seen(whole, "loss")[0]
    assert seen(kept, "loss")[2] == seen(whole, "loss")[2]
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 3]


def test_other_releases_are_told_where_a_run_continues(experts: list[Path], tmp_path: Path) -> None:
    data = {"scenes": {"num_samples": 20}}
    asked = Recipe.model_validate(as_written(experts[:1], data, num_steps=3))
    steps = list(islice(steps_of(asked, tmp_path / "run"), 1))
    assert not steps[0].notes
    place = tmp_path / "run" / "environment.json"
    environment = json.loads(place.read_text())
    environment["starts"][-1]["versions"]["torch"] = "1.0"
    place.write_text(json.dumps(environment))
    first, second = steps_of(asked, tmp_path / "run")
    assert "torch" in first.notes[0]
    assert "(before: 1.0)" in first.notes[0]
    assert not second.notes
    (line,) = (line for line in lines(tmp_path / "run") if "notes" in line)
    assert line["notes"] == list(first.notes)


def test_starved_experts_are_warned_of(
    experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the mark at a third of the weight or more, which nobody has at the beginning."""
    monkeypatch.setattr("afa.training.routing._RARE", 0.4)
    asked = observed(experts, training={"num_steps": 12, "learning_rate": 1e-9})
    notes = {step.step: step.notes for step in steps_of(asked, tmp_path / "run")}
    warned = {step: [n for n in said if "less than 40%" in n] for step, said in notes.items()}
    assert {step: len(said) for step, said in warned.items() if said} == {10: 3}  # the fifth report
    for name, line in zip(NAMES, warned[10], strict=True):
        assert f"'{name}'" in line
        assert "conv_in, " in line
    assert [x["step"] for x in lines(tmp_path / "run") if "warnings" in x] == [10]


@pytest.mark.parametrize(
    ("tracker", "code", "said"),
    [("no_such", "AFA-TRAIN-044", "tensorboard"), ("wandb", "AFA-TRAIN-045", "pip install wandb")],
)
def test_trackers_that_cannot_be_had(
    experts: list[Path], tmp_path: Path, tracker: str, code: str, said: str
) -> None:
    asked = observed(experts, training={"trackers": ["tensorboard", tracker]})
    before = set(threading.enumerate())
    with refusal(code, f"'{tracker}'", said):
        list(steps_of(asked, tmp_path / "run"))
    assert not set(threading.enumerate()) - before, "the first one's writer has ended"
