"""LoRAs as experts: the same pictures as merged checkpoints, for the memory of one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import afa
from afa.aggregators import SABW
from afa.denoisers.kinds import denoiser_of
from afa.errors import AfaError
from afa.loading.expert_source import ExpertSource
from afa.loading.inspection import describe
from tests.cli.test_cli import run
from tests.refusal import refusal
from tests.tiny_pipelines import PIPELINES

SMALL = afa.SABWConfig(hidden_size=8, num_layers=1, num_heads=2, norm_num_groups=4)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]


def lora_of(
    pipeline: Any, file: Path, seed: int, *, text: bool = True, targets: Any = ATTENTION
) -> Path:
    """Write a LoRA with random weights, in the layout of diffusers."""
    torch.manual_seed(seed)
    parts = {"unet": (denoiser_of(pipeline), targets)}
    if text:
        parts["text_encoder"] = (pipeline.text_encoder, TEXT)
    tensors = {}
    for prefix, (model, names) in parts.items():
        model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=names))
        for key, tensor in get_peft_model_state_dict(model).items():
            tensors[f"{prefix}.{key}"] = torch.randn_like(tensor) * 0.2
        model.delete_adapters("default") if prefix == "unet" else model.delete_adapter("default")
    save_file(tensors, file)
    return file


@pytest.fixture
def loras(experts: list[Path], tmp_path: Path) -> list[Path]:
    pipeline = StableDiffusionPipeline.from_pretrained(experts[0])
    return [lora_of(pipeline, tmp_path / f"lora{n}.safetensors", n) for n in range(3)]


def asked(base: Path, lora: Path, scale: float = 0.8) -> dict[str, Any]:
    return {"base": str(base), "lora": str(lora), "scale": scale}


def merged(base: Path, lora: Path, folder: Path, scale: float = 0.8) -> Path:
    """The same as a checkpoint of its own, merged by the library."""
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(str(lora))
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(folder)
    return folder


def awake(pipeline: Any) -> Any:
    torch.manual_seed(3)
    for rule in denoiser_of(pipeline).aggregators:
        if isinstance(rule, SABW):
            nn.init.normal_(rule.conv_out.weight)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    images = pipeline("a fox", num_inference_steps=2, generator=generator, output_type="pt")
    return images.images


def pointers(model: nn.Module) -> set[int]:
    return {p.data_ptr() for p in model.parameters()}


@torch.no_grad()
def test_they_draw_as_merged_checkpoints_do(
    experts: list[Path], loras: list[Path], tmp_path: Path
) -> None:
    folders = [merged(experts[0], lora, tmp_path / lora.stem) for lora in loras]
    torch.manual_seed(1)
    shared = afa.load_pipeline([asked(experts[0], lora) for lora in loras], SMALL)
    torch.manual_seed(1)
    apart = afa.load_pipeline(folders, SMALL)
    for ours, theirs in zip(shared.unet.experts, apart.unet.experts, strict=True):
        for key, tensor in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], tensor, rtol=0, atol=1e-6)
    torch.testing.assert_close(draw(awake(shared)), draw(awake(apart)), rtol=0, atol=1e-5)


def test_they_share_what_no_lora_touches(experts: list[Path], loras: list[Path]) -> None:
    before = load_file(experts[0] / "unet" / "diffusion_pytorch_model.safetensors")
    pipeline = afa.load_pipeline([str(experts[0]), *(asked(experts[0], lora) for lora in loras)])
    base, *others = pipeline.unet.experts
    for key, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    for expert in others:
        own = pointers(expert) - pointers(base)
        touched = [n for n, _ in expert.named_modules() if n.endswith(tuple(ATTENTION))]
        assert len(own) == len(touched) > 0
        assert not any("lora" in name for name, _ in expert.named_modules())
    pipeline.to(torch.bfloat16)  # still shared after a move
    assert len(pointers(others[0]) - pointers(base)) == len(touched)
    assert len(pointers(pipeline.unet.experts)) == len(pointers(base)) + 3 * len(touched)


def test_a_lora_without_text_leaves_one_text_encoder(experts: list[Path], tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(experts[0])
    files = [lora_of(pipeline, tmp_path / f"{n}.safetensors", n, text=False) for n in range(2)]
    ensemble = afa.load_pipeline([asked(experts[0], file) for file in files])
    assert len(ensemble.text_encoder.encoders) == 1


def test_saved_and_loaded(experts: list[Path], loras: list[Path], tmp_path: Path) -> None:
    pipeline = awake(afa.load_pipeline([asked(experts[0], lora) for lora in loras], SMALL))
    folder = afa.save_ensemble(pipeline, tmp_path / "ensemble")
    again = afa.load_ensemble(folder)
    assert torch.equal(draw(pipeline), draw(again))
    card = (folder / "README.md").read_text()
    assert "with 0.8 of `./../lora0.safetensors`" in card
    (first, *_) = describe(folder)["experts"]
    assert first["lora"] == "0.8 x ./../lora0.safetensors"
    assert run("inspect", folder) == 0
    lora_of(StableDiffusionPipeline.from_pretrained(experts[0]), loras[1], seed=9)
    with refusal("AFA-LOAD-031", r"lora1\.safetensors", "SHA-256"):
        afa.load_ensemble(folder)


@torch.no_grad()
def test_kohyas_layout(experts: list[Path], loras: list[Path], tmp_path: Path) -> None:
    """As the web has them: flat names, `text_model` in the text encoder's, an alpha beside each."""
    converted = {}
    for key, tensor in load_file(loras[0]).items():
        part, _, place = key.partition(".")
        layer, _, side = place.removesuffix(".weight").rpartition(".")
        if part == "text_encoder":
            layer = "text_model." + layer.removeprefix("text_model.")
        name = f"{'lora_unet' if part == 'unet' else 'lora_te'}_{layer.replace('.', '_')}"
        side = {"lora_A": "lora_down", "lora_B": "lora_up"}[side]
        converted[f"{name}.{side}.weight"] = tensor
        converted[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(converted, tmp_path / "kohya.safetensors")
    pipeline = afa.load_pipeline([asked(experts[0], tmp_path / "kohya.safetensors")])
    expected = merged(experts[0], tmp_path / "kohya.safetensors", tmp_path / "merged")
    unet = load_file(expected / "unet" / "diffusion_pytorch_model.safetensors")
    base = load_file(experts[0] / "unet" / "diffusion_pytorch_model.safetensors")
    (expert,) = pipeline.unet.experts
    for key, tensor in unet.items():
        torch.testing.assert_close(expert.state_dict()[key], tensor, rtol=0, atol=1e-6)
    assert any(not torch.equal(unet[key], base[key]) for key in base)
    text = StableDiffusionPipeline.from_pretrained(experts[0]).text_encoder.state_dict()
    (encoder,) = pipeline.text_encoder.encoders
    changed = [k for k, tensor in encoder.state_dict().items() if not torch.equal(tensor, text[k])]
    assert len(changed) == 2 * len(TEXT), "two layers"


@torch.no_grad()
def test_convolutions_as_locon_has_them(experts: list[Path], tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(experts[0])
    file = lora_of(pipeline, tmp_path / "locon.safetensors", 4, targets=["conv1", "conv_shortcut"])
    (expert,) = afa.load_pipeline([asked(experts[0], file)]).unet.experts
    unet = load_file(
        merged(experts[0], file, tmp_path / "merged")
        / "unet"
        / "diffusion_pytorch_model.safetensors"
    )
    for key, tensor in unet.items():
        torch.testing.assert_close(expert.state_dict()[key], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["xl", "flux", "chroma", "z-image", "klein", "qwen-image", "sd3"])
def test_other_kinds(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipeline = PIPELINES[kind](tmp_path / "tokenizer")
    base = tmp_path / "base"
    pipeline.save_pretrained(base)
    file = tmp_path / "lora.safetensors"
    denoiser = denoiser_of(pipeline)
    denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]))
    prefix = "unet" if kind == "xl" else "transformer"
    state = get_peft_model_state_dict(denoiser)
    save_file({f"{prefix}.{k}": torch.randn_like(v) for k, v in state.items()}, file)
    ensemble = afa.load_pipeline([str(base), asked(base, file)])
    plain, changed = denoiser_of(ensemble).experts
    own = pointers(changed) - pointers(plain)
    touched = [n for n, _ in changed.named_modules() if n.endswith(("to_q", "to_k"))]
    assert len(own) == len(touched) > 0


