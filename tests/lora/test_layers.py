"""Layers under the names of the original codes, held against whole models in those layouts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig

from afa.denoisers.kinds import denoiser_of, kind_of_pipeline
from afa.lora.header import LoraFile
from afa.lora.plan import Base, plan_changes
from tests.loading.single_file.test_load import described
from tests.lora.models import assert_equal, by_diffusers, peft_lora, with_lora, write
from tests.single_file import original_layout
from tests.tiny import ODD, tiny_pipeline
from tests.tiny_pipelines import PIPELINES

if TYPE_CHECKING:
    from torch import Tensor

DENOISER = "model.diffusion_model."
#: no layer, but a table
_TABLES = ("pos_embed",)


def made(kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    return tiny_pipeline(folder) if kind == "1.5" else PIPELINES[kind](folder)


def denoiser_layers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A denoiser's weights under its original names."""
    return {
        key.removeprefix(DENOISER): tensor
        for key, tensor in tensors.items()
        if key.startswith(DENOISER) and not key.endswith(_TABLES)
        if "." in key.removeprefix(DENOISER)
    }


def change_of_everything(weights: dict[str, Tensor], flat: bool) -> tuple[dict[str, Tensor], Any]:
    """A LoRA of every layer, a difference of every norm and bias; and what each adds."""
    torch.manual_seed(1)
    tensors, added = {}, {}
    for key, weight in weights.items():
        layer, _, last = key.rpartition(".")
        name = f"lora_unet_{layer.replace('.', '_')}" if flat else f"diffusion_model.{layer}"
        if weight.ndim == 1:
            role = "diff_b" if last == "bias" else "diff"
            tensors[f"{name}.{role}"] = added[key] = torch.randn_like(weight)
            continue
        rest = weight.shape[1:]
        down, up = torch.randn(2, *rest), torch.randn(len(weight), 2, *(1 for _ in rest[1:]))
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down, up
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
        added[key] = 0.5 * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return tensors, added


@pytest.mark.parametrize(
    ("kind", "flat"),
    [
        ("1.5", True),
        ("xl", False),
        ("flux", True),
        ("flux", False),
        ("chroma", True),
        ("z-image", True),
        ("qwen-image", True),
        ("klein", True),
        ("sd3", True),
    ],
)
def test_every_layer_by_its_original_name(kind: str, flat: bool, tmp_path: Path) -> None:
    pipeline = made(kind, tmp_path / "tokenizer")
    before = denoiser_layers(original_layout(pipeline))
    tensors, added = change_of_everything(before, flat)
    after = with_lora(pipeline, write(tmp_path / "l.safetensors", tensors))
    for key, tensor in denoiser_layers(original_layout(after)).items():
        torch.testing.assert_close(tensor, before[key] + added[key], rtol=1e-5, atol=1e-5, msg=key)
    old, new = denoiser_of(pipeline).state_dict(), denoiser_of(after).state_dict()
    same = [key for key, tensor in old.items() if torch.equal(tensor, new[key])]
    assert all("pos_embed" in key or "." not in key for key in same), same


@pytest.mark.parametrize(
    "name",
    [
        "stable-diffusion-1.5",
        "stable-diffusion-xl",
        "stable-diffusion-3.5-medium",
        "flux-dev",
        "chroma",
    ],
)
def test_every_layer_of_the_published_models(name: str) -> None:
    """At their real sizes, by shapes alone."""
    pipeline = described(name)
    kind = kind_of_pipeline(pipeline)
    header = {}
    for key, weight in denoiser_layers(original_layout(pipeline)).items():
        layer = "lora_unet_" + key.rpartition(".")[0].replace(".", "_")
        if weight.ndim > 1:
            rest = weight.shape[1:]
            header[f"{layer}.lora_down.weight"] = (4, *rest)
            header[f"{layer}.lora_up.weight"] = (len(weight), 4, *(1 for _ in rest[1:]))
    lora = LoraFile(
        Path("l"), {k: {"dtype": "F16", "shape": s} for k, s in header.items()}, {}, None, {}
    )
    base = Base.of(name, kind, {kind.denoiser: denoiser_of(pipeline)})
    changes = plan_changes(lora, base, 1.0)
    assert sum(len(change.tensors) for change in changes) == len(header)
    assert len({rows.layer for change in changes for rows in change.rows}) >= len(changes)


# -- spellings of the library's own names -----------------------------------------------------


