"""Experts from files of scaled and plain float8 weights: every scale is applied or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

import afa
from afa.denoisers.kinds import denoiser_of
from afa.denoisers.packed import PackedLinear, packed_layers
from afa.loading.inspection import describe, describe_quantised
from afa.loading.manifest import read_manifest
from afa.loading.memory.bits import bits_of
from afa.loading.memory.plan import bytes_alone
from afa.loading.pipeline import load_single
from afa.loading.single_file.load import Companions
from afa.loading.single_file.packed.layout import layout_of
from afa.merging import WeightedSum
from afa.merging.checkpoints import read_checkpoint
from afa.merging.in_memory import merge_models, weighted_merge
from tests.loading.single_file.test_load import assert_same_weights, made
from tests.quantised import Layout, is_matrix, scaled, write_scaled
from tests.refusal import refusal
from tests.single_file import original_layout

pytestmark = pytest.mark.slow

_LAYOUTS: tuple[Layout, ...] = ("scale_weight", "comfy_quant", "metadata", "plain")
_UNET = "model.diffusion_model."
_ROTATED = '{"format": "float8_e4m3fn", "full_precision_matrix_mult": true, "convrot": true}'
_FIRST = f"{_UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def sd1(root: Path) -> DiffusionPipeline:
    return made("1.5", root)


@pytest.fixture(scope="module")
def files(sd1: DiffusionPipeline, root: Path) -> tuple[Path, Path]:
    """One model with scaled weights, and the same with the dequantised ones."""
    exact = write_scaled(original_layout(sd1), root / "scaled.safetensors", "scale_weight")
    return root / "scaled.safetensors", written(exact, root / "dense.safetensors")


def written(tensors: dict[str, Tensor], file: Path, metadata: Any = None) -> Path:
    save_file({name: t.clone().contiguous() for name, t in tensors.items()}, file, metadata)
    return file


def assert_dequantised(packed: nn.Module, dense: nn.Module) -> None:
    """All linear layers are quantised, and all weights are equal to the last bit."""
    layers = packed_layers(packed)
    assert layers.keys() == {n for n, m in dense.named_modules() if type(m) is nn.Linear}
    for name, parameter in dense.named_parameters():
        found = layers.get(name.removesuffix(".weight"))
        ours = found.weight if found and name.endswith("weight") else packed.get_parameter(name)
        assert ours.dtype == parameter.dtype
        assert torch.equal(ours, parameter), name


def draw(pipeline: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn: Tensor = pipeline(
        "a fox", num_inference_steps=2, output_type="pt", generator=generator
    ).images
    return drawn


# -- what is loaded ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", _LAYOUTS)
@pytest.mark.parametrize("kind", ["1.5", "sd3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_values_times_scales(
    kind: str, layout: Layout, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = original_layout(made(kind, tmp_path))
    exact = write_scaled(tensors, tmp_path / "a.safetensors", layout)
    written(exact, tmp_path / "b.safetensors")
    ours, theirs = (
        afa.load_pipeline([file], config=tmp_path / f"{kind}-0", torch_dtype=dtype)
        for file in (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    )
    assert_dequantised(denoiser_of(ours).experts[0], denoiser_of(theirs).experts[0])
    assert denoiser_of(ours).dtype == dtype
    # where a weight lies in memory decides the last bits of a product
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    torch.testing.assert_close(draw(ours), draw(theirs), atol=tolerance, rtol=0)


def test_a_denoiser_alone_in_the_layout_of_diffusers(root: Path, tmp_path: Path) -> None:
    pipeline = made("sd3", root)
    state = {name: t.detach() for name, t in pipeline.transformer.state_dict().items()}
    for layout in ("scale_weight", "metadata"):
        exact = write_scaled(state, tmp_path / f"{layout}.safetensors", layout, prefix="")
        dense = written(exact, tmp_path / "dense.safetensors")
        ours, theirs = (
            afa.load_pipeline([file], config=root / "sd3-0", parts=[root / "sd3-0"])
            for file in (tmp_path / f"{layout}.safetensors", dense)
        )
        assert_dequantised(ours.transformer.experts[0], theirs.transformer.experts[0])


def test_memory_keeps_a_byte_per_weight(files: tuple[Path, Path], root: Path) -> None:
    ours, theirs = (
        afa.load_pipeline([file], config=root / "1.5-0").unet.experts[0] for file in files
    )
    for name, layer in packed_layers(ours).items():
        weight = theirs.get_parameter(f"{name}.weight")
        held = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
        bias = 0 if layer.bias is None else layer.bias.nbytes
        assert held - bias == weight.numel() + 4 * len(weight)
        assert layer.packed.dtype == torch.uint8


def test_scales_per_row_and_e5m2(sd1: DiffusionPipeline, root: Path, tmp_path: Path) -> None:
    tensors = original_layout(sd1)
    found, _, exact = scaled(tensors, "comfy_quant", dtype=torch.float8_e5m2)
    conv = f"{_UNET}input_blocks.0.0.weight"  # not kept quantised, because it is no matrix
    found[conv] = tensors[conv].to(torch.float8_e5m2)
    found[f"{_UNET}input_blocks.0.0.weight_scale"] = torch.tensor(0.3)
    exact[conv] = found[conv].float() * torch.tensor(0.3)
    rows = torch.linspace(0.5, 2, len(found[f"{_FIRST}.weight"]))[:, None]
    found[f"{_FIRST}.weight_scale"] = rows
    exact[f"{_FIRST}.weight"] = found[f"{_FIRST}.weight"].float() * rows
    ours, theirs = (
        afa.load_pipeline([written(each, tmp_path / f"{n}.safetensors")], config=root / "1.5-0")
        for n, each in enumerate((found, exact))
    )
    assert_dequantised(ours.unet.experts[0], theirs.unet.experts[0])


def test_an_ensemble_of_three_kinds_of_files(files: tuple[Path, Path], root: Path) -> None:
    made("1.5", root, 1)
    three, plain = [files[0], files[1], root / "1.5-1"], [files[1], files[1], root / "1.5-1"]
    torch.manual_seed(0)
    ours = afa.load_pipeline(three, afa.SABWConfig(), config=root / "1.5-0")
    torch.manual_seed(0)
    theirs = afa.load_pipeline(
        plain, afa.SABWConfig(), config=root / "1.5-0", allow_duplicates=True
    )
    assert {p.dtype for p in ours.unet.aggregators.parameters()} == {torch.float32}
    torch.testing.assert_close(draw(ours), draw(theirs), atol=1e-5, rtol=0)
    afa.save_ensemble(ours, root / "saved")
    again = afa.load_ensemble(root / "saved")
    assert torch.equal(draw(again), draw(ours))


def test_text_encoders_are_dequantised(root: Path, tmp_path: Path) -> None:
    pipeline = made("sd3", tmp_path)
    tensors = original_layout(pipeline)
    prefix = "text_encoders.t5xxl.transformer."
    found, _, exact = scaled(tensors, "scale_weight", prefix)
    table = f"{prefix}shared.weight"  # a table of embeddings, unscaled as in published files
    found[table], exact[table] = (tensors[table].to(torch.float8_e4m3fn) for _ in range(2))
    del found[f"{prefix}shared.scale_weight"]
    ours, theirs = (
        afa.load_pipeline([written(each, tmp_path / f"{n}.safetensors")], config=tmp_path / "sd3-0")
        for n, each in enumerate((found, exact))
    )
    assert_same_weights(ours.text_encoder_3.encoders[0], theirs.text_encoder_3.encoders[0])
    # and as a file of its own, under parts
    for number, each in enumerate((found, exact)):
        own = {k.removeprefix(prefix): t for k, t in each.items() if k.startswith(prefix)}
        written(own, tmp_path / f"t5-{number}.safetensors")
    without = {k: t for k, t in tensors.items() if not k.startswith(prefix)}
    bare = written(without, tmp_path / "bare.safetensors")
    ours, theirs = (
        afa.load_pipeline(
            [bare], config=tmp_path / "sd3-0", parts=[tmp_path / f"t5-{n}.safetensors"]
        )
        for n in range(2)
    )
    assert_same_weights(ours.text_encoder_3.encoders[0], theirs.text_encoder_3.encoders[0])


def test_inspect_counts_them(files: tuple[Path, Path]) -> None:
    found = describe(files[0])
    assert "F8_E4M3" in found["dtypes"]
    assert "unknown" in found["configuration"]  # it has the size of no published model
    layout = layout_of(files[0])
    count = len(layout.scales)
    assert describe_quantised(layout) == f"{count} tensors F8_E4M3, {count} with a scale"
    assert len(layout.unused) == count + 1  # scales of activations, and the marker


# -- with other features ----------------------------------------------------------------------


@pytest.mark.parametrize("place", ["stream", "offload"])
def test_places_give_the_same_pictures(place: Any, files: tuple[Path, Path], root: Path) -> None:
    expected = draw(afa.load_pipeline([files[0]], config=root / "1.5-0"))
    ours = afa.load_pipeline([files[0]], config=root / "1.5-0", place=place)
    assert torch.equal(draw(ours), expected)
    ours.unet.stop_offloading()
    assert torch.equal(draw(ours), expected)


def test_a_cast_does_not_round_scales(files: tuple[Path, Path], root: Path) -> None:
    ours, theirs = (afa.load_pipeline([file], config=root / "1.5-0").unet for file in files)
    ours.to(torch.bfloat16).to(torch.float32)
    layers = packed_layers(ours.experts[0])
    for name, layer in layers.items():
        assert torch.equal(layer.weight, theirs.experts[0].get_parameter(f"{name}.weight"))


def test_gradients_pass_through(files: tuple[Path, Path], root: Path) -> None:
    """Aggregators train on quantised experts, with and without checkpointing."""
    ours, theirs = (afa.load_pipeline([file], config=root / "1.5-0").unet for file in files)
    text = torch.randn(1, 5, ours.config.cross_attention_dim)
    for checkpoints in (False, True):
        gradients = []
        for unet in (ours, theirs):
            if checkpoints:
                unet.enable_gradient_checkpointing()
            latent = torch.ones(1, 4, 8, 8, requires_grad=True)
            unet(latent, torch.tensor([5.0]), text, return_dict=False)[0].sum().backward()
            gradients.append(latent.grad)
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_a_lora_dequantises_what_it_changes(files: tuple[Path, Path], root: Path) -> None:
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    width = len(
        afa.load_pipeline([root / "1.5-0"]).unet.experts[0].get_parameter(f"{layer}.weight")
    )
    torch.manual_seed(3)
    lora = {
        f"unet.{layer}.lora_A.weight": torch.randn(2, width),
        f"unet.{layer}.lora_B.weight": torch.randn(width, 2),
    }
    file = written(lora, root / "lora.safetensors")
    ours, theirs = (
        afa.load_pipeline(
            [each, {"base": str(each), "lora": str(file), "scale": 0.5}], config=root / "1.5-0"
        ).unet.experts
        for each in files
    )
    changed = theirs[1].get_parameter(f"{layer}.weight")
    assert torch.equal(ours[1].get_parameter(f"{layer}.weight"), changed)
    assert not torch.equal(ours[0].get_submodule(layer).weight, changed)
    left = packed_layers(ours[1])
    assert layer not in left
    assert all(packed_layers(ours[0])[name].packed is left[name].packed for name in left)
    with refusal("AFA-ENSEMBLE-069", "to_q|time_embedding"):
        afa.load_pipeline([files[0]], config=root / "1.5-0").load_lora_weights(file)


def test_merges_and_trainings_get_dequantised_weights(files: tuple[Path, Path], root: Path) -> None:
    companions = Companions(torch.float32, config=root / "1.5-0")
    ours, theirs = (
        load_single(file, companions=companions, dequantise=True)[0].unet for file in files
    )
    assert_same_weights(theirs, ours)
    assert all(parameter.requires_grad for parameter in ours.parameters())
    kept = load_single(files[0], companions=companions)[0].unet
    assert packed_layers(kept)
    expected = weighted_merge([theirs, made("1.5", root, 1).unet])
    merged = merge_models([kept, made("1.5", root, 1).unet], WeightedSum())
    assert_same_weights(expected, merged)
    assert packed_layers(kept)


def test_what_needs_plain_weights_is_refused(files: tuple[Path, Path], root: Path) -> None:
    with refusal("AFA-LOAD-115", "scaled.safetensors"):
        afa.load_pipeline([files[0]], config=root / "1.5-0", quantize="int8")
    with refusal("AFA-MERGE-032"):
        read_checkpoint(str(files[0]))
    unet = afa.load_pipeline([files[0]], config=root / "1.5-0").unet
    with refusal("AFA-ENSEMBLE-071"):
        unet.shard_experts(Any)


def test_the_memory_estimate_counts_a_byte_per_weight(files: tuple[Path, Path], root: Path) -> None:
    companions = Companions(torch.float32, config=root / "1.5-0")
    ours, theirs = (read_manifest(file, companions) for file in files)
    assert bits_of([theirs], torch.float32) is None
    bits = bits_of([ours, theirs], torch.float32)
    assert bits is not None
    assert (bits.mean, bits.most, bits.is_dequantised) == (20, 32, True)
    unet = load_single(files[1], companions=companions)[0].unet
    linear = sum(m.weight.numel() for m in unet.modules() if type(m) is nn.Linear)
    rows = sum(m.out_features for m in unet.modules() if type(m) is nn.Linear)
    saved = bytes_alone(theirs, torch.float32) - bytes_alone(ours, torch.float32)
    assert saved == 3 * linear - 4 * rows
    lora = replace(ours, source=replace(ours.source, lora="x"))
    assert bits_of([lora], torch.float32) is None


def test_a_layer_prints_its_format_and_is_no_linear_layer(files: tuple[Path, Path]) -> None:
    layer = PackedLinear(
        torch.zeros(4, 3, dtype=torch.uint8), None, None, "F8_E4M3", (4, 3), torch.float16
    )
    assert "3, 4, F8_E4M3" in repr(layer)
    assert not isinstance(layer, nn.Linear)
    assert is_matrix("a.weight", layer.weight)
    assert layer.weight.dtype == torch.float16
