"""Transformers, cut at every site and joined again, are the library's own forward, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from afa.denoisers import discover_sites, family_of, run_alone, run_lockstep
from tests.refusal import refusal
from tests.tiny_transformers import KINDS, call, tiny_transformer, transformer_inputs

DTYPES = [torch.float32, torch.bfloat16]


def rejoined(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return run_alone(family_of(model).blocks(model, **inputs))


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
        inputs["hidden_states"].requires_grad_()
        run(model, inputs).square().mean().backward()
        gradients.append(inputs["hidden_states"].grad)
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
        run_lockstep([family_of(model).blocks(model, **inputs)], note)
    assert [site.name for site in sites] == [feature.site for feature in seen]
    for site, feature in zip(sites, seen, strict=True):
        assert site.channels == feature.hidden.shape[1]
        assert site.temb_channels == feature.temb.shape[-1]
        assert (site.stream == "text") == (feature.hidden.shape[-2:] == (5, 1))
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
    ("pixart", {"encoder_attention_mask": torch.ones(2, 5)}),
]


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "extra"), ARGUMENTS, ids=[f"{kind} {' '.join(extra)}" for kind, extra in ARGUMENTS]
)
def test_argument(kind: str, extra: dict[str, Any], dtype: torch.dtype) -> None:
    model = tiny_transformer(kind).to(dtype)
    extra = {
        key: [v.to(dtype) for v in value] if key.startswith(("control", "block")) else value
        for key, value in extra.items()
        if not isinstance(value, bool)
    } | {key: value for key, value in extra.items() if isinstance(value, bool)}
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
    for kind in ("flux", "chroma", "sd3"):
        inputs = transformer_inputs(kind) | {"joint_attention_kwargs": {"scale": 0.5}}
        with refusal("AFA-MODEL-004"):
            rejoined(tiny_transformer(kind), inputs)


def test_an_unknown_block_is_refused() -> None:
    model = tiny_transformer("sd3")
    model.transformer_blocks[1] = torch.nn.Identity()
    with refusal("AFA-MODEL-015", r"transformer_blocks\.1"):
        family_of(model)
