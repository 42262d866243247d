"""A whole comparison: what it leaves, how it goes on, and that nothing depends on the stops."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import afa
from afa.cli import main
from afa.evaluation import evaluate, load_evaluate_recipe
from afa.evaluation.methods import MethodBuilder
from afa.statistics import paired_difference
from tests import warm
from tests.evaluation.conftest import SMALL
from tests.metrics.tiny import write_clip
from tests.refusal import refusal

pytestmark = pytest.mark.slow

Write = Callable[..., Path]


def run(recipe: Path, output: Path) -> dict[str, Any]:
    list(evaluate(load_evaluate_recipe(recipe), output))
    return json.loads((output / "report.json").read_text())


def unmeasured(content: Any) -> str:
    """A report without what is measured anew in every run, as bytes would be compared."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key != "measured"}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return json.dumps(strip(content), indent=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The small comparison, done once without a stop."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(SMALL, sort_keys=False))
    report = run(folder / "recipe.yaml", folder / "output")
    return folder / "output", report


def test_the_report_can_be_computed_from_the_scores_of_pictures(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    output, report = finished
    with (output / "scores.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    seeds = len(SMALL["sampling"]["seeds"])
    for row in report["rows"]:
        for group, found in row["groups"].items():
            mine = [x for x in lines if (x["method"], x["group"]) == (row["method"], group)]
            assert len(mine) == report["groups"][group] * seeds * row["num_replicas"]
            for score, figures in found["scores"].items():
                mean = sum(float(line[score]) for line in mine) / len(mine)
                assert mean == pytest.approx(figures["mean"], abs=1e-9)
    for row in report["paired"]:

        def scores(method: str, row: dict[str, Any] = row) -> np.ndarray:
            """[1, prompts], the mean over the seeds."""
            found: dict[int, list[float]] = {}
            for line in lines:
                if (line["method"], line["group"]) == (method, row["group"]):
                    found.setdefault(int(line["prompt_number"]), []).append(
                        float(line[row["score"]])
                    )
            return np.array([[np.mean(found[n]) for n in sorted(found)]])

        paired = paired_difference(scores(row["method"]), scores(row["against"]), 100)
        assert (paired.wins, paired.losses) == (row["wins"], row["losses"])
        assert paired.difference.mean == pytest.approx(row["difference"]["mean"], abs=1e-9)
    assert {line["prompt"] for line in lines} == {
        text for text, _ in json.loads((output / "prompts.json").read_text())["prompts"]
    }


def test_everything_is_on_disk(finished: tuple[Path, dict[str, Any]]) -> None:
    output, report = finished
    names = {path.name for path in output.iterdir()}
    reports = {"report.json", "report.md", "scores.csv"}
    assert reports | {"pictures.png", "scores.png", "curve.png"} <= names
    drawn = output / "methods" / "expert-animals" / "replica-0" / "seed-1" / "steps-2"
    assert sorted(path.name for path in drawn.glob("*.png")) == [f"{n:06d}.png" for n in range(5)]
    assert [path.name for path in output.rglob(".*")] == [".lock"], "nothing unfinished is left"
    rows = {row["method"]: row for row in report["rows"]}
    assert list(rows) == [
        "AFA",
        "expert: animals",
        "expert: food",
        "shell: animals",
        "shell: food",
        "weighted merge",
    ]
    assert rows["weighted merge"]["expert_calls_per_image"] == 4
    assert rows["AFA"]["expert_calls_per_image"] == 8
    assert rows["AFA"]["measured"]["seconds_per_image"] > 0
    for row in rows.values():
        assert set(row["groups"]) == {"mixed", "animals"}
        scores = row["groups"]["mixed"]["scores"]
        assert list(scores) == ["both", "objects", "left", "right", "clip_t", "clip_i"]
        for score in scores.values():
            assert score["low"] <= score["mean"] <= score["high"]
        assert row["groups"]["mixed"]["sets"]["fid"]["mean"] > 0


def test_a_method_is_compared_with_the_best_expert_and_its_shell(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    _, report = finished
    references = report["references"]["animals"]
    assert references == {
        "subject": "AFA",
        "best expert": "expert: animals",
        "shell of the best expert": "shell: animals",
    }
    chosen = [
        row
        for row in report["paired"]
        if (row["group"], row["score"]) == ("animals", "clip_t") and row["role"] == "best expert"
    ]
    assert len(chosen) == 5
    means = {
        row["method"]: row["groups"]["animals"]["scores"]["clip_t"]["mean"]
        for row in report["rows"]
    }
    for row in chosen:
        assert row["against"] == "expert: animals"
        expected = means[row["method"]] - means["expert: animals"]
        assert row["difference"]["mean"] == pytest.approx(expected)
        assert row["wins"] + row["losses"] + row["ties"] == 2
    against = [row["against"] for row in report["paired"] if row["role"] == "subject"]
    assert set(against) == {row["method"] for row in report["rows"]} - {"AFA"}


def test_the_text_has_every_method_and_drawing(finished: tuple[Path, dict[str, Any]]) -> None:
    output, report = finished
    text = (output / "report.md").read_text()
    for row in report["rows"]:
        assert f"| {row['method']} |" in text
    drawings = [part.split(")")[0] for part in text.split("![](")[1:]]
    assert drawings
    assert all((output / drawing).is_file() for drawing in drawings)
    assert [row["num_steps"] for row in report["curve"]] == [1, 2] * 3


def test_done_work_is_not_done_again(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, write: Write, monkeypatch: Any
) -> None:
    output, report = finished
    copy = shutil.copytree(output, tmp_path / "copy")

    def refuse(*_: Any) -> None:
        raise AssertionError("nothing is to be drawn")

    monkeypatch.setattr(MethodBuilder, "build", refuse)
    # and with nothing to draw, what was measured is the same, too
    assert run(write(), copy) == report


def test_methods_metrics_and_seeds_can_be_added(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, write: Write
) -> None:
    output, report = finished
    copy = shutil.copytree(output, tmp_path / "copy")
    before = {
        path: path.stat().st_mtime_ns for path in copy.rglob("*.png") if "steps-" in str(path)
    }
    more = run(
        write(
            methods=[*SMALL["methods"], {"name": "base", "model": "zoo:base"}],
            metrics=[*SMALL["metrics"], {"name": "cmmd", "weights": "zoo:clip"}],
        ),
        copy,
    )
    assert [row["method"] for row in more["rows"]][-1] == "base"
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    row, old = more["rows"][0]["groups"]["mixed"], report["rows"][0]["groups"]["mixed"]
    assert row["scores"] == old["scores"]
    assert row["sets"]["cmmd"]["mean"] > 0


def reached(output: Path, pattern: str, count: int) -> bool:
    return len(list(output.glob(pattern))) >= count


@pytest.mark.nightly
@pytest.mark.fault(
    "kill -9",
    "evaluate",
    how="SIGKILL three times: during preparation, while drawing, and between drawing and scoring",
    holds="the same command resumes, and produces the report of an undisturbed run",
)
@pytest.mark.slow
def test_killed_three_times_it_comes_to_the_same_report(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, write: Write
) -> None:
    output, report = tmp_path / "output", finished[1]
    moments = [
        ("references/*.png", 2),  # while it gets ready
        ("methods/*/*/*/*/*.png", 3),  # in the middle of a batch
        ("methods/shell-animals/*/*/*/scores/*/*.json", 1),  # between drawing and scoring
    ]
    for pattern, count in moments:
        process = warm.Running(["evaluate", write(), "--output", output])
        deadline = time.monotonic() + 120
        while not reached(output, pattern, count):
            assert process.poll() is None, "it ended before it was to be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (output / "report.json").exists()
    code, _, said = warm.run(["evaluate", write(), "--output", output])
    assert code == 0, said
    written = json.loads((output / "report.json").read_text())
    assert unmeasured(written) == unmeasured(report)


@pytest.mark.nightly
@pytest.mark.slow
def test_two_processes_come_to_the_same_report(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, write: Write
) -> None:
    output, report = finished
    ranks = warm.run_ranks(["evaluate", write(), "--output", tmp_path / "two"])
    assert not any(code for code, *_ in ranks), ranks
    written = json.loads((tmp_path / "two" / "report.json").read_text())
    assert unmeasured(written) == unmeasured(report)
    for picture in output.glob("methods/*/*/*/*/*.png"):
        twin = tmp_path / "two" / picture.relative_to(output)
        assert twin.read_bytes() == picture.read_bytes()


# -- what is wrong ----------------------------------------------------------------------------


def fails(recipe: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command says; it exits with 2."""
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(recipe), "--output", str(output)])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.nightly
def test_a_damaged_reference_picture_keeps_what_is_done(
    finished: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    write: Write,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = shutil.copytree(finished[0] / "references", tmp_path / "real")
    broken = real / "000003.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    metrics = ["scenes", {"name": "fid", "weights": "zoo:clip"}]
    recipe = write(references=str(real), metrics=metrics, curve=None)
    output = tmp_path / "output"
    line = fails(recipe, output, capsys)
    assert "AFA-PICTURE-" in line
    assert "000003.png'" in line
    assert not (output / "report.json").exists()
    # the same command resumes once it is fixed
    broken.write_bytes(whole)
    assert run(recipe, output)["rows"][0]["groups"]["mixed"]["sets"]["fid"]["mean"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": [{"name": "clip_t", "weights": "none/such"}]}, "'clip_t'"),
        ({"metrics": [{"name": "fid"}]}, "pip install 'afa[inception]'"),
        (
            {"metrics": [{"name": "clip_t"}]},
            "clip_t",
        ),
        ({"metrics": ["beauty"]}, "AFA-RECIPE-002"),
        ({"methods": [{"name": "a", "model": "none.safetensors"}]}, "none.safetensors"),
        (
            {"methods": [{"name": "a"}]},
            "exactly one of model, ensemble, merge, fusion and pictures",
        ),
        ({"methods": [{"name": "a", "merge": {"method": "ties"}}], "base": None}, "base"),
        (
            {"methods": [{"name": "a", "model": "zoo:base"}, {"name": "A", "model": "zoo:base"}]},
            "'a' and 'A'",
        ),
        ({"methods": [{"name": "a", "fusion": {"rule": "shell", "expert": 2}}]}, "from 0 to 1"),
        (
            {"methods": [{"name": "a", "fusion": {"rule": "shell"}}]},
            "'methods.0.fusion.expert'",
        ),
        (
            {"methods": [{"name": "a", "fusion": {"rule": "shel"}}]},
            "'methods.0.fusion.rule'",
        ),
        ({"methods": [{"name": "a", "fusion": {}}]}, "'methods.0.fusion.rule'"),
        (
            {"methods": [{"name": "a", "fusion": {"rule": "magic_fusion", "temprature": 1}}]},
            "'temperatures'?",
        ),
        (
            {"methods": [{"name": "a", "fusion": {"rule": "noise_mean", "expert": 1}}]},
            "'methods.0.fusion.expert'",
        ),
        ({"primary": "fid"}, "got 'fid'"),
        (
            {"metrics": [{"name": "clip_t", "weights": "zoo:clip"}] * 2},
            "got 'clip_t' twice",
        ),
        (
            {"methods": [{"name": "a", "merge": {"method": "weighted", "experts": ["b"]}}]},
            "experts in the merge 'a'",
        ),
        (
            {"methods": [{"name": "a", "merge": {"method": "weighted", "dtype": "float16"}}]},
            "dtype in the merge 'a'",
        ),
        (
            {"methods": [{"name": "a", "fusion": {"rule": "hand_over", "boundaries": [1, 2]}}]},
            "boundaries",
        ),
        (
            {
                "methods": [{"name": "a", "fusion": {"rule": "magic_fusion"}}],
                "sampling": {"guidance": 1},
            },
            "guidance",
        ),
        ({"curve": {"num_steps": [0]}}, "greater than or equal to 1"),
        ({"sampling": {"num_steps": 1001}}, "less than or equal to 1000"),
        ({"prompts": {"zoo": {"kinds": {"mixed": 0}}}}, "greater than 0"),
        (
            {"metrics": [{"name": "fid", "weights": "zoo:clip"}], "curve": {"num_steps": [1]}},
            "must have a metric of single pictures",
        ),
        (
            {"metrics": [{"name": "kid", "weights": "zoo:clip", "subset_size": 50}], "curve": None},
            "AFA-EVAL-023",
        ),
        ({"subject": "nobody"}, "got 'nobody'"),
        ({"experts": [], "base": None}, "must have experts"),
        ({"sampling": {"seeds": [1, 1]}}, "[1, 1]"),
        ({"sampling": {"num_step": 3}}, "did you mean 'num_steps'?"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    write: Write,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    assert message in fails(write(**{"curve": None, **changes}), tmp_path / "output", capsys)
    assert not list((tmp_path / "output").glob("methods/*/*/seed-*"))


def test_scenes_are_judged_for_prompts_of_a_file(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    caption = "a fox on the left and a pizza on the right, blue background"
    (tmp_path / "prompts.csv").write_text(f'Prompts,Category\n"{caption}",easy\n')
    changes = {"metrics": ["scenes"], "prompts": {"drawbench": "prompts.csv"}, "curve": None}
    report = run(write(**changes), tmp_path / "output")
    assert report["groups"] == {"easy": 1}
    assert set(report["rows"][0]["groups"]["easy"]["scores"]) == {
        "both",
        "objects",
        "left",
        "right",
    }
    (tmp_path / "prompts.csv").write_text("Prompts,Category\na fox,hard\n")
    assert "AFA-EVAL-031" in fails(write(**changes), tmp_path / "other", capsys)
    assert not list((tmp_path / "other").glob("methods/*/*/seed-*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [("a fox\n\na pizza\n", "line 2"), ("a fox\na fox\n", "line 1")],
)
def test_a_prompt_file_with_a_bad_line(
    tmp_path: Path,
    write: Write,
    capsys: pytest.CaptureFixture[str],
    content: str,
    message: str,
) -> None:
    (tmp_path / "prompts.txt").write_text(content)
    metrics = [{"name": "clip_t", "weights": "zoo:clip"}]
    recipe = write(prompts={"text": "prompts.txt"}, metrics=metrics, curve=None)
    assert message in fails(recipe, tmp_path / "output", capsys)


def test_experts_that_do_not_fit(
    experts: list[Path], tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = [{"name": "merge", "merge": {"method": "weighted"}}]
    recipe = write(experts=["zoo:animals", str(experts[0])], methods=methods, curve=None)
    line = fails(recipe, tmp_path / "output", capsys)
    assert "AFA-LOAD-003" in line


def test_a_checkpoint_that_has_changed_is_not_mixed_with_old_pictures(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copytree(afa.zoo.expert_folder("animals"), tmp_path / "own")
    methods = [{"name": "own", "model": str(own)}]
    recipe = write(methods=methods, metrics=["scenes"], curve=None)
    output = tmp_path / "output"
    run(recipe, output)
    weights = own / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"] = tensors["conv_in.bias"] + torch.ones(())
    save_file(tensors, weights, metadata={"format": "pt"})
    line = fails(recipe, output, capsys)
    assert "AFA-EVAL-030" in line
    assert "'own'" in line
    assert "differ in model" in line
    # doing what the line says gives the scores of the new checkpoint, not of the old one
    shutil.rmtree(line.split("in '")[1].split("'")[0])
    again = run(recipe, output)
    fresh = run(recipe, tmp_path / "fresh")
    assert unmeasured(again) == unmeasured(fresh)


@pytest.mark.nightly
def test_a_metric_whose_weights_have_changed_is_measured_again(
    tmp_path: Path, write: Write
) -> None:
    write_clip(tmp_path / "clip")
    names = ("clip_t", "clip_i", "cmmd")
    metrics = [{"name": name, "weights": "clip"} for name in names]
    recipe = write(metrics=metrics, methods=SMALL["methods"][:3], curve=None)
    before = run(recipe, tmp_path / "output")
    weights = tmp_path / "clip" / "model.safetensors"
    tensors = load_file(weights)
    for name in ("visual_projection.weight", "text_projection.weight"):
        tensors[name] = tensors[name].flip(0) * torch.arange(len(tensors[name]))[:, None]
    save_file(tensors, weights, metadata={"format": "pt"})
    after = run(recipe, tmp_path / "output")
    assert unmeasured(after) == unmeasured(run(recipe, tmp_path / "fresh"))
    first, second = (r["rows"][0]["groups"]["mixed"] for r in (before, after))
    assert all(first["scores"][n]["mean"] != second["scores"][n]["mean"] for n in names[:2])
    assert first["sets"]["cmmd"] != second["sets"]["cmmd"]


@pytest.mark.parametrize("file", ["vae/diffusion_pytorch_model.safetensors", "scheduler"])
def test_autoencoder_and_scheduler_belong_to_a_checkpoint(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    own = shutil.copytree(afa.zoo.expert_folder("animals"), tmp_path / "own")
    recipe = write(methods=[{"name": "own", "model": str(own)}], metrics=["scenes"], curve=None)
    run(recipe, tmp_path / "output")
    if file == "scheduler":
        config = own / "scheduler" / "scheduler_config.json"
        config.write_text(config.read_text().replace("0.012", "0.013"))
    else:
        tensors = {key: tensor / 2 for key, tensor in load_file(own / file).items()}
        save_file(tensors, own / file, metadata={"format": "pt"})
    assert "differ in model" in fails(recipe, tmp_path / "output", capsys)


def test_a_scheduler_is_part_of_what_pictures_are_made_from(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    sampling = {"num_steps": 2, "guidance": 3, "seeds": [0], "num_threads": 1}
    few: dict[str, Any] = {"metrics": ["scenes"], "curve": None}
    few["prompts"] = {"zoo": {"kinds": {"mixed": 2}}}
    few["methods"] = [{"name": "AFA", "fusion": {"rule": "feature_mean"}}]
    own = run(write(**few, sampling=sampling), tmp_path / "own")
    assert "scheduler" not in own["sampling"]
    chosen = write(**few, sampling={**sampling, "scheduler": "Euler a"})
    report = run(chosen, tmp_path / "chosen")
    assert report["sampling"]["scheduler"] == "euler_a"
    assert "Scheduler of all methods: euler_a." in (tmp_path / "chosen/report.md").read_text()
    drawn = [next((tmp_path / n).rglob("steps-2/000000.png")) for n in ("own", "chosen")]
    assert drawn[0].read_bytes() != drawn[1].read_bytes()
    line = fails(chosen, tmp_path / "own", capsys)
    assert "AFA-EVAL-030" in line
    assert "differ in sampling" in line
    for scheduler, code, said in (
        ("heun", "AFA-DRAW-023", "zero terminal SNR"),
        ("foo", "AFA-RECIPE-002", "nknown scheduler"),
    ):
        wrong = write(**few, sampling={**sampling, "scheduler": scheduler})
        line = fails(wrong, tmp_path / "wrong", capsys)
        assert code in line
        assert said in line
    assert not list((tmp_path / "wrong").rglob("*.png"))
    fast = [{**few["methods"][0], "acceleration": "fast"}]
    wrong = write(**{**few, "methods": fast}, sampling={**sampling, "scheduler": "heun"})
    assert "twice" in fails(wrong, tmp_path / "wrong", capsys)


@pytest.mark.nightly
def test_steps_and_seeds_can_be_changed_and_it_is_a_fresh_report(
    tmp_path: Path, write: Write
) -> None:
    methods = [
        {"name": "AFA", "ensemble": "zoo:ensemble"},
        {"name": "dollars $_$ | ^", "model": "zoo:food"},
    ]
    few = {"methods": methods, "prompts": {"zoo": {"kinds": {"mixed": 3}}}, "metrics": ["scenes"]}
    sampling = {"num_steps": 1, "guidance": 3, "batch_size": 4, "seeds": [0], "num_threads": 1}
    # the curve's batches are cut elsewhere than the main comparison's
    curve = {"num_steps": [1, 2], "limit": 2}
    run(write(**few, sampling=sampling, curve=curve), tmp_path / "grown")
    other = {**sampling, "num_steps": 2, "seeds": [5, 0]}
    grown = run(write(**few, sampling=other, curve=curve), tmp_path / "grown")
    fresh = run(write(**few, sampling=other, curve=curve), tmp_path / "fresh")
    assert unmeasured(grown) == unmeasured(fresh)
    assert grown["weights"]["experts"] == ["animals", "food", "things"]
    assert len(grown["weights"]["groups"]["mixed"]["shares"]) == 2


def test_groups_that_alternate_and_a_curve(tmp_path: Path, write: Write) -> None:
    (tmp_path / "drawbench.csv").write_text("Prompts,Category\na,A\nb,B\nc,B\nd,A\n")
    report = run(
        write(
            prompts={"drawbench": "drawbench.csv"},
            methods=[{"name": "base", "model": "zoo:base"}],
            metrics=[{"name": "clip_t", "weights": "zoo:clip"}],
            sampling={"num_steps": 1, "guidance": 3, "batch_size": 4, "num_threads": 1},
            curve={"num_steps": [1, 2]},
        ),
        tmp_path / "output",
    )
    assert report["groups"] == {"A": 2, "B": 2}
    assert report["curve"][0]["scores"] == {
        name: {k: score[k] for k in ("mean", "low", "high")}
        for name, score in report["rows"][0]["groups"]["A"]["scores"].items()
    }


def test_only_one_process_may_have_the_folder(tmp_path: Path, write: Write) -> None:
    from afa.machine.ownership import owned

    output = tmp_path / "output"
    output.mkdir()
    (output / ".report.json.abcd1234").write_text("half")  # of a start that was killed
    with owned(output), refusal("AFA-FILE-002"):
        run(write(curve=None), output)
    assert not (output / ".report.json.abcd1234").exists()


def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "AFA-EVAL-018" in fails(write(), tmp_path / "mine", capsys)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_clip_i_needs_a_picture_for_every_prompt(tmp_path: Path, write: Write) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\n")
    metrics = [{"name": "clip_i", "weights": "zoo:clip"}]
    recipe = write(prompts={"text": "prompts.txt"}, metrics=metrics, curve=None)
    with refusal("AFA-EVAL-020"):
        run(recipe, tmp_path / "output")
