"""A distillation from recipe to files: what is trained, what is written, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

import afa
from afa.cli import main
from afa.denoisers.kinds import denoiser_of
from afa.distilling.features import distance, expose_features
from afa.distilling.recipe import DistillRecipe, load_distill_recipe
from afa.distilling.run import distill
from afa.distilling.student import load_student
from afa.distilling.teacher import Teacher
from afa.evaluation.recipe import EvaluateRecipe
from afa.evaluation.run import evaluate
from afa.exporting import export_checkpoint
from afa.loading.pipeline import load_single
from afa.loading.student_record import baked_guidance
from afa.training.stopping import Stopped
from tests.distilling.students import as_written, files_of, recipe, steps_of
from tests.preflight.test_preflight import changed
from tests.refusal import refusal
from tests.tiny import tiny_pipeline
from tests.tiny_pipelines import saved_experts

LORA = {"what": "lora", "rank": 4}
FEATURES = {"sites": ["mid"], "weight": 0.1}


def as_yaml(asked: dict[str, Any], place: Path) -> Path:
    place.write_text(json.dumps(asked))  # JSON is YAML
    return place


# -- training ---------------------------------------------------------------------------------


def test_a_student_learns_its_teacher(experts: list[Path], tmp_path: Path) -> None:
    asked = recipe(
        experts,
        tmp_path / "prompts.txt",
        training={"num_steps": 60, "batch_size": 8, "learning_rate": 3e-3, "checkpoint_every": 60},
        validation={"num_samples": 4, "every": 4},
    )
    steps = steps_of(asked, tmp_path / "out")
    losses = [step.loss for step in steps]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    record = json.loads((tmp_path / "out" / "distill.json").read_text())
    held_out = record["validation_loss"]
    assert [each["step"] for each in held_out] == list(range(4, 61, 4))
    assert held_out[-1]["loss"] < held_out[0]["loss"]


def test_a_full_student_is_a_stock_pipeline(experts: list[Path], tmp_path: Path) -> None:
    asked = recipe(
        experts,
        tmp_path / "prompts.txt",
        previews={"prompts": ["a fox"], "every": 4, "num_steps": 1},
    )
    steps_of(asked, out := tmp_path / "out")
    stock: Any = DiffusionPipeline.from_pretrained(out)
    ours, _ = load_single(str(out))
    for name, tensor in stock.unet.state_dict().items():
        assert torch.equal(tensor, denoiser_of(ours).state_dict()[name])
    before: Any = DiffusionPipeline.from_pretrained(experts[0])
    changed = [
        name
        for name, tensor in before.unet.state_dict().items()
        if not torch.equal(tensor, stock.unet.state_dict()[name])
    ]
    assert len(changed) > 0.9 * len(before.unet.state_dict())
    for name, tensor in before.text_encoder.state_dict().items():
        assert torch.equal(tensor, stock.text_encoder.state_dict()[name])
    assert (out / "previews" / "step-00000004.png").is_file()
    assert "ensemble of 3 models" in (out / "README.md").read_text()


def test_the_mean_of_the_experts(experts: list[Path], tmp_path: Path) -> None:
    asked = recipe(experts, tmp_path / "prompts.txt", student={"init": "merge"})
    pipeline, hashes = load_student(Teacher.of(asked), asked.student)
    assert len(hashes) == 3 + 1
    states = [DiffusionPipeline.from_pretrained(e).unet.state_dict() for e in experts]
    for name, tensor in denoiser_of(pipeline).state_dict().items():
        mean = torch.stack([state[name] for state in states]).mean(0)
        torch.testing.assert_close(tensor, mean)
    again: Any = DiffusionPipeline.from_pretrained(experts[0])
    for name, tensor in states[0].items():  # the experts' files are mapped, and not written
        assert torch.equal(tensor, again.unet.state_dict()[name])
    assert steps_of(asked, tmp_path / "out")


def test_an_expert_by_name(experts: list[Path], tmp_path: Path) -> None:
    asked = recipe(experts, tmp_path / "prompts.txt", student={"init": {"expert": "expert1"}})
    pipeline, _ = load_student(Teacher.of(asked), asked.student)
    named: Any = DiffusionPipeline.from_pretrained(experts[1])
    for name, tensor in named.unet.state_dict().items():
        assert torch.equal(tensor, denoiser_of(pipeline).state_dict()[name])
    other = recipe(experts, tmp_path / "prompts.txt", student={"init": {"expert": "fox"}})
    with refusal("AFA-DISTILL-002", "'fox'", "expert0, expert1, expert2"):
        list(distill(other, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_text_encoders(experts: list[Path], tmp_path: Path) -> None:
    for what in ({}, LORA):
        asked = recipe(
            experts,
            tmp_path / "prompts.txt",
            student={"init": str(experts[0]), "text_encoder": True, **what},
        )
        out = tmp_path / f"out{len(what)}"
        steps_of(asked, out)
        if what:
            names = load_file(out / "lora-diffusers.safetensors")
            assert any(name.startswith("text_encoder.text_model.") for name in names)
            names = load_file(out / "lora.safetensors")
            assert any(name.startswith("lora_te_text_model_") for name in names)
            continue
        before: Any = DiffusionPipeline.from_pretrained(experts[0])
        after: Any = DiffusionPipeline.from_pretrained(out)
        own, new = before.text_encoder.state_dict(), after.text_encoder.state_dict()
        assert any(not torch.equal(tensor, new[name]) for name, tensor in own.items())


def test_several_sources(experts: list[Path], tmp_path: Path) -> None:
    pictures = {
        "data": {"scenes": {"num_samples": 4}, "resolution": 16},
        "number": 4,
        "share": 0.5,
    }
    asked = recipe(experts, tmp_path / "prompts.txt", pictures=pictures)
    assert len(steps_of(asked, tmp_path / "out")) == 4
    assert "noised pictures" in (tmp_path / "out" / "README.md").read_text()


def test_guidance_is_baked_in(experts: list[Path], tmp_path: Path) -> None:
    asked = recipe(experts, tmp_path / "prompts.txt", guidance={"bake_in": 3.0})
    steps_of(asked, out := tmp_path / "out")
    assert "guidance (CFG) 1" in (out / "README.md").read_text()
    list(export_checkpoint(str(out), tmp_path / "one.safetensors"))
    lora = recipe(
        experts,
        tmp_path / "prompts.txt",
        guidance={"bake_in": 3.0},
        student={"init": str(experts[0]), **LORA},
    )
    steps_of(lora, tmp_path / "lora")
    files = [out, tmp_path / "one.safetensors", tmp_path / "lora" / "lora.safetensors"]
    assert [baked_guidance(file) for file in files] == [3.0, 3.0, 3.0]
    assert baked_guidance(experts[0]) is None
    method = {"name": "a", "model": str(out)}
    common = {
        "prompts": {"zoo": {"kinds": {"mixed": 1}}},
        "sampling": {"num_steps": 1, "device": "cpu", "height": 64, "width": 64},
        "metrics": ["scenes"],
    }
    for own, expected in (({}, 1), ({"guidance": 1}, 0)):
        compared = EvaluateRecipe.model_validate({**common, "methods": [{**method, **own}]})
        events = evaluate(compared, tmp_path / f"compared{len(own)}")
        notes = [note for event in events for note in event.notes if "guidance 3 already" in note]
        assert len(notes) == expected
        report = (tmp_path / f"compared{len(own)}" / "report.md").read_text()
        assert ("another guidance: a: 1" in report) == bool(own)


# -- LoRAs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["1.5", pytest.param("xl", marks=pytest.mark.nightly)])
def test_lora_files_are_the_student(kind: str, experts: list[Path], tmp_path: Path) -> None:
    """In diffusers and in afa, in both namings: the same change of weights."""
    folders = experts if kind == "1.5" else saved_experts(kind, tmp_path / "kinds", count=2)
    student = {"init": str(folders[0]), "text_encoder": True, **LORA}
    asked = recipe(folders, tmp_path / "prompts.txt", student=student)
    steps_of(asked, out := tmp_path / "out")
    before: Any = DiffusionPipeline.from_pretrained(folders[0])
    states = {}
    for file in ("lora.safetensors", "lora-diffusers.safetensors"):
        stock: Any = DiffusionPipeline.from_pretrained(folders[0])
        stock.load_lora_weights(str(out), weight_name=file)
        stock.fuse_lora()
        stock.unload_lora_weights()
        ours, _ = load_single({"base": str(folders[0]), "lora": str(out / file)})
        states[f"diffusers {file}"] = stock.unet.state_dict()
        states[f"afa {file}"] = denoiser_of(ours).state_dict()
        own = ours.text_encoder.state_dict()
        for name, tensor in stock.text_encoder.state_dict().items():
            torch.testing.assert_close(tensor, own[name], rtol=0, atol=1e-5)
    adapters = load_file(out / "lora-diffusers.safetensors")
    changed = 0
    for name, tensor in before.unet.state_dict().items():
        layer = name.removesuffix(".weight")
        factors = [adapters.get(f"unet.{layer}.lora_{side}.weight") for side in "BA"]
        expected = tensor
        if factors[0] is not None and factors[1] is not None:
            up, down = (factor.flatten(1) for factor in factors if factor is not None)
            expected = tensor + (up @ down).reshape(tensor.shape)
            changed += 1
        for what, state in states.items():
            torch.testing.assert_close(state[name], expected, rtol=0, atol=1e-5, msg=what)
    assert changed > 20
    for file in ("lora.safetensors", "lora-diffusers.safetensors"):
        with safe_open(out / file, framework="pt") as opened:
            metadata = opened.metadata()
        assert json.loads(metadata["afa_distill"])["student"]["rank"] == 4
        assert metadata["modelspec.title"] == "out"
    assert not (out / "model_index.json").exists()


@pytest.mark.parametrize(
    "kind", ["sd3", "flux", "chroma", "z-image", "klein", "qwen-image", "pixart"]
)
def test_loras_of_transformers(kind: str, tmp_path: Path) -> None:
    folders = saved_experts(kind, tmp_path / "kinds", count=2)
    asked = recipe(folders, tmp_path / "prompts.txt", student={"init": str(folders[0]), **LORA})
    steps_of(asked, out := tmp_path / "out")
    assert not (out / "lora-diffusers.safetensors").exists()
    ours, _ = load_single({"base": str(folders[0]), "lora": str(out / "lora.safetensors")})
    before, _ = load_single(str(folders[0]))
    states = denoiser_of(before).state_dict(), denoiser_of(ours).state_dict()
    assert sum(not torch.equal(states[0][name], states[1][name]) for name in states[0]) > 5


# -- the same bytes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "student", [{}, pytest.param(LORA, marks=pytest.mark.nightly)], ids=["full", "lora"]
)
def test_stopped_anywhere_it_ends_with_the_same_bytes(
    student: dict[str, Any], experts: list[Path], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "student": {"init": str(experts[0]), **student},
        "training": {"ema_decay": 0.9},
        "validation": {"num_samples": 2, "every": 2},
    }
    asked = recipe(experts, tmp_path / "prompts.txt", **changes)
    calls = 0

    def counted() -> bool:
        nonlocal calls
        calls += 1
        return False

    list(distill(asked, tmp_path / "out", should_stop=counted))
    whole = files_of(tmp_path / "out")
    assert calls == 3 + 4
    for moment in range(1, calls):
        out = tmp_path / f"at{moment}" / "out"
        left = moment

        def stop() -> bool:
            nonlocal left
            left -= 1
            return left == 0

        with pytest.raises(Stopped):
            list(distill(asked, out, should_stop=stop))
        list(distill(asked, out))
        assert files_of(out) == whole, f"stopped at {moment}"


def test_another_recipe_does_not_resume(experts: list[Path], tmp_path: Path) -> None:
    asked = recipe(experts, tmp_path / "prompts.txt")
    steps_of(asked, tmp_path / "out")
    other = recipe(experts, tmp_path / "prompts.txt", training={"learning_rate": 1e-2})
    with refusal("AFA-DISTILL-015", "training.learning_rate"):
        list(distill(other, tmp_path / "out"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with refusal("AFA-DISTILL-015", "has no distillation"):
        list(distill(asked, tmp_path / "mine"))


# -- refusals before any work -----------------------------------------------------------------


def test_a_student_of_another_objective(experts: list[Path], tmp_path: Path) -> None:
    """Of experts with several, it learns what the first one predicts."""
    file = "scheduler/scheduler_config.json"
    other = changed(experts[1], tmp_path / "velocity", file, prediction_type="v_prediction")
    for init in ("merge", str(other), {"expert": "velocity"}):
        asked = recipe([experts[0], other], tmp_path / "prompts.txt", student={"init": init})
        with refusal("AFA-DISTILL-011", "v_prediction", "student.init"):
            list(distill(asked, tmp_path / "out"))


def test_a_student_of_another_architecture(experts: list[Path], tmp_path: Path) -> None:
    xl = saved_experts("xl", tmp_path / "kinds", count=1)[0]
    wide: Any = tiny_pipeline(tmp_path / "tokenizer", block_out_channels=(32, 96))
    wide.save_pretrained(tmp_path / "wide")
    for other in (xl, tmp_path / "wide"):
        asked = recipe(experts, tmp_path / "prompts.txt", student={"init": str(other)})
        with refusal("AFA-DISTILL-011", other.name, "student.init"):
            list(distill(asked, tmp_path / "out"))
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trajectories": None}, "trajectories, pictures or both"),
        ({"student": {"init": "merge", "what": "lora"}}, "afa merge"),
        ({"student": {"rank": 4}}, "rank"),
        ({"guidance": {"bake_in": 3}, "trajectories": {"guidance": 1}}, "above 1"),
        ({"training": {"entropy_weight": 0.1}}, "entropy_weight"),
        ({"training": {"expert_dtype": "float32"}}, "expert_dtype"),
        ({"teacher": {"fusion": {"rule": "feature_mean"}, "acceleration": "fast"}}, "acceler"),
        ({"teacher": {"model": ["./a", "./b"]}, "experts": None}, "one model"),
        ({"teacher": {"model": "./a"}}, "merge or fusion"),
        ({"recording": {"max_disk": "much"}}, "20GB"),
        (
            {"pictures": {"data": {"scenes": {}}, "number": 4}},
            "pictures.share",
        ),
    ],
)
def test_recipes_that_are_refused(
    changes: dict[str, Any], said: str, experts: list[Path], tmp_path: Path
) -> None:
    asked = as_written(experts, tmp_path / "prompts.txt", **changes)
    with refusal("AFA-RECIPE-002", said):
        load_distill_recipe(as_yaml(asked, tmp_path / "recipe.yaml"))


def test_default_learning_rates(experts: list[Path], tmp_path: Path) -> None:
    asked = as_written(experts, tmp_path / "prompts.txt")
    del asked["training"]["learning_rate"]
    rates = []
    for what in ("full", "lora"):
        asked["student"]["what"] = what
        rates.append(DistillRecipe.model_validate(asked).training.learning_rate)
    assert rates == [1e-5, 1e-4]


def test_the_command(
    experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = as_written(experts, tmp_path / "prompts.txt")
    asked["experts"] = [f"./{path.name}" for path in experts]
    for expert in experts:
        (tmp_path / expert.name).symlink_to(expert)
    place = as_yaml(asked, tmp_path / "recipe.yaml")
    with pytest.raises(SystemExit) as stop:
        main(["check", str(place)])
    assert stop.value.code == 0
    with pytest.raises(SystemExit) as stop:
        main(["distill", str(place), "--output", str(tmp_path / "out"), "--no-check"])
    assert stop.value.code == 0
    assert "afa export" in " ".join(capsys.readouterr().out.split())
    file = tmp_path / "one.safetensors"
    with pytest.raises(SystemExit) as stop:
        main(["export", str(tmp_path / "out"), "--output", str(file)])
    assert stop.value.code == 0
    with safe_open(file, framework="pt") as opened:
        record = json.loads(opened.metadata()["afa_distill"])
    assert record["training"]["num_steps"] == 4
    assert afa.distill is distill


# -- features ---------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["fusion", pytest.param("model", marks=pytest.mark.nightly)])
def test_features_at_sites(teacher: str, experts: list[Path], tmp_path: Path) -> None:
    """The same predictions are recorded, and with a weight near zero the same student comes out."""
    changes: dict[str, Any] = {}
    if teacher == "model":
        changes = {"teacher": {"model": str(experts[1])}, "experts": None}
    sites = ["mid", "up.0.0"]
    plain = recipe(experts, tmp_path / "prompts.txt", **changes)
    tiny = recipe(
        experts, tmp_path / "prompts.txt", **changes, features={"sites": sites, "weight": 1e-20}
    )
    losses = [[step.loss for step in steps_of(plain, tmp_path / "plain")]]
    losses.append([step.loss for step in steps_of(tiny, tmp_path / "tiny")])
    assert losses[0] == losses[1]
    shards = [
        load_file(tmp_path / name / "recorded" / "trajectories" / "000001.safetensors")
        for name in ("plain", "tiny")
    ]
    for name, tensor in shards[0].items():
        assert torch.equal(tensor, shards[1][name]), name
    extra = shards[1].keys() - shards[0].keys()
    assert extra == {
        f"{kind}.{site}" for kind in ("features", "features_without") for site in sites
    }
    # the student of a strong weight is another one, and nearer to these features
    strong = recipe(
        experts,
        tmp_path / "prompts.txt",
        **changes,
        features={"sites": sites, "weight": 10.0},
        training={"num_steps": 40, "checkpoint_every": 40},
    )
    weak = recipe(
        experts,
        tmp_path / "prompts.txt",
        **changes,
        features={"sites": sites, "weight": 1e-20},
        training={"num_steps": 40, "checkpoint_every": 40},
    )
    distances = []
    for name, asked in (("strong", strong), ("weak", weak)):
        steps_of(asked, tmp_path / name)
        student: Any = DiffusionPipeline.from_pretrained(tmp_path / name).unet
        tap = expose_features(student, sites)
        shard = shards[1]
        student(shard["noisy"][:1], shard["timestep"][:1], torch.zeros(1, 24, 16))
        targets = {site: shard[f"features.{site}"][:1] for site in sites}
        distances.append(float(distance(tap.seen, targets)))
    assert distances[0] < distances[1]


def test_sites_that_do_not_exist(experts: list[Path], tmp_path: Path) -> None:
    asked = recipe(experts, tmp_path / "prompts.txt", features={"sites": ["up.9.9"]})
    with refusal("AFA-DISTILL-017", "up.9.9", "mid"):
        steps_of(asked, tmp_path / "out")
    rule = {"fusion": {"rule": "magic_fusion", "temperatures": [1.0, 1.0]}}
    two = recipe(experts[:2], tmp_path / "prompts.txt", teacher=rule, features={"sites": ["mid"]})
    with refusal("AFA-DISTILL-018", "mid"):
        steps_of(two, tmp_path / "two")


# -- together with other settings -------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "features"),
    [
        ({}, None),
        (LORA, FEATURES),
        pytest.param(LORA, None, marks=pytest.mark.nightly),
        pytest.param({}, FEATURES, marks=pytest.mark.nightly),
        pytest.param({"text_encoder": True}, None, marks=pytest.mark.nightly),
        pytest.param({"text_encoder": True}, FEATURES, marks=pytest.mark.nightly),
    ],
)
def test_gradient_checkpointing_changes_nothing(
    student: dict[str, Any], features: Any, experts: list[Path], tmp_path: Path
) -> None:
    losses = []
    for name, on in (("plain", False), ("checkpointed", True)):
        asked = recipe(
            experts,
            tmp_path / "prompts.txt",
            student={"init": str(experts[0]), **student},
            features=features,
            training={"gradient_checkpointing": on},
        )
        losses.append([step.loss for step in steps_of(asked, tmp_path / name)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_predictions_in_half_precision(experts: list[Path], tmp_path: Path) -> None:
    losses = []
    for dtype in ("float32", "bfloat16"):
        asked = recipe(experts, tmp_path / "prompts.txt", recording={"dtype": dtype})
        losses.append([step.loss for step in steps_of(asked, tmp_path / dtype)])
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    sizes = [
        sum(f.stat().st_size for f in (tmp_path / d / "recorded").rglob("*.safetensors"))
        for d in ("float32", "bfloat16")
    ]
    assert sizes[1] < 0.8 * sizes[0]


@pytest.mark.parametrize("kind", ["sd3", pytest.param("flux", marks=pytest.mark.nightly), "pixart"])
def test_text_encoders_of_transformers(kind: str, tmp_path: Path) -> None:
    """A full student trains them all; a LoRA only those of CLIP, or it is refused."""
    folders = saved_experts(kind, tmp_path / "kinds", count=2)
    student = {"init": str(folders[0]), "text_encoder": True}
    steps_of(recipe(folders, tmp_path / "prompts.txt", student=student), tmp_path / "full")
    lora = recipe(folders, tmp_path / "prompts.txt", student={**student, **LORA})
    if kind == "pixart":
        with refusal("AFA-DISTILL-020"):
            steps_of(lora, tmp_path / "lora")
        return
    steps_of(lora, tmp_path / "lora")
    names = {name.partition(".")[0] for name in load_file(tmp_path / "lora" / "lora.safetensors")}
    clip = {"sd3": {"text_encoder", "text_encoder_2"}, "flux": {"text_encoder"}}[kind]
    assert names == {"transformer", *clip}
    ours, _ = load_single(
        {"base": str(folders[0]), "lora": str(tmp_path / "lora" / "lora.safetensors")}
    )
    before, _ = load_single(str(folders[0]))
    own, new = before.text_encoder.state_dict(), ours.text_encoder.state_dict()
    assert any(not torch.equal(tensor, new[name]) for name, tensor in own.items())


def test_a_lora_on_a_lora_is_refused(experts: list[Path], tmp_path: Path) -> None:
    steps_of(
        recipe(experts, tmp_path / "prompts.txt", student={"init": str(experts[0]), **LORA}),
        tmp_path / "first",
    )
    source = {"base": str(experts[0]), "lora": str(tmp_path / "first" / "lora.safetensors")}
    again = recipe(experts, tmp_path / "prompts.txt", student={"init": source, **LORA})
    with refusal("AFA-DISTILL-019", "what: full"):
        steps_of(again, tmp_path / "again")
    full = recipe(experts, tmp_path / "prompts.txt", student={"init": source})
    assert steps_of(full, tmp_path / "full")
