"""Everything else of a stock pipeline: works with an ensemble inside, or is refused by name.

docs/compatibility.md is the table; every row names its test here or elsewhere.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate
import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    ChromaPipeline,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
)
from diffusers.hooks import FirstBlockCacheConfig, apply_group_offloading
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

import afa
from afa.denoisers.kinds import build_pipeline, denoiser_of, kind_of_pipeline
from afa.ensemble.denoiser import EnsembleDenoiser
from tests.refusal import refusal
from tests.tiny import TEXT_WIDTH, tiny_pipeline, tiny_unet
from tests.tiny_pipelines import saved_experts

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.slow

_DOCS = Path(__file__).parent.parent / "docs" / "compatibility.md"
_SMALL = afa.SABWConfig(hidden_size=8, num_layers=1, num_heads=2, norm_num_groups=4)
_EMBEDDING = 6  # width of an IP-Adapter's pictures


def ensemble(folders: list[Path]) -> Any:
    torch.manual_seed(0)
    pipeline = afa.load_pipeline(folders, _SMALL)
    for rule in pipeline.unet.aggregators:
        torch.nn.init.normal_(rule.conv_out.weight)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(experts: list[Path]) -> Any:
    return ensemble(experts)


def stock(folder: Path) -> Any:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, prompt: str | None = "a fox", **options: Any) -> Tensor:
    call = {"num_inference_steps": 2, "output_type": "pt", **options}
    return pipeline(prompt, generator=torch.Generator().manual_seed(0), **call).images


def shell(folder: Path) -> Any:
    """An ensemble of one expert, which is that expert."""
    pipeline = afa.load_pipeline([folder])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# -- adapters -----------------------------------------------------------------------------------


def lora_file(folder: Path, place: Path, *, text: bool = False) -> Path:
    """A LoRA of a U-Net's attention, and of the text encoder's if asked for."""
    torch.manual_seed(1)
    model = stock(folder)
    model.unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    )
    layers: dict[str, Any] = {"unet_lora_layers": get_peft_model_state_dict(model.unet)}
    if text:
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model.text_encoder.add_adapter(config)
        layers["text_encoder_lora_layers"] = get_peft_model_state_dict(model.text_encoder)
    StableDiffusionPipeline.save_lora_weights(place, **layers)
    return place / "pytorch_lora_weights.safetensors"


def test_a_lora_for_all_experts(experts: list[Path], tmp_path: Path) -> None:
    file = lora_file(experts[0], tmp_path)
    alone, inside = stock(experts[0]), shell(experts[0])
    before = draw(inside)
    for one in (alone, inside):
        one.load_lora_weights(str(file), adapter_name="ink")
    assert torch.equal(draw(alone), draw(inside))
    assert not torch.equal(draw(inside), before)
    for one in (alone, inside):
        one.set_adapters(["ink"], [0.3])
    assert torch.equal(draw(alone), draw(inside))
    assert inside.get_active_adapters() == ["ink"]
    for one in (alone, inside):
        one.fuse_lora(components=["unet"])
    assert torch.equal(draw(alone), draw(inside))
    inside.unfuse_lora(components=["unet"])
    inside.unload_lora_weights()
    torch.testing.assert_close(draw(inside), before, atol=1e-5, rtol=0)  # W + dW - dW
    several = ensemble(experts)
    plain = draw(several)
    several.load_lora_weights(str(file))
    assert not torch.equal(draw(several), plain)
    assert torch.equal(draw(several, cross_attention_kwargs={"scale": 0.0}), plain)
    several.disable_lora()
    assert torch.equal(draw(several), plain)
    several.unload_lora_weights()
    assert torch.equal(draw(several), plain)
    assert several.get_list_adapters() == {}


def test_fusing_a_lora_into_experts_that_share_their_weights(
    experts: list[Path], tmp_path: Path
) -> None:
    first = lora_file(experts[0], tmp_path / "first")
    second = lora_file(experts[1], tmp_path / "second")
    named: list[Any] = [experts[0], {"base": str(experts[0]), "lora": str(first)}]
    pipeline = afa.load_pipeline(named)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(second))
    before = draw(pipeline)
    pipeline.fuse_lora(components=["unet"])
    torch.testing.assert_close(draw(pipeline), before, atol=1e-5, rtol=0)


def test_a_lora_for_one_expert(pipeline: Any, experts: list[Path], tmp_path: Path) -> None:
    state = load_file(lora_file(experts[0], tmp_path))
    pipeline.unet.experts[1].load_lora_adapter(state, prefix="unet")
    named = ensemble(
        [experts[0], {"base": str(experts[1]), "lora": str(next(tmp_path.iterdir()))}, experts[2]]  # type: ignore[list-item]
    )
    named.unet.aggregators.load_state_dict(pipeline.unet.aggregators.state_dict())
    torch.testing.assert_close(draw(pipeline), draw(named), atol=1e-5, rtol=0)


def test_a_lora_of_text_encoders_is_refused(
    pipeline: Any, experts: list[Path], tmp_path: Path
) -> None:
    before = draw(pipeline)
    file = lora_file(experts[0], tmp_path, text=True)
    with refusal("AFA-ENSEMBLE-022", "denoiser's", r"\{base"):
        pipeline.load_lora_weights(str(file))
    assert torch.equal(draw(pipeline), before)


def test_textual_inversion(experts: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "toy.safetensors"
    save_file({"emb_params": torch.randn(2, TEXT_WIDTH)}, file)
    alone, inside, several = stock(experts[0]), shell(experts[0]), ensemble(experts)
    for one in (alone, inside, several):
        one.load_textual_inversion(str(file), token="<toy>")
    assert torch.equal(draw(alone, "a <toy>"), draw(inside, "a <toy>"))
    assert torch.equal(draw(alone, "a fox"), draw(inside, "a fox"))
    assert not torch.equal(draw(several, "a <toy>"), draw(several, "a"))
    rows = [e.get_input_embeddings().weight[-2:] for e in several.text_encoder.encoders]
    assert len(rows) == 3
    assert torch.equal(rows[0], rows[1])
    with refusal("AFA-ENSEMBLE-059", "expert's"):
        several.unload_textual_inversion()


def ip_adapter(unet: Any) -> dict[str, dict[str, Tensor]]:
    """An IP-Adapter's state: 4 tokens for a picture, and keys and values for them."""
    torch.manual_seed(2)
    width = unet.config.cross_attention_dim
    projection = {
        "proj.weight": torch.randn(4 * width, _EMBEDDING),
        "proj.bias": torch.randn(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    layers = {}
    cross = [name for name in unet.attn_processors if "attn2" in name]
    modules = dict(unet.named_modules())
    for n, name in enumerate(cross):
        hidden = modules[name.removesuffix(".processor")].to_k.out_features
        for part in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * n + 1}.{part}.weight"] = torch.randn(hidden, width)
    return {"image_proj": projection, "ip_adapter": layers}


def test_ip_adapter(experts: list[Path]) -> None:
    alone, inside, several = stock(experts[0]), shell(experts[0]), ensemble(experts)
    state = ip_adapter(alone.unet)
    picture = [torch.randn(2, 1, _EMBEDDING, generator=torch.Generator().manual_seed(3))]
    plain = draw(several)
    for one in (alone, inside, several):
        one.load_ip_adapter(state, subfolder="", weight_name="", image_encoder_folder=None)
    first = draw(inside, ip_adapter_image_embeds=picture)
    assert torch.equal(draw(alone, ip_adapter_image_embeds=picture), first)
    for scale in (0.4, {"up": 0.3}, {"down": {"block_1": [0.0, 1.0]}}):
        for one in (alone, inside):
            one.set_ip_adapter_scale(scale)
        scaled = draw(inside, ip_adapter_image_embeds=picture)
        assert torch.equal(draw(alone, ip_adapter_image_embeds=picture), scaled), scale
        assert not torch.equal(first, scaled)
    second = draw(inside, ip_adapter_image_embeds=picture)
    assert torch.equal(draw(alone, ip_adapter_image_embeds=picture), second)
    assert not torch.equal(first, second)
    assert not torch.equal(draw(several, ip_adapter_image_embeds=picture), plain)
    several.unload_ip_adapter()
    assert torch.equal(draw(several), plain)


# -- speed and memory ---------------------------------------------------------------------------


def test_attention_backends(pipeline: Any) -> None:
    before = draw(pipeline)
    assert len(pipeline.unet.attn_processors) == 3 * len(pipeline.unet.experts[0].attn_processors)
    pipeline.unet.set_attn_processor(AttnProcessor())
    assert {type(p) for p in pipeline.unet.attn_processors.values()} == {AttnProcessor}
    torch.testing.assert_close(draw(pipeline), before, atol=1e-5, rtol=0)
    pipeline.unet.set_default_attn_processor()
    pipeline.unet.set_attention_backend("native")
    torch.testing.assert_close(draw(pipeline), before, atol=1e-5, rtol=0)
    pipeline.unet.set_default_attn_processor()
    pipeline.enable_attention_slicing()
    sliced = {type(p) for p in pipeline.unet.attn_processors.values()}
    assert sliced == {SlicedAttnProcessor}
    torch.testing.assert_close(draw(pipeline), before, atol=1e-5, rtol=0)


def test_fused_projections_and_freeu(experts: list[Path]) -> None:
    alone, inside = stock(experts[0]), shell(experts[0])
    for one in (alone, inside):
        one.fuse_qkv_projections()
    torch.testing.assert_close(draw(alone), draw(inside), atol=1e-5, rtol=0)
    for one in (alone, inside):
        one.unfuse_qkv_projections()
        one.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert torch.equal(draw(alone), draw(inside))
    for one in (alone, inside):
        one.disable_freeu()
    assert torch.equal(draw(alone), draw(inside))


@pytest.mark.parametrize("how", ["leaf_level", "block_level"])
def test_group_offload(pipeline: Any, how: str) -> None:
    before = draw(pipeline)
    cpu = torch.device("cpu")
    blocks = {"num_blocks_per_group": 1} if how == "block_level" else {}
    apply_group_offloading(
        pipeline.unet, onload_device=cpu, offload_device=cpu, offload_type=how, **blocks
    )
    assert torch.equal(draw(pipeline), before)


def test_offloading_the_whole_pipeline_by_groups(pipeline: Any) -> None:
    before, cpu = draw(pipeline), torch.device("cpu")
    pipeline.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert torch.equal(draw(pipeline), before)


def test_hooks_of_cpu_offload(experts: list[Path]) -> None:
    # enable_model_cpu_offload and enable_sequential_cpu_offload themselves ask for an accelerator
    expected = draw(ensemble(experts))
    whole = ensemble(experts)
    accelerate.cpu_offload_with_hook(whole.unet, execution_device="cpu")
    assert torch.equal(draw(whole), expected)
    parts = ensemble(experts)
    accelerate.cpu_offload(parts.unet, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in parts.unet.parameters())
    assert torch.equal(draw(parts), expected)


def test_layerwise_casting(pipeline: Any) -> None:
    before = draw(pipeline)
    pipeline.unet.enable_layerwise_casting(
        storage_dtype=torch.bfloat16, compute_dtype=torch.float32
    )
    assert {p.dtype for p in pipeline.unet.experts[0].down_blocks.parameters()} >= {torch.bfloat16}
    assert {p.dtype for p in pipeline.unet.aggregators.parameters()} == {torch.float32}
    torch.testing.assert_close(draw(pipeline), before, atol=0.05, rtol=0)


def test_caches_are_refused(pipeline: Any) -> None:
    with refusal("AFA-ENSEMBLE-021"):
        pipeline.unet.enable_cache(FirstBlockCacheConfig(threshold=0.1))


def test_autoencoders_in_tiles_and_slices(pipeline: Any) -> None:
    size: dict[str, Any] = {"height": 16, "width": 16, "num_images_per_prompt": 2}
    before = draw(pipeline, **size)
    parts: list[torch.Size] = []
    pipeline.vae.decoder.register_forward_pre_hook(lambda _, args: parts.append(args[0].shape))
    pipeline.vae.enable_slicing()
    torch.testing.assert_close(draw(pipeline, **size), before, atol=1e-5, rtol=0)
    assert [shape[0] for shape in parts] == [1, 1]
    pipeline.vae.enable_tiling()
    wide = draw(pipeline, height=32, width=32)
    assert wide.shape[-1] == 32
    assert len(parts) > 3


def test_other_memory_formats(pipeline: Any) -> None:
    before = draw(pipeline)
    pipeline.unet.to(memory_format=torch.channels_last)
    torch.testing.assert_close(draw(pipeline), before, atol=1e-5, rtol=0)


# -- other pipelines, schedulers and inputs -----------------------------------------------------


def test_the_same_parts_in_another_pipeline(pipeline: Any) -> None:
    for auto in (AutoPipelineForImage2Image, AutoPipelineForInpainting):
        other = auto.from_pipe(pipeline)
        assert other.unet is pipeline.unet
    assert (
        StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False).unet
        is pipeline.unet
    )
    # a class's own from_pipe takes denoisers of the library alone
    with pytest.raises(ValueError, match="unet"):
        StableDiffusionImg2ImgPipeline.from_pipe(pipeline)


