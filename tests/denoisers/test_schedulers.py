"""Schedulers by name: equal to a stock pipeline with that scheduler, or refused by name."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionPipeline

import afa
from afa.denoisers.kinds import denoiser_of, kind_of_pipeline
from afa.denoisers.scheduler_names import SAMPLERS, a1111_name, canonical_name
from afa.denoisers.schedulers import name_of, sampled_with, scheduler_for, scheduler_names_for
from tests.preflight.test_preflight import changed
from tests.refusal import refusal
from tests.tiny_pipelines import saved_experts

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

pytestmark = [
    pytest.mark.slow,
    # diffusers' own, with NumPy 2
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),
]

FILE = "scheduler/scheduler_config.json"
VELOCITY = {"prediction_type": "v_prediction"}
ZERO_SNR = {**VELOCITY, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
#: the class and the settings in diffusers' own table of A1111's names
DOCUMENTED: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a_karras": ("KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m_sde_karras": (
        "DPMSolverMultistepScheduler",
        {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
    ),
    "dpmpp_2m_sgm_uniform": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "unipc_karras": ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    "deis": ("DEISMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}


def draw(pipeline: Any, seeds: tuple[int, ...] = (0,), **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    call = {"num_inference_steps": 4, "output_type": "pt", **kind_of_pipeline(pipeline).call}
    call |= options
    return pipeline(prompt=["a fox"] * len(seeds), generator=generators, **call).images


def stock(folder: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("DPM++ 2M Karras", "dpmpp_2m_karras"),
        ("dpmpp_2m karras", "dpmpp_2m_karras"),
        ("dpmpp_2m/sgm_uniform", "dpmpp_2m_sgm_uniform"),
        ("DPM++ 3M SDE Exponential", "dpmpp_3m_sde_exponential"),
        ("Euler a", "euler_a"),
        ("k_euler_a", "euler_a"),
        ("euler_ancestral", "euler_a"),
        ("dpmsolver++", "dpmpp_2m"),
        ("uni_pc", "unipc"),
        ("PLMS", "pndm"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("FlowMatchEulerDiscreteScheduler", "euler"),
    ],
)
def test_names_of_other_programs(given: str, name: str) -> None:
    assert canonical_name(given) == name
    assert canonical_name(a1111_name(name)) == name


def test_unknown_names() -> None:
    with refusal("AFA-DRAW-020", "'eulr'", "Did you mean euler"):
        canonical_name("eulr")
    with refusal("AFA-DRAW-019", "DPM\\+\\+ SDE Karras", "dpmpp_2m_sde"):
        canonical_name("DPM++ SDE Karras")


@pytest.mark.parametrize("changes", [{}, VELOCITY])
def test_it_draws_as_the_stock_pipeline(
    experts: list[Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = changed(experts[0], tmp_path / "expert", FILE, **changes)
    inside, alone = afa.load_pipeline([folder]), stock(folder)
    own, before, seen = alone.scheduler, draw(inside), set()
    for name, (class_name, settings) in DOCUMENTED.items():
        alone.scheduler = getattr(diffusers, class_name).from_config(own.config, **settings)
        with sampled_with(inside, name):
            assert type(inside.scheduler).__name__ == class_name
            assert torch.equal(draw(inside), draw(alone)), name
            assert name_of(inside.scheduler) == name.removesuffix("_sgm_uniform")
        seen.add(draw(alone).numpy().tobytes())
    assert len(seen) == len(DOCUMENTED)
    assert torch.equal(draw(inside), before)


def test_pictures_do_not_depend_on_their_batch(experts: list[Path]) -> None:
    """Schedulers that add noise take it from each picture's own generator."""
    pipeline = afa.load_pipeline(experts)
    has_scipy = find_spec("scipy") is not None
    for name in [name for name in SAMPLERS if has_scipy or name != "lms"]:
        with sampled_with(pipeline, name):
            both, one = draw(pipeline, (3, 5)), draw(pipeline, (5,))
            assert torch.equal(one, draw(pipeline, (5,)))
        torch.testing.assert_close(both[1:], one, atol=1e-4, rtol=0)


def test_zero_terminal_snr_carries_over(experts: list[Path], tmp_path: Path) -> None:
    folder = changed(experts[0], tmp_path / "expert", FILE, **ZERO_SNR)
    pipeline = afa.load_pipeline([folder])
    own = stock(folder).scheduler.config
    for name in ("euler", "euler_a", "ddim", "dpmpp_2m", "unipc", "lcm"):
        made = scheduler_for(pipeline, name)
        assert made.config.rescale_betas_zero_snr
        assert made.config.timestep_spacing == own.timestep_spacing
        with sampled_with(pipeline, name):
            assert draw(pipeline).isfinite().all()
    for name in ("heun", "dpm2", "pndm", "deis", "dpmpp_2s"):
        with refusal("AFA-DRAW-023", name, "zero terminal SNR"):
            scheduler_for(pipeline, name)


