"""What an ensemble must compute, written down plainly: every expert, every site, every step.

Nothing is skipped, moved, kept or lowered here but what a feature *means* is: where features of an
earlier step are to be reused, all is computed and then replaced. Of the package only the families'
coroutines and the fusion rules are used, which have tests of their own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from afa.aggregators import Condition, Fused, weighted_sum
from afa.denoisers import Family, Site
from afa.denoisers.tokens import TEXT

Weights = dict[str, Tensor]


@dataclass
class Call:
    """One call of the denoiser: which picture it belongs to, and its arguments by name."""

    picture: int
    timestep: float
    arguments: dict[str, Any]

    @property
    def latent(self) -> Tensor:
        return next(iter(self.arguments.values()))


@dataclass
class Meaning:
    """What the features that are switched on mean for what is computed."""

    family: Family
    sites: Sequence[Site]
    experts: list[Any]
    rules: dict[str, Any]
    widths: Any
    dtype: torch.dtype = torch.float32
    schedule: Callable[[float], Sequence[int]] | None = None
    plan: Callable[[float], Mapping[str, Sequence[int]]] | None = None
    bias: Mapping[str, Tensor] = field(default_factory=dict)
    regions: Tensor | None = None
    masks: bool = False
    interval: int = 1
    drift: float | None = None
    keep_weights: bool = False
    lora_scale: float | None = None
    #: by expert, what it predicts and its noise schedule; the first is the ensemble's
    objectives: Sequence[tuple[str, dict[str, Any]]] | None = None


@dataclass
class _Picture:
    """What is known of a picture's earlier steps."""

    since_whole: int = 0
    whole: tuple[Tensor, Weights, Weights] | None = None  # latent, features, weights
    running: Any = None
    is_guarded: bool = False


@dataclass
class Expected:
    """What a call gives: the prediction, and the fusion weights at the sites that it computes."""

    prediction: Tensor
    weights: Weights


@torch.no_grad()
def expected_of(meaning: Meaning, calls: Sequence[Call]) -> list[Expected]:
    """What the calls give, in their order."""
    pictures: dict[int, _Picture] = {}
    if meaning.dtype != torch.float32:
        rules = meaning.rules.items()
        meaning = copy.copy(meaning)
        meaning.rules = {site: copy.deepcopy(rule).to(meaning.dtype) for site, rule in rules}
    return [_step(meaning, pictures.setdefault(c.picture, _Picture()), c) for c in calls]


def _step(meaning: Meaning, picture: _Picture, call: Call) -> Expected:
    every = range(len(meaning.experts))
    active = sorted(meaning.schedule(call.timestep)) if meaning.schedule else list(every)
    planned = meaning.plan(call.timestep) if meaning.plan else {}
    if picture.running not in (None, (active, planned)):
        picture.whole = None
    picture.running = active, planned
    if not picture.is_guarded:
        is_whole = picture.whole is None or _is_due(meaning, picture, call)
        reused = None if is_whole else picture.whole
        prediction, features, weights = _run(meaning, call, active, planned, reused)
        picture.since_whole = 0 if is_whole else picture.since_whole + 1
        if is_whole and meaning.interval > 1:
            picture.whole = call.latent.clone(), features, weights
        if prediction.isfinite().all():
            return Expected(prediction, weights)
        picture.is_guarded = True
    assert meaning.masks, "nothing else is expected to be finite"
    prediction, _, weights = _run(meaning, call, active, planned, None, masks=True)
    return Expected(prediction, weights)


def _is_due(meaning: Meaning, picture: _Picture, call: Call) -> bool:
    if picture.since_whole + 1 >= meaning.interval:
        return True
    if meaning.drift is None:
        return False
    assert picture.whole is not None, "it is asked of those that have one"
    now, then = call.latent.float(), picture.whole[0].float()
    return bool((now - then).abs().sum() / then.abs().sum() > meaning.drift)


def _run(
    meaning: Meaning,
    call: Call,
    active: Sequence[int],
    planned: Mapping[str, Sequence[int]],
    reused: tuple[Tensor, Weights, Weights] | None,
    *,
    masks: bool = False,
) -> tuple[Tensor, Weights, Weights]:
    arguments = dict(call.arguments)
    arguments.pop(meaning.family.attention_kwargs, None)
    per_expert = meaning.family.split(
        meaning.experts[0], arguments, meaning.widths, len(meaning.experts)
    )
    if meaning.objectives is not None:
        per_expert = [
            own | _seen(meaning.objectives, n, own, call.timestep)
            for n, own in enumerate(per_expert)
        ]
    texts = {n: per_expert[n]["encoder_hidden_states"] for n in active}
    heard = [n for n in active if not masks or texts[n].isfinite().all()]
    runs = {n: meaning.family.blocks(meaning.experts[n], **per_expert[n]) for n in active}
    yielded = {n: next(run) for n, run in runs.items()}
    steps = torch.as_tensor(arguments["timestep"]).expand(len(call.latent))
    features: Weights = {}
    weights: Weights = {}
    condition: Condition | None = None
    entries, exits = _ends(meaning.sites)
    inner = {site.name for site in _middle(meaning.sites)}
    while True:
        site = next(iter(yielded.values())).site
        hidden = {n: feature.hidden for n, feature in yielded.items()}
        if meaning.objectives is not None and site == meaning.sites[-1].name:
            hidden = {
                n: _converted(meaning.objectives, n, each, per_expert[n]["sample"], call.timestep)
                for n, each in hidden.items()
            }
        sound = [n for n in heard if not masks or hidden[n].isfinite().all()]
        if condition is None:
            temb = _mean([yielded[n].temb for n in sound])
            condition = Condition(
                steps, temb, _mean([texts[n] for n in heard]), call.latent, num_experts=3
            )
        chosen = [n for n in planned.get(site, active) if n in sound]
        kept = reused[2][site] if reused and meaning.keep_weights and site not in inner else None
        fused = _fused(meaning, site, {n: hidden[n] for n in chosen}, condition, kept)
        out = fused.feature
        assert isinstance(out, Tensor), "these rules give one for all"
        stream = "text" if site.endswith(TEXT) else "image"
        if reused is not None and exits.get(stream) == site:
            then, entry = reused[1], entries.get(stream)
            out = then[site]
            if meaning.family.is_residual and entry is not None:
                out = features[entry] + (then[site] - then[entry])
        features[site] = out
        if fused.weights is not None and not (reused and site in inner):
            weights[site] = fused.weights
        try:
            yielded = {n: run.send(out) for n, run in runs.items()}
        except StopIteration as stop:
            return stop.value, features, weights


