"""What is no part of a change is refused by name, and `afa check` says the same as loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

import afa
from afa.denoisers.kinds import denoiser_of
from afa.errors import AfaError
from afa.loading.expert_source import ExpertSource
from afa.loading.lora import check_lora, hash_lora
from tests.lora.models import peft_lora, with_lora, write
from tests.preflight.test_check import looked
from tests.refusal import refusal
from tests.tiny import ODD, tiny_pipeline
from tests.tiny_pipelines import PIPELINES

if TYPE_CHECKING:
    from torch import Tensor

QUERY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
NAME = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
WIDTH = 16


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape)


#: a LoRA of one layer
RIGHT: dict[str, Tensor] = {
    f"{QUERY}.lora_down.weight": ones(2, WIDTH),
    f"{QUERY}.lora_up.weight": ones(WIDTH, 2),
    f"{QUERY}.alpha": torch.tensor(1.0),
}
FAR = QUERY.replace("mid_block", "down_blocks_7")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("base")
    pipeline = tiny_pipeline(folder / "tokenizer", **ODD["two levels"])
    pipeline.save_pretrained(folder / "base")
    pipeline.folder = folder / "base"
    return pipeline


def refused(pipeline: Any, file: Path, scale: float = 1.0) -> str:
    """The message of loading, which is that of checking."""
    with pytest.raises(AfaError) as loading:
        with_lora(pipeline, file, scale)
    with pytest.raises(AfaError) as checking:
        check_lora(ExpertSource("base", lora=str(file), scale=scale), pipeline.folder)
    assert str(checking.value) == str(loading.value)
    assert "\n" not in str(loading.value)
    return str(loading.value)


@pytest.mark.parametrize(
    ("more", "named", "message"),
    [
        ({f"{QUERY}.dora_scale": ones(3, 1)}, "dora_scale", "must have"),
        ({f"{QUERY}.hada_w1_a": ones(2, 2)}, "hada_w1_b", "all of its factors"),
        ({f"{QUERY}.lokr_w1": ones(2, 2)}, "lokr_w2_a", "all of its factors"),
        ({f"{QUERY}.oft_blocks": ones(2, 2)}, "oft_blocks", "a tensor of OFT"),
        ({"lora_controlnet": ones(1)}, "lora_controlnet", "a tensor of a Control-LoRA"),
        ({"bundle_emb.x.string_to_param.*": ones(2, 2)}, "bundle_emb", "a textual inversion"),
        ({f"{NAME}.lora_embedding_A": ones(2, 2)}, "embedding_A", "LoRA for embeddings"),
        ({f"{QUERY}.scalar": ones(1)}, f"{QUERY}.scalar", "is unknown"),
        ({f"{QUERY}.set_weight": ones(1)}, f"{QUERY}.set_weight", "is unknown"),
        ({f"{NAME}.lora_A.bias": ones(2)}, f"{NAME}.lora_A.bias", "is unknown"),
        ({f"{QUERY}.diff": ones(WIDTH, WIDTH)}, f"{QUERY}.diff", "in two ways"),
        ({f"{QUERY}.diff_b": ones(WIDTH)}, f"{QUERY}.diff_b", "which has no bias"),
        ({f"{FAR}.diff": ones(2)}, f"{FAR}.diff", "1 of its 4 tensors are for layers"),
        ({"foo.weight": ones(2)}, "foo.weight", "layers that the base lacks"),
        (
            {"lora_te2_text_model_encoder_layers_0_mlp_fc1.diff": ones(2)},
            "lora_te2_text_model",
            "are for text_encoder_2, which the base lacks",
        ),
        (
            {"lora_te_text_model_encoder_layers_9_mlp_fc1.diff": ones(2)},
            "layers_9_mlp_fc1",
            "the base's text_encoder lacks",
        ),
        ({"lora_unet_double_blocks_0_img_mlp_0.diff": ones(2)}, "double", "probably for Flux"),
        ({"lora_unet_conv_in.lora_up.weight": ones(8, 2)}, "conv_in", "lacks the factor 'down'"),
        ({"lora_unet_conv_in.lora_mid.weight": ones(2, 2)}, "conv_in", "factor 'down and up'"),
        ({"lora_unet_conv_in.diff": ones(8, 4)}, "conv_in.diff", "must have (8, 4, 3, 3)"),
        ({"lora_unet_conv_out.diff_b": ones(5)}, "conv_out", "has shape (5,)"),
        ({f"{QUERY}.alpha": ones(2)}, f"{QUERY}.alpha", "has shape (2,)"),
        ({f"{QUERY}.lora_up.weight": ones(WIDTH, 3)}, "lora_up", "must have (16, 2)"),
        (
            {
                "lora_unet_conv_in.lora_down.weight": ones(2, 8, 3, 3),
                "lora_unet_conv_in.lora_up.weight": ones(8, 2, 1, 1),
            },
            "lora_unet_conv_in.lora_down.weight",
            "Control LoRAs",
        ),
        (
            {f"{QUERY}.lora_down.weight": torch.ones(2, WIDTH, dtype=torch.int8)},
            "lora_down",
            "is quantised (I8)",
        ),
        ({f"{QUERY}.alpha": torch.tensor(torch.nan)}, f"{QUERY}.alpha", "non-finite values"),
        ({f"{QUERY}.lora_up.weight": ones(WIDTH, 2) / 0}, "lora_up", "non-finite values"),
        (
            {f"{NAME}.lora_A.a.weight": ones(2, WIDTH), f"{NAME}.lora_B.b.weight": ones(WIDTH, 2)},
            f"{NAME}.lora_B.b.weight",
            "has several adapters",
        ),
        (
            {f"{NAME}.lora_A.weight": ones(2, WIDTH), f"{NAME}.lora_B.weight": ones(WIDTH, 2)},
            NAME,
            "twice",
        ),
    ],
)
def test_refused_by_name(
    pipeline: Any, more: dict[str, Tensor], named: str, message: str, tmp_path: Path
) -> None:
    text = refused(pipeline, write(tmp_path / "l.safetensors", {**RIGHT, **more}))
    assert named in text
    assert message in text


def test_the_same_file_without_it_is_right(pipeline: Any, tmp_path: Path) -> None:
    more = {"text_encoder.text_model.embeddings.position_ids": torch.arange(4)}
    orphan = {"lora_unet_conv_in.alpha": torch.tensor(1.0)}  # of a product that is not there
    file = write(tmp_path / "l.safetensors", {**RIGHT, **more, **orphan})
    check_lora(ExpertSource("base", lora=str(file)), pipeline.folder)
    new, old = with_lora(pipeline, file).unet.state_dict(), pipeline.unet.state_dict()
    changed = [key for key in old if not torch.equal(new[key], old[key])]
    assert changed == [f"{NAME.removeprefix('unet.')}.weight"]
    torch.testing.assert_close(new[changed[0]], old[changed[0]] + 1.0)


def test_nine_in_ten_layers_that_the_base_lacks(pipeline: Any, tmp_path: Path) -> None:
    far: dict[str, Tensor] = {}
    for n in range(9):
        name = FAR.replace("attentions_0", f"attentions_{n}")
        far |= {f"{name}.lora_down.weight": ones(2, 8), f"{name}.lora_up.weight": ones(8, 2)}
    file = tmp_path / "l.safetensors"
    save_file({**RIGHT, **far}, file, {"ss_base_model_version": "sdxl_base_v1-0"})
    text = refused(pipeline, file)
    assert "18 of its 21 tensors are for layers that the base's unet lacks" in text
    assert "Its metadata says that it is for sdxl_base_v1-0." in text
    with refusal("AFA-LORA-008", "18", "21"):
        afa.load_pipeline([{"base": str(pipeline.folder), "lora": str(file)}])


def test_a_name_that_may_be_of_two_encoders(tmp_path: Path) -> None:
    pipeline = PIPELINES["xl"](tmp_path / "tokenizer")
    layer = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {f"{layer}.lora_A.weight": ones(2, 8), f"{layer}.lora_B.weight": ones(8, 2)}
    file = write(tmp_path / "l.safetensors", tensors, LoraConfig(r=2))
    with refusal("AFA-LORA-007", "text_encoder_2"):
        with_lora(pipeline, file)


def test_control_loras_of_flux(tmp_path: Path) -> None:
    pipeline = PIPELINES["flux"](tmp_path / "tokenizer")
    width = denoiser_of(pipeline).x_embedder.weight.shape
    tensors = {"img_in.lora_A.weight": ones(2, 2 * width[1]), "img_in.lora_B.weight": ones(16, 2)}
    file = write(tmp_path / "l.safetensors", tensors)
    with refusal("AFA-LORA-013", r"img_in\.lora_A"):
        with_lora(pipeline, file)


# -- PEFT's configuration ---------------------------------------------------------------------


def raw_peft(pipeline: Any, folder: Path, **changes: Any) -> Path:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["attn1.to_q"])
    state = peft_lora(pipeline.unet, config)
    raw = {f"base_model.model.{key}": tensor for key, tensor in state.items()}
    file = write(folder / "adapter_model.safetensors", raw, config)
    place = folder / "adapter_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | changes))
    return file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "describes a LOHA adapter"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa, which changes the base's"),
        ({"layer_replication": [[0, 1]]}, "has layer_replication = "),
        ({"r": 3}, "has rank 2, but PEFT's configuration says 3"),
        ({"lora_alpha": "much"}, "'lora_alpha' = much"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "'(a+)+$' = 1"),
        ({"alpha_pattern": 3}, "'alpha_pattern' = 3"),
        ({"use_dora": True}, "lacks the lora_magnitude_vector of"),
    ],
)
def test_configurations_that_mean_more(
    pipeline: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert message in refused(pipeline, raw_peft(pipeline, tmp_path, **changes))


def test_peft_without_its_configuration(pipeline: Any, tmp_path: Path) -> None:
    file = raw_peft(pipeline, tmp_path)
    alone = hash_lora(file)
    (tmp_path / "adapter_config.json").write_text(
        (tmp_path / "adapter_config.json").read_text() + "\n"
    )
    assert hash_lora(file) != alone, "the scale is part of what the LoRA is"
    (tmp_path / "adapter_config.json").unlink()
    assert "there is no adapter_config.json beside it" in refused(pipeline, file)


def test_two_scales(pipeline: Any, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["attn1.to_q"])
    state = {f"unet.{k}": t for k, t in peft_lora(pipeline.unet, config).items()}
    state[f"{next(iter(state)).rpartition('.lora_')[0]}.alpha"] = torch.tensor(3.0)
    file = write(tmp_path / "l.safetensors", state, config, "unet")
    assert "has two scales for" in refused(pipeline, file)
    file = tmp_path / "m.safetensors"
    save_file(RIGHT, file, {"lora_adapter_metadata": "no JSON"})
    assert "must be a JSON object" in refused(pipeline, file)


# -- where it is said -------------------------------------------------------------------------


def test_check_finds_what_loading_refuses(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "l.safetensors", {**RIGHT, f"{FAR}.diff": ones(2)})
    expert = {"base": str(pipeline.folder), "lora": str(file)}
    with pytest.raises(AfaError) as loading:
        afa.load_pipeline([expert])
    (error,) = looked(tmp_path, [pipeline.folder, expert]).errors
    assert error.text == str(loading.value)
    monkeypatch.chdir(pipeline.folder.parent)  # both name the base as it was named
    with refusal("AFA-LORA-008", r"'\./base'") as loading:
        afa.load_pipeline([{**expert, "base": "./base"}])
    with pytest.raises(AfaError) as checking:
        check_lora(ExpertSource("./base", lora=str(file)), Path("base"))
    assert str(checking.value) == str(loading.value)