@pytest.mark.parametrize("kind", ["xl", "sd3", "flux"])
def test_from_pipe_of_other_families(kind: str, tmp_path: Path) -> None:
    pipeline = afa.load_pipeline(saved_experts(kind, tmp_path, 2))
    other = AutoPipelineForImage2Image.from_pipe(pipeline)
    assert denoiser_of(other) is denoiser_of(pipeline)


@pytest.mark.parametrize("kind", ["sd3", "flux", "chroma", "z-image", "qwen-image"])
def test_pipelines_of_transformers_that_take_a_picture(kind: str, tmp_path: Path) -> None:
    pipeline = afa.load_pipeline(saved_experts(kind, tmp_path, 2))
    call: dict[str, Any] = {"strength": 1.0, "num_inference_steps": 2, "output_type": "np"}
    call["image"] = torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    name = next(name for name in kind_of_pipeline(pipeline).others if "Img2Img" in name)
    other: Any = build_pipeline(name, pipeline.components, {})
    assert denoiser_of(other) is denoiser_of(pipeline)
    other.set_progress_bar_config(disable=True)
    assert np.isfinite(other("a fox", height=16, width=16, **call)[0]).all()


def test_reference_images_of_klein(tmp_path: Path) -> None:
    pipeline: Any = afa.load_pipeline(saved_experts("klein", tmp_path, 2))
    picture = Image.new("RGB", (64, 64))
    with refusal("AFA-MODEL-014", "second image"):
        pipeline(prompt="a fox", image=picture, height=16, width=16, num_inference_steps=1)


