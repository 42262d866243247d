"""Transformers, cut at every site and joined again, are the library's own forward, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

from afa.denoisers import discover_sites, family_of, run_alone, run_lockstep
from tests.refusal import refusal
from tests.tiny_transformers import (
    KINDS,
    call,
    latents_of,
    stacked,
    tiny_transformer,
    transformer_inputs,
)

DTYPES = [torch.float32, torch.bfloat16]


def rejoined(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    family = family_of(model)
    arguments = family.interface.arguments(dict(inputs))
    return stacked(family.interface.output(run_alone(family.blocks(model, **arguments))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rejoined_is_the_librarys_own(kind: str, dtype: torch.dtype) -> None:
    model = tiny_transformer(kind).to(dtype)
    inputs = transformer_inputs(kind, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(rejoined(model, inputs), call(model, inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_librarys_own(kind: str) -> None:
    model = tiny_transformer(kind).requires_grad_(False)
    gradients = []
    for run in (rejoined, call):
        inputs = transformer_inputs(kind)
        latents = [latent.requires_grad_() for latent in latents_of(inputs)]
        run(model, inputs).square().mean().backward()
        gradients.append(
            torch.stack([latent.grad for latent in latents if latent.grad is not None])
        )
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_sites_are_discovered(kind: str) -> None:
    model = tiny_transformer(kind)
    sites = discover_sites(model)
    seen: list[Any] = []

    def note(features: Any) -> torch.Tensor:
        seen.append(features[0])
        return features[0].hidden

    inputs = transformer_inputs(kind)
    with torch.no_grad():
        family = family_of(model)
        run_lockstep([family.blocks(model, **family.interface.arguments(inputs))], note)
    assert [site.name for site in sites] == [feature.site for feature in seen]
    for site, feature in zip(sites, seen, strict=True):
        assert site.channels == feature.hidden.shape[1]
        assert site.temb_channels == feature.temb.shape[-1]
        assert (site.stream == "text") == (feature.hidden.shape[-1] == 1)
    assert (sites[0].name, sites[-1].name) == ("embed", "out")


def residuals(count: int, tokens: int = 16, channels: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, tokens, channels, generator=generator) for _ in range(count)]


ARGUMENTS: list[tuple[str, dict[str, Any]]] = [
    ("flux", {"controlnet_block_samples": residuals(1)}),
    ("flux", {"controlnet_block_samples": residuals(2), "controlnet_blocks_repeat": True}),
    ("flux", {"controlnet_single_block_samples": residuals(2)}),
    ("flux", {"guidance": torch.tensor([1.0, 7.0])}),
    ("chroma", {"controlnet_block_samples": residuals(1)}),
    ("chroma", {"controlnet_single_block_samples": residuals(2)}),
    ("chroma", {"attention_mask": torch.ones(2, 21)}),
    ("sd3", {"block_controlnet_hidden_states": residuals(2)}),
    ("sd3", {"skip_layers": [1]}),
    ("sd3.5", {"skip_layers": [0, 2]}),
    ("z-image", {"controlnet_block_samples": {0: residuals(1, 64)[0], 2: residuals(1, 64)[0]}}),
    ("qwen-image", {"controlnet_block_samples": residuals(2)}),
    ("qwen-image", {"encoder_hidden_states_mask": None}),
    ("pixart", {"encoder_attention_mask": torch.ones(2, 5)}),
]


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "extra"), ARGUMENTS, ids=[f"{kind} {' '.join(extra)}" for kind, extra in ARGUMENTS]
)
def test_argument(kind: str, extra: dict[str, Any], dtype: torch.dtype) -> None:
    model = tiny_transformer(kind).to(dtype)

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) else value

    extra = {
        key: tree_map(cast, value) if key.startswith(("control", "block")) else value
        for key, value in extra.items()
    }
    plain = transformer_inputs(kind, dtype=dtype)
    expected = call(model, {**plain, **extra})
    assert torch.equal(rejoined(model, {**plain, **extra}), expected)
    assert not torch.equal(call(model, plain), expected), "the argument had no effect"


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dit"])
def test_other_sizes(kind: str) -> None:
    model = tiny_transformer(kind)
    for height, width in ((8, 4), (12, 10)):
        inputs = transformer_inputs(kind, height=height, width=width)
        assert torch.equal(rejoined(model, inputs), call(model, inputs))


@torch.no_grad()
def test_positions_with_a_batch_axis() -> None:
    model, inputs = tiny_transformer("flux"), transformer_inputs("flux")
    expected = call(model, inputs)
    inputs |= {key: inputs[key][None].expand(2, -1, -1) for key in ("img_ids", "txt_ids")}
    assert torch.equal(rejoined(model, inputs), expected)


def test_a_loras_scale_is_refused() -> None:
    for kind in ("flux", "klein", "chroma", "sd3", "z-image", "qwen-image"):
        name = family_of(tiny_transformer(kind)).attention_kwargs
        inputs = transformer_inputs(kind) | {name: {"scale": 0.5}}
        with refusal("AFA-MODEL-004"):
            rejoined(tiny_transformer(kind), inputs)


def test_omni_is_refused() -> None:
    with refusal("AFA-MODEL-022", "siglip_feat_dim"):
        family_of(tiny_transformer("z-image", siglip_feat_dim=8))
    inputs = transformer_inputs("z-image")
    with refusal("AFA-MODEL-022"):
        rejoined(tiny_transformer("z-image"), {**inputs, "x": [[x] for x in inputs["x"]]})


def test_cached_reference_images_are_refused() -> None:
    inputs = transformer_inputs("klein") | {"kv_cache_mode": "extract"}
    with refusal("AFA-MODEL-028", "extract"):
        rejoined(tiny_transformer("klein"), inputs)


def test_models_for_editing_are_refused() -> None:
    for entry in ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
        with refusal("AFA-MODEL-025", entry):
            family_of(tiny_transformer("qwen-image", **{entry: True}))
    inputs, model = transformer_inputs("qwen-image"), tiny_transformer("qwen-image")
    for shapes in ([[(1, 4, 4), (1, 2, 2)]] * 2, [[(1, 4, 4)], [(1, 2, 2)]], [[(2, 4, 2)]] * 2):
        with refusal("AFA-MODEL-025", "sizes"):
            rejoined(model, {**inputs, "img_shapes": shapes})
    with refusal("AFA-MODEL-025", "additional_t_cond"):
        rejoined(model, {**inputs, "additional_t_cond": torch.zeros(2)})


def test_latents_of_several_sizes_are_refused() -> None:
    inputs = transformer_inputs("z-image")
    inputs["x"][1] = inputs["x"][1][..., :4]
    with refusal("AFA-MODEL-023", r"\(4, 1, 8, 4\), \(4, 1, 8, 8\)"):
        rejoined(tiny_transformer("z-image"), inputs)


@torch.no_grad()
def test_padding_of_several_texts_is_kept_for_all_steps() -> None:
    """Lists are new at every step, their texts are not; another text of the list is another one."""
    inputs, interface = (
        transformer_inputs("z-image"),
        family_of(tiny_transformer("z-image")).interface,
    )
    first = interface.arguments(dict(inputs))["encoder_hidden_states"]
    again = interface.arguments({**inputs, "cap_feats": list(inputs["cap_feats"])})
    assert again["encoder_hidden_states"] is first
    inputs["cap_feats"][1] = inputs["cap_feats"][1] + 1
    other = interface.arguments(dict(inputs))["encoder_hidden_states"]
    assert torch.equal(other[0], first[0])
    assert not torch.equal(other[1], first[1])
    inputs["cap_feats"][1].add_(1)  # in place
    assert not torch.equal(interface.arguments(dict(inputs))["encoder_hidden_states"], other)


def test_an_unknown_block_is_refused() -> None:
    model = tiny_transformer("sd3")
    model.transformer_blocks[1] = torch.nn.Identity()
    with refusal("AFA-MODEL-015", r"transformer_blocks\.1"):
        family_of(model)