def test_it_trains_from_a_recipe(experts: list[Path], loras: list[Path], tmp_path: Path) -> None:
    import yaml

    from afa.training import load_recipe, train
    from tests.training.runs import as_written

    recipe = as_written(experts, num_steps=1)
    recipe["experts"] = [{**asked(experts[0], lora), "lora": lora.name} for lora in loras[:2]]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    list(train(load_recipe(path), tmp_path / "run"))
    assert (tmp_path / "run" / "aggregators.safetensors").is_file()
    recipe["experts"][0]["scal"] = recipe["experts"][0].pop("scale")
    path.write_text(yaml.safe_dump(recipe))
    with refusal("AFA-RECIPE-002", r"'experts\.0\.scal'", "'scale'"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("no.safetensors", None, "no.safetensors' does not exist"),
        ("x.ckpt", None, "is a pickle, which can run code"),
        ("x.safetensors", {"conv_in.weight": torch.ones(1)}, "must be a LoRA for the Stable"),
        (
            "x.safetensors",
            {"lora_unet_a.oft_blocks": torch.ones(1)},
            "has 'lora_unet_a.oft_blocks', a tensor of OFT",
        ),
        (
            "x.safetensors",
            {
                "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 8),
                "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(8, 2),
            },
            "does not fit the Stable Diffusion model .* 2 of its 2 tensors .* probably for Flux",
        ),
    ],
)
def test_errors(experts: list[Path], tmp_path: Path, name: str, tensors: Any, message: str) -> None:
    if tensors is not None:
        save_file(tensors, tmp_path / name)
    with pytest.raises(AfaError, match=message) as error:
        afa.load_pipeline([asked(experts[0], tmp_path / name)])
    assert "\n" not in str(error.value)


def test_a_lora_with_its_own_objective(experts: list[Path], loras: list[Path]) -> None:
    base = {"base": str(experts[0])}
    velocity = {**base, "lora": str(loras[0]), "prediction_type": "v_prediction"}
    pipeline = afa.load_pipeline([experts[0], velocity, {**base, "lora": str(loras[1])}])
    kinds = [each.predicts for each in pipeline.unet.objectives.experts]
    assert kinds == ["epsilon", "v_prediction", "epsilon"]


def test_from_python() -> None:
    assert ExpertSource("zoo:base", lora="a.safetensors").scale == 1.0
