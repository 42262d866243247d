"""GGUF files as experts: their weights to the last bit, and everything else refused by name."""

from __future__ import annotations

import copy
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

import afa
from afa import files
from afa.denoisers.kinds import denoiser_of
from afa.denoisers.packed import PackedLinear, packed_layers
from afa.ensemble.caching.graphs import Graphs
from afa.files import FileCache
from afa.loading import weights
from afa.loading.inspection import describe
from afa.loading.manifest import read_manifest
from afa.loading.memory.bits import bits_of
from afa.loading.pipeline import load_single
from afa.loading.single_file.load import Companions
from afa.loading.trust.gguf import BY_NAME, PLAIN, check_gguf
from afa.merging.checkpoints import read_checkpoint
from afa.preflight.weights import Weights, check_values
from tests.cli.test_cli import run, write_recipe
from tests.loading.single_file.test_load import assert_same_weights, made
from tests.loading.single_file.test_scaled_fp8 import draw
from tests.quantised import quantised_rows, write_gguf
from tests.refusal import refusal
from tests.single_file import original_layout
from tests.tiny_pipelines import PIPELINES

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.slow

_PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def wide(root: Path, width: int, seed: int = 0) -> tuple[DiffusionPipeline, Path]:
    """A pipeline of Stable Diffusion 3 whose rows have this many weights, and its folder."""
    pipeline = made("sd3", root, seed)
    config = {**pipeline.transformer.config, "attention_head_dim": width // 2, "num_layers": 2}
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel.from_config({**config, "caption_projection_dim": width})
    pipeline.register_modules(transformer=transformer.eval())
    folder = root / f"wide-{width}-{seed}"
    pipeline.save_pretrained(folder)
    return pipeline, folder


@pytest.fixture(scope="module")
def sd3(root: Path) -> tuple[DiffusionPipeline, Path]:
    return wide(root, 32)


def denoiser_tensors(pipeline: Any) -> dict[str, Tensor]:
    """The denoiser's tensors as in published GGUF files: original names without a prefix."""
    tensors = original_layout(pipeline)
    return {k.removeprefix(_PREFIX): t for k, t in tensors.items() if k.startswith(_PREFIX)}


def _written(tensors: dict[str, Tensor], file: Path) -> Path:
    save_file({name: t.clone().contiguous() for name, t in tensors.items()}, file)
    return file


@pytest.fixture(scope="module")
def q4(sd3: tuple[DiffusionPipeline, Path], root: Path) -> tuple[Path, Path]:
    """One denoiser in Q4_0, and the same with the dequantised weights."""
    exact = write_gguf(denoiser_tensors(sd3[0]), root / "q4.gguf", "sd3", "Q4_0")
    return root / "q4.gguf", _written(exact, root / "q4-dense.safetensors")


# -- what is loaded ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", sorted(name for name in BY_NAME if name not in PLAIN))
def test_weights_are_those_of_the_package(
    kind: str, dtype: torch.dtype, root: Path, tmp_path: Path
) -> None:
    pipeline, folder = wide(root, BY_NAME[kind].elements)
    exact = write_gguf(denoiser_tensors(pipeline), tmp_path / "a.gguf", "sd3", kind)
    dense = _written(exact, tmp_path / "b.safetensors")
    ours, theirs = (
        afa.load_pipeline([file], config=folder, parts=[folder], torch_dtype=dtype).transformer
        for file in (tmp_path / "a.gguf", dense)
    )
    layers = packed_layers(ours.experts[0])
    assert {layer.quantisation for layer in layers.values()} == {kind}
    inside = {n for n, m in theirs.experts[0].named_modules() if type(m) is nn.Linear}
    assert {name for name in inside if name.startswith("transformer_blocks.0.attn.")} <= set(layers)
    for name, layer in layers.items():
        assert torch.equal(layer.weight, theirs.experts[0].get_parameter(f"{name}.weight")), name
    assert ours.dtype == dtype


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_types_without_blocks_are_plain_weights(
    kind: str, sd3: tuple[DiffusionPipeline, Path], tmp_path: Path
) -> None:
    exact = write_gguf(denoiser_tensors(sd3[0]), tmp_path / "a.gguf", "sd3", kind)
    dense = _written(exact, tmp_path / "b.safetensors")
    ours, theirs = (
        afa.load_pipeline([file], config=sd3[1], parts=[sd3[1]]).transformer.experts[0]
        for file in (tmp_path / "a.gguf", dense)
    )
    assert not packed_layers(ours)
    assert_same_weights(theirs, ours)


def test_three_experts_of_different_precision(
    q4: tuple[Path, Path], sd3: tuple[DiffusionPipeline, Path], root: Path
) -> None:
    other = wide(root, 32, 1)[1]
    options: dict[str, Any] = {"config": sd3[1], "parts": [sd3[1]]}
    pictures = []
    for file in q4:
        torch.manual_seed(0)
        pipeline = afa.load_pipeline([file, sd3[1], other], afa.SABWConfig(), **options)
        assert {p.dtype for p in pipeline.transformer.aggregators.parameters()} == {torch.float32}
        pictures.append(draw(pipeline))
    torch.testing.assert_close(*pictures, atol=1e-5, rtol=0)
    pipeline = afa.load_pipeline([q4[0], other], **options)
    afa.save_ensemble(pipeline, root / "saved")
    assert torch.equal(draw(afa.load_ensemble(root / "saved")), draw(pipeline))


def test_flattened_weights_of_a_unet(root: Path, tmp_path: Path) -> None:
    """Converters flatten weights whose rows are no blocks; convolutions are dequantised."""
    pipeline = made("1.5", root)
    for n, tensors in enumerate((denoiser_tensors(pipeline), pipeline.unet.state_dict())):
        exact = write_gguf(tensors, tmp_path / f"{n}.gguf", "sd1", "Q8_0", flatten=True)
        options: dict[str, Any] = {"config": root / "1.5-0", "parts": [root / "1.5-0"]}
        dense = _written(exact, tmp_path / f"{n}.safetensors")
        ours, theirs = (
            afa.load_pipeline([file], **options).unet.experts[0]
            for file in (tmp_path / f"{n}.gguf", dense)
        )
        layers = packed_layers(ours)
        assert layers
        for name, parameter in theirs.named_parameters():
            found = layers.get(name.removesuffix(".weight"))
            is_packed = found is not None and name.endswith("weight")
            mine = found.weight if found and is_packed else ours.get_parameter(name)
            assert torch.equal(mine, parameter), name


def test_dropped_dimensions_and_a_missing_architecture(
    sd3: tuple[DiffusionPipeline, Path], tmp_path: Path
) -> None:
    tensors = denoiser_tensors(sd3[0])
    tensors["pos_embed"] = tensors["pos_embed"][0]  # as ggml writes it
    write_gguf(tensors, tmp_path / "a.gguf", "sd3", "Q8_0")
    content = (tmp_path / "a.gguf").read_bytes()
    key = b"general.architecture"
    (tmp_path / "b.gguf").write_bytes(content.replace(key, b"general.xrchitecture"))
    for name in ("a.gguf", "b.gguf"):
        afa.load_pipeline([tmp_path / name], config=sd3[1], parts=[sd3[1]])


def test_a_whole_model_in_one_file(root: Path, tmp_path: Path) -> None:
    pipeline = made("1.5", root)
    exact = write_gguf(original_layout(pipeline), tmp_path / "a.gguf", "sd1", "Q8_0")
    dense = _written(exact, tmp_path / "b.safetensors")
    ours, theirs = (
        afa.load_pipeline([file], config=root / "1.5-0") for file in (tmp_path / "a.gguf", dense)
    )
    assert_same_weights(theirs.text_encoder, ours.text_encoder)
    assert_same_weights(theirs.vae, ours.vae)


@pytest.mark.nightly
def test_a_flux_file_of_published_width(tmp_path: Path) -> None:
    # the library reads this layout at the published width alone: one block of each kind
    torch.manual_seed(0)
    pipeline = PIPELINES["flux"](tmp_path / "tokenizer")
    config = {
        **pipeline.transformer.config,
        **{"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 128},
        "axes_dims_rope": (16, 56, 56),
        "num_attention_heads": 24,
    }
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(config).bfloat16()
    transformer = transformer.to_empty(device="cpu").eval()
    for n, parameter in enumerate(transformer.parameters()):
        parameter.data.uniform_(-0.02, 0.02, generator=torch.Generator().manual_seed(n))
    pipeline.register_modules(transformer=transformer)
    pipeline.save_pretrained(tmp_path / "folder")
    exact = write_gguf(denoiser_tensors(pipeline), tmp_path / "a.gguf", "flux", "Q4_K")
    loaded = afa.load_pipeline(
        [tmp_path / "a.gguf"],
        config=tmp_path / "folder",
        parts=[tmp_path / "folder"],
        torch_dtype=torch.bfloat16,
    )
    ours = loaded.transformer.experts[0]
    layers = packed_layers(ours)
    double, single = ours.transformer_blocks[0], ours.single_transformer_blocks[0]
    q, k, v, mlp = exact["single_blocks.0.linear1.weight"].split([3072, 3072, 3072, 12288])
    for layer, expected in (
        (single.attn.to_q, q),
        (single.attn.to_k, k),
        (single.attn.to_v, v),
        (single.proj_mlp, mlp),
        (double.ff.net[2], exact["double_blocks.0.img_mlp.2.weight"]),
        (double.attn.add_k_proj, exact["double_blocks.0.txt_attn.qkv.weight"].chunk(3)[1]),
        (ours.norm_out.linear, _swapped(exact["final_layer.adaLN_modulation.1.weight"])),
    ):
        assert layer in layers.values()
        assert torch.equal(layer.weight, expected.bfloat16())


def _swapped(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


# -- with other features ----------------------------------------------------------------------


@pytest.mark.parametrize("place", ["stream", "offload"])
def test_places_give_the_same_pictures(
    place: Any, q4: tuple[Path, Path], sd3: tuple[DiffusionPipeline, Path]
) -> None:
    options: dict[str, Any] = {"config": sd3[1], "parts": [sd3[1]]}
    expected = draw(afa.load_pipeline([q4[0]], **options))
    assert torch.equal(draw(afa.load_pipeline([q4[0]], **options, place=place)), expected)


def test_devices_and_copies_give_the_same_pictures(
    q4: tuple[Path, Path], sd3: tuple[DiffusionPipeline, Path], root: Path
) -> None:
    other = wide(root, 32, 1)[1]
    pipeline = afa.load_pipeline([q4[0], other], config=sd3[1], parts=[sd3[1]])
    expected = draw(pipeline)
    copied = copy.deepcopy(pipeline.transformer)
    pipeline.transformer.place_experts(["cpu", "cpu"])
    assert torch.equal(draw(pipeline), expected)
    pipeline.register_modules(transformer=copied)
    assert torch.equal(draw(pipeline), expected)


def test_gradients_pass_through(q4: tuple[Path, Path], sd3: tuple[DiffusionPipeline, Path]) -> None:
    gradients = []
    for file in q4:
        denoiser = afa.load_pipeline([file], config=sd3[1], parts=[sd3[1]]).transformer
        inputs = denoiser.family.example(sd3[0].transformer)
        inputs = {
            name: torch.ones_like(value, device="cpu") if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        inputs["hidden_states"].requires_grad_()
        denoiser(**inputs, return_dict=False)[0].sum().backward()
        gradients.append(inputs["hidden_states"].grad)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["F8_E4M3", "Q8_0", "Q4_K"])
def test_a_layer_can_be_compiled(kind: str) -> None:
    if kind == "F8_E4M3":
        data = torch.ones(4, 256).to(torch.float8_e4m3fn).view(torch.uint8)
        scale = torch.arange(4.0)[:, None]
    else:
        data, scale = torch.from_numpy(quantised_rows(torch.ones(4, 256).numpy(), kind)), None
    layer = PackedLinear(data, scale, torch.ones(4), kind, (4, 256), torch.float32)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(torch.ones(2, 256)), layer(torch.ones(2, 256)))


def test_a_lora_dequantises_what_it_changes(
    q4: tuple[Path, Path], sd3: tuple[DiffusionPipeline, Path], tmp_path: Path
) -> None:
    layer = "transformer_blocks.0.attn.to_q"
    lora = {
        f"transformer.{layer}.lora_A.weight": torch.randn(2, 32),
        f"transformer.{layer}.lora_B.weight": torch.randn(32, 2),
    }
    file = _written(lora, tmp_path / "lora.safetensors")
    ours, theirs = (
        afa.load_pipeline(
            [each, {"base": str(each), "lora": str(file)}], config=sd3[1], parts=[sd3[1]]
        ).transformer.experts[1]
        for each in q4
    )
    changed = theirs.get_parameter(f"{layer}.weight")
    assert torch.equal(ours.get_parameter(f"{layer}.weight"), changed)


def test_a_student_starts_from_dequantised_weights(
    q4: tuple[Path, Path], sd3: tuple[DiffusionPipeline, Path]
) -> None:
    ours, theirs = (
        load_single(
            file,
            companions=Companions(torch.float32, config=sd3[1], parts=[sd3[1]]),
            dequantise=True,
        )[0].transformer
        for file in q4
    )
    assert_same_weights(theirs, ours)


def test_what_needs_other_weights_is_refused(
    q4: tuple[Path, Path], sd3: tuple[DiffusionPipeline, Path]
) -> None:
    options: dict[str, Any] = {"config": sd3[1], "parts": [sd3[1]]}
    with refusal("AFA-LOAD-115", "q4.gguf"):
        afa.load_pipeline([q4[0]], **options, quantize="int8")
    with refusal("AFA-LOAD-091", "q4.gguf"):
        read_checkpoint(str(q4[0]))
    with refusal("AFA-LOAD-077", "text_encoder"):
        afa.load_pipeline([q4[0]], config=sd3[1])
    denoiser = denoiser_of(afa.load_pipeline([q4[0]], **options))
    with refusal("AFA-ENSEMBLE-070", "Q4_0"):
        denoiser.graphs = Graphs()
    with refusal("AFA-ENSEMBLE-071"):
        denoiser.shard_experts(Any)


def test_the_commands_take_them(
    q4: tuple[Path, Path], sd3: tuple[DiffusionPipeline, Path], root: Path, tmp_path: Path
) -> None:
    experts = [q4[0], wide(root, 32, 1)[1]]
    settings = {"config": str(sd3[1]), "parts": [str(sd3[1])]}
    recipe = write_recipe(tmp_path, experts, **settings)
    allowed = ("--allow-folder", root)
    assert run("check", recipe, *allowed) == 0
    assert run("train", recipe, "--output", tmp_path / "run", *allowed) == 0
    command = ("generate", tmp_path / "run", "a fox", "--steps", 1, "--height", 16, "--width", 16)
    assert run(*command, "--output", tmp_path / "pictures", "--bias", "q4=1") == 0
    assert run("inspect", q4[0]) == 0


# -- what is told about a file ----------------------------------------------------------------


def test_inspect_counts_types(q4: tuple[Path, Path]) -> None:
    found = describe(q4[0])
    assert found["layout"] == "Stable Diffusion 3, original layout, denoiser alone"
    assert "Q4_0" in found["dtypes"]
    assert len(found["sha256"]) == 64


def test_the_memory_estimate_counts_blocks(
    q4: tuple[Path, Path], sd3: tuple[DiffusionPipeline, Path]
) -> None:
    companions = Companions(torch.bfloat16, config=sd3[1], parts=[sd3[1]])
    manifest = read_manifest(q4[0], companions)
    bits = bits_of([manifest], torch.bfloat16)
    assert bits is not None
    assert 4.5 <= bits.mean < 16  # 18 bytes for 32 weights, and a few matrices that are no blocks
    assert manifest.num_bytes == q4[0].stat().st_size


def test_values_are_checked_after_dequantisation(q4: tuple[Path, Path], tmp_path: Path) -> None:
    experts = [Weights(f.name, [f], is_single=True) for f in q4]
    findings = list(check_values(experts, torch.float32, lambda _: None))
    assert [found.code for found in findings] == ["AFA-CHECK-009"]  # they are duplicates
    content = bytearray(q4[0].read_bytes())
    header = check_gguf(q4[0])
    first = next(e for e in header.tensors.values() if e["dtype"] == "Q4_0")
    place = header.start + first["data_offsets"][0]
    content[place : place + 2] = struct.pack("<e", float("inf"))
    (tmp_path / "bad.gguf").write_bytes(content)
    bad = [Weights("bad", [tmp_path / "bad.gguf"], is_single=True)]
    found = list(check_values(bad, torch.float32, lambda _: None))
    assert [each.code for each in found] == ["AFA-CHECK-007"]


def test_the_header_is_read_once(
    q4: tuple[Path, Path], sd3: tuple[DiffusionPipeline, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = []

    def counted(file: Path) -> Any:
        count.append(file)
        return check_gguf(file)

    monkeypatch.setattr(weights, "check_gguf", counted)
    monkeypatch.setattr(files, "SETTLED", -1)
    monkeypatch.setattr(weights, "gguf_cache", FileCache())
    afa.load_pipeline([q4[0]], config=sd3[1], parts=[sd3[1]])
    assert count == [q4[0]]
