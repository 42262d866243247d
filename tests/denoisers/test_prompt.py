"""What depends on the prompt alone: computed once, never stale, gone with the prompt."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from afa.denoisers.prompt import (
    PromptAttention,
    cross_attentions,
    once_per_prompt,
    prompts_attended_once,
)
from tests.ensemble.test_ensemble import call, ensemble_of
from tests.tiny import TEXT_WIDTH, tiny_unet

STEPS = (900, 600, 300)


class Counter:
    """Counts how often modules run, and how many of their outputs are still in memory."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.calls = 0
        self._outputs: list[StorageWeakRef] = []
        for module in modules:
            module.register_forward_hook(self._count)

    def _count(self, _: Any, __: Any, output: Tensor) -> None:
        self.calls += 1
        self._outputs.append(StorageWeakRef(output.untyped_storage()))

    @property
    def alive(self) -> int:
        gc.collect()
        return sum(not output.expired() for output in self._outputs)


def cross_attention(**settings: Any) -> Attention:
    torch.manual_seed(0)
    return Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8, **settings).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": True},
        {"rescale_output_factor": 2.0},
        {"residual_connection": True},
        {"qk_norm": "layer_norm"},
        {"cross_attention_norm": "layer_norm"},
        {"norm_num_groups": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_library_s_attention(settings: dict[str, Any], dtype: torch.dtype) -> None:
    attention = cross_attention(**settings).to(dtype)
    hidden, text = torch.randn(2, 5, 16).to(dtype), torch.randn(2, 3, 12).to(dtype)
    mask = torch.tensor([[0.0, -1e4, 0.0], [0.0, 0.0, -1e4]], dtype=dtype)[:, None]
    for bias in (None, mask):
        expected = attention(hidden, text, attention_mask=bias)
        with prompts_attended_once([attention]):
            for _ in range(2):
                assert torch.equal(attention(hidden, text, attention_mask=bias), expected)
    with prompts_attended_once([attention]):
        itself = torch.randn(2, 5, 12).to(dtype)
        assert attention.processor.__class__ is PromptAttention
        assert torch.equal(attention(hidden, itself), attention(hidden, itself.clone()))


@torch.no_grad()
def test_other_processors_stay_and_the_own_is_put_back() -> None:
    class Other(AttnProcessor2_0):
        pass

    usual, other = cross_attention(), cross_attention(processor=Other())
    before = usual.processor
    with prompts_attended_once([usual, other]):
        assert type(usual.processor) is PromptAttention
        assert type(other.processor) is Other
    assert usual.processor is before


def _experts_keys(ensemble: Any) -> list[nn.Module]:
    return [attention.to_k for attention in cross_attentions(ensemble)]


@torch.no_grad()
def test_keys_and_values_are_computed_once_for_all_steps() -> None:
    ensemble, arguments = ensemble_of(), call()
    keys = _experts_keys(ensemble)
    counter = Counter(keys)
    assert len(keys) > len(ensemble.aggregators)  # theirs, and the experts'
    for step in STEPS:
        ensemble(**{**arguments, "timestep": step})
    assert counter.calls == len(keys)
    ensemble(**{**arguments, "timestep": STEPS[0]})  # another picture
    assert counter.calls == 2 * len(keys)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_a_loop_gives_bit_for_bit_what_single_calls_give(dtype: torch.dtype, shared: bool) -> None:
    ensemble = ensemble_of().to(dtype)
    arguments = {k: v.to(dtype) if v.is_floating_point() else v for k, v in call().items()}
    if shared:
        arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"][..., :TEXT_WIDTH]
    for step in STEPS:
        now = {**arguments, "timestep": torch.tensor(step)}
        text = arguments["encoder_hidden_states"].clone()  # another object
        expected = ensemble(**{**now, "encoder_hidden_states": text}).sample
        assert torch.equal(ensemble(**now).sample, expected)


@torch.no_grad()
def test_a_text_or_weights_that_change_on_the_way_are_seen() -> None:
    ensemble, arguments = ensemble_of(), call()
    text: Tensor = arguments["encoder_hidden_states"]

    def at(step: int, **changes: Any) -> Tensor:
        return ensemble(**{**arguments, "timestep": step, **changes}).sample

    at(900)
    text += 1.0
    assert torch.equal(at(800), at(800, encoder_hidden_states=text.clone()))
    at(700)
    keys: Any = _experts_keys(ensemble)
    for key in keys:
        key.weight.mul_(2)
    changed = at(600)
    assert torch.equal(changed, at(600, encoder_hidden_states=text.clone()))
    for key in keys:
        key.weight.data.mul_(2)  # unseen by autograd, as a LoRA that is fused: the next run sees it
    assert torch.equal(at(900), at(900, encoder_hidden_states=text.clone()))


def test_nothing_is_kept_where_gradients_are_recorded() -> None:
    ensemble, arguments = ensemble_of(), call()
    counter = Counter(_experts_keys(ensemble))
    for step in STEPS:
        ensemble(**{**arguments, "timestep": step}).sample.mean().backward()
    assert counter.calls == len(STEPS) * len(_experts_keys(ensemble))
    assert counter.alive == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_kept_goes_with_the_prompt(mode: Any) -> None:
    ensemble = ensemble_of()
    counter = Counter(_experts_keys(ensemble))
    with mode():
        arguments = call()
        for step in STEPS:
            ensemble(**{**arguments, "timestep": step})
        kept = len(_experts_keys(ensemble)) if mode is torch.no_grad else 0
        assert counter.alive == kept
        del arguments
    assert counter.alive == 0


@torch.no_grad()
def test_a_single_token_is_no_leak() -> None:
    """Its part of the joined embedding is a view, which must not keep the whole alive."""
    ensemble, arguments = ensemble_of(), call()
    arguments = {
        "sample": arguments["sample"][:1],
        "timestep": torch.tensor(5),
        "encoder_hidden_states": arguments["encoder_hidden_states"][:1, :1].clone(),
    }
    text = StorageWeakRef(arguments["encoder_hidden_states"].untyped_storage())
    ensemble(**arguments)
    del arguments
    gc.collect()
    assert text.expired()


def test_the_value_is_computed_again_where_it_must() -> None:
    text, seen = torch.zeros(2), []

    def compute() -> int:
        seen.append(1)
        return len(seen)

    with torch.no_grad():
        assert [once_per_prompt(text, "a", compute) for _ in range(3)] == [1, 1, 1]
        assert once_per_prompt(text, "b", compute) == 2
        text += 1
        assert once_per_prompt(text, "a", compute) == 3
    assert once_per_prompt(text, "a", compute) == 4  # gradients are recorded


@torch.no_grad()
@pytest.mark.parametrize("experts_alone", [True, False])
def test_steps_with_several_timesteps_begin_anew(experts_alone: bool) -> None:
    ensemble = ensemble_of(1 if experts_alone else 3)
    arguments = call(1 if experts_alone else 3)
    counter = Counter(_experts_keys(ensemble))
    several = torch.arange(len(arguments["sample"])) + 100
    for steps in (900, several, several - 50):
        ensemble(**{**arguments, "timestep": steps})
    assert counter.calls == 3 * len(_experts_keys(ensemble))


def test_cross_attentions_are_found_in_order() -> None:
    unet = tiny_unet()
    found = cross_attentions(unet)
    names = {id(module): name for name, module in unet.named_modules()}
    listed = [names[id(attention)] for attention in found]
    assert all(name.endswith("attn2") for name in listed)
    assert len(listed) == sum(name.endswith("attn2") for name in names.values())
