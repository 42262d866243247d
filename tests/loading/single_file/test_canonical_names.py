"""One model has one set of names, whatever the layout of its file."""

from __future__ import annotations

import pytest

from afa.loading.single_file.canonical_names import canonical_names, unet_names

D = "model.diffusion_model."
CLIP, T5 = "cond_stage_model.transformer.", "text_encoders.t5xxl.transformer."


@pytest.mark.parametrize(
    "names",
    [
        # denoisers of the original codes, with and without their prefix
        {"input_blocks.0.0.weight": f"{D}input_blocks.0.0.weight", "out.2.bias": f"{D}out.2.bias"},
        {"joint_blocks.0.x": f"{D}joint_blocks.0.x", "pos_embed": f"{D}pos_embed"},
        {"diffusion_model.double_blocks.0.x": f"{D}double_blocks.0.x"},
        # what lies beside a bare denoiser is not of it
        {
            "double_blocks.0.x": f"{D}double_blocks.0.x",
            "vae.decoder.conv_in.bias": "first_stage_model.decoder.conv_in.bias",
            f"{T5}shared.weight": f"{T5}shared.weight",
            "alphas_cumprod": "alphas_cumprod",
            "v_pred": "v_pred",
            "model_ema.decay": "model_ema.decay",
        },
        # bare denoisers of diffusers
        {"down_blocks.0.x": "unet.down_blocks.0.x", "conv_in.weight": "unet.conv_in.weight"},
        {
            "transformer_blocks.0.x": "transformer.transformer_blocks.0.x",
            "x_embedder.bias": "transformer.x_embedder.bias",
        },
        # CLIP under its older names; T5 has no others
        {
            f"{CLIP}encoder.layers.0.x": f"{CLIP}text_model.encoder.layers.0.x",
            f"{CLIP}text_projection.weight": f"{CLIP}text_projection.weight",
            f"{T5}encoder.block.0.x": f"{T5}encoder.block.0.x",
            "foo": "foo",
        },
        {
            "conditioner.embedders.0.transformer.embeddings.x": (
                "conditioner.embedders.0.transformer.text_model.embeddings.x"
            ),
            "text_encoders.clip_l.transformer.final_layer_norm.x": (
                "text_encoders.clip_l.transformer.text_model.final_layer_norm.x"
            ),
        },
    ],
)
def test_names(names: dict[str, str]) -> None:
    assert canonical_names(names) == names
    canonical = list(names.values())
    assert list(canonical_names(canonical).values()) == canonical  # they stay


def test_the_number_of_layers_is_told_from_a_u_net() -> None:
    expected = {
        "input_blocks.0.0.weight": "conv_in.weight",
        "input_blocks.1.0.in_layers.0.weight": "down_blocks.0.resnets.0.norm1.weight",
        "input_blocks.2.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
        "input_blocks.2.0.op.bias": "down_blocks.0.downsamplers.0.conv.bias",
        "input_blocks.3.0.emb_layers.1.bias": "down_blocks.1.resnets.0.time_emb_proj.bias",
        "output_blocks.1.1.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
        "output_blocks.1.1.conv.bias": "up_blocks.0.upsamplers.0.conv.bias",
        "output_blocks.0.0.skip_connection.bias": "up_blocks.0.resnets.0.conv_shortcut.bias",
        "label_emb.0.0.weight": "add_embedding.linear_1.weight",
        "label_emb.0.0.bias": "add_embedding.linear_1.bias",
        "label_emb.0.2.weight": "add_embedding.linear_2.weight",
        "label_emb.0.2.bias": "add_embedding.linear_2.bias",
    }
    found = unet_names([*(D + name for name in expected), "first_stage_model.quant_conv.bias"])
    assert found == {D + name: f"unet.{new}" for name, new in expected.items()}
