"""Tensors that not all files have, and tensors that are no weights: kept, repaired, always said."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open

from tests.merging.merge_files import POSITIONS, TEXT, UNET, denoiser, merged, model
from tests.refusal import refusal

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tests.merging.merge_files import Tensors

OPTIONAL: Tensors = {
    "alphas_cumprod": torch.linspace(0.99, 0.004, 1000),
    "posterior_log_variance_clipped": torch.linspace(-9, -4, 1000),
    "log_one_minus_alphas_cumprod": torch.full((1000,), -torch.inf),
    "sigmas": torch.ones(10),
    "denoiser.log_sigmas": torch.ones(10),
    "cond_stage_model.logit_scale": torch.tensor(4.6),
    "cond_stage_model.transformer.text_projection.weight": torch.ones(2, 2),
    "model_ema.decay": torch.tensor(0.5),
    "model_ema.num_updates": torch.tensor(3, dtype=torch.int32),
    POSITIONS: torch.arange(24)[None],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Tensors]:
    return [model(tmp_path_factory.mktemp("tokenizer"), seed=seed) for seed in range(3)]


def record(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        content: dict[str, Any] = json.loads(opened.metadata()["afa_merge"])
    return content


def test_what_the_first_has_alone_is_its_own(models: list[Tensors], tmp_path: Path) -> None:
    ours, said, file = merged(tmp_path, {"a": models[0] | OPTIONAL, "b": models[1]})
    for name, tensor in OPTIONAL.items():
        assert torch.equal(ours[name], tensor), name
    assert "Not merged, copied from '/a.safetensors': cond_stage_model." in said
    assert sorted(record(file)["kept_tensors"]) == sorted(OPTIONAL)


def test_what_only_others_have_is_left_out(models: list[Tensors], tmp_path: Path) -> None:
    ours, said, file = merged(tmp_path, {"a": models[0], "b": models[1] | OPTIONAL})
    assert ours.keys() == models[0].keys()
    assert (
        "Dropped from '/b.safetensors', because '/a.safetensors' lacks it: alphas_cumprod" in said
    )
    assert record(file)["left_out_tensors"] == {str(tmp_path / "b.safetensors"): sorted(OPTIONAL)}


@pytest.mark.parametrize("having", ["a", "b", "base"])
def test_add_difference_of_files_with_other_optional_tensors(
    having: str, models: list[Tensors], tmp_path: Path
) -> None:
    files = {"a": models[0], "b": models[1], "base": models[2]}
    files[having] = files[having] | OPTIONAL
    ours, _, _ = merged(tmp_path, files, "add_difference", weights=[1, 0.5], vae="merge")
    a, b, base = models
    for name in a:
        expected = base[name] + (a[name] - base[name]) + 0.5 * (b[name] - base[name])
        torch.testing.assert_close(ours[name], expected)
    for name, tensor in OPTIONAL.items():
        assert (name in ours) == (having == "a")
        assert having != "a" or torch.equal(ours[name], tensor)


def test_what_all_have_is_merged(models: list[Tensors], tmp_path: Path) -> None:
    first = models[0] | {"cond_stage_model.logit_scale": torch.tensor(2.0)}
    second = models[1] | {"cond_stage_model.logit_scale": torch.tensor(4.0)}
    ours, said, _ = merged(tmp_path, {"a": first, "b": second})
    assert ours["cond_stage_model.logit_scale"].item() == 3
    assert said.splitlines() == [
        f"Autoencoder copied from '/a.safetensors' (vae: first): "
        f"{sum(n.startswith('first_stage_model.') for n in first)} tensors"
    ]


def test_averaged_weights_of_one_expert_are_warned_of(
    models: list[Tensors], tmp_path: Path
) -> None:
    name = "model_ema.diffusion_model" + "input_blocks.0.0.weight".replace(".", "")
    _, said, _ = merged(tmp_path, {"a": models[0] | {name: torch.ones(8, 4, 3, 3)}, "b": models[1]})
    assert "uses that expert, not the merge" in said


def test_every_tensor_is_merged_or_named(models: list[Tensors], tmp_path: Path) -> None:
    files = {"a": models[0] | OPTIONAL, "b": denoiser(models[1]) | {"sigmas": torch.ones(10)}}
    ours, _, file = merged(tmp_path, files)
    kept = set(record(file)["kept_tensors"])
    for name in ours:
        is_merged = name.startswith(UNET) or name == "sigmas"
        is_vae = name.startswith("first_stage_model.")  # `vae: first` in the record says it
        assert is_merged + is_vae + (name in kept) == 1, name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{TEXT}text_model.final_layer_norm.bias", "'.*final_layer_norm.bias' has shape"),
        (f"{UNET}middle_block.0.in_layers.0.bias", "'.*middle_block.*' has shape"),
    ],
)
@pytest.mark.parametrize("lacking", [0, 1])
def test_weights_that_are_missing_are_refused(
    name: str, message: str, lacking: int, models: list[Tensors], tmp_path: Path
) -> None:
    files = {"a": dict(models[0]), "b": dict(models[1])}
    del files["ab"[lacking]][name]
    with refusal("AFA-MERGE-009", f"{message}", f"{'ab'[lacking]}.safet"):
        merged(tmp_path, files)
    assert not (tmp_path / "merged").exists()


# -- positions --------------------------------------------------------------------------------

RIGHT = torch.arange(24)


@pytest.mark.parametrize(
    "damaged",
    [
        (RIGHT * 0.7 + RIGHT * 0.3 - 1e-3 * (RIGHT > 20)),  # averaged, and short of the integers
        (RIGHT * 0.5).half(),
        (RIGHT * 0.9999).long()[None],  # truncated: 0, 0, 1, 2, ...
        RIGHT.to(torch.float8_e4m3fn),  # rounded: 17 is 16
        RIGHT.flip(0).to(torch.int32),
        torch.full((24,), torch.nan),
    ],
)
def test_damaged_positions_are_repaired(
    damaged: Tensor, models: list[Tensors], tmp_path: Path
) -> None:
    ours, said, file = merged(tmp_path, {"a": models[0] | {POSITIONS: damaged}, "b": models[1]})
    assert ours[POSITIONS].dtype == torch.int64
    assert torch.equal(ours[POSITIONS], RIGHT.reshape(damaged.shape))
    assert f"rounded or averaged positions of '/a.safetensors': {POSITIONS} is now" in said
    assert record(file)["repaired_tensors"] == [POSITIONS]


@pytest.mark.parametrize("right", [RIGHT[None], RIGHT.float(), RIGHT.half(), RIGHT.to(torch.int32)])
def test_right_positions_stay_as_they_are(
    right: Tensor, models: list[Tensors], tmp_path: Path
) -> None:
    files = {"a": models[0] | {POSITIONS: right}, "b": models[1] | {POSITIONS: RIGHT * 2}}
    ours, said, _ = merged(tmp_path, files)
    assert torch.equal(ours[POSITIONS], right)
    assert ours[POSITIONS].dtype == right.dtype
    assert "Repaired" not in said


def test_positions_that_the_results_type_rounds_are_integers(
    models: list[Tensors], tmp_path: Path
) -> None:
    first = models[0] | {POSITIONS: torch.arange(600.0)}
    ours, _, _ = merged(tmp_path, {"a": first, "b": models[1]}, dtype="bfloat16")
    assert torch.equal(ours[POSITIONS], torch.arange(600))


# -- types ------------------------------------------------------------------------------------


def test_mixed_types_are_computed_in_float32(models: list[Tensors], tmp_path: Path) -> None:
    name = next(name for name in models[0] if name.startswith(UNET))
    types = [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
    files = {"abcd"[n]: {k: t.to(d) for k, t in models[n % 3].items()} for n, d in enumerate(types)}
    ours, said, _ = merged(tmp_path, files)
    expected = sum(0.25 * each[name].float() for each in files.values())
    assert isinstance(expected, torch.Tensor)
    assert torch.equal(ours[name], expected.half())
    assert "Mixed dtypes (bfloat16, float16, float64, float8_e4m3fn): computed in float32" in said
    assert "written in the dtypes of '/a.safetensors': float16 (" in said


def test_float8_that_cannot_hold_the_result_is_refused(
    models: list[Tensors], tmp_path: Path
) -> None:
    name = f"{UNET}input_blocks.0.0.bias"
    first = {**models[0], name: torch.full((8,), 400.0).to(torch.float8_e4m3fn)}
    second = {**models[1], name: torch.full((8,), 5000.0)}
    with refusal("AFA-MERGE-035", "2692", "torch.float8"):
        merged(tmp_path, {"a": first, "b": second})
