"""The features that are tried with each other: how each is switched on, and what it means.

A feature may prepare the models before any ensemble is made of them, switch something on, change
the calls that are made, and say what all that means in the terms of `tests.pairs.reference`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

import afa
from afa.aggregators import Mean
from afa.denoisers.objective import Objective, objective_of
from afa.ensemble.caching.plan import PruningPlan, StepRange, fused_sites
from afa.ensemble.conversion import Conversion, Objectives
from afa.ensemble.denoiser import EnsembleDenoiser
from afa.ensemble.regions import Regions
from afa.ensemble.steering import Bias, site_biases
from tests.ensemble.caching.test_graphs import Replays
from tests.pairs.reference import Call, Meaning
from tests.pairs.world import NUM_EXPERTS, World, made
from tests.tiny import TEXT_WIDTH
from tests.tiny_transformers import TEXT_LENGTH

#: other experts run from the second step on, at which nothing else would end a cache's reuse
SWITCH = 0.8
BIAS: Bias = {"0": 1.0, "1": {"up": -0.5}}


def _nothing(*_: Any) -> None:
    pass


def _same(_: World, calls: list[Call]) -> list[Call]:
    return calls


@dataclass(frozen=True)
class Feature:
    """One feature.

    Attributes:
        name: as the table has it.
        prepare: the models, before anything else.
        switch_on: in an ensemble.
        around: what all calls are made within.
        calls: what becomes of the calls.
        means: what it does to the meaning.
        in_threads: whether two threads draw pictures of their own at the same time.
    """

    name: str
    prepare: Callable[[World], None] = _nothing
    switch_on: Callable[[EnsembleDenoiser, World], None] = _nothing
    around: Callable[[EnsembleDenoiser], AbstractContextManager[Any]] = lambda _: nullcontext()
    calls: Callable[[World, list[Call]], list[Call]] = _same
    means: Callable[[Meaning, World], None] = _nothing
    in_threads: bool = False

    @property
    def is_switched(self) -> bool:
        """Whether it matters what is switched on before it."""
        return self.switch_on is not _nothing

    @property
    def has_meaning(self) -> bool:
        """Whether anything else is computed than without it."""
        defaults = (_nothing, _same, _nothing)
        return (self.prepare, self.calls, self.means) != defaults

    @property
    def is_prepared(self) -> bool:
        """Whether the experts are others than without it."""
        return self.prepare is not _nothing

    @property
    def is_lora(self) -> bool:
        """Whether a LoRA is loaded."""
        return self.name.startswith("LoRA")

    @property
    def is_of_weights(self) -> bool:
        """Whether it changes the experts' weights, so that its order among such matters."""
        return self.is_lora or self.name.startswith("bfloat16")


# -- which experts run ------------------------------------------------------------------------


def _schedule(world: World) -> Callable[[float], list[int]]:
    return lambda timestep: [0, 1] if timestep > SWITCH * world.highest else [2, 1]


def _plan_on(ensemble: EnsembleDenoiser, world: World) -> None:
    early, late = _planned(world)
    ensemble.plan = PruningPlan(
        num_experts=NUM_EXPERTS,
        sites=fused_sites(ensemble),
        keep=0.9,
        ranges=[
            StepRange(above=SWITCH * world.highest, experts=early),
            StepRange(above=None, experts=late),
        ],
    )


def _planned(world: World) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    middle = [site.name for site in world.sites if site.block == world.middle]
    early = {name: [0, 1] for name in middle} | {world.last: [0]}
    return early, {world.last: [1, 2]}


def _plan_means(meaning: Meaning, world: World) -> None:
    early, late = _planned(world)
    meaning.plan = lambda timestep: early if timestep > SWITCH * world.highest else late


def _schedule_on(ensemble: EnsembleDenoiser, world: World) -> None:
    ensemble.schedule = _schedule(world)


def _schedule_means(meaning: Meaning, world: World) -> None:
    meaning.schedule = _schedule(world)


# -- what the experts predict -----------------------------------------------------------------

_SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
OBJECTIVES: list[tuple[str, dict[str, Any]]] = [
    ("epsilon", _SCHEDULE),
    ("v_prediction", {**_SCHEDULE, "rescale_betas_zero_snr": True}),
    ("flow_prediction", {}),
]


