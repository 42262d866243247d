"""Models for few steps beside models for many are warned of."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from afa.loading.compare import compare
from afa.loading.distilled import Distilled, distilled_of, method_in
from afa.loading.facts import read_facts
from afa.loading.single_file.identify import config_folder
from afa.loading.single_file.load import Described
from tests.preflight.test_preflight import changed

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("sd_xl_turbo_1.0_fp16.safetensors", "Turbo"),
        ("juggernautXL_v9Rdphoto2Lightning.safetensors", "Lightning"),
        ("dreamshaperXL_lightningDPMSDE.safetensors", "Lightning"),
        ("LCM_Dreamshaper_v7", "LCM"),
        ("lcm-lora-sdv1-5", "LCM"),
        ("Hyper-SDXL-8steps-lora.safetensors", "Hyper"),
        ("sdxl_4step_dmd2", "DMD"),
        ("SDXLTurbo", "Turbo"),
        ("epicrealism_hyperrealism.safetensors", None),
        ("turbocharged", None),
        ("majicmix.safetensors", None),
    ],
)
def test_names(name: str, method: str | None) -> None:
    assert method_in(name) == method


def test_metadata_schedulers_and_the_guidance_embedding(
    experts: list[Path], tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1)}, file, {"modelspec.title": "Some Lightning 4 steps"})
    config = config_folder("stable-diffusion-xl")
    found = distilled_of(str(file), config, is_file=True, path=file)
    assert found == Distilled("Lightning", "'modelspec.title' in its metadata")
    assert distilled_of("a", experts[0], is_file=False) is None
    lcm = changed(experts[0], tmp_path / "one", "unet/config.json", time_cond_proj_dim=256)
    found = distilled_of("a", lcm, is_file=False)
    assert found == Distilled("LCM", "time_cond_proj_dim in its configuration")
    index = changed(
        experts[0], tmp_path / "two", "model_index.json", scheduler=["diffusers", "LCMScheduler"]
    )
    found = distilled_of("a", index, is_file=False)
    assert found == Distilled("LCM", "its scheduler, LCMScheduler")


def test_a_mixture_is_warned_of(experts: list[Path]) -> None:
    one, two = (
        read_facts(name, Described(folder))
        for name, folder in (("sdxl-turbo", experts[0]), ("photo", experts[1]))
    )
    (finding,) = (each for each in compare([one, two]) if each.check == "distilled")
    assert finding.level == "warning"
    assert "'sdxl-turbo' seems to be distilled for few steps (Turbo, by its name)" in finding.text
    for others in (
        [one, replace(two, distilled=one.distilled)],
        [two, replace(one, distilled=None)],
    ):
        assert not [each for each in compare(others) if each.check == "distilled"]