def test_inpainting_with_chroma(tmp_path: Path) -> None:
    """The library's pipeline fails with the library's own model as well."""
    (folder,) = saved_experts("chroma", tmp_path, 1)
    call = {"image": torch.zeros(1, 3, 16, 16), "mask_image": torch.ones(1, 1, 16, 16)}
    for pipeline in (ChromaPipeline.from_pretrained(folder), afa.load_pipeline([folder])):
        other: Any = build_pipeline("ChromaInpaintPipeline", pipeline.components, {})
        with pytest.raises(AttributeError, match="guidance_embeds"):
            other("a fox", height=16, width=16, strength=1.0, num_inference_steps=1, **call)


def test_perturbed_attention_guidance(experts: list[Path]) -> None:
    def guided(pipeline: Any) -> Tensor:
        parts = {**pipeline.components, "requires_safety_checker": False}
        other = StableDiffusionPAGPipeline(**parts, pag_applied_layers=["mid"])
        other.set_progress_bar_config(disable=True)
        return draw(other, pag_scale=3.0)

    assert torch.equal(guided(stock(experts[0])), guided(shell(experts[0])))


@pytest.mark.parametrize("scheduler", [EulerAncestralDiscreteScheduler, LCMScheduler])
def test_other_schedulers(pipeline: Any, scheduler: Any) -> None:
    before = draw(pipeline)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    after = draw(pipeline)
    assert after.isfinite().all()
    assert not torch.equal(before, after)


