"""Files that are not complete models, and models that cannot be averaged, are refused by name."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open

from afa.merging import plan_merge
from tests.merging.merge_files import UNET, denoiser, merged, model
from tests.merging.test_merge_checkpoints import recipe
from tests.refusal import refusal

if TYPE_CHECKING:
    from pathlib import Path

    from tests.merging.merge_files import Tensors

ONE, FLOAT8 = torch.ones(2, 2), torch.float8_e4m3fn
INPUT = f"{UNET}input_blocks.0.0.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Tensors]:
    return [model(tmp_path_factory.mktemp("tokenizer"), seed=seed) for seed in range(3)]


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({"lora_unet_mid_block_x.lora_down.weight": ONE}, "a LoRA .*fuse_lora"),
        ({"unet.mid_block.to_q.lora_A.weight": ONE}, "a LoRA"),
        ({"unet.mid_block.processor.to_q_lora.down.weight": ONE}, "a LoRA"),
        ({"lycoris_x.hada_w1_a": ONE}, "a LoRA"),
        ({"diffusion_model.double_blocks.0.img_attn.qkv.lokr_w1": ONE}, "a LoRA"),
        ({"diffusion_model.single_blocks.0.linear1.diff": ONE}, "a LoRA"),
        ({"control_model.input_blocks.0.0.weight": ONE}, "a ControlNet"),
        ({"control_model.x.weight": ONE, INPUT: ONE}, "a ControlNet"),
        ({"down_blocks.0.x": ONE, "controlnet_down_blocks.0.weight": ONE}, "a ControlNet"),
        ({"controlnet_blocks.0.weight": ONE, "transformer_blocks.0.x": ONE}, "a ControlNet"),
        ({"image_proj.proj.weight": ONE, "ip_adapter.1.to_k_ip.weight": ONE}, "an adapter"),
        ({"down_blocks.0.motion_modules.0.x.weight": ONE}, "a motion module"),
        ({"emb_params": ONE}, "a textual inversion embedding"),
        ({"clip_l": ONE, "clip_g": ONE}, "a textual inversion embedding"),
        ({"first_stage_model.decoder.conv_in.weight": ONE}, "an autoencoder .*vae: merge"),
        ({"decoder.mid.attn_1.q.weight": ONE}, "an autoencoder"),
        ({"text_model.encoder.layers.0.mlp.fc1.weight": ONE}, "a text encoder"),
        ({"shared.weight": ONE, "encoder.block.0.layer.0.x.weight": ONE}, "a text encoder"),
        ({"vision_model.encoder.layers.0.x": ONE}, "an image encoder"),
        ({"latents_64x64": torch.ones(4, 8, 8), "original_size": ONE}, "not a model"),
    ],
)
def test_files_that_are_no_whole_models(
    tensors: Tensors, what: str, models: list[Tensors], tmp_path: Path
) -> None:
    for files in ({"a": tensors, "b": tensors}, {"a": models[0], "b": tensors}):
        code = "AFA-MERGE-042" if what == "not a model" else "AFA-MERGE-041"
        with refusal(code, rf".safetensors' is {what}"):
            merged(tmp_path, files)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "tensors",
    [
        {"scaled_fp8": torch.empty(0, dtype=FLOAT8)},
        {"x.weight": ONE.to(FLOAT8), "x.scale_weight": torch.ones(1)},  # ComfyUI
        {"x.weight": ONE.to(FLOAT8), "x.weight_scale": torch.ones(1)},
        {"x.weight": ONE.to(FLOAT8), "x.scale": torch.ones(1)},
        {"x.weight": ONE.to(FLOAT8), "x.weight_scale_inv": torch.ones(1)},
        {"x.weight": ONE.to(FLOAT8), "x.my_scale_of_rows": torch.ones(1)},
        {"x.weight._data": ONE.to(torch.int8), "x.weight._scale": ONE},  # optimum-quanto
        {"x.weight": ONE.to(torch.uint8), "x.weight.absmax": ONE},  # bitsandbytes
        {"x.weight.quant_map": ONE},
        {"x.weight.quant_state.bitsandbytes__nf4": ONE},
        {"x.weight": ONE.to(torch.int8), "x.SCB": ONE},
        {"x._weight_qdata": ONE.to(torch.int8), "x._weight_scale": ONE},  # torchao
        {"x.qweight": ONE.to(torch.int32), "x.scales": ONE},  # GPTQ, AWQ
        {"x.data": ONE.to(torch.int8), "x.zero_point": ONE},
    ],
)
def test_quantised_weights_of_any_naming(
    tensors: Tensors, models: list[Tensors], tmp_path: Path
) -> None:
    tensors = {name if name == "scaled_fp8" else UNET + name: t for name, t in tensors.items()}
    with refusal("AFA-MERGE-032"):
        merged(tmp_path, {"a": models[0] | tensors, "b": models[1] | tensors})


def test_a_file_of_nothing_but_quantised_weights(tmp_path: Path) -> None:
    tensors = {"k.weight._data": ONE.to(torch.int8), "k.weight._scale": torch.ones(2, 1)}
    with refusal("AFA-MERGE-032"):
        merged(tmp_path, {"a": tensors, "b": tensors})


def test_metadata_may_say_that_weights_are_quantised(models: list[Tensors], tmp_path: Path) -> None:
    about = {"b": {"_quantization_metadata": "{}"}}
    with refusal("AFA-MERGE-034", "b.safetensors"):
        merged(tmp_path, {"a": models[0], "b": models[1]}, metadata=about)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_integers_of_an_unknown_kind(
    dtype: torch.dtype, models: list[Tensors], tmp_path: Path
) -> None:
    strange = {f"{UNET}strange": torch.ones(3).to(dtype)}
    with refusal("AFA-MERGE-033", f"'{UNET}strange'"):
        merged(tmp_path, {"a": models[0] | strange, "b": models[1] | strange})


def test_plain_float8_and_scales_that_are_weights_are_merged(tmp_path: Path) -> None:
    flux = denoiser(model(tmp_path, "flux"))
    assert any(name.endswith("query_norm.scale") for name in flux)
    eight = {name: tensor.to(FLOAT8) for name, tensor in flux.items()}
    ours, _, _ = merged(tmp_path, {"a": flux, "b": eight})
    for name, tensor in flux.items():
        torch.testing.assert_close(ours[name], (tensor + eight[name].float()) / 2)


def test_one_tensor_under_two_names(models: list[Tensors], tmp_path: Path) -> None:
    start = "cond_stage_model.transformer."
    twice = {f"{start}final_layer_norm.bias": torch.ones(8)}
    with refusal("AFA-MERGE-007", "' and '"):
        merged(tmp_path, {"a": models[0] | twice, "b": models[1]})


def test_an_unknown_kind_is_merged_by_names_and_said(tmp_path: Path) -> None:
    a, b = {"layer.weight": ONE}, {"layer.weight": 3 * ONE}
    ours, said, _ = merged(tmp_path, {"a": a, "b": b})
    assert torch.equal(ours["layer.weight"], 2 * ONE)
    assert "unknown kind of model; tensors are matched by name only" in said


# -- kinds ------------------------------------------------------------------------------------


def unet(context: int, *, is_pooled: bool = False) -> Tensors:
    """As little of a U-Net as tells which one it is."""
    pooled = {f"{UNET}label_emb.0.0.weight": ONE} if is_pooled else {}
    key = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    return {INPUT: torch.ones(1, 4, 1, 1), key: torch.ones(1, context)} | pooled


_GUIDED = {"guidance_in.in_layer.weight": ONE}
_KINDS: dict[str, Tensors] = {
    "Stable Diffusion 1.x": unet(768),
    "Stable Diffusion 2.x": unet(1024),
    "Stable Diffusion XL": unet(2048, is_pooled=True),
    "Stable Diffusion XL refiner": unet(1280, is_pooled=True),
    "Stable Diffusion 3 (1 blocks)": {"joint_blocks.0.x.weight": ONE},
    "Flux without guidance (schnell)": {"double_blocks.0.x.weight": ONE},
    "Flux with guidance (dev)": {"double_blocks.0.x.weight": ONE, **_GUIDED},
    "Chroma": {"double_blocks.0.x.weight": ONE, "distilled_guidance_layer.x.weight": ONE},
    "of an unknown kind": {"layer.weight": ONE},
}


_NAMES = list(_KINDS)


@pytest.mark.parametrize(("first", "second"), list(itertools.pairwise([*_NAMES, _NAMES[0]])))
def test_models_of_two_kinds(first: str, second: str, tmp_path: Path) -> None:
    kinds = [rf"/{n}\.safetensors' is {re.escape(k)}[,.]" for n, k in (("a", first), ("b", second))]
    with refusal("AFA-MERGE-020", *kinds):
        merged(tmp_path, {"a": _KINDS[first], "b": _KINDS[second]})


def test_another_architecture_of_one_kind_says_how_much_is_missing(
    models: list[Tensors], tmp_path: Path
) -> None:
    smaller = {n: t for n, t in models[1].items() if not n.startswith(f"{UNET}middle_block.1.")}
    gone = len(models[1]) - len(smaller) - 1
    with refusal("AFA-MERGE-009", f"{gone}"):
        merged(tmp_path, {"a": models[0], "b": smaller})


# -- channels ---------------------------------------------------------------------------------


def widened(tensors: Tensors, channels: int) -> Tensors:
    torch.manual_seed(channels)
    more = torch.randn(tensors[INPUT].shape[0], channels - 4, 3, 3)
    return {**tensors, INPUT: torch.cat([tensors[INPUT], more], 1)}


@pytest.mark.parametrize("channels", [9, 8, 5])
def test_inpainting_is_merged_with_a_plain_model(
    channels: int, models: list[Tensors], tmp_path: Path
) -> None:
    first = widened(models[0], channels)
    ours, said, file = merged(tmp_path, {"a": first, "b": models[1]}, weights=[0.25, 0.75])
    expected = 0.25 * first[INPUT]
    expected[:, :4] += 0.75 * models[1][INPUT]
    torch.testing.assert_close(ours[INPUT], expected)
    assert f"from 4 to {channels} input channels: " in said
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["afa_merge"])["padded_tensors"] == [INPUT]


def test_an_inpainting_model_is_made_by_add_difference(
    models: list[Tensors], tmp_path: Path
) -> None:
    # A + (B - C), A for inpainting: its channels for mask and picture come out as they were
    files = {"a": widened(models[0], 9), "b": models[1], "base": models[2]}
    ours, _, _ = merged(tmp_path, files, "add_difference", weights=[1, 1])
    assert torch.equal(ours[INPUT][:, 4:], files["a"][INPUT][:, 4:])
    expected = models[0][INPUT] + models[1][INPUT] - models[2][INPUT]
    torch.testing.assert_close(ours[INPUT][:, :4], expected)


@pytest.mark.parametrize(
    ("first", "second", "code", "value"),
    [
        (4, 9, "AFA-MERGE-021", r"b.safetensors' has 9 .*\(inpainting\), .*b.safetensors' first"),
        (9, 8, "AFA-MERGE-022", r"8 .*\(instruct-pix2pix\), .* 9 .*\(inpainting\)"),
        (8, 9, "AFA-MERGE-022", "must have 8 or 4"),
    ],
)
def test_channels_that_cannot_be_merged(
    first: int, second: int, code: str, value: str, models: list[Tensors], tmp_path: Path
) -> None:
    files = {
        name: each if count == 4 else widened(each, count)
        for name, each, count in (("a", models[0], first), ("b", models[1], second))
    }
    with refusal(code, value):
        merged(tmp_path, files)


# -- objectives -------------------------------------------------------------------------------

V = {"modelspec.prediction_type": "v"}


@pytest.mark.parametrize(
    ("marks", "metadata", "kind"),
    [
        ({"v_pred": torch.empty(0)}, {}, "v_prediction"),
        ({}, V, "v_prediction"),
        ({}, {"modelspec.predict_key": "v"}, "v_prediction"),
        ({"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}, {}, "EDM"),
        ({"edm_vpred.sigma_max": torch.tensor(120.0)}, {}, "EDM"),
    ],
)
def test_predictions_that_differ(
    marks: Tensors,
    metadata: dict[str, str],
    kind: str,
    models: list[Tensors],
    tmp_path: Path,
) -> None:
    files = {"a": models[0], "b": models[1] | marks}
    with refusal("AFA-MERGE-024", "=", f"{kind}"):
        merged(tmp_path, files, metadata={"b": metadata})
    both = {name: tensors | marks for name, tensors in files.items()}
    ours, _, file = merged(tmp_path, both, metadata={"a": metadata, "b": metadata})
    assert marks.keys() <= ours.keys()
    with safe_open(file, "pt") as opened:
        said = opened.metadata().get("modelspec.prediction_type")
    assert said == ("v" if kind == "v_prediction" else None)


def test_a_yaml_beside_a_file_says_what_it_predicts(models: list[Tensors], tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("model: {params: {parameterization: v}}")
    files = {"a": models[0], "b": models[1]}
    with refusal("AFA-MERGE-024", "="):
        merged(tmp_path, files)
    _, _, file = merged(tmp_path, files, metadata={"a": V})
    with safe_open(file, "pt") as opened:  # where the result's own name has no .yaml
        assert opened.metadata()["modelspec.prediction_type"] == "v"


def test_a_recipe_beside_a_file_says_nothing(models: list[Tensors], tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("method: weighted\nexperts: [./a.safetensors]\n")
    merged(tmp_path, {"a": models[0], "b": models[1]})


def test_stable_diffusion_2_without_a_word_may_predict_either(tmp_path: Path) -> None:
    files = {"a": unet(1024), "b": unet(1024)}
    _, said, _ = merged(tmp_path, files, metadata={"a": V})
    assert "v_prediction, not specified by /b.safetensors" in said


@pytest.mark.parametrize("numbers", [torch.linspace(0.99, 0, 1000), torch.ones(500)])
def test_noise_schedules_that_differ(
    numbers: torch.Tensor, models: list[Tensors], tmp_path: Path
) -> None:
    usual = {"alphas_cumprod": torch.linspace(0.99, 0.0047, 1000)}
    files = {"a": models[0] | usual, "b": models[1] | {"alphas_cumprod": numbers}}
    with refusal("AFA-MERGE-025", "= 0.0047"):
        merged(tmp_path, files)
    halved = {"alphas_cumprod": usual["alphas_cumprod"].half()}
    merged(tmp_path, {**files, "b": models[1] | halved})


@pytest.mark.parametrize(
    "change", [{"beta_schedule": "linear"}, {"rescale_betas_zero_snr": True}, {"beta_end": 0.02}]
)
def test_schedulers_of_folders_that_differ(
    change: dict[str, Any], experts: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(experts[1], tmp_path / "other")
    config = tmp_path / "other" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with refusal("AFA-MERGE-025", f"{next(iter(change))} ="):
        plan_merge(recipe([experts[0], tmp_path / "other"]), tmp_path / "merged")


# -- metadata ---------------------------------------------------------------------------------


def test_metadata_describe_the_model_and_no_expert(models: list[Tensors], tmp_path: Path) -> None:
    architecture = {"modelspec.architecture": "stable-diffusion-v1"}
    about = {
        "a": {**architecture, "modelspec.title": "A", "modelspec.hash_sha256": "0x1"},
        "b": {**architecture, "modelspec.resolution": "512x512"},
    }
    about["a"]["modelspec.resolution"] = "768x768"
    _, _, file = merged(tmp_path, {"a": models[0], "b": models[1]}, metadata=about)
    with safe_open(file, "pt") as opened:
        found = opened.metadata()
    assert found.keys() - {"afa_merge"} == {"format", *architecture, "modelspec.merged_from"}
    assert found["modelspec.merged_from"] == "a.safetensors, b.safetensors"
