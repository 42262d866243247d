"""What would change one expert alone, or be ignored, is refused where it is connected."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.sd
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from comfy_extras.nodes_model_advanced import ModelComputeDtype, ModelSamplingDiscrete

from afa.errors import AfaError
from integrations.comfyui.ensemble import ensemble_model
from integrations.comfyui.folders import MEAN, in_a_row
from integrations.comfyui.nodes.ensemble import AfaEnsemble
from integrations.comfyui.tests.models import TEXT, lora_of, patcher, unet
from integrations.comfyui.tests.test_ensemble import conditioning, sample, saved
from tests.refusal import refusal


@pytest.fixture
def experts() -> list[Any]:
    return [patcher("sd15", seed) for seed in range(3)]


def sampled_as(model: Any, prediction: str) -> Any:
    return ModelSamplingDiscrete().patch(model, prediction, False)[0]


def test_other_predictions(experts: list[Any]) -> None:
    with refusal("AFA-COMFY-005", "model_2"):
        ensemble_model([experts[0], sampled_as(experts[1], "v_prediction")], None)
    both = [sampled_as(each, "v_prediction") for each in experts]
    before = sample(ensemble_model(both, None))
    assert torch.equal(before, sample(sampled_as(ensemble_model(experts, None), "v_prediction")))
    assert not torch.equal(before, sample(ensemble_model(experts, None)))


def test_other_noise_schedules(experts: list[Any]) -> None:
    zero_snr = ModelSamplingDiscrete().patch(experts[1], "eps", True)[0]
    with refusal("AFA-COMFY-006", "model_2"):
        ensemble_model([sampled_as(experts[0], "eps"), zero_snr], None)


def test_other_architectures() -> None:
    with refusal("AFA-COMFY-005", "model_2"):
        ensemble_model([patcher("sd15"), patcher("sdxl")], None)
    wide = patcher("sd15")
    block = wide.model.diffusion_model.input_blocks[1][0]
    block.emb_layers[1] = torch.nn.Linear(64, 32)
    with refusal("AFA-MODEL-002", "input_blocks.1.0.emb_layers.1.weight"):
        ensemble_model([patcher("sd15"), wide], None)


def test_other_data_types(experts: list[Any]) -> None:
    experts[1].model.manual_cast_dtype = torch.bfloat16
    with refusal("AFA-COMFY-005", "bfloat16"):
        ensemble_model(experts, None)


def test_other_models(experts: list[Any]) -> None:
    experts[0].model.diffusion_model = torch.nn.Linear(2, 2)
    with refusal("AFA-COMFY-003", "Linear"):
        ensemble_model(experts[:1], None)
    model: Any = unet("sd15")
    assert isinstance(model, UNetModel)
    model.default_num_video_frames = 14
    experts[1].model.diffusion_model = model
    with refusal("AFA-COMFY-001", "videos"):
        ensemble_model(experts[1:2], None)


def test_ensembles_are_no_experts(experts: list[Any]) -> None:
    with refusal("AFA-COMFY-034", "model_2"):
        ensemble_model([experts[0], ensemble_model(experts, None)], None)


def test_wrappers_in_the_options_before(experts: list[Any]) -> None:
    changed = experts[1].clone()
    add_wrapper_with_key(
        WrappersMP.DIFFUSION_MODEL, "other", print, changed.model_options, is_model_options=True
    )
    with refusal("AFA-COMFY-004", "other"):
        ensemble_model([experts[0], changed], None)


@pytest.mark.parametrize("name", ["forward", "_forward"])
def test_replaced_methods_of_a_denoiser(experts: list[Any], name: str) -> None:
    """As packs do that cache blocks: the coroutine would not call them."""
    denoiser = experts[1].model.diffusion_model
    setattr(denoiser, name, getattr(denoiser, name))
    with refusal("AFA-COMFY-011", name):
        sample(ensemble_model(experts, None))


def test_replaced_blocks_of_one_denoiser() -> None:
    experts = [patcher("flux", seed) for seed in range(2)]
    ensemble = ensemble_model(experts, None)
    blocks = experts[1].model.diffusion_model.double_blocks
    experts[1].model.diffusion_model.double_blocks = blocks[:1]
    with refusal("AFA-MODEL-020", "single.0", "double.1"):
        sample(ensemble, kind="flux")


def test_aggregators_of_others(experts: list[Any], tmp_path: Path) -> None:
    saved("sd15", experts, tmp_path / "three")
    with refusal("AFA-COMFY-008", "3", "2"):
        ensemble_model(experts[:2], tmp_path / "three")
    wider = [patcher("sd15", seed, 2 * TEXT) for seed in range(3)]
    with refusal("AFA-LOAD-018"):
        ensemble_model(wider, tmp_path / "three")


def test_parts_after_the_ensemble(experts: list[Any]) -> None:
    ensemble = ensemble_model(experts, None)
    other_type = ModelComputeDtype().patch(ensemble, "bf16")[0]
    with refusal("AFA-COMFY-010", "manual_cast_dtype"):
        sample(other_type)
    replaced = ensemble.clone()
    replaced.add_object_patch("diffusion_model.out", torch.nn.Identity())
    with refusal("AFA-COMFY-010", "diffusion_model.out"):
        sample(replaced)


def test_lora_hooks(experts: list[Any]) -> None:
    lora = lora_of(experts[0])
    hooks = comfy.hooks.create_hook_lora(lora, 1.0, 1.0)
    text = conditioning("sd15", 1, 2)
    hooked = comfy.hooks.set_hooks_for_conditioning(text, hooks)
    assert not torch.equal(sample(experts[0], positive=hooked), sample(experts[0]))
    with refusal("AFA-COMFY-010", "hook"):
        sample(ensemble_model(experts, None), positive=hooked)


def test_compiled(experts: list[Any]) -> None:
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    ensemble = ensemble_model(experts, None)
    set_torch_compile_wrapper(ensemble, backend="eager")
    with refusal("AFA-COMFY-010", "compile"):
        sample(ensemble)


def test_saving_as_a_checkpoint(experts: list[Any], tmp_path: Path) -> None:
    ensemble = ensemble_model(experts, None)
    for _ in range(2):  # before and after it was loaded
        with refusal("AFA-COMFY-019"):
            comfy.sd.save_checkpoint(str(tmp_path / "file.safetensors"), ensemble)
        sample(ensemble)
    assert not list(tmp_path.iterdir())


def test_gaps_between_experts() -> None:
    assert in_a_row({"model_1": 1, "model_2": 2, "model_3": None}) == [1, 2]
    with refusal("AFA-COMFY-018", "model_2"):
        in_a_row({"model_1": 1, "model_2": None, "model_3": 3})


def test_one_checkpoint_with_several_loras() -> None:
    """ComfyUI keeps one set of weights for a checkpoint; each expert must have its own."""
    checkpoint, others = patcher("sd15"), [patcher("sd15") for _ in range(2)]
    loras = [lora_of(checkpoint, seed) for seed in (5, 6)]

    def with_lora(model: ModelPatcher, lora: Any) -> Any:
        return comfy.sd.load_lora_for_models(model, None, lora, 0.8, 0)[0]

    apart = [with_lora(m, lora) for m, lora in zip(others, loras, strict=True)]
    expected = sample(ensemble_model([patcher("sd15"), *apart], None))
    first = sample(with_lora(checkpoint, loras[0]))  # its weights hold a LoRA now
    together = [checkpoint, *(with_lora(checkpoint, lora) for lora in loras)]
    assert torch.equal(sample(ensemble_model(together, None)), expected)
    assert torch.equal(sample(with_lora(checkpoint, loras[0])), first)
    same = [checkpoint, checkpoint.clone(), checkpoint]
    plain = sample(checkpoint)
    came = sample(ensemble_model(same, None), 3, double=True)
    torch.testing.assert_close(came, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


def test_errors_are_shown_with_their_code(experts: list[Any]) -> None:
    """ComfyUI shows the message alone; and remedies are those of ComfyUI."""
    with pytest.raises(AfaError, match=r"one quantity|latents.*\(AFA-COMFY-005\)"):
        AfaEnsemble.execute(experts[0], MEAN, model_2=patcher("sdxl"))
    experts[1].model.diffusion_model.out[2].bias.fill_(torch.inf)
    with pytest.raises(AfaError) as raised:
        sample(ensemble_model(experts, None))
    text = str(raised.value)
    assert re.search(r"'model_2' computed NaN.*--bf16-unet.*\(AFA-ENSEMBLE-033\)$", text)
    assert "--on-nonfinite" not in text
