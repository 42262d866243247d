"""What a teacher predicts is recorded as it was: of every family, once, within bounds."""

from __future__ import annotations

import gc
import weakref
from collections import Counter, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from pydantic import ValidationError
from safetensors.torch import load_file

import afa.distilling.recording as recording
from afa.denoisers.kinds import conditioning_of, denoiser_of
from afa.distilling.passes import Trajectories, passes_of
from afa.distilling.predictions import LiveTexts, RecordedExamples, Source
from afa.distilling.recipe import DistillRecipe
from afa.distilling.recording import read_rows, record_predictions
from afa.distilling.teacher import Teacher
from afa.drafting import routed, use_drafts
from afa.training.encoding import encode_captions
from afa.training.engine import Engine
from tests.distilling.students import recipe
from tests.refusal import refusal
from tests.tiny_pipelines import PIPELINES, saved_experts
from tests.training.test_several import folder_of

KINDS = ["1.5", *(kind for kind in PIPELINES if kind not in ("dit", "refiner"))]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folders(kind: str, experts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    if kind == "1.5":
        return experts
    return saved_experts(kind, tmp_path_factory.mktemp("kinds"), count=2)


def recorded(asked: DistillRecipe, folder: Path) -> list[Path]:
    list(record_predictions(Teacher.of(asked), passes_of(asked), folder, Engine("cpu")))
    return sorted(folder.rglob("*.safetensors"))


def captions_of(asked: DistillRecipe, folder: Path, number: int) -> list[str]:
    rows = read_rows(passes_of(asked)[number], folder, asked.recording.batch_size)
    return [rows.row(n)[1] for n in range(len(rows))]


@torch.no_grad()
def predicted_for(pipeline: Any, tensors: dict[str, torch.Tensor], text: str) -> torch.Tensor:
    """The prediction for one recorded latent, with the conditions of a text."""
    conditions = encode_captions(pipeline, [text])
    conditions["sizes"] = tensors["sizes"][None]
    if "guidance" in tensors:
        assert tensors["guidance"] == pytest.approx(3.0)
        conditions["guidance"] = tensors["guidance"][None]
    found: torch.Tensor = conditioning_of(pipeline).predict(
        pipeline,
        denoiser_of(pipeline),
        tensors["noisy"][None],
        tensors["timestep"][None],
        conditions,
    )
    return found[0]


def test_predictions_are_those_for_the_latents_beside_them(
    kind: str, folders: list[Path], tmp_path: Path
) -> None:
    """In every family: latents unpacked, timesteps of the scheduler, the halves of guidance."""
    asked = recipe(folders, tmp_path / "prompts.txt", trajectories={"num_steps": [2]})
    recorded(asked, tmp_path / "kept")
    rows = read_rows(passes_of(asked)[0], tmp_path / "kept", 2)
    assert len(rows) == 5 * 2  # the sixth picture of the last batch is not used
    pipeline: Any = Teacher.of(asked).load(torch.device("cpu"))
    for number in range(len(rows)):
        tensors, caption = rows.row(number)
        assert tensors["noisy"].shape == tensors["conditional"].shape
        assert ("unconditional" in tensors) == (kind != "flux")
        for name, text in (("conditional", caption), ("unconditional", "")):
            if name not in tensors:
                continue
            predicted = predicted_for(pipeline, tensors, text)
            torch.testing.assert_close(predicted, tensors[name], rtol=1e-4, atol=2e-5)


def test_a_teacher_that_draws_by_drafts(experts: list[Path], tmp_path: Path) -> None:
    """Its drafts are not recorded, and what is recorded was fused by their regions.

    Pictures are drawn one by one: judgements divide by their small standard errors, and so enlarge
    the last bits in which batches of another size differ on some processors.
    """
    drafts = {"judge": str(experts[2]), "num_steps": 1, "num_levels": 2}
    teacher = {"fusion": {"rule": "feature_mean"}, "drafts": drafts}
    kept: dict[str, Any] = {"trajectories": {"num_steps": [2]}, "teacher": teacher}
    kept["recording"] = {"batch_size": 1}
    asked = recipe(experts, tmp_path / "prompts.txt", **kept)
    recorded(asked, tmp_path / "kept")
    rows = read_rows(passes_of(asked)[0], tmp_path / "kept", 1)
    assert len(rows) == 5 * 2
    pipeline: Any = Teacher.of(asked).load(torch.device("cpu"))
    tensors, caption = rows.row(0)
    with refusal("AFA-ENSEMBLE-062"):
        predicted_for(pipeline, tensors, caption)
    generator = [torch.Generator().manual_seed(0)]
    call = {"guidance_scale": 3.0, "height": 16, "width": 16}
    with routed(pipeline, [caption], generator, **call):
        predicted = predicted_for(pipeline, tensors, caption)
    torch.testing.assert_close(predicted, tensors["conditional"], rtol=1e-4, atol=2e-4)
    use_drafts(pipeline, None)
    plain = predicted_for(pipeline, tensors, caption)
    assert not torch.allclose(plain, tensors["conditional"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "changes",
    [
        {"pictures": {"data": {"scenes": {"num_samples": 4}}, "number": 4, "share": 0.5}},
        {"features": {"sites": ["mid"]}},
    ],
    ids=str,
)
def test_what_a_teacher_with_drafts_does_not_give(
    changes: dict[str, Any], experts: list[Path], tmp_path: Path
) -> None:
    teacher = {"fusion": {"rule": "feature_mean"}, "drafts": {"judge": str(experts[2])}}
    with pytest.raises(ValidationError, match="drafts"):
        recipe(experts, tmp_path / "prompts.txt", teacher=teacher, **changes)


def test_trajectories_are_those_of_the_pipeline(experts: list[Path], tmp_path: Path) -> None:
    """The next latent of every step follows from what was recorded, up to the pipeline's end."""
    asked = recipe(experts, tmp_path / "prompts.txt", trajectories={"num_steps": [3]})
    files = recorded(asked, tmp_path / "kept")
    pipeline: Any = Teacher.of(asked).load(torch.device("cpu"))
    shard = load_file(files[0])
    captions = captions_of(asked, tmp_path / "kept", 0)[:2]
    drawn = pipeline(
        captions,
        num_inference_steps=3,
        guidance_scale=3.0,
        height=16,
        width=16,
        generator=[torch.Generator().manual_seed(n) for n in range(2)],
        output_type="latent",
    ).images
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    steps = [{name: tensor[n : n + 2] for name, tensor in shard.items()} for n in (0, 2, 4)]
    for now, after in zip(steps, [*steps[1:], None], strict=True):
        guided = now["unconditional"] + 3.0 * (now["conditional"] - now["unconditional"])
        came = pipeline.scheduler.step(guided, int(now["timestep"][0]), now["noisy"]).prev_sample
        assert torch.equal(came, drawn if after is None else after["noisy"])


def test_noised_pictures(kind: str, folders: list[Path], tmp_path: Path) -> None:
    pictures = {
        "data": {"scenes": {"num_samples": 4}, "resolution": 16},
        "number": 3,
    }
    asked = recipe(folders, tmp_path / "prompts.txt", trajectories=None, pictures=pictures)
    recorded(asked, tmp_path / "kept")
    rows = read_rows(passes_of(asked)[0], tmp_path / "kept", 2)
    assert len(rows) == 3
    pipeline: Any = Teacher.of(asked).load(torch.device("cpu"))
    tensors, caption = rows.row(2)
    assert " on the left and " in caption
    predicted = predicted_for(pipeline, tensors, caption)
    torch.testing.assert_close(predicted, tensors["conditional"], rtol=1e-4, atol=2e-5)


def test_pictures_with_several_captions_and_repeats(experts: list[Path], tmp_path: Path) -> None:
    folder_of(tmp_path / "data", 4, repeats=(3, 1))
    data = {"folder": str(tmp_path / "data"), "resolution": 16, "repeats": True}
    found: dict[str, list[str]] = {}
    for mode in ("first", "random"):
        pictures = {"data": {**data, "captions": mode}, "number": 24}
        asked = recipe(experts, tmp_path / "prompts.txt", trajectories=None, pictures=pictures)
        recorded(asked, tmp_path / mode)
        found[mode] = captions_of(asked, tmp_path / mode, 0)
    names = {mode: [text.split()[0] for text in texts] for mode, texts in found.items()}
    assert names["first"] == names["random"]
    counts = Counter(names["first"])
    assert [counts[f"picture{n}"] for n in range(4)] == [9, 3, 9, 3]
    assert {text.split()[1] for text in found["first"]} == {"way0"}
    assert {text for text in found["random"] if "2" in text} > {"picture2 way0", "picture2 way1"}


def test_targets(experts: list[Path], tmp_path: Path) -> None:
    """With prompt, without, or guided; a quarter without prompt is a quarter of the places."""
    asked = recipe(experts, tmp_path / "prompts.txt")
    recorded(asked, tmp_path / "kept")
    rows = read_rows(passes_of(asked)[0], tmp_path / "kept", 2)
    pipeline: Any = Teacher.of(asked).load(torch.device("cpu"))
    by_latent = {tuple(rows.row(n)[0]["noisy"].flatten().tolist()): n for n in range(len(rows))}

    def batch(**settings: Any) -> Any:
        examples = RecordedExamples(
            [Source(rows, np.arange(len(rows)))],
            LiveTexts(pipeline),
            seed=1,
            device=torch.device("cpu"),
            **settings,
        )
        return next(examples.batches([range(400)]))

    for settings, share in (({}, 0.0), ({"caption_dropout": 0.25}, 0.25), ({"bake_in": 3.0}, 0.0)):
        found = batch(**settings)
        without = 0
        for noisy, target in zip(found.noisy, found.target, strict=True):
            row, _ = rows.row(by_latent[tuple(noisy.flatten().tolist())])
            guided = row["unconditional"] + 3.0 * (row["conditional"] - row["unconditional"])
            if "bake_in" in settings:
                assert torch.equal(target, guided)
            elif torch.equal(target, row["unconditional"]):
                without += 1
            else:
                assert torch.equal(target, row["conditional"])
        assert without / 400 == pytest.approx(share, abs=0.06)


def test_batches_are_kept_and_continued(
    experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(experts, tmp_path / "prompts.txt")
    whole = {file.name: file.read_bytes() for file in recorded(asked, tmp_path / "whole")}
    files = recorded(asked, tmp_path / "again")
    kept = files[0].stat().st_mtime_ns
    files[1].unlink()
    assert {f.name: f.read_bytes() for f in recorded(asked, tmp_path / "again")} == whole
    assert files[0].stat().st_mtime_ns == kept
    # a run that needs fewer pictures loads no teacher
    fewer = recipe(experts, tmp_path / "prompts.txt", trajectories={"number": 3})
    monkeypatch.setattr(Teacher, "load", lambda *_: pytest.fail("loaded"))
    recorded(fewer, tmp_path / "again")
    assert len(read_rows(passes_of(fewer)[0], tmp_path / "again", 2)) == 2 * 2 + 3


def test_the_teacher_is_gone_afterwards(
    experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    load = Teacher.load

    def noted(self: Teacher, device: torch.device) -> Any:
        pipeline = load(self, device)
        seen.append(weakref.ref(denoiser_of(pipeline)))
        return pipeline

    monkeypatch.setattr(Teacher, "load", noted)
    recorded(recipe(experts, tmp_path / "prompts.txt"), tmp_path / "kept")
    gc.collect()
    assert len(seen) == 1
    assert seen[0]() is None


# -- refusals ---------------------------------------------------------------------------------


def test_another_teacher_is_refused(experts: list[Path], tmp_path: Path) -> None:
    recorded(recipe(experts, tmp_path / "prompts.txt"), tmp_path / "kept")
    other = recipe(experts[:2], tmp_path / "prompts.txt", student={"init": str(experts[0])})
    with refusal("AFA-EVAL-030", "teacher", str(tmp_path / "kept")):
        recorded(other, tmp_path / "kept")
    changed = recipe(experts, tmp_path / "prompts.txt", trajectories={"guidance": 4.0})
    with refusal("AFA-EVAL-030", "sampling"):
        recorded(changed, tmp_path / "kept")
    (tmp_path / "kept" / "trajectories" / "made_from.json").unlink()
    with refusal("AFA-EVAL-029", "trajectories"):
        recorded(changed, tmp_path / "kept")


def test_the_bound_on_disk(
    experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = recipe(experts, tmp_path / "prompts.txt", recording={"max_disk": "1KB"})
    with refusal("AFA-DISTILL-006", "max_disk"):
        recorded(small, tmp_path / "kept")
    assert not list((tmp_path / "kept").rglob("*.safetensors"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(recording.shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with refusal("AFA-DISTILL-007", "recording.folder"):
        recorded(recipe(experts, tmp_path / "prompts.txt"), tmp_path / "kept")


def test_the_bound_is_what_is_written(experts: list[Path], tmp_path: Path) -> None:
    """The estimate is of latents and predictions; headers and numbers come on top."""
    asked = recipe(experts, tmp_path / "prompts.txt")
    files = recorded(asked, tmp_path / "kept")
    tensors = [load_file(file) for file in files]
    names = ("noisy", "conditional", "unconditional")
    num_bytes = sum(each[name].nbytes for each in tensors for name in names)
    for limit, passes in ((num_bytes, True), (num_bytes - 1, False)):
        again = recipe(experts, tmp_path / "prompts.txt", recording={"max_disk": limit})
        place = tmp_path / f"limit-{limit}"
        if passes:
            recorded(again, place)
        else:
            with refusal("AFA-DISTILL-006"):
                recorded(again, place)


def test_a_full_disk(experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(experts, tmp_path / "prompts.txt")
    write = recording.Predictions.write
    count = 0

    def full(self: Any, place: Path, dtype: torch.dtype) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise OSError(28, "No space left on device")
        write(self, place, dtype)

    monkeypatch.setattr(recording.Predictions, "write", full)
    with refusal("AFA-DISTILL-009", "No space left", "same command"):
        recorded(asked, tmp_path / "kept")
    assert len(list((tmp_path / "kept").rglob("*.safetensors"))) == 1
    whole = {file.name: file.read_bytes() for file in recorded(asked, tmp_path / "whole")}
    assert {f.name: f.read_bytes() for f in recorded(asked, tmp_path / "kept")} == whole


def test_a_teacher_that_is_written_meanwhile(
    tmp_path: Path, experts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    mine = [tmp_path / expert.name for expert in experts[:2]]
    for expert, copy in zip(experts, mine, strict=False):
        shutil.copytree(expert, copy)
    asked = recipe(mine, tmp_path / "prompts.txt")
    weights = next((mine[1] / "unet").glob("*.safetensors"))
    record = Trajectories.record

    def disturbed(self: Any, pipeline: Any, number: int, tap: Any) -> Any:
        found = record(self, pipeline, number, tap)
        if number == 1:
            content = weights.read_bytes()
            with weights.open("r+b") as file:
                file.write(content)
        return found

    monkeypatch.setattr(Trajectories, "record", disturbed)
    with refusal("AFA-LOAD-100", weights.name):
        recorded(asked, tmp_path / "kept")
    assert len(list((tmp_path / "kept").rglob("*.safetensors"))) == 1


def test_prompts_that_are_cut_are_named(experts: list[Path], tmp_path: Path) -> None:
    asked = recipe(experts, tmp_path / "prompts.txt")
    (tmp_path / "prompts.txt").write_text("a fox\n" + "a very long prompt " * 40 + "\n")
    events = list(
        record_predictions(Teacher.of(asked), passes_of(asked), tmp_path / "kept", Engine("cpu"))
    )
    notes = [note for event in events for note in event.notes]
    assert len(notes) == 1
    assert notes[0].startswith("warning: ")
    assert "limit of 24" in notes[0]


def test_values_that_are_not_finite(
    experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Trajectories.record

    def broken(self: Any, pipeline: Any, number: int, tap: Any) -> Any:
        found = record(self, pipeline, number, tap)
        found.conditional[0] = torch.nan
        return found

    monkeypatch.setattr(Trajectories, "record", broken)
    with refusal("AFA-DISTILL-008", "batch 0 of trajectories"):
        recorded(recipe(experts, tmp_path / "prompts.txt"), tmp_path / "kept")


def test_trajectories_and_pictures_of_other_sizes(experts: list[Path], tmp_path: Path) -> None:
    pictures = {
        "data": {"scenes": {"num_samples": 4}, "resolution": 32},
        "number": 3,
        "share": 0.5,
    }
    asked = recipe(experts, tmp_path / "prompts.txt", pictures=pictures)
    with refusal("AFA-DISTILL-005", "pictures.data.resolution"):
        recorded(asked, tmp_path / "kept")
