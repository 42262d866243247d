"""What is taken over between steps: what it must equal, and what it must never be."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import afa
from afa.aggregators import Condition, Fused, FusionRule, Separate
from afa.denoisers import Site, discover_sites
from afa.ensemble.caching.loop import Kept, Loop, Loops
from afa.ensemble.caching.shortcut import Shortcut
from afa.ensemble.running import Running
from tests.ensemble import test_ensemble, test_transformer_ensemble
from tests.tiny import SDXL, SMALL_UNET, TEXT_WIDTH, inputs, tiny_unet, xl_inputs
from tests.tiny_transformers import KINDS, call, transformer_inputs

pytestmark = pytest.mark.slow

STEPS = (900, 700, 500, 300, 100)
FAMILIES = ("unet", "sdxl", *KINDS)


def ensemble_of(family: str, num_experts: int = 2) -> Any:
    if family == "unet":
        return test_ensemble.ensemble_of(num_experts, **SMALL_UNET)
    if family == "sdxl":
        return test_ensemble.ensemble_of(num_experts, **{**SDXL, "layers_per_block": 1})
    return test_transformer_ensemble.ensemble_of(family, num_experts)


def arguments_of(
    family: str, num_experts: int = 2, batch: int = 2, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """The arguments of one call, floating-point tensors in the given type."""
    if family == "unet":
        arguments = inputs(batch, text_width=TEXT_WIDTH * num_experts)
    elif family == "sdxl":
        arguments = xl_inputs(num_experts, batch=batch)
    else:
        arguments = transformer_inputs(family, batch, num_experts=num_experts)

    def cast(value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if is_float else value

    return tree_map(cast, arguments)


def at(arguments: dict[str, Any], step: int, seed: int | None = None) -> dict[str, Any]:
    """The same call at another timestep, with other latents."""
    if "x" in arguments:  # Z-Image: lists, and time runs the other way
        packed = {"hidden_states": torch.stack(arguments["x"]), "timestep": arguments["t"] * 0}
        moved = at(packed, step, seed)
        time = torch.full_like(arguments["t"], 1 - step / 1000)
        return {**arguments, "x": list(moved["hidden_states"]), "t": time}
    given = arguments["timestep"]
    now = torch.full_like(given, step) / (1000 if given.max() <= 1 else 1)
    latent = next(key for key in ("sample", "hidden_states") if key in arguments)
    torch.manual_seed(0)
    picture = torch.randn_like(arguments[latent])  # what all steps have in common
    torch.manual_seed(step if seed is None else seed)
    return {
        **arguments,
        "timestep": now.to(given.dtype),
        latent: 0.9 * picture + 0.4 * torch.randn_like(picture),
    }


def draw(ensemble: Any, arguments: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return [call(ensemble, at(arguments, step)) for step in STEPS]


class Overridden(FusionRule):
    """A rule that remembers what it gave, and gives something else where it is told to."""

    def __init__(self, rule: Any) -> None:
        super().__init__()
        self.rule, self.given, self.instead = rule, Tensor(), None

    def forward(self, features: Any, condition: Condition) -> Fused:
        fused = self.rule(features, condition)
        if self.instead is not None:
            fused = Fused(self.instead(), fused.weights)
        self.given = fused.feature
        return fused


def by_hand(family: str, arguments: dict[str, Any], interval: int, fresh: int) -> list[Tensor]:
    """Everything is computed at every step, and then replaced where it would be taken over."""
    ensemble = ensemble_of(family)
    rules = [Overridden(rule) for rule in ensemble.aggregators]
    ensemble.aggregators = nn.ModuleList(rules)
    blocks = [site.name for site in ensemble.sites if site.stream == "image"]
    inner = blocks[fresh : len(blocks) - fresh]
    of_site = dict(zip(ensemble.sites, rules, strict=True))
    exits, entries = {}, {}
    for site, rule in of_site.items():
        if site.block in inner:
            exits[site.stream] = rule
        elif site.stream not in exits:
            entries[site.stream] = rule
    outputs: list[Tensor] = []
    whole: dict[Any, Any] = {}
    for number, step in enumerate(STEPS):
        for stream, rule in exits.items():
            rule.instead = None
            if number % interval:
                entry = None if family in ("unet", "sdxl") else entries.get(stream)

                entry_then = None if entry is None else whole[entry]
                rule.instead = _replacement(whole[rule], entry, entry_then)
        with torch.no_grad():
            outputs.append(call(ensemble, at(arguments, step)))
        if number % interval == 0:
            whole = {rule: rule.given for rule in rules}
    return outputs


def _replacement(then: Tensor, entry: Any, entry_then: Any) -> Any:
    """What was there, or what the blocks since the entry had added to it."""
    return lambda: then if entry is None else entry.given + then - entry_then


@pytest.mark.parametrize("fresh", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_as_if_all_were_computed_and_then_replaced(family: str, fresh: int) -> None:
    ensemble, arguments = ensemble_of(family), arguments_of(family)
    ensemble.acceleration = afa.Acceleration(interval=2, fresh=fresh)
    for came, expected in zip(
        draw(ensemble, arguments), by_hand(family, arguments, 2, fresh), strict=True
    ):
        torch.testing.assert_close(came, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_steps_are_exact_and_others_are_not(family: str) -> None:
    ensemble, arguments = ensemble_of(family), arguments_of(family)
    exact = draw(ensemble, arguments)
    ensemble.acceleration = afa.Acceleration(interval=3)
    came = draw(ensemble, arguments)
    same = [torch.equal(a, b) for a, b in zip(came, exact, strict=True)]
    assert same == [True, False, False, True, False]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_skipped_is_not_run(family: str) -> None:
    ensemble, arguments = ensemble_of(family), arguments_of(family)
    layers = ensemble.family.layers(ensemble.experts[1])
    calls = [0, 0]

    def count(place: int) -> Any:
        def hook(*_: Any) -> None:
            calls[place] += 1

        return hook

    layers[len(layers) // 2].register_forward_hook(count(0))
    ensemble.aggregators[len(ensemble.sites) // 2].register_forward_hook(count(1))
    ensemble.acceleration = afa.Acceleration(interval=2)
    draw(ensemble, arguments)
    assert calls == [3, 3]


@pytest.mark.parametrize("family", ["unet", "flux"])
def test_weights_can_be_taken_over_too(family: str) -> None:
    ensemble, arguments = ensemble_of(family), arguments_of(family)
    calls = [0] * len(ensemble.sites)
    for place, rule in enumerate(ensemble.aggregators):

        def count(*_: Any, place: int = place) -> None:
            calls[place] += 1

        rule.register_forward_hook(count)
    ensemble.acceleration = afa.Acceleration(interval=2, keep_weights=True)
    with afa.record_weights(ensemble) as record:
        draw(ensemble, arguments)
    assert calls == [3] * len(ensemble.sites)
    last = ensemble.sites[-1].name
    weights = [step.weights[last] for step in record.steps]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_kept_weights_that_are_right_change_nothing() -> None:
    """The mean's weights are the same at every step."""
    experts = [tiny_unet(n) for n in range(2)]
    ensemble, arguments = afa.EnsembleDenoiser(experts), arguments_of("unet")
    ensemble.acceleration = afa.Acceleration(interval=2)
    expected = draw(ensemble, arguments)
    ensemble.acceleration = afa.Acceleration(interval=2, keep_weights=True)
    for a, b in zip(draw(ensemble, arguments), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("family", ["unet", "flux", "chroma", "dit"])
def test_the_prediction_itself_can_be_taken_over(family: str) -> None:
    ensemble, arguments = ensemble_of(family), arguments_of(family)
    exact = draw(ensemble, arguments)
    ensemble.acceleration = afa.Acceleration(interval=2, fresh=0)
    came = draw(ensemble, arguments)
    for number, prediction in enumerate(came):
        assert torch.equal(prediction, exact[number - number % 2])


@pytest.mark.parametrize("first", [1, 2, 3])
def test_the_first_steps_are_whole(first: int) -> None:
    ensemble, arguments = ensemble_of("unet"), arguments_of("unet")
    exact = draw(ensemble, arguments)
    ensemble.acceleration = afa.Acceleration(interval=2, first=first)
    same = [torch.equal(a, b) for a, b in zip(draw(ensemble, arguments), exact, strict=True)]
    assert (
        same
        == {
            1: [True, False, True, False, True],
            2: [True, True, False, True, False],
            3: [True, True, True, False, True],
        }[first]
    )


def test_the_change_is_measured_since_the_last_whole_step() -> None:
    ensemble, arguments = ensemble_of("unet"), arguments_of("unet")
    ensemble.acceleration = afa.Acceleration(interval=100, drift=0.15)
    whole: list[int] = []
    ensemble.aggregators[4].register_forward_hook(lambda *_: whole.append(now))
    latent = torch.randn_like(arguments["sample"])
    noise = torch.randn_like(latent)
    ensemble.experts[0].conv_in.bias.data.zero_()
    ensemble.experts[1].conv_in.bias.data.zero_()
    with torch.no_grad():
        for number in range(8):
            now: int = 900 - 100 * number
            moved = latent + 0.05 * number * noise
            ensemble(**{**arguments, "timestep": now, "sample": moved})
    assert whole[0] == 900
    gaps = [a - b for a, b in pairwise(whole)]
    assert gaps  # small changes add up
    assert min(gaps) > 100


@pytest.mark.parametrize("family", ["unet", "flux"])
def test_every_loop_begins_anew(family: str) -> None:
    ensemble, arguments = ensemble_of(family), arguments_of(family)
    ensemble.acceleration = afa.Acceleration(interval=4)
    first, again = draw(ensemble, arguments), draw(ensemble, arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    # another prompt, at a timestep that would go on with the loop before
    other = {**arguments, "encoder_hidden_states": arguments["encoder_hidden_states"] + 1}
    with torch.no_grad():
        came = ensemble(**at(other, 50), return_dict=False)[0]
        ensemble.acceleration = afa.Acceleration()
        assert torch.equal(came, ensemble(**at(other, 50), return_dict=False)[0])


def test_two_prompts_in_turns_are_two_loops() -> None:
    """As pipelines do that compute the halves of guidance one after the other."""
    ensemble = ensemble_of("flux")
    one, other = (arguments_of("flux") for _ in range(2))
    other["encoder_hidden_states"] = other["encoder_hidden_states"] + 1
    ensemble.acceleration = afa.Acceleration(interval=2)
    alone = [draw(ensemble, one), draw(ensemble, other)]
    with torch.no_grad():
        for number, step in enumerate(STEPS):
            for prompt, expected in zip((one, other), alone, strict=True):
                came = ensemble(**at(prompt, step), return_dict=False)[0]
                assert torch.equal(came, expected[number])


def test_gradients_and_mixed_timesteps_take_nothing_over() -> None:
    ensemble, arguments = ensemble_of("unet"), arguments_of("unet")
    ensemble.acceleration = afa.Acceleration(interval=4)
    exact = ensemble_of("unet")
    for step in STEPS:
        came = ensemble(**at(arguments, step)).sample
        assert torch.equal(came, exact(**at(arguments, step)).sample)
        came.mean().backward()
    with torch.no_grad():
        for number in range(3):
            several = {**arguments, "timestep": torch.tensor([900, 500]) - number}
            assert torch.equal(ensemble(**several).sample, exact(**several).sample)


def test_what_is_kept_goes_with_the_prompt() -> None:
    ensemble, arguments = ensemble_of("unet"), arguments_of("unet")
    ensemble.acceleration = afa.Acceleration(interval=2)
    draw(ensemble, arguments)
    assert len(list(ensemble.loops)) == 1
    del arguments
    gc.collect()
    assert not list(ensemble.loops)


def test_unused_features_take_no_memory() -> None:
    ensemble, arguments = ensemble_of("unet"), arguments_of("unet")
    ensemble.acceleration = afa.Acceleration(interval=2)
    draw(ensemble, arguments)
    (loop,) = ensemble.loops
    sizes = {
        site: features[0].untyped_storage().nbytes()
        for site, features in loop.kept.features.items()
    }
    names = [site.name for site in ensemble.sites]
    assert {site for site, size in sizes.items() if size > 8} == {names[0], names[-2]}
    assert set(sizes) == set(names[:-1])


@pytest.mark.parametrize("family", ["unet", "flux", "sd3"])
def test_controlnet_and_caching_go_together(family: str) -> None:
    ensemble, arguments = ensemble_of(family), arguments_of(family)
    if family == "unet":
        unet = ensemble.experts[0]
        down, mid = _residuals(unet, arguments)
        arguments |= {
            "down_block_additional_residuals": down,
            "mid_block_additional_residual": mid,
        }
    elif family == "flux":
        arguments["controlnet_block_samples"] = [torch.randn(2, 16, 16)]
        arguments["controlnet_single_block_samples"] = [torch.randn(2, 16, 16)]
    else:
        arguments["block_controlnet_hidden_states"] = [torch.randn(2, 16, 16)]
    exact = draw(ensemble, arguments)
    ensemble.acceleration = afa.Acceleration(interval=2)
    same = [torch.equal(a, b) for a, b in zip(draw(ensemble, arguments), exact, strict=True)]
    assert same == [True, False, True, False, True]


def _residuals(unet: Any, arguments: dict[str, Any]) -> tuple[list[Tensor], Tensor]:
    shapes: list[Any] = []
    hooks = []
    for module in (unet.conv_in, *unet.down_blocks, unet.mid_block):
        hooks.append(module.register_forward_hook(lambda *seen: shapes.append(_shapes(seen[-1]))))
    own = {**arguments, "encoder_hidden_states": arguments["encoder_hidden_states"][..., :16]}
    with torch.no_grad():
        unet(**own)
    for hook in hooks:
        hook.remove()
    conv_in, *down, mid = shapes
    listed = [conv_in, *(shape for block in down for shape in block)]
    return [0.1 * torch.randn(shape) for shape in listed], 0.1 * torch.randn(mid)


def _shapes(output: Any) -> Any:
    if isinstance(output, tuple):
        return [skip.shape for skip in output[1]]
    return output.shape


def test_recorded_weights_are_complete() -> None:
    ensemble, arguments = ensemble_of("unet"), arguments_of("unet")
    for acceleration in (afa.Acceleration(interval=2), afa.Acceleration(interval=2, fresh=0)):
        ensemble.acceleration = acceleration
        with afa.record_weights(ensemble) as record:
            draw(ensemble, arguments)
        assert record.mean_share().shape == (len(STEPS), len(ensemble.sites), 2)
        whole, taken = record.steps[0].weights, record.steps[1].weights
        assert torch.equal(whole["mid"], taken["mid"])


def test_sites_without_fusion_are_taken_over_for_each_expert() -> None:
    experts = [tiny_unet(n) for n in range(2)]
    sites = discover_sites(experts[0])
    ensemble = afa.EnsembleDenoiser(experts, [Separate() for _ in sites])
    alone = afa.EnsembleDenoiser(experts[:1], [Separate() for _ in sites])
    arguments = arguments_of("unet")
    own = {**arguments, "encoder_hidden_states": arguments["encoder_hidden_states"][..., :16]}
    ensemble.acceleration = alone.acceleration = afa.Acceleration(interval=2)
    for a, b in zip(draw(ensemble, arguments), draw(alone, own), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def shortcut_of(
    loop: Loop,
    settings: afa.Acceleration,
    latent: Tensor,
    agree: Callable[[bool], bool] = bool,
) -> Shortcut:
    names = ("conv_in", "down.0.0", "mid", "up.0.0", "conv_out")
    sites = [Site(name, 1, 1, 1) for name in names]
    return Shortcut(settings, sites, False, loop, latent, agree)


def test_loops_are_told_by_prompt_and_timestep() -> None:
    loops, prompt, latent = Loops(), torch.zeros(1), torch.randn(2, 4, 8, 8)
    steps = torch.tensor([900, 900])
    loop = loops.of(prompt, steps, latent)
    assert loops.of(prompt, steps - 1, latent) is loop
    assert (loop.num_calls, loop.timestep) == (2, 899)
    again = loops.of(prompt, steps - 1, latent)  # the same step again: another picture
    assert again is not loop
    assert loops.of(torch.zeros(1), steps - 2, latent) is not again
    mixed = loops.of(prompt, torch.tensor([3, 4]), latent)
    assert loops.of(prompt, torch.tensor([1, 1]), latent) is not mixed


def test_a_latent_that_cannot_have_come_from_the_last_begins_a_loop() -> None:
    """The caller holds the prompt of a picture that was left early, and begins another one."""
    loops, prompt, latent = Loops(), torch.zeros(1), torch.randn(2, 4, 8, 8)
    steps = torch.tensor([900, 900])
    loop = loops.of(prompt, steps, latent)
    latent.mul_(0.7)  # in place: the loop has a copy
    assert loops.of(prompt, steps - 1, latent) is loop
    wider, other = torch.randn(2, 4, 8, 16), torch.randn(2, 4, 8, 8)
    for number, given in enumerate((other, wider, latent.half(), latent), start=2):
        another = loops.of(prompt, steps - number, given)
        assert another is not loop
        loop = another
    assert loops.of(prompt, steps - 9, 0.5 * latent) is loop


def test_what_other_experts_have_made_is_not_reused() -> None:
    loop = Loop(900, torch.zeros(1), kept=Kept(torch.zeros(1)))
    loop.runs(Running([0, 1]))
    loop.runs(Running([0, 1]))
    assert loop.kept
    loop.runs(Running([0, 1], {"mid": [0]}))
    assert not loop.kept


def test_processes_that_disagree_compute_the_step() -> None:
    """One that sees a large change computes it; the others would wait for its features."""
    loop = Loop(900, torch.zeros(1), num_calls=2)
    loop.kept = Kept(torch.ones(1))
    settings, seen = afa.Acceleration(interval=9, drift=0.5), []

    def agree(decision: bool) -> bool:
        seen.append(decision)
        return True

    shortcut = shortcut_of(loop, settings, torch.ones(1), agree)
    assert seen == [False]
    assert not shortcut.skipped


def test_a_transformer_with_skipped_layers_takes_nothing_over() -> None:
    """Skip-layer guidance is another model at the same steps."""
    ensemble = ensemble_of("sd3")
    arguments = {**arguments_of("sd3"), "skip_layers": [1]}
    exact = draw(ensemble, arguments)
    ensemble.acceleration = afa.Acceleration(interval=4)
    assert all(torch.equal(a, b) for a, b in zip(draw(ensemble, arguments), exact, strict=True))


def whole_calls(settings: afa.Acceleration, latents: Iterable[Tensor]) -> list[int]:
    """Which of these latents are computed as a whole."""
    loop, found = Loop(1000, torch.zeros(1)), []
    for number, latent in enumerate(latents):
        loop.num_calls, loop.timestep = number + 1, 1000 - number
        shortcut = shortcut_of(loop, settings, latent)
        if not shortcut.skipped:
            found.append(number)
        shortcut.keep(latent)
    return found


@pytest.mark.parametrize("num_steps", [10, 20, 80])
def test_as_many_steps_are_whole_however_many_there_are(num_steps: int) -> None:
    image, noise = torch.randn(2, 2, 4, 8, 8)
    angles = torch.linspace(math.pi / 2, 0, num_steps + 1)[:-1].tolist()
    latents = [math.cos(a) * image + math.sin(a) * noise for a in angles]
    settings = afa.Acceleration(interval=1000, drift=0.3)
    whole = whole_calls(settings, latents)
    assert 5 <= len(whole) <= 7  # half a turn's half by 0.3 each
    assert len(whole_calls(afa.Acceleration(interval=3), latents)) == math.ceil(num_steps / 3)
    assert whole_calls(afa.Acceleration(interval=2, drift=9.0), latents) == [
        *range(0, num_steps, 2)
    ]
    large = [latent.half().repeat(1, 1, 32, 32) for latent in latents]  # sums beyond float16
    assert whole_calls(settings, large) == whole
    # a mask and a masked picture beside the latent, as inpainting models have, change nothing
    beside = torch.randn(2, 5, 8, 8)
    assert whole_calls(settings, [torch.cat([latent, beside], 1) for latent in latents]) == whole


def test_a_latent_that_is_changed_in_place_has_changed() -> None:
    latent = torch.randn(1, 4, 8, 8)
    growing = (latent.mul_(2) for _ in range(4))
    assert whole_calls(afa.Acceleration(interval=9, drift=0.5), growing) == [0, 1, 2, 3]
