"""The U-Net, cut at every site and joined again, is the library's own forward, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from afa.denoisers import PLAIN, Execution, discover_sites, family_of, run_alone
from afa.denoisers.unet import unet_blocks, unet_layers
from tests.refusal import refusal
from tests.tiny import (
    ODD,
    REFINER,
    SD1,
    SD2,
    SDXL,
    TEXT_WIDTH,
    inputs,
    tiny_unet,
    xl_inputs,
)

CONFIGS = {"sd1": SD1, "sd2": SD2, **ODD}


def assert_parity(unet: Any, call: dict[str, Any], extra: dict[str, Any] | None = None) -> None:
    """Compare with `torch.equal`, in float32 and in bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        _assert_parity(unet.to(dtype), cast(call, dtype), cast(extra or {}, dtype))


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in `dtype`, wherever they are in lists and dictionaries."""
    if isinstance(value, dict):
        return {key: cast(entry, dtype) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(cast(entry, dtype) for entry in value)
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value


def _assert_parity(unet: Any, call: dict[str, Any], extra: dict[str, Any]) -> None:
    # the library consumes lists of residuals, so it gets copies
    copies = {k: list(v) if isinstance(v, list) else v for k, v in extra.items()}
    with torch.no_grad():
        expected = unet(**call, **copies).sample
        came = run_alone(unet_blocks(unet, **call, **extra))
        without = unet(**call).sample if not _required(unet) else None
    assert torch.equal(came, expected)
    if extra and without is not None:
        assert not torch.equal(expected, without), "the argument had no effect: a vacuous test"


def _required(unet: Any) -> bool:
    return unet.class_embedding is not None


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_is_the_librarys_own(name: str) -> None:
    assert_parity(tiny_unet(**CONFIGS[name]), inputs())


def test_stable_diffusion_xl_and_its_refiner() -> None:
    assert_parity(tiny_unet(**SDXL), xl_inputs())
    assert_parity(tiny_unet(**SDXL), xl_inputs(height=9, width=6))
    assert_parity(tiny_unet(**REFINER), xl_inputs(num_ids=5))


@pytest.mark.parametrize(("height", "width"), [(9, 8), (7, 13), (10, 6)])
def test_odd_latent_sizes(height: int, width: int) -> None:
    assert_parity(tiny_unet(), inputs(height=height, width=width))


@pytest.mark.parametrize("timestep", [7, 801.0, torch.tensor(3)], ids=str)
def test_one_timestep_for_all(timestep: Any) -> None:
    assert_parity(tiny_unet(), {**inputs(), "timestep": timestep})


def controlnet_residuals(height: int = 8) -> dict[str, Any]:
    sizes = [(8, 1), (8, 1), (8, 1), (8, 2), (16, 2), (16, 2), (16, 4), (16, 4), (16, 4)]
    down = tuple(torch.randn(2, c, height // s, height // s) for c, s in sizes)
    return {
        "down_block_additional_residuals": down,
        "mid_block_additional_residual": torch.randn(2, 16, height // 4, height // 4),
    }


def adapter_residuals() -> dict[str, Any]:
    sizes = [(8, 8), (16, 4), (16, 2)]
    return {"down_intrablock_additional_residuals": [torch.randn(2, c, s, s) for c, s in sizes]}


def adapter_residuals_with_mid() -> dict[str, Any]:
    residuals = adapter_residuals()["down_intrablock_additional_residuals"]
    return {"down_intrablock_additional_residuals": [*residuals, torch.randn(2, 16, 2, 2)]}


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]])
ARGUMENTS = {
    "encoder_attention_mask": lambda: {"encoder_attention_mask": MASK.bool()},
    "controlnet": controlnet_residuals,
    "adapter": adapter_residuals,
    "adapter with mid": adapter_residuals_with_mid,
    "controlnet and adapter": lambda: {**controlnet_residuals(), **adapter_residuals()},
}


@pytest.mark.parametrize("config", [SD1, SD2], ids=["sd1", "sd2"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_argument(name: str, config: dict[str, Any]) -> None:
    assert_parity(tiny_unet(**config), inputs(), ARGUMENTS[name]())


def test_controlnet_at_an_odd_size() -> None:
    sizes = [(9, 7)] * 3 + [(5, 4)] * 3 + [(3, 2)] * 3
    channels = [8, 8, 8, 8, 16, 16, 16, 16, 16]
    residuals = {
        "down_block_additional_residuals": tuple(
            torch.randn(2, c, *size) for c, size in zip(channels, sizes, strict=True)
        ),
        "mid_block_additional_residual": torch.randn(2, 16, 3, 2),
    }
    assert_parity(tiny_unet(), inputs(height=9, width=7), residuals)


def test_adapter_where_no_block_attends() -> None:
    # here the library adds in place, which reaches the skip connections as well
    plain: dict[str, Any] = {
        "down_block_types": ("DownBlock2D",) * 3,
        "up_block_types": ("UpBlock2D",) * 3,
        "mid_block_type": "UNetMidBlock2D",
    }
    residuals = [torch.randn(2, c, s, s) for c, s in [(8, 4), (16, 2), (16, 2)]]
    assert_parity(tiny_unet(**plain), inputs(), {"down_intrablock_additional_residuals": residuals})


def test_attention_mask() -> None:
    # this mask is over the pixels of self-attention, so it fits one resolution only
    unet = tiny_unet(**{**ODD["one level"], "mid_block_type": None})
    mask = (torch.arange(64) % 3 > 0).expand(2, 64)
    assert_parity(unet, inputs(), {"attention_mask": mask})


def test_timestep_cond() -> None:
    unet = tiny_unet(time_cond_proj_dim=6)
    assert_parity(unet, inputs(), {"timestep_cond": torch.randn(2, 6)})


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({"num_class_embeds": 4}, torch.tensor([1, 3])),
        ({"class_embed_type": "timestep"}, torch.tensor([10, 500])),
        ({"class_embed_type": "identity"}, torch.randn(2, 32)),
        (
            {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 6},
            torch.randn(2, 6),
        ),
        (
            {
                "class_embed_type": "simple_projection",
                "projection_class_embeddings_input_dim": 6,
                "class_embeddings_concat": True,
            },
            torch.randn(2, 6),
        ),
    ],
    ids=["embedding", "timestep", "identity", "projection", "concatenated"],
)
def test_class_labels(config: dict[str, Any], labels: torch.Tensor) -> None:
    unet = tiny_unet(**config)
    assert_parity(unet, inputs(), {"class_labels": labels})
    assert discover_sites(unet)[-1].name == "conv_out"


def test_gligen_objects() -> None:
    unet = tiny_unet(attention_type="gated")
    objects = {
        "boxes": torch.rand(2, 3, 4),
        "masks": torch.ones(2, 3),
        "positive_embeddings": torch.randn(2, 3, TEXT_WIDTH),
    }
    for name, parameter in unet.named_parameters():
        if "alpha_" in name:
            torch.nn.init.constant_(parameter, 0.5)  # at zero the objects have no effect
    assert_parity(unet, inputs(), {"cross_attention_kwargs": {"gligen": objects}})


def test_freeu() -> None:
    unet, call = tiny_unet(), inputs()
    with torch.no_grad():
        plain = unet(**call).sample
        unet.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
        assert not torch.equal(unet(**call).sample, plain)
    assert_parity(unet, call)
    unet.disable_freeu()
    assert_parity(unet, call)


def test_fused_projections() -> None:
    unet = tiny_unet()
    unet.fuse_qkv_projections()
    assert_parity(unet, inputs())


def test_gradient_checkpointing_changes_no_gradient() -> None:
    call = inputs()
    gradients = []
    for execution in (PLAIN, Execution(checkpoints=True)):
        unet = tiny_unet()
        sample = call["sample"].clone().requires_grad_()
        blocks = unet_blocks(unet, **{**call, "sample": sample}, execution=execution)
        run_alone(blocks).square().mean().backward()
        gradients.append((sample.grad, unet.conv_in.weight.grad))
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=0, atol=0)


def test_gradient_checkpointing_computes_what_lies_between_sites_again() -> None:
    unet = tiny_unet()
    calls: list[str] = []
    parts = {
        "resnet": unet.down_blocks[0].resnets[0],
        "attention": unet.down_blocks[0].attentions[0],
        "downsampler": unet.down_blocks[0].downsamplers[0],
        "mid": unet.mid_block,
        "upsampler": unet.up_blocks[0].upsamplers[0],
    }
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    sample = inputs()["sample"].requires_grad_()
    execution = Execution(checkpoints=True)
    blocks = unet_blocks(unet, **{**inputs(), "sample": sample}, execution=execution)
    run_alone(blocks).mean().backward()
    assert {name: calls.count(name) for name in parts} == dict.fromkeys(parts, 2)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_layers_that_are_brought_over_one_at_a_time(checkpoints: bool) -> None:
    """Copies of the weights are used, whose results and gradients are the same, bit for bit."""
    gradients = []
    for execution in (PLAIN, Execution(checkpoints, torch.device("cpu"))):
        unet = tiny_unet().requires_grad_(False)
        sample = inputs()["sample"].requires_grad_()
        blocks = unet_blocks(unet, **{**inputs(), "sample": sample}, execution=execution)
        prediction = run_alone(blocks)
        prediction.square().mean().backward()
        gradients.append((prediction.detach(), sample.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_nothing_of_the_blocks_is_used_where_it_lies() -> None:
    """As on a machine whose accelerator has no room for the blocks: here they are on no device."""
    unet = tiny_unet().requires_grad_(False)
    expected = run_alone(unet_blocks(unet, **inputs()))
    kept = {id(part): copy.deepcopy(part) for part in _modules(unet_layers(unet))}

    class Elsewhere(Execution):
        def run(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
            return kept[id(layer)](*args, **kwargs)

    for part in unet_layers(unet):
        part.to("meta")
    assert torch.equal(run_alone(unet_blocks(unet, **inputs(), execution=Elsewhere())), expected)


def _modules(parts: list[Any]) -> list[Any]:
    return [module for part in parts for module in part.modules()]


def test_half_of_controlnets_residuals_is_refused() -> None:
    residuals = controlnet_residuals()
    residuals.pop("mid_block_additional_residual")
    with refusal("AFA-MODEL-018", "T2I-Adapter's"):
        run_alone(unet_blocks(tiny_unet(), **inputs(), **residuals))


def test_lora_scale_is_refused_below_the_ensemble() -> None:
    with refusal("AFA-MODEL-019"):
        run_alone(unet_blocks(tiny_unet(), **inputs(), cross_attention_kwargs={"scale": 0.5}))


def test_unknown_blocks_are_refused_by_name() -> None:
    unet = tiny_unet(
        **{
            **ODD["two levels"],
            "down_block_types": ("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
            "attention_head_dim": 4,
        }
    )
    with refusal("AFA-MODEL-017", r"down_blocks\.1", "SimpleCrossAttnDownBlock2D"):
        family_of(unet)


def test_other_models_are_refused() -> None:
    with refusal("AFA-MODEL-010"):
        family_of(torch.nn.Linear(1, 1))


def test_sites_of_a_small_unet() -> None:
    sites = discover_sites(tiny_unet(**ODD["two levels"]))
    assert [(s.name, s.channels, s.scale) for s in sites] == [
        ("conv_in", 8, 1),
        ("down.0.0", 8, 1),
        ("down.0.downsample", 8, 2),
        ("down.1.0", 16, 2),
        ("mid", 16, 2),
        ("up.0.0", 16, 2),
        ("up.0.1", 16, 1),
        ("up.1.0", 8, 1),
        ("conv_out", 4, 1),
    ]
    assert {s.temb_channels for s in sites} == {32}
