"""Conditions of ComfyUI beside an ensemble: ControlNets, regions, masks, schedules, samplers.

Three equal experts, fused by the mean, each with its own copy of the text, draw what one of them
draws: that needs texts that are split rightly, and residuals that are added once for each expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.samplers
import comfy.t2i_adapter.adapter
import nodes
import pytest
import torch

from integrations.comfyui.ensemble import ensemble_model
from integrations.comfyui.tests.models import KINDS, OPS, TEXT, UNETS, patcher, randomize
from integrations.comfyui.tests.test_ensemble import conditioning, sample
from integrations.comfyui.texts import join

Condition = list[Any]
Change = Callable[[Condition, str], Condition]


def controlnet(kind: str) -> comfy.controlnet.ControlNet:
    """A tiny ControlNet of the tiny U-Net."""
    config: dict[str, Any] = dict(UNETS[kind][0])
    for key in ("transformer_depth", "num_res_blocks", "channel_mult"):
        config[key] = list(config[key])
    del config["transformer_depth_output"]
    model = comfy.cldm.cldm.ControlNet(
        image_size=8,
        in_channels=4,
        hint_channels=3,
        model_channels=32,
        use_spatial_transformer=True,
        context_dim=TEXT,
        legacy=False,
        dtype=torch.float32,
        operations=OPS,
        **config,
    )
    randomize(model, 11)
    cpu = torch.device("cpu")
    return comfy.controlnet.ControlNet(model.eval().requires_grad_(False), load_device=cpu)


def with_controlnet(condition: Condition, kind: str) -> Condition:
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(2))
    net = controlnet(kind)
    apply = nodes.ControlNetApplyAdvanced()
    return apply.apply_controlnet(condition, condition, net, picture, 0.7, 0.0, 0.9)[0]


def with_adapter(condition: Condition, kind: str) -> Condition:
    model = comfy.t2i_adapter.adapter.Adapter(
        channels=[32, 32, 64, 64], nums_rb=1, cin=3 * 64, ksize=1, sk=True, use_conv=False, xl=False
    )
    randomize(model, 12)
    adapter = comfy.controlnet.T2IAdapter(model.eval(), 3, 8, "nearest-exact")
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(2))
    apply = nodes.ControlNetApplyAdvanced()
    return apply.apply_controlnet(condition, condition, adapter, picture, 0.7, 0.0, 1.0)[0]


def with_area(condition: Condition, kind: str) -> Condition:
    area = nodes.ConditioningSetArea().append(condition, 32, 32, 16, 16, 0.8)[0]
    return [*condition, *area]


def with_mask(condition: Condition, kind: str) -> Condition:
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    return [*condition, *nodes.ConditioningSetMask().append(condition, mask, "default", 0.9)[0]]


def with_steps(condition: Condition, kind: str) -> Condition:
    early = nodes.ConditioningSetTimestepRange().set_range(condition, 0.0, 0.5)[0]
    late = nodes.ConditioningZeroOut().zero_out(condition)[0]
    late = nodes.ConditioningSetTimestepRange().set_range(late, 0.5, 1.0)[0]
    return early + late


def other(condition: Condition) -> Condition:
    """The condition of another prompt, of as many experts."""
    return [[text.roll(3, 0).neg(), dict(entries)] for text, entries in condition]


CHANGES: dict[str, Change] = {
    "ControlNet": with_controlnet,
    "T2I-Adapter": with_adapter,
    "area": with_area,
    "mask": with_mask,
    "timestep range and zero": with_steps,
    "average": lambda c, _: nodes.ConditioningAverage().addWeighted(c, other(c), 0.6)[0],
    "concat": lambda c, _: nodes.ConditioningConcat().concat(c, other(c))[0],
    "combine": lambda c, _: nodes.ConditioningCombine().combine(c, other(c))[0],
}


@pytest.mark.parametrize("kind", UNETS)
@pytest.mark.parametrize("name", CHANGES)
def test_conditions(name: str, kind: str) -> None:
    if name == "T2I-Adapter" and kind == "sdxl":
        pytest.skip("the tiny adapter has the blocks of the other U-Net")
    models = [patcher(kind) for _ in range(3)]
    plain = [conditioning(kind, 1, seed) for seed in (2, 3)]
    joined = [join([each] * 3) for each in plain]
    change = CHANGES[name]
    expected = sample(models[0], positive=change(plain[0], kind), negative=plain[1], kind=kind)
    came = sample(
        ensemble_model(models, None),
        positive=change(joined[0], kind),
        negative=joined[1],
        kind=kind,
    )
    alone = sample(models[0], positive=plain[0], negative=plain[1], kind=kind)
    assert not torch.equal(alone, expected), "the condition has no effect here"
    size = float(expected.abs().max())
    torch.testing.assert_close(came, expected, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("key", ["c_crossattn", "crossattn_controlnet"])
@pytest.mark.parametrize("kind", KINDS)
def test_controlnets_get_the_texts_of_the_first_expert(kind: str, key: str) -> None:
    class Control:
        """Notes the conditions of its calls, and adds nothing."""

        def __init__(self) -> None:
            self.seen: list[dict[str, Any]] = []

        def get_control(self, noisy: Any, timestep: Any, cond: Any, *_: Any) -> None:
            self.seen.append(cond)

        def pre_run(self, *_: Any) -> None:
            return None

        def get_models(self) -> list[Any]:
            return []

        def get_extra_hooks(self) -> list[Any]:
            return []

        def inference_memory_requirements(self, dtype: Any) -> int:
            return 0

        def cleanup(self) -> None:
            return None

        extra_hooks = previous_controlnet = None

    control = Control()
    ((text, entries),) = conditioning(kind, 3, 2)
    given = {**entries, "control": control}
    if key == "crossattn_controlnet":
        given["cross_attn_controlnet"] = text + 1
    models = [patcher(kind, seed) for seed in range(3)]
    sample(ensemble_model(models, None), 3, kind, positive=[[text, given]])
    ((_, own),) = [[None, text[..., :TEXT] + (key == "crossattn_controlnet")]]
    assert control.seen
    for cond in control.seen:
        came = cond[key]
        assert torch.equal(came[:1], own.expand_as(came[:1])) or torch.equal(came[-2:-1], own)
        if kind != "sd15":
            pooled = entries["pooled_output"][:, :8]
            assert any(torch.equal(row[:8], pooled[0]) for row in cond["y"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of k-diffusion
@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_samplers(sampler: str) -> None:
    models = [patcher("sd15") for _ in range(2)]
    options: dict[str, Any] = {
        "sampler_name": sampler,
        "scheduler": "karras",
        "steps": 4,
        "cfg": 1.5,
    }
    expected = sample(models[0], **options)
    assert torch.equal(sample(ensemble_model(models[:1], None), **options), expected)
    came = sample(ensemble_model(models, None), 2, double=True, **options)
    size = float(expected.abs().max())
    torch.testing.assert_close(came, expected, rtol=1e-4, atol=1e-4 * size)


@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
def test_schedulers(scheduler: str) -> None:
    model = patcher("sd15")
    options: dict[str, Any] = {"scheduler": scheduler, "steps": 4}
    expected = sample(model, **options)
    assert torch.equal(sample(ensemble_model([model], None), **options), expected)


def test_latent_mask_and_partial_denoising() -> None:
    model = patcher("sd15")
    latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., 4:] = 1
    options: dict[str, Any] = {
        "latent_image": latent,
        "noise_mask": mask,
        "denoise": 0.6,
        "steps": 5,
    }
    expected = sample(model, **options)
    assert torch.equal(sample(ensemble_model([model], None), **options), expected)
    torch.testing.assert_close(expected[..., :4], latent[..., :4], rtol=1e-5, atol=1e-5)
