"""The composite text encoder: one embedding per expert, identical encoders run once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from transformers import CLIPTextConfig, CLIPTextModel

from afa.ensemble.text import EnsembleTextEncoder, attach_controlnet, hash_weights, share_equal
from tests.refusal import refusal
from tests.tiny import TEXT_WIDTH, tiny_pipeline

IDS = torch.tensor([[1, 5, 6, 2], [1, 7, 2, 2]])


def encoder(seed: int, **changes: Any) -> CLIPTextModel:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 20,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    model = CLIPTextModel(CLIPTextConfig(**{**settings, **changes})).eval()
    torch.nn.init.normal_(model.final_layer_norm.weight)
    return model


def test_embeddings_are_concatenated_in_the_experts_order() -> None:
    encoders = [encoder(0), encoder(1), encoder(0)]
    joined = EnsembleTextEncoder(encoders)(IDS)
    parts = [e(IDS) for e in encoders]
    assert torch.equal(joined[0], torch.cat([p[0] for p in parts], -1))
    assert torch.equal(joined.pooler_output, torch.cat([p.pooler_output for p in parts], -1))


def test_identical_encoders_are_kept_and_run_once() -> None:
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    encoders = [encoder(0), encoder(1), encoder(0)]
    for e in encoders:
        e.register_forward_hook(count)
    composite = EnsembleTextEncoder(encoders)
    composite(IDS)
    assert (calls, len(composite.encoders), composite.encoder_of) == (2, 2, [0, 1, 0])


def test_where_all_are_identical_one_embedding_serves_all() -> None:
    composite = EnsembleTextEncoder([encoder(0), encoder(0)])
    assert torch.equal(composite(IDS)[0], encoder(0)(IDS)[0])


def test_hidden_layers_and_their_last_norm() -> None:
    encoders = [encoder(0), encoder(1)]
    composite = EnsembleTextEncoder(encoders)
    joined = composite(IDS, output_hidden_states=True, return_dict=True)
    single = [e(IDS, output_hidden_states=True) for e in encoders]
    assert torch.equal(
        joined.hidden_states[-2], torch.cat([s.hidden_states[-2] for s in single], -1)
    )
    normed = composite.text_model.final_layer_norm(joined.hidden_states[-2])
    expected = [
        e.final_layer_norm(s.hidden_states[-2]) for e, s in zip(encoders, single, strict=True)
    ]
    assert torch.equal(normed, torch.cat(expected, -1))


@pytest.mark.parametrize("change", [{"hidden_size": 16}, {"num_hidden_layers": 1}])
def test_different_shapes_are_refused(change: dict[str, int]) -> None:
    with refusal("AFA-ENSEMBLE-058"):
        EnsembleTextEncoder([encoder(0), encoder(1, **change)])


def test_the_hash_sees_every_weight_and_its_type() -> None:
    first, second = encoder(0), encoder(0)
    assert hash_weights(first) == hash_weights(second)
    with torch.no_grad():
        second.final_layer_norm.bias[-1] += 1e-6
    assert hash_weights(first) != hash_weights(second)
    assert hash_weights(first) != hash_weights(encoder(0).bfloat16())


def test_equal_encoders_are_one_object() -> None:
    first, other, same = encoder(0), encoder(1), encoder(0)
    shared = share_equal([first, other, same, other])
    assert [id(e) for e in shared] == [id(e) for e in (first, other, first, other)]
    with torch.no_grad():
        same.final_layer_norm.bias[-1] += 1e-6
    assert share_equal([first, same])[1] is same
    half = encoder(0).bfloat16()
    assert share_equal([first, half])[1] is half


def test_skipping_layers_in_a_stock_pipeline(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(tmp_path)
    encoders = [pipeline.text_encoder, tiny_pipeline(tmp_path, seed=1).text_encoder]
    pipeline.text_encoder = EnsembleTextEncoder(encoders)
    joined = pipeline.encode_prompt("a fox", "cpu", 1, False, clip_skip=1)[0]
    ids = pipeline.tokenizer("a fox", padding="max_length", return_tensors="pt").input_ids
    hidden = [e(ids, output_hidden_states=True).hidden_states[-2] for e in encoders]
    expected = [e.final_layer_norm(h) for e, h in zip(encoders, hidden, strict=True)]
    assert torch.equal(joined, torch.cat(expected, -1))


def test_a_controlnet_sees_one_experts_part() -> None:
    controlnet = ControlNetModel(
        in_channels=4,
        block_out_channels=(4,),
        down_block_types=("CrossAttnDownBlock2D",),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=2,
        conditioning_embedding_out_channels=(4, 4),
    ).eval()
    for block in controlnet.controlnet_down_blocks:
        torch.nn.init.normal_(block.weight)  # zero at first, so nothing would be seen
    sample, step, picture = torch.randn(1, 4, 8, 8), torch.tensor(5), torch.randn(1, 3, 16, 16)
    text = torch.randn(1, 5, 3 * TEXT_WIDTH)

    def run(states: torch.Tensor) -> torch.Tensor:
        output = controlnet(
            sample, step, encoder_hidden_states=states, controlnet_cond=picture, return_dict=False
        )
        return output[0][-1]

    expected = run(text[..., TEXT_WIDTH : 2 * TEXT_WIDTH])
    other = run(text[..., :TEXT_WIDTH])
    attach_controlnet(controlnet, 3, expert=1)
    assert torch.equal(run(text), expected)
    assert not torch.equal(run(text), other)
    with refusal("AFA-ENSEMBLE-060", "0", "2", "3"):
        attach_controlnet(controlnet, 3, expert=3)