def test_embeddings_instead_of_prompts(pipeline: Any) -> None:
    prompt, negative = pipeline.encode_prompt("a fox", "cpu", 1, True)
    embedded = draw(pipeline, None, prompt_embeds=prompt, negative_prompt_embeds=negative)
    assert torch.equal(embedded, draw(pipeline))
    # one expert's alone serves all of them
    one = [embeds[..., :TEXT_WIDTH] for embeds in (prompt, negative)]
    shared = draw(pipeline, None, prompt_embeds=one[0], negative_prompt_embeds=one[1])
    assert shared.isfinite().all()


def test_guidance_rescaled(experts: list[Path]) -> None:
    drawn = [draw(make(experts[0]), guidance_rescale=0.7) for make in (stock, shell)]
    assert torch.equal(*drawn)


# -- other experts ------------------------------------------------------------------------------


def test_experts_for_inpainting(tmp_path: Path) -> None:
    folders = []
    for seed in range(2):
        parts = tiny_pipeline(tmp_path / "tokenizer", seed, in_channels=9).components
        model = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
        folders.append(tmp_path / f"expert{seed}")
        model.save_pretrained(folders[-1])
    picture, hole = Image.new("RGB", (16, 16), "red"), Image.new("L", (16, 16), 255)
    stock_one = StableDiffusionInpaintPipeline.from_pretrained(folders[0], safety_checker=None)
    drawn = [
        draw(one, image=picture, mask_image=hole, height=16, width=16)
        for one in (stock_one, shell(folders[0]))
    ]
    assert torch.equal(*drawn)
    both = afa.load_pipeline(folders)
    assert type(both) is StableDiffusionInpaintPipeline
    filled = draw(both, image=picture, mask_image=hole, height=16, width=16)
    assert filled.isfinite().all()
    ordinary = tmp_path / "ordinary"
    tiny_pipeline(tmp_path / "tokenizer").save_pretrained(ordinary)
    with refusal("AFA-LOAD-004", "= 4", "9"):
        afa.load_pipeline([folders[0], ordinary])