def _objective(kind: str, settings: dict[str, Any]) -> Objective:
    if kind == "flow_prediction":
        found = objective_of(FlowMatchEulerDiscreteScheduler())
    else:
        found = objective_of(DDPMScheduler(**settings, prediction_type=kind))
    assert found is not None, "it is known"
    return found


def _objectives_on(ensemble: EnsembleDenoiser, _: World) -> None:
    objectives = Objectives.of([_objective(*each) for each in OBJECTIVES])
    assert objectives is not None, "they differ"
    ensemble.conversion = Conversion(ensemble.family, ensemble.sites[-1], objectives)


def _objectives_means(meaning: Meaning, _: World) -> None:
    meaning.objectives = OBJECTIVES


# -- what is reused ---------------------------------------------------------------------------


def _cache_on(ensemble: EnsembleDenoiser, _: World) -> None:
    ensemble.acceleration = replace(ensemble.acceleration, interval=2)


def _cache_means(meaning: Meaning, _: World) -> None:
    meaning.interval = 2


def _kept_on(ensemble: EnsembleDenoiser, _: World) -> None:
    interval = 3 if ensemble.acceleration.is_exact else ensemble.acceleration.interval
    ensemble.acceleration = afa.Acceleration(interval=interval, drift=0.7, keep_weights=True)


def _kept_means(meaning: Meaning, _: World) -> None:
    meaning.interval = 3 if meaning.interval == 1 else meaning.interval
    meaning.drift, meaning.keep_weights = 0.7, True


def _graphs_on(ensemble: EnsembleDenoiser, _: World) -> None:
    ensemble.graphs = Replays()


# -- LoRAs ------------------------------------------------------------------------------------


