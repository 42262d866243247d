"""One pair of features on one family: equal to what they mean, or refused where switched on."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from diffusers.utils.peft_utils import scale_lora_layers
from torch import Tensor

from afa.ensemble.denoiser import EnsembleDenoiser
from afa.ensemble.recording import WeightRecord
from afa.errors import AfaError
from tests.pairs.copies import Template
from tests.pairs.features import SPREAD, Feature, feature_of
from tests.pairs.reference import Call, Expected, expected_of
from tests.pairs.world import World

gc.freeze()  # what was imported is not looked through at every collection
#: where the sums of products are taken in another order, as by a LoRA that is merged
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
#: `ordered`: equal where one is switched on first, refused where the other is
Kind = Literal["equal", "close", "ordered", "refused"]
#: by family, features in their order, the picture's number, and its prompt's seed
Reference = Callable[[str, tuple[str, ...], int, int], list[Expected]]


@dataclass(frozen=True)
class Outcome:
    """What came of a pair, and the words of a refusal."""

    kind: Kind
    message: str = ""


class Wrong(AssertionError):
    """A pair that is neither equal nor refused."""


def outcome_of(family: str, names: tuple[str, str], expected: Reference | None = None) -> Outcome:
    """Switch two features on, in this order, and see what is drawn.

    Args:
        family: of the experts.
        names: of the features.
        expected: gives what is to be drawn; None computes it.

    Raises:
        Wrong: what is drawn is something else than the features mean.
    """
    features = [feature_of(name) for name in names]
    world, waiting = World(family), list(features)
    try:
        if features[0].is_lora:
            world = World(family, _with_lora(family, waiting.pop(0).name).copy())
        for feature in dict.fromkeys(features):
            feature.prepare(world)
        ensemble = world.ensemble
        for feature in waiting:
            feature.switch_on(ensemble, world)
    except AfaError as refused:
        return Outcome("refused", str(refused))
    pictures = [(0, 0)]  # number, and the prompt's seed
    if any(feature.in_threads for feature in features):
        # two pictures of one prompt are the harder case; alone, the threads have one each
        pictures.append((10, 10 if len(set(names)) == 1 else 0))
    prompts = {seed: world.prompt(seed) for _, seed in pictures}
    programs = [_program(world, features, number, prompts[seed]) for number, seed in pictures]
    came: list[Any] = [None] * len(programs)

    def draw(number: int) -> None:
        try:
            came[number] = _drawn(ensemble, features, programs[number])
        except Exception as error:
            came[number] = error

    if len(programs) == 1:
        draw(0)
    else:
        _in_threads(draw, names, ensemble, programs)
    for failed in came:
        if isinstance(failed, AfaError) and "second thread" in str(failed):
            return Outcome("refused", str(failed))
        if isinstance(failed, Exception):
            raise Wrong(f"{names}: {type(failed).__name__}: {failed}") from failed
    right = expected or expected_pictures
    kinds = [
        _compared(names, right(family, _key(features), *which), predictions, record)
        for which, (predictions, record) in zip(pictures, came, strict=True)
    ]
    return Outcome("close" if "close" in kinds else "equal")


def _in_threads(
    draw: Callable[[int], None],
    names: tuple[str, str],
    ensemble: EnsembleDenoiser,
    programs: list[list[Call]],
) -> None:
    """Draw each picture in a thread of its own, and let the threads meet within every call.

    Raises:
        Wrong: they were not in the same call of the ensemble at the same time.
    """
    met: list[int] = []
    barrier = threading.Barrier(len(programs), action=lambda: met.append(1), timeout=60)

    def meet(*_: Any) -> None:
        # a thread that was refused does not come; what became of it is looked at by the caller
        with suppress(threading.BrokenBarrierError):
            barrier.wait()

    def run(number: int) -> None:
        draw(number)
        barrier.abort()

    if SPREAD.name not in names:  # where the second thread is refused, whichever comes first
        ensemble.register_forward_pre_hook(meet)
    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(programs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if SPREAD.name not in names and len(met) != len(programs[0]):
        raise Wrong(f"{names}: the threads met in {len(met)} of {len(programs[0])} calls")


def _key(features: list[Feature]) -> tuple[str, ...]:
    """The features that change what is computed; in their order where weights are changed."""
    names = [feature.name for feature in features if feature.has_meaning]
    is_ordered = sum(feature.is_of_weights for feature in features) > 1
    return tuple(names if is_ordered else sorted(names))


def _program(world: World, features: list[Feature], number: int, prompt: Tensor) -> list[Call]:
    """All calls; sizes are decided before further pictures are drawn, types at the end."""
    calls = world.picture(number, prompt)
    order = ["odd sizes", "a longer prompt", "another picture size", "another prompt object"]
    order.append("a loop left early")
    rank = {name: place for place, name in enumerate(order)}
    distinct = dict.fromkeys(features)
    for feature in sorted(distinct, key=lambda f: rank.get(f.name, len(rank))):
        calls = feature.calls(world, calls)
    return calls


def _drawn(
    ensemble: EnsembleDenoiser, features: list[Feature], calls: list[Call]
) -> tuple[list[Tensor], WeightRecord | None]:
    with ExitStack() as stack, torch.no_grad():
        entered = [stack.enter_context(feature.around(ensemble)) for feature in features]
        predictions = [ensemble(**call.arguments, return_dict=False)[0] for call in calls]
    return predictions, next((e for e in entered if e is not None), None)


@cache
def _with_lora(family: str, name: str) -> Template:
    """An ensemble with a LoRA switched on; to load it takes as long as to draw a picture."""
    world = World(family)
    feature_of(name).switch_on(world.ensemble, world)
    return Template(world.ensemble)


@cache
def _meaning_of_lora(family: str, name: str) -> Template:
    """What a LoRA alone means, loaded into every expert by the library."""
    world = World(family)
    meaning = world.meaning()
    feature_of(name).means(meaning, world)
    return Template(meaning)


@cache
def expected_pictures(
    family: str, names: tuple[str, ...], number: int, seed: int
) -> list[Expected]:
    """What features that are switched on in this order mean for the pictures of a program.

    Args:
        family: of the experts.
        names: of the features.
        number: of the program's picture.
        seed: of its prompt.
    """
    features, world = [feature_of(name) for name in names], World(family)
    waiting = list(features)
    of_weights = [feature for feature in features if feature.is_of_weights]
    if of_weights and of_weights[0].is_lora and not any(f.is_prepared for f in features):
        waiting.remove(of_weights[0])
        meaning = _meaning_of_lora(family, of_weights[0].name).copy()
    else:
        for feature in dict.fromkeys(features):
            feature.prepare(world)
        meaning = world.meaning()
    for feature in waiting:
        feature.means(meaning, world)
    if meaning.lora_scale is not None:
        for expert in meaning.experts:
            scale_lora_layers(expert, meaning.lora_scale)
    return expected_of(meaning, _program(world, features, number, world.prompt(seed)))


def _compared(
    names: tuple[str, str],
    expected: list[Expected],
    predictions: list[Tensor],
    record: WeightRecord | None,
) -> Kind:
    pairs = [(p, e.prediction) for p, e in zip(predictions, expected, strict=True)]
    if record is not None:
        if len(record.steps) != len(expected):
            raise Wrong(f"{names}: {len(record.steps)} steps recorded, {len(expected)} drawn")
        for step, each in zip(record.steps, expected, strict=True):
            pairs += [(step.weights[site], weights) for site, weights in each.weights.items()]
    differ = [(a, b) for a, b in pairs if not torch.equal(a, b)]
    for came, right in differ:
        near = TOLERANCE[predictions[0].dtype]
        if came.shape != right.shape or not torch.allclose(came, right, rtol=near, atol=near):
            error = (came - right).abs().max() if came.shape == right.shape else "another shape"
            raise Wrong(f"{names}: off by {error}")
    return "close" if differ else "equal"


def names_who_is_not_finite(family: str, name: str) -> bool:
    """Whether a non-finite expert stops the drawing of all pictures, by name, beside a feature.

    A feature that leaves this expert out where it is not finite is no exception: it gives finite
    values elsewhere, or is not masked.
    """
    return "'1' computed NaN" in what_stops(family, feature_of(name), World.spoil)


def what_stops(family: str, feature: Feature, spoil: Callable[[World], None]) -> str:
    """What is said where drawing beside a feature is stopped by a non-finite expert.

    Args:
        family: of the experts.
        feature: switched on, but its masking.
        spoil: makes the expert non-finite.

    Returns: nothing where drawing came to its end.
    """
    world = World(family)
    spoil(world)
    feature.switch_on(world.ensemble, world)
    world.ensemble.on_nonfinite = "stop"
    try:
        _drawn(world.ensemble, [feature], _program(world, [feature], 0, world.prompt(0)))
    except AfaError as error:
        return str(error)
    return ""


def as_json(outcomes: dict[str, Outcome]) -> str:
    """For a process that tries a row of pairs on behalf of another."""
    return json.dumps({name: [outcome.kind, outcome.message] for name, outcome in outcomes.items()})
