"""Estimates are of what is loaded: experts, aggregators, and samples of a step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import afa
from afa.evaluation.planned import plan_of_evaluation
from afa.evaluation.recipe import EvaluateRecipe
from afa.loading.planned import Group, Plan, plan_of_ensemble
from afa.loading.single_file.load import Companions
from afa.preflight.run import Report, look
from tests.preflight.test_preflight import changed
from tests.tiny import tiny_pipeline
from tests.tiny_pipelines import saved_experts

CPU = torch.device("cpu")
SETTINGS: list[dict[str, Any]] = [
    {"hidden_ratio": None, "min_scale": 1},  # not written: the values of the first release
    {},
    {"hidden_ratio": 0.5, "min_scale": 4, "sharing": "width", "stride": 2, "prompt": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_estimate_is_of_the_aggregators_that_are_loaded(
    settings: dict[str, Any], experts: list[Path], tmp_path: Path
) -> None:
    config = afa.SABWConfig(
        hidden_size=64, num_layers=2, num_heads=2, norm_num_groups=4, **settings
    )
    afa.save_ensemble(afa.load_pipeline(experts[:2], config), tmp_path / "ensemble")
    (group,) = plan_of_ensemble(tmp_path / "ensemble", torch.float32, CPU).groups
    assert group.aggregators == config
    loaded: Any = afa.load_ensemble(tmp_path / "ensemble")
    last = loaded.unet.aggregators[-1].config
    for name in (*settings, "hidden_size", "num_layers", "num_heads", "norm_num_groups"):
        assert getattr(group.aggregators, name) == getattr(last, name), name


def evaluation(expert: Path, guidance: float) -> Plan:
    recipe = {
        "prompts": {"zoo": {"kinds": {"mixed": 1}}},
        "methods": [{"name": "a", "model": str(expert)}],
        "metrics": ["scenes"],
        "sampling": {"guidance": guidance, "device": "cpu", "height": 512, "width": 512},
    }
    return plan_of_evaluation(EvaluateRecipe.model_validate(recipe))


def takes(plan: Plan) -> int:
    (estimate,) = look(plan, with_weights=False).estimates.values()
    return estimate.takes


def test_a_step_has_the_samples_that_pipelines_give_it(
    experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what this process takes already differs from one moment to the next
    monkeypatch.setattr("afa.preflight.machine.program_bytes", lambda _: 0)
    assert takes(evaluation(experts[0], 1.0)) < takes(evaluation(experts[0], 7.5))
    (flux,) = saved_experts("flux", tmp_path, count=1)
    # what it was distilled with is an input, no second half of the batch
    assert takes(evaluation(flux, 1.0)) == takes(evaluation(flux, 7.5))


def notes_on_autoencoders(report: Report) -> list[str]:
    return [finding.text for finding in report.findings if finding.check == "autoencoder"]


def test_experts_of_one_name_have_autoencoders_of_their_own(
    experts: list[Path], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(experts[1], tmp_path / experts[0].name))
    pipeline = tiny_pipeline(tmp_path / "tokenizer")
    torch.nn.init.ones_(pipeline.vae.decoder.conv_in.bias)
    pipeline.vae.save_pretrained(other / "vae")
    group = Group("x", [experts[0], other], Companions(torch.float32))
    (note,) = notes_on_autoencoders(look(Plan([group]), with_weights=False))
    assert f"({experts[0].name}, {experts[0].name})" in note


def test_a_single_file_is_looked_at_with_each_configuration(
    experts: list[Path], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    from tests.single_file import original_layout

    file = tmp_path / "expert.safetensors"
    save_file(original_layout(tiny_pipeline(tmp_path / "tokenizer")), file)
    scheduler = "scheduler/scheduler_config.json"
    other = changed(experts[0], tmp_path / "other", scheduler, prediction_type="v_prediction")
    groups = [
        Group(config.name, [config, file], Companions(torch.float32, config=config))
        for config in (experts[0], other)
    ]
    report = look(Plan(groups), with_weights=False)
    assert not [finding for finding in report.errors if "prediction_type" in finding.text]
    looks = [each for each in report.experts if each.manifest.path == file]
    found = [each.facts.schedule["prediction_type"] for each in looks]
    assert found == ["epsilon", "v_prediction"]
    assert json.loads((other / scheduler).read_text())["prediction_type"] == "v_prediction"
