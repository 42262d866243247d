"""Whole pipelines as single files in the layouts of the original codes, as the web has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from afa.denoisers.kinds import kind_of_pipeline

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
    from torch import Tensor, nn

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def original_layout(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    """All weights of a pipeline under the names of the original code."""
    parts: Any = pipeline.components
    name = kind_of_pipeline(pipeline).name
    tensors: dict[str, Tensor] = {}

    def add(prefix: str, part: dict[str, Tensor]) -> None:
        tensors.update({prefix + key: tensor for key, tensor in part.items()})

    vae = "first_stage_model."
    if name in ("Stable Diffusion", "Stable Diffusion XL"):
        add("model.diffusion_model.", original_unet(parts["unet"]))
    if name == "Stable Diffusion":
        add("cond_stage_model.transformer.", _clip(parts["text_encoder"]))
    elif name == "Stable Diffusion XL":
        if parts["text_encoder"] is not None:
            add("conditioner.embedders.0.transformer.", _clip(parts["text_encoder"]))
        number = 0 if parts["text_encoder"] is None else 1
        add(f"conditioner.embedders.{number}.model.", _open_clip(parts["text_encoder_2"]))
    elif name == "Stable Diffusion 3":
        add("model.diffusion_model.", _sd3(parts["transformer"]))
        add("text_encoders.clip_l.transformer.", _clip(parts["text_encoder"]))
        add("text_encoders.clip_g.transformer.", _clip(parts["text_encoder_2"]))
        add("text_encoders.t5xxl.transformer.", parts["text_encoder_3"].state_dict())
    elif name == "FLUX.2 klein":  # the transformer alone
        add("model.diffusion_model.", _flux2(parts["transformer"]))
        return {key: tensor.contiguous() for key, tensor in tensors.items()}
    elif name == "Qwen-Image":  # the names of the library, and nothing but the transformer
        add("model.diffusion_model.", parts["transformer"].state_dict())
        return {key: tensor.contiguous() for key, tensor in tensors.items()}
    elif name == "Z-Image":
        vae = "vae."
        add("model.diffusion_model.", _z_image(parts["transformer"]))
        qwen = parts["text_encoder"].state_dict()
        add("text_encoders.qwen3_4b.transformer.model.", qwen)
    elif name == "Chroma":
        vae = "vae."
        add("model.diffusion_model.", _chroma(parts["transformer"]))
        add("text_encoders.t5xxl.transformer.", parts["text_encoder"].state_dict())
    else:
        vae = "vae."
        add("model.diffusion_model.", _flux(parts["transformer"]))
        add("text_encoders.clip_l.transformer.", _clip(parts["text_encoder"]))
        add("text_encoders.t5xxl.transformer.", parts["text_encoder_2"].state_dict())
    add(vae, _vae(parts["vae"]))
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


# -- text encoders ----------------------------------------------------------------------------


def _clip(encoder: nn.Module) -> dict[str, Tensor]:
    """As transformers itself has it, in the older naming."""
    return {
        key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}": tensor
        for key, tensor in encoder.state_dict().items()
    }


_OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def _open_clip(encoder: nn.Module) -> dict[str, Tensor]:
    state = _clip(encoder)
    result = {theirs: state[ours] for ours, theirs in _OPEN_CLIP.items()}
    if "text_projection.weight" in state:
        result["text_projection"] = state["text_projection.weight"].T
    for key, tensor in state.items():
        if ".layers." not in key:
            continue
        number, rest = key.split(".layers.")[1].split(".", 1)
        place = f"transformer.resblocks.{number}."
        if "self_attn.q_proj" in rest:
            kind = rest.rpartition(".")[2]
            names = [key.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
            result[f"{place}attn.in_proj_{kind}"] = torch.cat([state[name] for name in names])
        elif "_proj." not in rest or "out_proj" in rest:
            result[place + _rename(rest, _OPEN_CLIP_LAYER)] = tensor
    return result


# -- transformers -----------------------------------------------------------------------------


def _swapped(tensor: Tensor) -> Tensor:
    """Scale and shift of a modulation, the other way round."""
    return torch.cat(tensor.chunk(2, dim=0)[::-1])


def _joined(state: dict[str, Tensor], place: str, names: str, kind: str) -> Tensor:
    return torch.cat([state[f"{place}.{name}.{kind}"] for name in names.split()])


_SD3 = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
}
_SD3_BLOCK = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}


def _sd3(transformer: Any) -> dict[str, Tensor]:
    state = transformer.state_dict()
    last = len(transformer.transformer_blocks) - 1
    result = {"pos_embed": state["pos_embed.pos_embed"]}
    for kind in ("weight", "bias"):
        result |= {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for ours, theirs in _SD3.items()}
        out = state[f"norm_out.linear.{kind}"]
        result[f"final_layer.adaLN_modulation.1.{kind}"] = _swapped(out)
        for n in range(last + 1):
            ours, theirs = f"transformer_blocks.{n}", f"joint_blocks.{n}"
            for block, names in (("x", "to_q to_k to_v"), ("context", "add_q add_k add_v")):
                names = names if block == "x" else " ".join(f"{q}_proj" for q in names.split())
                joined = _joined(state, f"{ours}.attn", names, kind)
                result[f"{theirs}.{block}_block.attn.qkv.{kind}"] = joined
            if f"{ours}.attn2.to_q.{kind}" in state:
                joined = _joined(state, f"{ours}.attn2", "to_q to_k to_v", kind)
                result[f"{theirs}.x_block.attn2.qkv.{kind}"] = joined
            for name, other in _SD3_BLOCK.items():
                tensor = state.get(f"{ours}.{name}.{kind}")
                if tensor is None:
                    continue
                if n == last and name == "norm1_context.linear":
                    tensor = _swapped(tensor)
                result[f"{theirs}.{other}.{kind}"] = tensor
    return result


_FLUX = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "proj_out": "final_layer.linear",
}
_FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
}
_FLUX_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}


def _flux(transformer: Any) -> dict[str, Tensor]:
    state = transformer.state_dict()
    result = {}
    for kind in ("weight", "bias"):
        for ours, theirs in _FLUX.items():
            if f"{ours}.{kind}" in state:
                result[f"{theirs}.{kind}"] = state[f"{ours}.{kind}"]
        if f"norm_out.linear.{kind}" in state:
            out = state[f"norm_out.linear.{kind}"]
            result[f"final_layer.adaLN_modulation.1.{kind}"] = _swapped(out)
        for n in range(len(transformer.transformer_blocks)):
            ours, theirs = f"transformer_blocks.{n}", f"double_blocks.{n}"
            for name, other in _FLUX_DOUBLE.items():
                if f"{ours}.{name}.{kind}" in state:
                    result[f"{theirs}.{other}.{kind}"] = state[f"{ours}.{name}.{kind}"]
            streams = {"img": "to_q to_k to_v", "txt": "add_q_proj add_k_proj add_v_proj"}
            for stream, names in streams.items():
                tensor = _joined(state, f"{ours}.attn", names, kind)
                result[f"{theirs}.{stream}_attn.qkv.{kind}"] = tensor
        for n in range(len(transformer.single_transformer_blocks)):
            ours, theirs = f"single_transformer_blocks.{n}", f"single_blocks.{n}"
            all_in_one = _joined(state, ours, "attn.to_q attn.to_k attn.to_v proj_mlp", kind)
            result[f"{theirs}.linear1.{kind}"] = all_in_one
            result[f"{theirs}.linear2.{kind}"] = state[f"{ours}.proj_out.{kind}"]
            if f"{ours}.norm.linear.{kind}" in state:
                result[f"{theirs}.modulation.lin.{kind}"] = state[f"{ours}.norm.linear.{kind}"]
    for n in range(len(transformer.transformer_blocks)):
        for name, other in _FLUX_NORMS.items():
            key = f"transformer_blocks.{n}.{name}.weight"
            result[f"double_blocks.{n}.{other}.scale"] = state[key]
    for n in range(len(transformer.single_transformer_blocks)):
        for letter, name in (("q", "query"), ("k", "key")):
            key = f"single_transformer_blocks.{n}.attn.norm_{letter}.weight"
            result[f"single_blocks.{n}.norm.{name}_norm.scale"] = state[key]
    return result


def _chroma(transformer: Any) -> dict[str, Tensor]:
    """Flux without modulations, and the network that computes them."""
    result = _flux(transformer)
    for key, tensor in transformer.distilled_guidance_layer.state_dict().items():
        name = key.replace("linear_1", "in_layer").replace("linear_2", "out_layer")
        if key.startswith("norms."):
            name = name.replace(".weight", ".scale")
        result[f"distilled_guidance_layer.{name}"] = tensor
    return result


_FLUX2 = {
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "proj_out": "final_layer.linear",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
}
_FLUX2_DOUBLE = {
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
}


def _flux2(transformer: Any) -> dict[str, Tensor]:
    state = transformer.state_dict()
    result = {f"{theirs}.weight": state[f"{ours}.weight"] for ours, theirs in _FLUX2.items()}
    result["final_layer.adaLN_modulation.1.weight"] = _swapped(state["norm_out.linear.weight"])
    for n in range(len(transformer.transformer_blocks)):
        ours, theirs = f"transformer_blocks.{n}", f"double_blocks.{n}"
        for name, other in _FLUX2_DOUBLE.items():
            result[f"{theirs}.{other}.weight"] = state[f"{ours}.{name}.weight"]
        streams = {"img": "to_q to_k to_v", "txt": "add_q_proj add_k_proj add_v_proj"}
        for stream, names in streams.items():
            tensor = _joined(state, f"{ours}.attn", names, "weight")
            result[f"{theirs}.{stream}_attn.qkv.weight"] = tensor
        for name, other in _FLUX_NORMS.items():
            result[f"{theirs}.{other}.scale"] = state[f"{ours}.{name}.weight"]
    for n in range(len(transformer.single_transformer_blocks)):
        ours, theirs = f"single_transformer_blocks.{n}.attn", f"single_blocks.{n}"
        result[f"{theirs}.linear1.weight"] = state[f"{ours}.to_qkv_mlp_proj.weight"]
        result[f"{theirs}.linear2.weight"] = state[f"{ours}.to_out.weight"]
        for letter, name in (("q", "query"), ("k", "key")):
            result[f"{theirs}.norm.{name}_norm.scale"] = state[f"{ours}.norm_{letter}.weight"]
    return result


def _z_image(transformer: Any) -> dict[str, Tensor]:
    """Queries, keys and values in one, and other names of a few layers."""
    result = {}
    for key, tensor in transformer.state_dict().items():
        place, _, rest = key.partition(".attention.")
        name = key.replace("all_x_embedder.2-1.", "x_embedder.")
        name = name.replace("all_final_layer.2-1.", "final_layer.")
        if rest.startswith("to_q"):
            names = "to_q to_k to_v"
            joined = _joined(transformer.state_dict(), f"{place}.attention", names, "weight")
            result[f"{place}.attention.qkv.weight"] = joined
        elif not rest.startswith(("to_k", "to_v")):
            for ours, theirs in (("to_out.0", "out"), ("norm_q", "q_norm"), ("norm_k", "k_norm")):
                name = name.replace(f".attention.{ours}.", f".attention.{theirs}.")
            result[name] = tensor
    return result


# -- U-Nets and autoencoders ------------------------------------------------------------------


def _rename(key: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        if key.startswith(f"{ours}."):
            return theirs + key.removeprefix(ours)
    return key


def original_unet(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    layers = unet.config.layers_per_block
    places = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for b in range(len(unet.down_blocks)):
        for i in range(layers):
            number = 1 + b * (layers + 1) + i
            places[f"down_blocks.{b}.resnets.{i}"] = f"input_blocks.{number}.0"
            places[f"down_blocks.{b}.attentions.{i}"] = f"input_blocks.{number}.1"
        number = (b + 1) * (layers + 1)
        places[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
    for b, block in enumerate(unet.up_blocks):
        attends = hasattr(block, "attentions")
        for i in range(layers + 1):
            number = b * (layers + 1) + i
            places[f"up_blocks.{b}.resnets.{i}"] = f"output_blocks.{number}.0"
            places[f"up_blocks.{b}.attentions.{i}"] = f"output_blocks.{number}.1"
        upsampler = f"output_blocks.{number}.{2 if attends else 1}.conv"
        places[f"up_blocks.{b}.upsamplers.0.conv"] = upsampler
    result = {}
    for key, tensor in unet.state_dict().items():
        place = next(p for p in places if key.startswith(f"{p}."))
        rest = key.removeprefix(f"{place}.")
        if ".resnets." in place:
            rest = _rename(rest, _RESNET)
        result[f"{places[place]}.{rest}"] = tensor
    return result


def _vae(vae: AutoencoderKL) -> dict[str, Tensor]:
    levels = len(vae.config.block_out_channels)
    places = {}
    for side in ("encoder", "decoder"):
        for n in (0, 1):
            places[f"{side}.mid_block.resnets.{n}"] = f"{side}.mid.block_{n + 1}"
        places[f"{side}.mid_block.attentions.0"] = f"{side}.mid.attn_1"
        places[f"{side}.conv_norm_out"] = f"{side}.norm_out"
    for b in range(levels):
        for i in range(vae.config.layers_per_block + 1):
            places[f"encoder.down_blocks.{b}.resnets.{i}"] = f"encoder.down.{b}.block.{i}"
            up = f"decoder.up.{levels - 1 - b}"
            places[f"decoder.up_blocks.{b}.resnets.{i}"] = f"{up}.block.{i}"
            places[f"decoder.up_blocks.{b}.upsamplers.0"] = f"{up}.upsample"
        places[f"encoder.down_blocks.{b}.downsamplers.0"] = f"encoder.down.{b}.downsample"
    result = {}
    for key, tensor in vae.state_dict().items():
        place = next((p for p in places if key.startswith(f"{p}.")), None)
        if place is None:
            result[key] = tensor
            continue
        rest = _rename(key.removeprefix(f"{place}."), {"conv_shortcut": "nin_shortcut"})
        if ".attentions." in place:
            rest = _rename(rest, _ATTENTION)
            tensor = tensor[..., None, None] if tensor.ndim == 2 else tensor
        result[f"{places[place]}.{rest}"] = tensor
    return result