def test_defaults_of_other_classes_are_not_taken(experts: list[Path]) -> None:
    """Heun's defaults have other betas; those of DDIM and DDPM clip pixels."""
    pipeline = afa.load_pipeline(experts[:1])
    pipeline.scheduler = EulerDiscreteScheduler()
    assert scheduler_for(pipeline, "heun").config.beta_end == 0.02
    assert scheduler_for(pipeline, "lcm").config.beta_schedule == "linear"
    for name in ("ddim", "ddpm"):
        assert scheduler_for(pipeline, name).config.clip_sample is False
    pipeline.scheduler = EulerDiscreteScheduler(use_karras_sigmas=True)
    assert not scheduler_for(pipeline, "dpmpp_2m").config.use_karras_sigmas


def test_what_a_scheduler_cannot_be_combined_with(experts: list[Path]) -> None:
    pipeline = afa.load_pipeline(experts)
    with refusal("AFA-DRAW-024", "ddim", "karras"):
        scheduler_for(pipeline, "ddim_karras")
    afa.accelerate(pipeline, "fast")
    for name in ("heun", "dpm2_karras"):
        with refusal("AFA-DRAW-028", name, "--speed"):
            scheduler_for(pipeline, name)
    for name in ("euler_a", "dpmpp_2m_sde"):
        with sampled_with(pipeline, name):
            one, other = (draw(pipeline, num_inference_steps=8) for _ in range(2))
            assert torch.equal(one, other), name
    pipeline.scheduler = diffusers.EDMEulerScheduler()
    with refusal("AFA-DRAW-021", "EDMEulerScheduler", "euler"):
        scheduler_for(pipeline, "euler")


def test_lms_and_beta_need_scipy(experts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = afa.load_pipeline(experts[:1])
    monkeypatch.setattr("afa.denoisers.schedulers.find_spec", lambda _: None)
    for name in ("lms", "euler_beta"):
        with refusal("AFA-DRAW-022", name, "pip install scipy"):
            scheduler_for(pipeline, name)


def test_rounded_timesteps_of_different_objectives(experts: list[Path], tmp_path: Path) -> None:
    """Predictions are converted at the level of the timestep, so it must be that of the latent."""
    velocity = changed(experts[1], tmp_path / "velocity", FILE, **VELOCITY)
    pipeline = afa.load_pipeline([experts[0], velocity])
    for name in ("euler", "euler_karras", "ddim", "dpmpp_2m", "unipc", "lcm"):
        scheduler_for(pipeline, name)
    for name in ("dpmpp_2m_karras", "unipc_exponential", "dpm2"):
        with refusal("AFA-DRAW-027", name, "rounded"):
            scheduler_for(pipeline, name)


@pytest.mark.parametrize(
    ("kind", "fitting"),
    [
        ("sd3", ["euler", "heun", "dpmpp_2m", "unipc", "euler_karras"]),
        ("flux", ["euler", "unipc", "euler_karras"]),
        ("z-image", ["euler", "euler_karras"]),
    ],
)
def test_schedulers_of_flows(kind: str, fitting: list[str], tmp_path: Path) -> None:
    (folder,) = saved_experts(kind, tmp_path, 1)
    pipeline, alone = afa.load_pipeline([folder]), DiffusionPipeline.from_pretrained(folder)
    assert scheduler_names_for(pipeline) == fitting
    own, size = alone.scheduler, dict[str, Any](height=16, width=16)
    before = draw(pipeline, **size)
    for name in fitting:
        with sampled_with(pipeline, name):
            made = pipeline.scheduler
            assert made.config.get("flow_shift", made.config.get("shift")) == 3.0
            changes: dict[str, Any] = {"use_karras_sigmas": name.endswith("karras")}
            if not type(made).__name__.startswith("FlowMatch"):
                changes |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
                changes |= {"flow_shift": 3.0}
            alone.scheduler = type(made).from_config(own.config, **changes)
            assert torch.equal(draw(pipeline, **size), draw(alone, **size)), name
        # a flow's Euler is its own scheduler
        assert (name == "euler") == torch.equal(draw(alone, **size), before)
    for name in ("euler_a", "ddim", "lcm", "dpmpp_2m_karras"):
        with refusal("AFA-DRAW-026", name, "euler", kind_of_pipeline(pipeline).name):
            scheduler_for(pipeline, name)
    pipeline.scheduler.register_to_config(stochastic_sampling=True)
    with refusal("AFA-DRAW-025", "stochastic_sampling"):
        scheduler_for(pipeline, "euler")


def test_shifts_by_size(tmp_path: Path) -> None:
    """Only schedulers with such shifts draw with them."""
    pipeline = afa.load_pipeline(saved_experts("sd3", tmp_path, 1))
    config = {"use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 0.9}
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    made = scheduler_for(pipeline, "unipc")
    assert {key: made.config[key] for key in config} == config
    assert scheduler_names_for(pipeline) == ["euler", "unipc", "euler_karras"]
    with sampled_with(pipeline, "unipc"):
        assert draw(pipeline, height=16, width=16).isfinite().all()
    assert denoiser_of(pipeline).objectives is None
