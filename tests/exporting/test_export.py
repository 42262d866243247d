"""A pipeline folder as one file: every tensor, in the layout that other programs read."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import afa
from afa.cli import main
from afa.denoisers.flux import FLUX
from afa.exporting import export_checkpoint, original, plan_export
from afa.exporting.plan import not_brought_back
from afa.loading.pipeline import load_single
from afa.loading.single_file.identify import config_folder, configs
from afa.loading.single_file.load import Companions
from tests.refusal import refusal
from tests.single_file import original_layout
from tests.tiny import tiny_pipeline
from tests.tiny_pipelines import PIPELINES

KINDS = ("1.5", "xl", "refiner", "sd3", "z-image")


def made(kind: str, root: Path) -> DiffusionPipeline:
    torch.manual_seed(0)
    if kind == "1.5":
        pipeline: Any = tiny_pipeline(root / "tokenizer")
    else:
        pipeline = PIPELINES[kind](root / "tokenizer")
    pipeline.save_pretrained(root / kind)
    return pipeline


def exported(folder: Path, file: Path, dtype: Any = None) -> dict[str, torch.Tensor]:
    steps = list(export_checkpoint(str(folder), file, dtype))
    assert steps[-1].num_bytes == steps[-1].total_bytes
    assert steps[-1].num_tensors == steps[-1].total_tensors
    return load_file(file)


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def change(place: Path, **settings: Any) -> None:
    place.write_text(json.dumps(json.loads(place.read_text()) | settings))


# -- layout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_file_that_the_original_code_would_have_written(
    kind: str, tmp_path: Path
) -> None:
    pipeline = made(kind, tmp_path)
    came = exported(tmp_path / kind, tmp_path / "out.safetensors")
    # computed by the text encoder, and the same as `shared.weight`
    computed = ("position_ids", "t5xxl.transformer.encoder.embed_tokens.weight")
    expected = {k: t for k, t in original_layout(pipeline).items() if not k.endswith(computed)}
    assert came.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(came[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_loaded_bit_for_bit(kind: str, tmp_path: Path) -> None:
    pipeline = made(kind, tmp_path)
    exported(tmp_path / kind, file := tmp_path / "out.safetensors")
    companions = Companions(torch.float32, config=tmp_path / kind)
    came, _ = load_single(str(file), companions=companions)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            ours = getattr(came, name).state_dict()
            assert ours.keys() == part.state_dict().keys()
            for key, tensor in part.state_dict().items():
                assert torch.equal(ours[key], tensor), (name, key)


def test_diffusers_loads_it_and_draws_the_same(tmp_path: Path) -> None:
    pipeline = made("1.5", tmp_path)
    exported(tmp_path / "1.5", file := tmp_path / "out.safetensors")
    came = StableDiffusionPipeline.from_single_file(
        str(file), config=str(tmp_path / "1.5"), local_files_only=True, safety_checker=None
    )
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
    pictures = [
        each("a fox", generator=torch.Generator().manual_seed(0), **options).images
        for each in (pipeline, came)
    ]
    torch.testing.assert_close(*pictures, atol=1e-5, rtol=0)


def test_a_folder_without_a_layout_for_all_parts_is_refused(tmp_path: Path) -> None:
    made("qwen-image", tmp_path)
    with refusal("AFA-EXPORT-005", "Qwen-Image"):
        plan_export(str(tmp_path / "qwen-image"), tmp_path / "out.safetensors")


@pytest.mark.parametrize("name", configs())
def test_every_published_denoiser_has_a_place_in_the_layout(name: str) -> None:
    """At its published size, without its weights."""
    from afa.loading.single_file.conversion import expected_shapes
    from afa.loading.single_file.layout import described_kind

    config = config_folder(name)
    kind = described_kind(config)
    assert kind.single_files is not None
    shapes = expected_shapes(kind.denoiser, config)
    planned = original.denoiser_tensors(shapes, kind.family, kind.single_files.renamed)
    assert not_brought_back(kind.denoiser, planned, shapes, config) == []
    shapes = expected_shapes("vae", config)
    assert not_brought_back("vae", original.vae_tensors(shapes), shapes, config) == []
    prefixes = kind.single_files.written(expected_shapes(kind.denoiser, config), _encoders(config))
    assert set(_encoders(config)) <= set(prefixes)
    for part in _encoders(config):
        shapes = expected_shapes(part, config)
        planned = list(original.tensors_of(shapes, prefixes[part]))
        assert not_brought_back(part, planned, shapes, config) == []


def _encoders(config: Path) -> list[str]:
    return sorted(place.name for place in config.glob("text_encoder*"))


def test_a_tensor_that_does_not_come_back_is_named() -> None:
    config = config_folder("flux-dev")
    settings = json.loads((config / "transformer" / "config.json").read_text())
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config({**settings, "num_layers": 1})
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    files = FLUX.pipelines[0].single_files
    assert files is not None
    planned = original.denoiser_tensors(shapes, FLUX, files.renamed)
    swapped = [
        each if each.change == "none" else original.FileTensor(each.name, each.sources)
        for each in planned
    ]
    lost = not_brought_back("transformer", swapped, shapes, config)
    assert set(lost) == {"norm_out.linear.bias", "norm_out.linear.weight"}


# -- what a file says -------------------------------------------------------------------------


def test_metadata_name_the_source_and_the_hash_of_all_values(tmp_path: Path) -> None:
    made("1.5", tmp_path)
    exported(tmp_path / "1.5", file := tmp_path / "out.safetensors", "float16")
    metadata, content = metadata_of(file), file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    digest = hashlib.sha256(content[8 + length :]).hexdigest()
    assert metadata["modelspec.hash_sha256"] == f"0x{digest}"
    record = json.loads(metadata["afa_export"])
    assert record["source"]["source"] == str(tmp_path / "1.5")
    assert len(record["source"]["sha256"]) == 64
    assert record["dtype"] == "float16"
    exported(tmp_path / "1.5", again := tmp_path / "again" / "out.safetensors", "float16")
    assert again.read_bytes() == content


def test_precision_is_of_all_weights(tmp_path: Path) -> None:
    made("1.5", tmp_path)
    whole = exported(tmp_path / "1.5", tmp_path / "out.safetensors")
    half = exported(tmp_path / "1.5", tmp_path / "half.safetensors", "float16")
    for name, tensor in whole.items():
        assert torch.equal(half[name], tensor.half())


@pytest.mark.parametrize("zero_snr", [False, True])
def test_velocity_is_marked_and_read_again(zero_snr: bool, tmp_path: Path) -> None:
    made("xl", tmp_path)
    place = tmp_path / "xl" / "scheduler" / "scheduler_config.json"
    change(place, prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr)
    came = exported(tmp_path / "xl", file := tmp_path / "out.safetensors")
    assert ("v_pred" in came, "ztsnr" in came) == (True, zero_snr)
    assert metadata_of(file)["modelspec.prediction_type"] == "v"
    loaded, _ = load_single(str(file), companions=Companions(torch.float32, config=tmp_path / "xl"))
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    assert loaded.scheduler.config.rescale_betas_zero_snr == zero_snr


def test_a_merge_says_what_it_was_made_of(tmp_path: Path) -> None:
    made("1.5", tmp_path)
    (tmp_path / "1.5" / "merge.json").write_text('{"method": "weighted"}')
    exported(tmp_path / "1.5", file := tmp_path / "out.safetensors")
    assert json.loads(metadata_of(file)["afa_merge"]) == {"method": "weighted"}


def test_settings_that_a_file_cannot_say_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("1.5", tmp_path)
    plan = plan_export(str(tmp_path / "1.5"), tmp_path / "out.safetensors")
    assert plan.configuration is None
    assert "no published model has this architecture" in plan.notes[-1]
    # as where the tiny model were a published one
    made("1.5", tmp_path / "published")
    published = tmp_path / "published" / "1.5"
    monkeypatch.setattr("afa.exporting.plan.config_of", lambda *_: "tiny")
    monkeypatch.setattr("afa.exporting.unsaid.config_folder", lambda _: published)
    folder = tmp_path / "1.5"
    plan = plan_export(str(folder), tmp_path / "out.safetensors")
    assert plan.notes == []
    change(folder / "vae" / "config.json", scaling_factor=0.5)
    change(folder / "scheduler" / "scheduler_config.json", beta_end=0.02)
    change(folder / "text_encoder" / "config.json", hidden_act="gelu")
    change(folder / "unet" / "config.json", norm_num_groups=2)
    change(folder / "tokenizer" / "tokenizer_config.json", model_max_length=10)
    change(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    notes = plan_export(str(folder), tmp_path / "out.safetensors").notes
    for key in (
        "scaling_factor = 0.5",
        "beta_end = 0.02",
        "hidden_act = gelu",
        "norm_num_groups",
        "model_max_length",
        "have to be told",
    ):
        assert any(key in note for note in notes), (key, notes)


# -- refusals ---------------------------------------------------------------------------------


def test_what_is_not_one_model_is_refused(experts: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    with refusal("AFA-EXPORT-001", "out.ckpt"):
        plan_export(str(experts[0]), tmp_path / "out.ckpt")
    save_file({"a": torch.zeros(1)}, tmp_path / "there.safetensors")
    with refusal("AFA-EXPORT-001", "exists"):
        plan_export(str(experts[0]), tmp_path / "there.safetensors")
    with refusal("AFA-EXPORT-002", "there.safetensors"):
        plan_export(str(tmp_path / "there.safetensors"), output)
    small = afa.SABWConfig(hidden_size=8, num_layers=1, num_heads=2, norm_num_groups=4)
    folder = afa.save_ensemble(afa.load_pipeline(experts, small), tmp_path / "ensemble")
    with refusal("AFA-EXPORT-003", str(folder)):
        plan_export(str(folder), output)
    PIPELINES["dit"](tmp_path / "tokenizer").save_pretrained(tmp_path / "dit")
    with refusal("AFA-LOAD-072", "DiT"):
        plan_export(str(tmp_path / "dit"), output)
    assert not output.exists()


def test_what_a_file_cannot_say_is_refused(tmp_path: Path) -> None:
    made("1.5", tmp_path)
    place = tmp_path / "1.5" / "scheduler" / "scheduler_config.json"
    for settings, said in (
        ({"prediction_type": "sample"}, "predicts sample"),
        # only velocity can be marked as such
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "zero terminal SNR"),
        ({"_class_name": "EDMEulerScheduler"}, "continuous noise levels"),
    ):
        change(place, **settings)
        with refusal("AFA-EXPORT-004", said):
            plan_export(str(tmp_path / "1.5"), tmp_path / "out.safetensors")


def test_values_beyond_half_precision_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    pipeline: Any = made("1.5", tmp_path)
    pipeline.unet.conv_in.weight.data[0, 0, 0, 0] = 1e6
    pipeline.save_pretrained(tmp_path / "1.5")
    output = tmp_path / "new" / "out.safetensors"
    with refusal("AFA-EXPORT-008", "input_blocks.0.0.weight"):
        list(export_checkpoint(str(tmp_path / "1.5"), output, "float16"))
    assert not output.parent.exists()
    list(export_checkpoint(str(tmp_path / "1.5"), output, "bfloat16"))
    assert output.is_file()


def test_a_folder_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    made("1.5", tmp_path)
    output = tmp_path / "out.safetensors"
    steps = export_checkpoint(str(tmp_path / "1.5"), output)
    while next(steps).stage == "hash":
        pass
    file = tmp_path / "1.5" / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes())
    with refusal("AFA-EXPORT-009", str(file)):
        list(steps)
    assert not output.exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made("1.5", tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path / "1.5"), "--output", str(tmp_path / "one.safetensors")])
    assert ended.value.code == 0
    said = capsys.readouterr()
    assert "config=" in said.out + said.err
    assert str(tmp_path / "one.safetensors") in (said.out + said.err).replace("\n", "")