def renamed(state: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """PEFT's names of a U-Net's attention as other programs write them."""
    found = {}
    for key, tensor in state.items():
        layer, _, side = key.removesuffix(".weight").rpartition(".lora_")
        kohya = {"A": "down", "B": "up"}[side]
        place, _, last = layer.removesuffix(".0").rpartition(".")
        found[
            {
                "diffusers": f"unet.{key}",
                "bare": key,
                "diffusion_model": f"diffusion_model.{key}",
                "named adapter": f"base_model.model.{layer}.lora_{side}.ink.weight",
                "kohya": f"lora_unet_{layer.replace('.', '_')}.lora_{kohya}.weight",
                "lycoris": f"lycoris_{layer.replace('.', '_')}.lora_{kohya}.weight",
                "processors": f"unet.{place}.processor.{last}_lora.{kohya}.weight",
                "bare processors": f"{place}.processor.{last}_lora.{kohya}.weight",
            }[layout]
        ] = tensor
    return found


@pytest.mark.parametrize(
    ("layout", "diffusers_reads_it"),
    [
        ("diffusers", True),
        ("kohya", True),
        ("processors", True),
        ("bare", False),
        ("bare processors", False),
        ("diffusion_model", False),
        ("lycoris", False),
        ("named adapter", False),
    ],
)
def test_spellings_of_a_layer(layout: str, diffusers_reads_it: bool, tmp_path: Path) -> None:
    pipeline = tiny_pipeline(tmp_path / "tokenizer", **ODD["two levels"])
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["attn1.to_q", "to_out.0"])
    state = peft_lora(pipeline.unet, config)
    one = write(tmp_path / "one.safetensors", {f"unet.{k}": t for k, t in state.items()})
    expected = with_lora(pipeline, one).unet.state_dict()
    beside = config if layout == "named adapter" else None
    file = write(tmp_path / "l.safetensors", renamed(state, layout), beside)
    ours = with_lora(pipeline, file).unet
    assert_equal(ours, expected, pipeline.unet, atol=0)
    if diffusers_reads_it:
        assert_equal(ours, by_diffusers(pipeline, file), pipeline.unet)


# -- text encoders ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "prefix", "part"),
    [
        ("1.5", "lora_te_", "text_encoder"),
        ("1.5", "text_encoder.", "text_encoder"),
        ("xl", "lora_te1_", "text_encoder"),
        ("xl", "lora_te2_", "text_encoder_2"),
        ("xl", "text_encoders.clip_g.transformer.", "text_encoder_2"),
        ("flux", "lora_te1_", "text_encoder"),
        ("flux", "lora_te3_", "text_encoder_2"),
        ("flux", "text_encoders.t5xxl.transformer.", "text_encoder_2"),
        ("sd3", "text_encoders.clip_l.transformer.", "text_encoder"),
        ("sd3", "lora_te3_", "text_encoder_3"),
        ("pixart", "text_encoders.t5xxl.transformer.", "text_encoder"),
    ],
)
def test_text_encoders(kind: str, prefix: str, part: str, tmp_path: Path) -> None:
    pipeline = made(kind, tmp_path / "tokenizer")
    encoder = getattr(pipeline, part)
    is_t5 = "T5" in type(encoder).__name__
    tensors: dict[str, Tensor] = {}
    products: dict[str, Tensor] = {}
    for name, weight in encoder.named_parameters():
        layer = name.removesuffix(".weight")
        if weight.ndim < 2 or "embed" in name or layer == "shared":
            continue
        bare = layer.removeprefix("text_model.")
        stem = layer if is_t5 or "text_projection" in bare else f"text_model.{bare}"
        stem = prefix + (stem.replace(".", "_") if prefix.endswith("_") else stem)
        down, up = torch.randn(2, weight.shape[1]), torch.randn(len(weight), 2)
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        products[name] = up @ down
    after = with_lora(pipeline, write(tmp_path / "l.safetensors", tensors))
    for name, weight in getattr(after, part).named_parameters():
        expected = encoder.get_parameter(name) + products.get(name, 0)
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-5, msg=name)
    for other in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if other != part:  # left alone, and shared
            assert getattr(after, other, None) is getattr(pipeline, other, None)


def test_an_embedding_that_two_modules_share(tmp_path: Path) -> None:
    pipeline = made("flux", tmp_path / "tokenizer")
    table = pipeline.text_encoder_2.shared.weight
    tensors = {"text_encoders.t5xxl.transformer.shared.diff": torch.ones_like(table)}
    after = with_lora(pipeline, write(tmp_path / "l.safetensors", tensors)).text_encoder_2
    tokens = torch.tensor([[3, 4]])
    torch.testing.assert_close(after.shared(tokens), pipeline.text_encoder_2.shared(tokens) + 1)
    assert after.encoder.embed_tokens.weight is after.shared.weight