@cache
def _lora(name: str, seed: int) -> dict[str, Tensor]:
    """A LoRA in PEFT's names, made on a model of its own."""
    model = copy.deepcopy(made(name).experts[0])
    torch.manual_seed(seed)
    targets = ["to_k", "proj_in" if name == "unet" else "proj_out"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    return {f"unet.{key}": value for key, value in get_peft_model_state_dict(model).items()}


def _load(model: Any, world: World, name: str, seed: int) -> None:
    known = getattr(getattr(model, "experts", [model])[0], "peft_config", {})
    while name in known:  # a feature with itself
        name += " again"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        # to load a LoRA after one was fused takes that one out again, in a single model as well
        warnings.filterwarnings("ignore", "Adapter cannot be set when the model is merged")
        model.load_lora_adapter(dict(_lora(world.name, seed)), adapter_name=name, prefix="unet")


def _lora_loaded(ensemble: EnsembleDenoiser, world: World) -> None:
    _load(ensemble, world, "loaded", 1)


def _lora_fused(ensemble: EnsembleDenoiser, world: World) -> None:
    _load(ensemble, world, "fused", 2)
    ensemble.fuse_lora()


def _lora_scaled(ensemble: EnsembleDenoiser, world: World) -> None:
    _load(ensemble, world, "scaled", 3)


def _with_scale(world: World, calls: list[Call]) -> list[Call]:
    name = world.family.attention_kwargs
    return [Call(c.picture, c.timestep, {**c.arguments, name: {"scale": 0.25}}) for c in calls]


def _loaded_means(meaning: Meaning, world: World) -> None:
    for expert in meaning.experts:
        _load(expert, world, "loaded", 1)


def _fused_means(meaning: Meaning, world: World) -> None:
    for expert in meaning.experts:
        _load(expert, world, "fused", 2)
        expert.fuse_lora()


def _scaled_means(meaning: Meaning, world: World) -> None:
    for expert in meaning.experts:
        _load(expert, world, "scaled", 3)
    meaning.lora_scale = 0.25


# -- weights ----------------------------------------------------------------------------------


def _half(ensemble: EnsembleDenoiser, _: World) -> None:
    ensemble.to(torch.bfloat16)


def _half_calls(_: World, calls: list[Call]) -> list[Call]:
    cast: dict[int, Tensor] = {}  # one object for all steps of a prompt, as pipelines have it

    def halved(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if id(value) not in cast:
            cast[id(value)] = value.bfloat16()
        return cast[id(value)]

    def arguments(call: Call) -> dict[str, Any]:
        given = {key: halved(value) for key, value in call.arguments.items()}
        return {**given, "timestep": call.arguments["timestep"]}

    return [Call(call.picture, call.timestep, arguments(call)) for call in calls]


def _half_means(meaning: Meaning, _: World) -> None:
    meaning.experts = [expert.to(torch.bfloat16) for expert in meaning.experts]
    meaning.dtype = torch.bfloat16


def _averages(parameters: list[nn.Parameter]) -> EMAModel:
    """A moving average whose values are others than the parameters'."""
    average = EMAModel(parameters, decay=0.9)
    generator = torch.Generator().manual_seed(5)
    for shadow in average.shadow_params:
        shadow.mul_(0.7).add_(0.1 * torch.randn(shadow.shape, generator=generator))
    return average


def _ema_on(ensemble: EnsembleDenoiser, world: World) -> None:
    """Draw once, so that whatever copies the weights has done so, and average them after."""
    (first,) = world.picture(50, world.prompt(0), steps=(950,))
    dtype = ensemble.dtype
    calls = _half_calls(world, [first]) if dtype == torch.bfloat16 else [first]
    before, ensemble.on_nonfinite = ensemble.on_nonfinite, "mask"
    with torch.no_grad():
        ensemble(**calls[0].arguments)
    ensemble.on_nonfinite = before
    ensemble.masked.clear()
    parameters = list(ensemble.aggregators.parameters())
    _averages(parameters).copy_to(parameters)


def _ema_means(meaning: Meaning, _: World) -> None:
    parameters = [p for rule in meaning.rules.values() for p in rule.parameters()]
    _averages(parameters).copy_to(parameters)


def _guard_on(ensemble: EnsembleDenoiser, _: World) -> None:
    ensemble.on_nonfinite = "mask"


def _guard_means(meaning: Meaning, _: World) -> None:
    meaning.masks = True


def _text_spoiled(value: float) -> Callable[[World, list[Call]], list[Call]]:
    """All calls with a prompt of which one expert's part has a value that is not finite."""

    def calls_of(_: World, calls: list[Call]) -> list[Call]:
        prompt = _prompt_of(calls).clone()
        prompt[:, 0, TEXT_WIDTH] = value
        given = {"encoder_hidden_states": prompt}
        return [Call(c.picture, c.timestep, c.arguments | given) for c in calls]

    return calls_of


def _bias_on(ensemble: EnsembleDenoiser, _: World) -> None:
    afa.steer(ensemble, BIAS)


def _bias_means(meaning: Meaning, world: World) -> None:
    meaning.bias = site_biases(world.ensemble, BIAS)


def _regions() -> Tensor:
    return torch.randn((2, NUM_EXPERTS, 3, 5), generator=torch.Generator().manual_seed(11))


def _regions_on(ensemble: EnsembleDenoiser, _: World) -> None:
    before = ensemble.regions  # both features set it
    ensemble.regions = Regions(_regions(), () if before is None else before.replaced)


def _regions_means(meaning: Meaning, _: World) -> None:
    meaning.regions = _regions()


def _drafts_on(ensemble: EnsembleDenoiser, _: World) -> None:
    """What drafts change is the bias by region, which is a feature of its own."""
    ensemble.drafter = SimpleNamespace(is_drawing=True)


def _replaced_on(ensemble: EnsembleDenoiser, world: World) -> None:
    ensemble.regions = Regions(_regions(), [site.name for site in world.sites])


def _replaced_means(meaning: Meaning, world: World) -> None:
    meaning.regions = _regions()
    meaning.rules = {site.name: Mean() for site in world.sites}


# -- pictures ---------------------------------------------------------------------------------


def _prompt_of(calls: list[Call]) -> Tensor:
    return calls[-1].arguments["encoder_hidden_states"]


def _is_odd(world: World, calls: list[Call]) -> int:
    latent = calls[0].latent
    return int(latent.shape[1] != 16 if world.name == "flux" else latent.shape[-1] % 2)


def _odd(world: World, calls: list[Call]) -> list[Call]:
    """Every picture of an odd size; all calls are made anew, before anything else changes them."""
    odd = 2 if world.name == "flux" else 1
    return world.picture(calls[0].picture, _prompt_of(calls), odd=odd)


def _longer(world: World, calls: list[Call]) -> list[Call]:
    """With a prompt of two chunks of tokens; all calls are made anew, after their size is known."""
    odd = (2 if world.name == "flux" else 1) * _is_odd(world, calls)
    return world.picture(calls[0].picture, world.prompt(20, 2 * TEXT_LENGTH), odd=odd)


def _another_size(world: World, calls: list[Call]) -> list[Call]:
    """With the same prompt, from a lower timestep on."""
    return [*calls, *world.picture(1, _prompt_of(calls), (250, 150), size=12)]


def _another_prompt(world: World, calls: list[Call]) -> list[Call]:
    odd = (2 if world.name == "flux" else 1) * _is_odd(world, calls)
    return [*calls, *world.picture(2, world.prompt(9), (240, 140), odd=odd)]


def _left_early(world: World, calls: list[Call]) -> list[Call]:
    """One step of a picture, with the prompt of the one that is drawn whole afterwards."""
    odd = (2 if world.name == "flux" else 1) * _is_odd(world, calls)
    return [*world.picture(3, _prompt_of(calls), (990,), odd=odd), *calls]


FEATURES = (
    Feature("pruning plan", switch_on=_plan_on, means=_plan_means),
    Feature("schedule", switch_on=_schedule_on, means=_schedule_means),
    Feature("mixed predictions", switch_on=_objectives_on, means=_objectives_means),
    Feature("several devices", switch_on=lambda e, _: e.place_experts(["cpu"] * NUM_EXPERTS)),
    Feature("offloading", switch_on=lambda e, _: e.offload_experts("cpu")),
    Feature("streaming", switch_on=lambda e, _: e.stream_experts()),
    Feature("feature cache", switch_on=_cache_on, means=_cache_means),
    Feature("kept weights", switch_on=_kept_on, means=_kept_means),
    Feature("CUDA graphs", switch_on=_graphs_on),
    Feature("non-finite guard", prepare=World.spoil, switch_on=_guard_on, means=_guard_means),
    Feature("LoRA loaded", switch_on=_lora_loaded, means=_loaded_means),
    Feature("LoRA fused", switch_on=_lora_fused, means=_fused_means),
    Feature("LoRA scaled", switch_on=_lora_scaled, calls=_with_scale, means=_scaled_means),
    Feature("bfloat16 experts", switch_on=_half, calls=_half_calls, means=_half_means),
    Feature("EMA copied in", switch_on=_ema_on, means=_ema_means),
    Feature("steering bias", switch_on=_bias_on, means=_bias_means),
    Feature("bias by region", switch_on=_regions_on, means=_regions_means),
    Feature("drafts", switch_on=_drafts_on),
    Feature("weights by region", switch_on=_replaced_on, means=_replaced_means),
    Feature("recorder", around=afa.record_weights),
    Feature("odd sizes", calls=_odd),
    Feature("a longer prompt", calls=_longer),
    Feature("another picture size", calls=_another_size),
    Feature("another prompt object", calls=_another_prompt),
    Feature("a loop left early", calls=_left_early),
    Feature("two threads", in_threads=True),
)
SITES = ("first", "middle", "last")
#: the guard, by where the values that are not finite come from
GUARDS = (
    *(
        Feature(
            f"{value} at the {place} site",
            prepare=partial(World.spoil, place=place, value=float(value)),
            switch_on=_guard_on,
            means=_guard_means,
        )
        for place in SITES
        for value in ("nan", "inf")
    ),
    *(
        Feature(
            f"{value} from the text encoder",
            switch_on=_guard_on,
            calls=_text_spoiled(float(value)),
            means=_guard_means,
        )
        for value in ("nan", "inf")
    ),
)
SPREAD = Feature("spread over processes", switch_on=lambda e, _: e.spread_experts())
NAMES = ("spread over processes", *(feature.name for feature in FEATURES))


def feature_of(name: str) -> Feature:
    """A feature by its name in the table."""
    return next(feature for feature in (SPREAD, *FEATURES, *GUARDS) if feature.name == name)