def _fused(
    meaning: Meaning,
    site: str,
    hidden: Mapping[int, Tensor],
    condition: Condition,
    kept: Tensor | None,
) -> Fused:
    if kept is not None:
        return Fused(weighted_sum(list(hidden.values()), kept[:, list(hidden)]), kept)
    rule = meaning.rules[site]
    condition = condition._replace(bias=_bias(meaning, site))
    if len(hidden) == len(meaning.experts):
        return rule(list(hidden.values()), condition)
    return rule.fuse_some(dict(hidden), condition)


def _bias(meaning: Meaning, site: str) -> Tensor | None:
    """Both biases at a site; a text has the mean weights of the regions."""
    own, regions = meaning.bias.get(site), meaning.regions
    if regions is None:
        return own
    if site.endswith(TEXT):
        regions = regions.softmax(1).mean((2, 3), keepdim=True).log()
    return regions if own is None else regions + own[:, None, None]


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total if len(tensors) == 1 else total / len(tensors)


# -- experts with different objectives ------------------------------------------------------------

_Objectives = Sequence[tuple[str, dict[str, Any]]]


def _angles(settings: dict[str, Any]) -> list[float]:
    """The angle between picture and noise at each timestep; one that is missing is 90 degrees."""
    products = DDPMScheduler(**settings).alphas_cumprod
    return [math.acos(math.sqrt(float(product))) for product in products]


def _place(objectives: _Objectives, expert: int, timestep: float) -> tuple[float, float]:
    """The timestep and the angle at which an expert is as noisy as the ensemble's timestep."""
    table = _angles(objectives[0][1])
    low = min(int(timestep), 998)
    wanted = table[low] + (timestep - low) * (table[low + 1] - table[low])
    kind, settings = objectives[expert]
    if kind == "flow_prediction":
        share = math.tan(wanted) / (1 + math.tan(wanted))
        return 1000 * share, wanted
    own = _angles(settings)
    if own == table:
        return timestep, wanted
    above = next((t for t, angle in enumerate(own) if angle >= wanted), 999)
    step = (wanted - own[above - 1]) / (own[above] - own[above - 1])
    return above - 1 + min(step, 1.0), min(wanted, own[-1])


def _seen(
    objectives: _Objectives, expert: int, own: dict[str, Any], timestep: float
) -> dict[str, Any]:
    """What an expert is called with instead."""
    if objectives[expert] == objectives[0]:
        return {}
    steps, angle = _place(objectives, expert, timestep)
    sample = own["sample"]
    if objectives[expert][0] == "flow_prediction":
        share = math.tan(angle) / (1 + math.tan(angle))
        sample = (sample.float() * math.hypot(share, 1 - share)).to(sample.dtype)
    return {"sample": sample, "timestep": torch.full((len(sample),), steps)}


def _converted(
    objectives: _Objectives, expert: int, prediction: Tensor, seen: Tensor, timestep: float
) -> Tensor:
    """The noise in the picture according to an expert."""
    kind, _ = objectives[expert]
    if kind == "epsilon":
        return prediction
    _, angle = _place(objectives, expert, timestep)
    own, latent = prediction.double(), seen.double()
    if kind == "v_prediction":
        noise = math.sin(angle) * latent + math.cos(angle) * own
    else:
        share = math.tan(angle) / (1 + math.tan(angle))
        noise = latent + (1 - share) * own
    return noise.to(prediction.dtype)


def _middle(sites: Sequence[Site]) -> list[Site]:
    """The sites that are reused: all blocks but the first and the last."""
    blocks = [site.name for site in sites if site.stream == "image"]
    return [site for site in sites if site.block in blocks[1:-1]]


def _ends(sites: Sequence[Site]) -> tuple[dict[str, str], dict[str, str]]:
    """By stream, the last site before those that are reused, and the last of them."""
    middle = _middle(sites)
    if not middle:
        return {}, {}
    before = sites[: list(sites).index(middle[0])]
    return {s.stream: s.name for s in before}, {s.stream: s.name for s in middle}
