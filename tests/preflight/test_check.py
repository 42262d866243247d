"""`afa check`, and the same check at the start of long commands."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import afa
from afa.cli import main
from afa.cli.check import plan_for, read_any
from afa.errors import AfaError
from afa.loading.memory.needs import Training
from afa.loading.planned import Work
from afa.preflight.machine import Estimate, Job, fits, largest_batch
from afa.preflight.run import Report, look
from afa.training.planned import plan_of_training
from afa.training.recipe import load_recipe
from tests.cli.test_cli import AGGREGATOR, run, write_recipe
from tests.preflight.test_preflight import changed
from tests.refusal import refusal
from tests.single_file import original_layout

pytestmark = pytest.mark.slow

UNET = "unet/diffusion_pytorch_model.safetensors"


def looked(folder: Path, experts: list[Any], **changes: Any) -> Report:
    names = [expert if isinstance(expert, dict) else str(expert) for expert in experts]
    recipe = {
        "experts": names,
        "data": {"scenes": {"num_samples": 10}},
        "aggregator": AGGREGATOR,
        "training": {"num_steps": 2, "batch_size": 2, "device": "cpu"},
        **changes,
    }
    place = folder / "recipe.yaml"
    place.write_text(yaml.safe_dump(recipe))
    return look(plan_of_training(load_recipe(place)))


def levels(report: Report) -> set[tuple[str, str]]:
    return {(finding.level, finding.check) for finding in report.findings}


def edited(expert: Path, copy: Path, file: str = UNET, **tensors: Any) -> Path:
    """A copy with other values; a function is given what was there."""
    shutil.copytree(expert, copy)
    found = load_file(copy / file)
    for key, change in tensors.items():
        name = key.replace("__", ".")
        found[name] = change(found[name])
    save_file(found, copy / file, {"format": "pt"})
    return copy


def test_sound_experts(experts: list[Path], tmp_path: Path) -> None:
    report = looked(tmp_path, experts)
    assert not report.errors
    assert ("warning", "duplicates") not in levels(report)
    assert [each.facts.short for each in report.experts] == ["expert0", "expert1", "expert2"]
    assert all(each.manifest.num_bytes > 0 and each.dtypes == "F32" for each in report.experts)
    found = report.estimates["training"]
    assert 0 < found.takes < found.free
    assert found.seconds > 0
    assert found.num_steps == 2


def test_weights_that_are_no_numbers(experts: list[Path], tmp_path: Path) -> None:
    def spoilt(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(torch.nan)

    wrong = edited(experts[1], tmp_path / "wrong", conv_in__bias=spoilt)
    (error,) = looked(tmp_path, [experts[0], wrong]).errors
    assert error.check == "weights"
    assert "'conv_in.bias' of 'wrong'" in error.text
    assert "All pictures would be black." in error.text


@pytest.mark.parametrize("part", ["text_encoder/model", "vae/diffusion_pytorch_model"])
def test_other_parts_are_read_as_well(part: str, experts: list[Path], tmp_path: Path) -> None:
    file = f"{part}.safetensors"
    name = sorted(load_file(experts[1] / file))[0].replace(".", "__")

    def spoilt(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(torch.inf)

    wrong = edited(experts[1], tmp_path / "wrong", file, **{name: spoilt})
    assert ("error", "weights") in levels(looked(tmp_path, [experts[0], wrong]))


def test_values_beyond_float16(experts: list[Path], tmp_path: Path) -> None:
    wrong = edited(experts[1], tmp_path / "w", conv_in__bias=lambda tensor: tensor.fill_(1e6))
    settings = {"num_steps": 2, "batch_size": 2, "device": "cpu"}
    half = looked(tmp_path, [experts[0], wrong], training={**settings, "expert_dtype": "float16"})
    assert half.errors[0].code == "AFA-CHECK-008"
    assert re.search("'conv_in.bias' of 'w' .* 1e[+]06, .* 65504", half.errors[0].text)
    brain = {**settings, "expert_dtype": "bfloat16"}
    assert not looked(tmp_path, [experts[0], wrong], training=brain).errors


def test_the_same_weights_twice(experts: list[Path], tmp_path: Path) -> None:
    shutil.copytree(experts[0], tmp_path / "renamed")
    report = looked(tmp_path, [experts[0], tmp_path / "renamed"])
    assert "'renamed' has the same weights as 'expert0'" in report.errors[0].text
    assert not looked(tmp_path, [experts[0], tmp_path / "renamed"], allow_duplicates=True).errors


def test_nearly_the_same_weights(experts: list[Path], tmp_path: Path) -> None:
    def nudged(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 1e-4

    near = edited(experts[0], tmp_path / "near", conv_in__bias=nudged)
    report = looked(tmp_path, [experts[0], near, experts[1]])
    (warning,) = [finding for finding in report.findings if finding.check == "duplicates"]
    assert warning.level == "warning"
    assert "'near' and 'expert0' have a cosine similarity of 1.0000" in warning.text


def test_shapes_that_are_not_what_the_configuration_says(
    experts: list[Path], tmp_path: Path
) -> None:
    wrong = edited(experts[1], tmp_path / "w", conv_in__bias=lambda tensor: torch.zeros(3))
    errors = looked(tmp_path, [experts[0], wrong]).errors
    assert errors[0].code == "AFA-CHECK-005"
    assert re.search(r"'conv_in.bias' has shape \(3,\) .* \(8,\)", errors[0].text)
    shutil.copytree(experts[1], tmp_path / "lacking")
    tensors = load_file(tmp_path / "lacking" / UNET)
    del tensors["mid_block.resnets.0.conv1.weight"]
    save_file(tensors, tmp_path / "lacking" / UNET, {"format": "pt"})
    errors = looked(tmp_path, [experts[0], tmp_path / "lacking"]).errors
    assert "'mid_block.resnets.0.conv1.weight' is missing" in errors[0].text


@pytest.mark.parametrize(
    ("file", "changes", "level", "check"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "logits"}, "error", "schedule"),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "note", "sched"),
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}, "note", "schedule"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "error", "schedule"),
        ("vae/config.json", {"latent_channels": 16}, "error", "latents"),
        ("vae/config.json", {"shift_factor": 0.5}, "error", "latents"),
        ("unet/config.json", {"cross_attention_dim": 24}, "error", "architecture"),
        ("text_encoder/config.json", {"hidden_size": 24}, "error", "text encoders"),
    ],
)
def test_configurations_that_do_not_fit(
    file: str, changes: dict[str, Any], level: str, check: str, experts: list[Path], tmp_path: Path
) -> None:
    other = changed(experts[1], tmp_path / "other", file, **changes)
    found = levels(looked(tmp_path, [experts[0], other]))
    assert any(l == level and c.startswith(check[:5]) for l, c in found), found  # noqa: E741


def test_zero_terminal_snr_wants_trailing_timesteps(experts: list[Path], tmp_path: Path) -> None:
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    file = "scheduler/scheduler_config.json"
    copies = [changed(e, tmp_path / e.name, file, **settings) for e in experts[:2]]
    report = looked(tmp_path, copies)
    assert not report.errors
    warnings = [finding.text for finding in report.findings if finding.level == "warning"]
    assert any("should be 'trailing'" in text for text in warnings)


def test_a_configuration_that_describes_no_model(experts: list[Path], tmp_path: Path) -> None:
    """The library divides by zero when it builds this one."""
    file = "unet/config.json"
    copies = [changed(e, tmp_path / e.name, file, attention_head_dim=0) for e in experts[:2]]
    report = looked(tmp_path, copies)
    assert {error.check for error in report.errors} == {"architecture"}
    assert report.errors[0].code == "AFA-CHECK-003"
    assert "integer division or modulo by zero" in report.errors[0].text
    assert not report.estimates


def test_all_errors_are_listed_and_the_first_is_raised(experts: list[Path], tmp_path: Path) -> None:
    wrong = [tmp_path / "a", tmp_path / "b", experts[0]]
    report = looked(tmp_path, wrong)
    assert len(report.errors) == 2
    with refusal("AFA-LOAD-079", "/a", r"\(1"):
        report.require()


def test_what_does_not_fit_comes_with_what_does(
    experts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # what tests before this one have left in the process is not to decide
    monkeypatch.setattr("afa.preflight.machine.program_bytes", lambda _: 300_000_000)
    cpu = torch.device("cpu")
    work = Work(cpu, 6400, "batch_size", training=Training())
    job = Job(experts[0], 2, 2, None, torch.float32, work)
    found = job.estimate()
    assert not list(fits(job, found))
    little = Estimate(found.takes, int(found.takes / 1.1), 1.0, 1)
    assert [finding.level for finding in fits(job, little)] == ["warning"]
    tight = Estimate(found.takes, job.bytes(1600), 1.0, 1)
    (finding,) = fits(job, tight)
    assert finding.level == "error"
    assert largest_batch(job, tight) == 1600
    assert "batch_size: 1600 with gradient_accumulation_steps: 4" in finding.remedy
    assert "gradient_checkpointing: true" in finding.remedy
    assert "memory-budget" not in finding.remedy


def test_pictures_with_guidance_are_two_samples_each(experts: list[Path]) -> None:
    cpu = torch.device("cpu")
    work = Work(cpu, 64, "sampling.batch_size", samples_each=2)
    job = Job(experts[0], 2, 2, None, torch.float32, work)
    takes = job.bytes(64)
    assert takes == replace(job, work=replace(work, samples_each=1)).bytes(128)
    tight = Estimate(takes, job.bytes(16), 1.0, 1)
    assert largest_batch(job, tight) == 16
    (finding,) = fits(job, tight)
    assert "sampling.batch_size: 16, or" in finding.remedy
    assert "gradient" not in finding.remedy


def test_a_picture_that_does_not_fit(
    experts: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("train", write_recipe(tmp_path, experts), "--output", tmp_path / "run") == 0
    monkeypatch.setattr("afa.preflight.machine.free_memory", lambda _: 100_000_000)
    asked = ("generate", tmp_path / "run", "a fox", "--steps", 1, "--device", "cpu", "--output")
    capsys.readouterr()
    assert run(*asked, tmp_path / "new") == 2
    said = capsys.readouterr().err
    assert "AFA-CHECK-002" in said
    assert "--memory-budget" in said
    assert "batch_size" not in said
    assert not (tmp_path / "new").exists()
    assert run(*asked, tmp_path / "new", "--no-check") == 0


# -- the command ------------------------------------------------------------------------------


def test_the_command(
    experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, experts)
    before = sorted(tmp_path.rglob("*"))
    assert run("check", recipe) == 0
    said = capsys.readouterr().out
    assert "Stable Diffusion" in said
    assert "of memory" in said
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written
    recipe = write_recipe(tmp_path, [*experts, tmp_path / "nowhere"])
    assert run("check", recipe) == 2
    said = capsys.readouterr().out
    assert "ERROR  files [AFA-LOAD-0" in said
    assert run("check", recipe, "--json", "--no-weights") == 2
    found = json.loads(capsys.readouterr().out)
    assert found["findings"][0]["level"] == "error"
    assert [expert["identity"] for expert in found["experts"]] == [None] * 3


RECIPES: dict[str, dict[str, Any]] = {
    "merge": {"method": "weighted"},
    "evaluate": {
        "prompts": {"zoo": {"kinds": {"mixed": 2}}},
        "methods": [{"name": "fusion", "fusion": {"rule": "feature_mean"}}],
        "metrics": ["scenes"],
        "sampling": {"device": "cpu"},
    },
    "search": {
        "prompts": {"zoo": {"kinds": {"mixed": 2}, "held_out": False}},
        "metric": "scenes",
        "sampling": {"device": "cpu"},
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_every_command(name: str, experts: list[Path], tmp_path: Path) -> None:
    place = tmp_path / "recipe.yaml"
    place.write_text(yaml.safe_dump({**RECIPES[name], "experts": [str(e) for e in experts[:2]]}))
    report = look(plan_for(place, read_any(place)))
    assert not report.errors, report.errors
    assert len(report.experts) == 2
    assert bool(report.estimates) == (name != "merge")


def test_an_ensemble_is_looked_at_as_it_is(experts: list[Path], tmp_path: Path) -> None:
    assert run("train", write_recipe(tmp_path, experts), "--output", tmp_path / "run") == 0
    report = look(plan_for(tmp_path / "run", None))
    assert not report.errors
    assert len(report.experts) == 3


def test_what_is_no_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("a: 1\n")
    assert run("check", tmp_path / "a.yaml") == 2
    assert "AFA-CLI-005" in capsys.readouterr().err


def parts_of_a_file(expert: Path, folder: Path) -> dict[str, str]:
    """A single file without text encoder and autoencoder, which are files of their own."""
    tensors = original_layout(StableDiffusionPipeline.from_pretrained(expert))
    marks = {"encoder": "cond_stage_model.", "vae": "first_stage_model.", "denoiser": "model."}
    for name, mark in marks.items():
        part = {key: tensor for key, tensor in tensors.items() if key.startswith(mark)}
        save_file(part, folder / f"{name}.safetensors")
    return {name: str(folder / f"{name}.safetensors") for name in marks}


@pytest.mark.parametrize(
    ("supplied", "said"),
    [
        ((), "lacks the text encoders text_encoder"),
        (("vae",), "lacks the text encoders text_encoder"),
        (("encoder",), "must have one. Set vae"),
        (("nowhere",), "does not exist"),
        (("encoder", "vae"), None),
    ],
    ids=str,
)
def test_what_nobody_supplies_to_a_file(
    supplied: tuple[str, ...],
    said: str | None,
    experts: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is refused before anything is loaded, by the check as by the training."""
    files = parts_of_a_file(experts[0], tmp_path) | {"nowhere": str(tmp_path / "nowhere")}
    recipe: dict[str, Any] = {
        "experts": [files["denoiser"], str(experts[1])],
        "config": str(experts[0]),
        "parts": [files[name] for name in supplied],
        "data": {"scenes": {"num_samples": 8}, "resolution": 16},
        "training": {"num_steps": 1, "device": "cpu"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(SystemExit) as stop:
        main(["check", str(tmp_path / "recipe.yaml"), "--no-weights"])
    line = next((x for x in capsys.readouterr().out.splitlines() if x.startswith("ERROR")), "")
    assert stop.value.code == (0 if said is None else 2), line
    if said is None:
        return
    assert said in line
    with pytest.raises(AfaError) as refused:
        afa.load_pipeline(recipe["experts"], config=recipe["config"], parts=recipe["parts"])
    assert str(refused.value) in line