def test_experts_that_predict_velocity(tmp_path: Path) -> None:
    folders = []
    for seed in range(2):
        model = tiny_pipeline(tmp_path / "tokenizer", seed)
        scheduler = DDIMScheduler.from_config(
            model.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=True
        )
        model.register_modules(scheduler=scheduler)
        folders.append(tmp_path / f"expert{seed}")
        model.save_pretrained(folders[-1])
    assert torch.equal(draw(stock(folders[0])), draw(shell(folders[0])))
    both = ensemble(folders)
    assert both.scheduler.config.prediction_type == "v_prediction"
    assert draw(both).isfinite().all()


def test_experts_of_classes() -> None:
    experts = [tiny_unet(seed, num_class_embeds=4) for seed in range(2)]
    labels = torch.tensor([1, 3])
    torch.manual_seed(0)
    call: dict[str, Any] = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 900]),
        "encoder_hidden_states": torch.randn(2, 5, TEXT_WIDTH),
        "class_labels": labels,
    }
    alone = EnsembleDenoiser(experts[:1])(**call).sample
    assert torch.equal(alone, experts[0](**call).sample)
    both = EnsembleDenoiser(experts)
    assert not torch.equal(both(**call).sample, both(**{**call, "class_labels": 0 * labels}).sample)


# -- the table ----------------------------------------------------------------------------------


def test_every_row_of_the_table_has_its_test() -> None:
    root = _DOCS.parent.parent
    text = _DOCS.read_text().partition("<!-- pairs")[0]  # those have tests of their own
    rows = [line for line in text.splitlines() if re.match(r"\| (?!what)", line)]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(tests/\S+\.py)::(\w+)`", row)
        assert named, row
        for file, test in named:
            assert f"def {test}(" in (root / file).read_text(), (file, test)
